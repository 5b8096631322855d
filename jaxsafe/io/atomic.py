"""Files and folders that appear whole under their final name, or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; on leaving without an error it is renamed to `path`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, ours: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`; on leaving without an error it takes the place of `path`.

    An existing `path` is replaced only when every name in it is one of `ours`; otherwise FileExistsError, for
    nobody's files may be lost.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give a folder")
    foreign = sorted(entry.name for entry in path.iterdir() if not ours(entry.name)) if path.exists() else []
    if foreign:
        raise FileExistsError(f"{path} exists and holds {foreign[0]!r}, which is not of an export; give another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):  # safetensors lets only the owner read what it writes
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` in UTF-8 to `path`, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
