"""The header of a GGUF file, walked through before a library reads it: libraries loop and allocate as it says.

Every count and length is bounded by what is left of the file, so that the walk takes at most a step for each of its
bytes, and what passes can be read. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stillknows.model.packed import library

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
FLOATS = (6, 12)
STRING, ARRAY = 8, 9
LEAST_FIELD = 8 + 4 + 1  # bytes of a name's length, a type and a value
LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of a name's length, a number of dimensions, a type and an offset
MOST_DIMENSIONS = 4
MOST_ELEMENTS = 2**22  # of all arrays together; the largest vocabularies with their merges have a third of that
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
LAYERS = ".block_count"


class Damaged(ValueError):
    """A header that does not fit its file."""


class _Cursor:
    """Reads a file from its beginning; what would go beyond its end is Damaged."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order, self.elements = data, 0, "little", 0

    def taken(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise Damaged("it ends within its header")
        return self.data[start : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.taken(size), self.order)  # type: ignore[arg-type]

    def count(self, what: str, least: int) -> int:
        """Read how many of something follow; each takes at least so many bytes."""
        found = self.number(8)
        if found * least > len(self.data) - self.at:
            raise Damaged(f"it speaks of {found:,} {what}, more than fit into it")
        return found

    def text(self, what: str) -> str:
        content = self.taken(self.count(f"bytes of {what}", 1))
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise Damaged(f"{what} is not UTF-8: {error.reason}") from None


class _Tensor(NamedTuple):
    name: str
    size: int
    offset: int


def check(path: Path) -> None:
    """Raise Damaged for a header that does not fit its file: counts, lengths, sizes and places of tensors, texts."""
    if path.stat().st_size < LEAST_TENSOR:
        raise Damaged("it ends within its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        tensors, fields = _counts(cursor)
        values = _fields(cursor, fields)
        found = [_tensor(cursor) for _ in range(tensors)]
        alignment = values.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise Damaged(f"{ALIGNMENT} is {alignment!r}")
        _require_room(found, -(-cursor.at // alignment) * alignment, len(data))
    for name, value in values.items() if tensors else ():  # one without tensors describes a model and is none
        if name.endswith(LAYERS) and (not isinstance(value, int) or not 0 <= value <= tensors):
            raise Damaged(f"{name} is {value!r}, and it holds {tensors:,} tensors")


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Read the beginning; return how many tensors and fields there are."""
    if cursor.taken(4) != MAGIC:
        raise Damaged("it does not begin with GGUF")
    version = cursor.number(4)
    if version & 0xFFFF == 0:  # written on a machine that puts the highest byte first
        cursor.order, version = "big", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS:
        raise Damaged(f"it is of version {version}; read are {VERSIONS[0]} and {VERSIONS[1]}")
    return cursor.count("tensors", LEAST_TENSOR), cursor.count("fields", LEAST_FIELD)


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    """Walk through the fields; return whole numbers and texts by name, None for other values."""
    values: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text("a field's name")
        if name in values:
            raise Damaged(f"it holds {name!r} twice")
        values[name] = _value(cursor, name)
    return values


def _value(cursor: _Cursor, name: str) -> Any:
    kind = cursor.number(4)
    if kind in SCALARS:
        value = cursor.number(SCALARS[kind])
        return None if kind in FLOATS else value
    if kind == STRING:
        return cursor.text(name)
    if kind != ARRAY:
        raise Damaged(f"{name} is of the unknown type {kind}")
    item = cursor.number(4)
    size = 8 if item == STRING else SCALARS.get(item)
    if size is None:
        raise Damaged(f"{name} is a list of the type {item}, which no reader knows")
    count = cursor.count(f"values of {name}", size)
    cursor.elements += count
    if cursor.elements > MOST_ELEMENTS:
        raise Damaged(f"its lists hold more than {MOST_ELEMENTS:,} values")
    if item != STRING:
        cursor.taken(count * size)
    for _ in range(count if item == STRING else 0):
        length = cursor.count(f"bytes of a value of {name}", 1)
        cursor.at += length
    return None


def _tensor(cursor: _Cursor) -> _Tensor:
    name = cursor.text("a tensor's name")
    dimensions = cursor.number(4)
    if dimensions > MOST_DIMENSIONS:
        raise Damaged(f"{name} has {dimensions:,} dimensions")
    elements = math.prod(cursor.number(8) for _ in range(dimensions))
    number, offset = cursor.number(4), cursor.number(8)
    block, size = _sizes().get(number, (0, 0))
    if not block:
        raise Damaged(f"{name} is of the unknown type {number}")
    return _Tensor(name, elements * size // block, offset)


def _sizes() -> Mapping[int, tuple[int, int]]:
    """Return the weights of a block and its bytes, by the number of a tensor's type."""
    return {int(kind): sizes for kind, sizes in library("gguf.constants").GGML_QUANT_SIZES.items()}


def _require_room(tensors: list[_Tensor], start: int, end: int) -> None:
    """Raise Damaged for tensors that lie beyond the file's end, or over one another."""
    for tensor in tensors:
        if start + tensor.offset + tensor.size > end:
            raise Damaged(f"{tensor.name} of {tensor.size:,} bytes lies beyond its end")
    if sum(tensor.size for tensor in tensors) > max(0, end - start):
        raise Damaged("its tensors lie over one another")
