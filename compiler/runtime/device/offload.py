"""Values that a training step's forward half leaves in host memory for its backward half."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .program import Call, Origin, Program, Ref, Storage

__all__ = ["fetched", "sent"]


def sent(program: Program, positions: Collection[int]) -> Program:
    """``program`` returning its outputs at ``positions`` in host memory.

    What only such an output needs is stored from where it was made. What a call has allocated for itself, and what
    another output needs on the device, is copied first.
    """
    storages, views = dict(program.storages), dict(program.views)
    calls, outputs = list(program.calls), list(program.outputs)
    stays = {program.storage_of(o).name for p, o in enumerate(outputs) if isinstance(o, Ref) and p not in positions}
    for position in sorted(positions):
        ref = outputs[position]
        assert isinstance(ref, Ref)  # numbers are saved as they are
        view = views[ref.name]
        storage = storages[view.storage]
        if storage.origin is Origin.OUTPUT and storage.name not in stays:
            storages[storage.name] = replace(storage, origin=Origin.RETURNED)
        elif storage.origin is not Origin.RETURNED:
            name = f"{ref.name}_sent"
            storages[name] = Storage(name, storage.nbytes, storage.dtype, storage.device, Origin.RETURNED)
            base = views[storage.name]
            views[name] = replace(base, name=name, storage=name)
            target = "aten.copy_.default"
            copied = Call(
                f"{len(calls)}_{target}", target, (Ref(name), Ref(storage.name)), {}, (storage.name,), (name,)
            )
            calls.append(copied)
            views[f"{name}_view"] = replace(view, name=f"{name}_view", storage=name)
            outputs[position] = Ref(f"{name}_view")
    return replace(program, storages=storages, views=views, calls=tuple(calls), outputs=tuple(outputs))


def fetched(program: Program, inputs: Collection[str]) -> Program:
    """``program`` with the inputs of these names in host memory."""
    storages = {n: replace(s, origin=Origin.HOST) if n in inputs else s for n, s in program.storages.items()}
    return replace(program, storages=storages)
