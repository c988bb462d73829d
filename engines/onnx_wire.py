"""The size of an ONNX file's structure, found in its bytes before protobuf builds objects of it.

Two bytes can stand for an empty node, and an object takes a hundred: a small file can fill the memory. So fields are counted
first. The format is protobuf's: a tag (field number and wire type), then a varint, 4 or 8 bytes, or a length and so many bytes.
"""

from functools import cache
from typing import Any

import onnx

MOST_FIELDS = 500_000
"""Large transformers have 200,000."""
DEEPEST = 60
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_structure(content: bytes) -> None:
    """Raise ValueError unless these are the bytes of an ``onnx.ModelProto`` of bearable size."""
    counted = 0
    pending = [(onnx.ModelProto.DESCRIPTOR, 0, len(content), 0)]
    while pending:
        kind, at, end, depth = pending.pop()
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        messages, strings = _messages_of(kind), _strings_of(kind)
        while at < end:
            counted += 1
            if counted > MOST_FIELDS:
                raise ValueError(f"it has more than {MOST_FIELDS:,} fields: no classifier has so many")
            tag, at = _varint(content, at, end)
            start, at = _skipped(content, at, end, tag & 7)
            inner = messages.get(tag >> 3)
            if inner is not None and tag & 7 == _BYTES:
                pending.append((inner, start, at, depth + 1))
            elif tag >> 3 in strings and not _is_text(content[start:at]):
                raise ValueError("a name in it is not text")


@cache
def _messages_of(kind: Any) -> dict[int, Any]:
    """Field number to message type, of those fields that hold messages."""
    return {field.number: field.message_type for field in kind.fields if field.message_type is not None}


@cache
def _strings_of(kind: Any) -> frozenset[int]:
    """Numbers of the fields that hold text, which protobuf's newer readers do not check."""
    return frozenset(field.number for field in kind.fields if field.type == field.TYPE_STRING)


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _skipped(content: bytes, at: int, end: int, wire_type: int) -> tuple[int, int]:
    """(where the value begins, where it ends)."""
    if wire_type == _VARINT:
        return at, _varint(content, at, end)[1]
    if wire_type == _BYTES:
        length, at = _varint(content, at, end)
        after = at + length
    elif wire_type in (_FIXED64, _FIXED32):
        after = at + (8 if wire_type == _FIXED64 else 4)
    else:
        raise ValueError("its bytes cannot be parsed")
    if after > end:
        raise ValueError("it is cut off, or its bytes cannot be parsed")
    return at, after


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("it is cut off, or its bytes cannot be parsed")
