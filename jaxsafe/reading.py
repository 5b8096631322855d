"""Files that others wrote, and libraries that read them: what goes wrong becomes one line that names the file."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

LFS_POINTER = b"version https://git-lfs"
LONGEST = 300
"""Characters of a library's own words that a line repeats."""


@contextlib.contextmanager
def reading(path: str | os.PathLike, fault: str = "cannot be read") -> Iterator[None]:
    """Whatever a library raises inside becomes a ValueError of one line: `path`, the `fault` and the library's words.

    Errors of the file system, which name the file, stay as they are, and so does a lack of memory. Raises ValueError.
    """
    try:
        yield
    except BaseException as error:
        # Libraries written in Rust panic with something that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if pointer := lfs_pointer(path):
            raise ValueError(f"{pointer} is a pointer of git-lfs, not the file itself; run 'git lfs pull'") from error
        # A kind of lack that a library has of its own is of a size that the file claims.
        if type(error) is MemoryError or (isinstance(error, OSError) and (error.filename or str(path) in str(error))):
            raise
        line = one_line(error)
        raise ValueError(line if str(path) in line else f"{path} {fault}: {line}") from error


def one_line(error: BaseException) -> str:
    """What `error` says, on one line; its kind too where it is one whose words say little without."""
    line = " ".join(str(error).split())[:LONGEST] or type(error).__name__
    vague = isinstance(error, LookupError | TypeError | AttributeError | RecursionError)
    return f"{type(error).__name__}: {line}" if vague else line


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises OSError where there is none, and ValueError for anything else."""
    with reading(path, "is not JSON"):
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}; an object {{...}} is expected")
    return content


def lfs_pointer(path: str | os.PathLike) -> pathlib.Path | None:
    """The first file at `path` (itself, or of the folder) that is a pointer of git-lfs in place of a file."""
    path = pathlib.Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return next((file for file in files if file.is_file() and _start(file) == LFS_POINTER), None)


def _start(file: pathlib.Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER))
