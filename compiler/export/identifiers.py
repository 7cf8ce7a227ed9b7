"""Any name as C can hold it: an identifier, a string literal, the text of a comment."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["comment_text", "identifiers", "string_literal"]

LONGEST_IDENTIFIER = 36  # C99 promises to tell macros apart by 63 characters: this, a prefix, a kind and a number
LONGEST_STRING = 1000  # bytes; C99 promises 4095 characters, and an escaped byte is written as up to four


def identifiers(names: Iterable[str]) -> list[str]:
    """An identifier for each of ``names``, all different: letters, digits and ``_``, to be used behind a prefix.

    Every run of other characters becomes one ``_``; of what is longer than 36 characters the end stays, which tells
    more in names that are paths. A name that would repeat an earlier identifier gets the first number appended that is
    free, from 2 on. Names that need no change keep theirs, whatever comes before them.
    """
    listed = list(names)
    wanted = [re.sub(r"[^A-Za-z0-9]+", "_", name)[-LONGEST_IDENTIFIER:] or "_" for name in listed]
    plain = {word for word, name in zip(wanted, listed, strict=True) if word == name}
    taken: set[str] = set()
    last: dict[str, int] = {}  # the highest number given to each word
    result = []
    for word, name in zip(wanted, listed, strict=True):
        chosen = word
        while chosen in taken or (chosen in plain and chosen != name):
            last[word] = last.get(word, 1) + 1
            chosen = f"{word}_{last[word]}"
        taken.add(chosen)
        result.append(chosen)
    return result


def string_literal(text: str) -> str:
    """``text`` as a C string literal of its UTF-8 bytes, cut to 1,000 of them.

    A question mark is escaped because two of them begin a trigraph; octal escapes end after three digits, so that no
    character behind one can join it, as it would a hexadecimal one.
    """
    data = text.encode("utf-8", errors="backslashreplace")[:LONGEST_STRING]
    return '"' + "".join(_escaped(byte) for byte in data) + '"'


def _escaped(byte: int) -> str:
    character = chr(byte)
    if character in '"\\?':
        return "\\" + character
    return character if 0x20 <= byte < 0x7F else f"\\{byte:03o}"


def comment_text(text: str) -> str:
    """``text`` as it can stand in a comment without ending it: whatever is not plain becomes ``_``; 80 characters."""
    return re.sub(r"[^A-Za-z0-9_.,:;=+()<>\[\] -]", "_", text)[:80]
