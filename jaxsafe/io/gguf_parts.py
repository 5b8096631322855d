"""The GGUF files of a model, opened: one, or the parts of one that was split."""

import dataclasses
import mmap
import os
import pathlib
import re
import struct
from typing import Any

from jaxsafe.reading import reading

MAGIC = b"GGUF"
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
DAMAGED = "is cut off, damaged or of an unknown GGUF version"
ITEM_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type number; 8 is text, 9 an array."""
TEXT, ARRAY = 8, 9
MOST = 2**22
"""Entries of a header, or of one of its arrays: more than any vocabulary and its merges have."""


def open_parts(path: str | os.PathLike) -> list[Any]:
    """A `gguf.GGUFReader` of each part of the model at `path`, the first part first.

    Of a model that was split, `path` is any part; the others lie beside it. Raises FileNotFoundError for a part that is
    not there, and ValueError for what is no GGUF file or is damaged.
    """
    path = pathlib.Path(path)
    reader = _open(path)
    count = reader.fields.get("split.count")
    with reading(path, DAMAGED):
        parts = int(count.contents()) if count else 1
    if parts == 1:
        return [reader]
    name = PART.fullmatch(path.name)
    if not name or int(name["count"]) != parts:
        raise ValueError(
            f"{path} is one part of a model in {parts} files; it must be called NAME-00001-of-{parts:05d}.gguf"
        )
    files = [path.with_name(f"{name['stem']}-{i:05d}-of-{name['count']}.gguf") for i in range(1, parts + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path} is part {int(name['number'])} of a model in {parts} files; {missing[0]!r} is not beside it"
        )
    return [reader if file == path else _open(file) for file in files]


def _open(path: pathlib.Path) -> Any:
    from gguf import GGUFReader

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with reading(path), path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
    with reading(path, DAMAGED):
        _check_header(path)
        reader = GGUFReader(path)
    if reader.byte_order == "S":
        raise ValueError(f"{path} is written in the other byte order; convert it with gguf-convert-endian")
    return reader


def _check_header(path: pathlib.Path) -> None:
    """Raises ValueError where the header counts more than the file holds, before anything is made of that size."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        swapped = struct.unpack_from("<I", data, len(MAGIC))[0] >= 2**16  # version numbers are small
        header = _Header(data, ">" if swapped else "<", 2 * len(MAGIC))
        tensors, fields = header.count(), header.count()
        for _ in range(fields):
            header.skip(header.take("Q"))
            header.skip_value(header.take("I"))
        for _ in range(tensors):
            header.skip(header.take("Q"))
            header.skip(8 * header.take("I") + 12)  # the sizes of the axes, the type and the place


@dataclasses.dataclass
class _Header:
    """A place in the header of a file, of a byte order."""

    data: mmap.mmap
    order: str
    place: int

    def take(self, kind: str) -> int:
        self.skip(size := struct.calcsize(self.order + kind))
        return struct.unpack_from(self.order + kind, self.data, self.place - size)[0]

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.place:
            raise ValueError(f"{size} bytes are announced at {self.place}, but the file ends at {len(self.data)}")
        self.place += size

    def count(self) -> int:
        if (count := self.take("Q")) > MOST:
            raise ValueError(f"{count} entries are announced at {self.place}; at most {MOST} are read")
        return count

    def skip_value(self, kind: int) -> None:
        if kind == TEXT:
            self.skip(self.take("Q"))
        elif kind in ITEM_BYTES:
            self.skip(ITEM_BYTES[kind])
        elif kind != ARRAY:
            raise ValueError(f"a value at {self.place} is of type {kind}, which GGUF does not have")
        elif (inner := self.take("I")) in ITEM_BYTES:
            self.skip(self.count() * ITEM_BYTES[inner])
        else:
            for _ in range(self.count()):
                self.skip_value(inner)
