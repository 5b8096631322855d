"""What a run has finished, by what it follows from: nothing stored is made again, and nothing is stored by halves."""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsafe.digest import digest
from jaxsafe.io.atomic import new_file, write_text
from jaxsafe.model.weights import flatten, nest
from jaxsafe.parallel import fetch
from jaxsafe.progress import Progress, silent
from jaxsafe.reading import reading

Json = Any


class Codec(Protocol):
    """How a kind of value lies in a file; `suffix` is that of its name."""

    suffix: str

    def write(self, path: pathlib.Path, value: Any) -> None:
        """Writes `value` to `path`, whole or not at all."""

    def read(self, path: pathlib.Path) -> Any:
        """The value in `path`. Raises ValueError where it holds none."""


class _Json:
    """Values of JSON."""

    suffix = ".json"

    def write(self, path: pathlib.Path, value: Json) -> None:
        write_text(path, json.dumps(value))

    def read(self, path: pathlib.Path) -> Json:
        with reading(path, "is not JSON; remove it to make it anew"):
            return json.loads(path.read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Trees of arrays by path, as safetensors; read onto the default device, or `on_host` as numpy arrays."""

    on_host: bool = False
    suffix = ".safetensors"

    def write(self, path: pathlib.Path, value: Any) -> None:
        # safetensors stores the buffer of a transposed array as if it were contiguous.
        arrays = {name: np.asarray(array, order="C") for name, array in flatten(fetch(value)).items()}
        with new_file(path) as temporary:
            save_file(arrays, temporary)

    def read(self, path: pathlib.Path) -> Any:
        # What lies on one process's devices could not be given to a program of several.
        framework = "numpy" if self.on_host or jax.process_count() > 1 else "flax"
        with (
            reading(path, "is not a whole safetensors file; remove it to make it anew"),
            safe_open(path, framework=framework) as file,
        ):
            return nest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


JSON, TREE = _Json(), _Tree()
HOST_TREE = _Tree(on_host=True)
"""Reads what is to be split over devices, none of which could hold it whole."""


def _sealed(value: Json) -> str:
    """`value` as JSON on one line, with a checksum in front: damage may leave JSON behind that says something else."""
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def _opened(line: str) -> Json:
    """The value of a `_sealed` line. Raises ValueError for a line that is not as it was written."""
    checksum, _, text = line.strip("\n").partition(" ")
    if checksum != f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}":
        raise ValueError("its checksum is another")
    return json.loads(text)


@dataclasses.dataclass(frozen=True)
class Store:
    """The finished pieces in `folder`: each has a `name` for people and is told apart by what it `follows` from.

    `follows` is in values of JSON and names everything that the piece depends on. Pieces of other experiments may lie
    beside those of this one.
    """

    folder: str | os.PathLike

    def path(self, name: str, follows: Json, suffix: str) -> pathlib.Path:
        """Where the piece lies, or would."""
        return pathlib.Path(self.folder) / f"{name}-{digest(follows)[:16]}{suffix}"

    def has(self, name: str, follows: Json, codec: Codec = JSON) -> bool:
        """Whether the piece is finished."""
        return self.path(name, follows, codec.suffix).is_file()

    def read(self, name: str, follows: Json, codec: Codec = JSON) -> Any:
        """A finished piece. Raises FileNotFoundError where it is not, ValueError where its file is torn."""
        return codec.read(self.path(name, follows, codec.suffix))

    def write(self, name: str, follows: Json, value: Any, codec: Codec = JSON) -> None:
        """Keeps a finished piece."""
        codec.write(self.path(name, follows, codec.suffix), value)

    def drop(self, name: str, follows: Json, suffix: str = ".json") -> None:
        """Takes a piece away that is of no more use."""
        self.path(name, follows, suffix).unlink(missing_ok=True)

    def once(self, name: str, follows: Json, make: Callable[[], Any], codec: Codec = JSON) -> Any:
        """The piece, made now unless it is finished; what is returned is always what the file holds."""
        if not self.has(name, follows, codec):
            self.write(name, follows, make(), codec)
        return self.read(name, follows, codec)

    def log(self, name: str, follows: Json) -> "Log":
        """The log of a piece in hand, from which an interrupted run goes on."""
        return Log(self.path(name, follows, ".jsonl"))


@dataclasses.dataclass(frozen=True)
class Log:
    """Finished parts of a piece, a checksum and one JSON value a line, in `path`."""

    path: pathlib.Path

    def entries(self) -> list[Json]:
        """The whole entries (none where the file is absent); a last line cut short is taken away.

        Raises ValueError for another line that is not as it was written.
        """
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        with reading(self.path, "is damaged; remove it to make it anew"):
            found = [_opened(line) for line in whole.decode().split("\n")[:-1]]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return found

    def add(self, *entries: Json) -> None:
        """Appends `entries`, which are on the disk when it returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_sealed(entry) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())


Batches = Iterable[tuple[Sequence[int], Sequence[Json]]]
"""(indices, values) of each batch as it is finished."""


class Entries(Protocol):
    """Finished parts of a piece: a `Log`, or the share of one."""

    def entries(self) -> list[Json]:
        """The entries that are there."""

    def add(self, *entries: Json) -> None:
        """Keeps further ones."""


def by_batch(
    n: int, make: Callable[[list[int]], Batches], log: Entries | None = None, done: Progress = silent
) -> list[Json]:
    """The values of 0 to n - 1, in values of JSON, made batch by batch by `make(indices)`.

    What `log` holds is not made again, and every finished batch is added to it. `done` is called with numbers of
    finished values, first with that of those in the log.
    """
    found: dict[int, Json] = dict([] if log is None else log.entries())
    done(len(found))
    left = [i for i in range(n) if i not in found]
    for indices, values in make(left) if left else ():
        batch = dict(zip(map(int, indices), values, strict=True))
        if log is not None:
            log.add(*batch.items())
        found |= batch
        done(len(batch))
    return [found[i] for i in range(n)]
