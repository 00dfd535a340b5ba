"""Values of files, and names that others chose, as text for people: in a line, and without what a terminal obeys."""

from __future__ import annotations

import codecs

__all__ = ["brief", "decoded_text", "printable"]

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


# UTF-32 first: its mark begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decoded_text(content: bytes) -> str:
    """The text of a file in UTF-8, with or without byte order mark, or in UTF-16 or UTF-32 with one.

    Raises:
        ValueError: it is in none of them.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 (byte {error.start})") from error


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with its control characters as escapes: they move the cursor, colour, or turn the order of letters.

    ``lines``: the ends of lines, which a name cannot have, stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)
