"""Walks the protobuf wire format, so that ONNX files can be looked into without the onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

__all__ = ["ByteSource", "length_delimited_fields"]


class ByteSource(Protocol):
    """Bytes or a memory map."""

    def __getitem__(self, index: int) -> int: ...


def length_delimited_fields(data: ByteSource, *, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each length-delimited field of the message in ``data[start:end]``.

    Raises:
        ValueError: when the bytes are not a protobuf message.
        IndexError: when they end too early.
    """
    position = start
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 2:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("truncated field")
            yield number, position, position + length
            position += length
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if position != end:
        raise ValueError("truncated message")


def _varint(data: ByteSource, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
