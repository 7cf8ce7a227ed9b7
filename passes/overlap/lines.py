"""Why a collective was left as it was, in words."""

from __future__ import annotations

from collections.abc import Mapping

from ...compiler.overlap import exposed_seconds
from ...compiler.plan import Plan
from .choice import Choice

__all__ = ["reasons_of"]

LEFT = 0.9  # of what was exposed before: what still is is then left as it was


def reasons_of(choice: Choice, before: Plan, after: Plan) -> Mapping[str, str]:
    """By collective of the program as given, why it is as exposed as it was; none for those that are not."""
    was, now = exposed_seconds(before), exposed_seconds(after)
    origin = choice.alternative.origin
    joined = dict(reversed(choice.alternative.joined))
    parts: dict[str, list[str]] = {}
    for name in now:
        parts.setdefault(origin.get(name, name), []).append(name)
    reasons: dict[str, str] = {}
    for name, seconds in was.items():
        own = parts.get(name, [])
        if choice.reason:
            reasons[name] = choice.reason
        elif seconds <= 0 or sum(now[part] for part in own) < LEFT * seconds:
            continue
        elif name in joined:
            reasons[name] = f"joined at {joined[name]}"
        elif choice.alternative.sizes and len(own) == 1:
            reasons[name] = "it is not divided, and no other work is ready while it is in flight"
        else:
            reasons[name] = "its result is read at once, and no other work is ready"
    return reasons
