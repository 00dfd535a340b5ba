"""Values of files, and names that others chose, as text for people: in a line, and without what a terminal obeys."""

from __future__ import annotations

__all__ = ["brief", "printable"]

_BRIEF = 80  # characters, and bits of an integer


def brief(value: object) -> str:
    """A value of a file as an error shows it, in a line; lists and objects by their type alone.

    Text for a nested or shared list, or for an integer of a million digits, would take minutes and gigabytes.
    """
    if isinstance(value, str):
        return repr(value if len(value) <= _BRIEF else value[:_BRIEF] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _BRIEF:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with its control characters as escapes: they move the cursor, colour, or turn the order of letters.

    ``lines``: the ends of lines, which a name cannot have, stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)
