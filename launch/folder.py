"""The folder that a run writes to: that it can be written, which experiment it holds, and that one run writes to it."""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator

import filelock
import jax
import msgspec
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxsafe.configs.fields import Fields
from jaxsafe.io.atomic import write_text
from jaxsafe.records.run import Json, plain, read_run, to_json

from . import command

EXPERIMENT, LOCK = "experiment.json", ".lock"
WRITTEN = (
    "store",
    "checkpoints",
    "export",
    "adapters",
    "tables",
    "figures",
    "run.json",
    "samples.jsonl",
    "report.html",
    "vectors.safetensors",
    "refusal.control.gguf",
    "mask.safetensors",
    EXPERIMENT,
)
"""Everything that runs write to their folder."""
ROOM = 100_000_000
"""Bytes that must be free at the start."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which experiment a folder holds: the task, and the settings that tell it from others."""

    task: str
    config: dict[str, Json]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What experiment.json holds: the experiment, and which process wrote to the folder last."""

    identity: Identity
    host: str
    pid: int
    since: str


def identity(task: str, fields: Fields, config: ConfigDict, **more: Json) -> Identity:
    """The identity of an experiment; `more` are settings that are none of the config."""
    return Identity(task, plain({name: config[name] for name, field in fields.items() if field.identifies} | more))


@contextlib.contextmanager
def held(out: str | os.PathLike, mine: Identity, results: int = 0) -> Iterator[pathlib.Path]:
    """The folder that this process writes to, `out` for process 0, which no other run may write to meanwhile.

    A run that goes on says how many of its `results` (0: of how many is not known) are finished.

    The other processes, who take the same steps, work in a copy that is thrown away; all must see `out` when they
    begin, and write their parts of checkpoints to it. Raises ValueError for a folder that cannot be written, has no
    room, holds something else or another experiment (unless --overwrite), or is written to by another run.
    """
    path, many = pathlib.Path(out), jax.process_count() > 1
    if jax.process_index() > 0:
        with _copy(path) as own:
            yield own
            multihost_utils.sync_global_devices("finished")
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_taken(path, mine, results))
        except BaseException:
            if many:
                multihost_utils.broadcast_one_to_all(np.int32(0))
            raise
        if many:
            multihost_utils.broadcast_one_to_all(np.int32(1))
            multihost_utils.sync_global_devices("results")  # what is written from now on is in no copy
        yield path
        if many:
            multihost_utils.sync_global_devices("finished")


@contextlib.contextmanager
def _copy(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A copy of `path` for a process that is not the first. Raises ValueError where the first could not take it."""
    if not multihost_utils.broadcast_one_to_all(np.int32(0)):
        raise ValueError(f"process 0 could not take --out={path}; it says why")
    with tempfile.TemporaryDirectory() as scratch:
        own = pathlib.Path(scratch) / "out"
        if path.is_dir():
            shutil.copytree(path, own, ignore=shutil.ignore_patterns("checkpoints", LOCK))
        multihost_utils.sync_global_devices("results")
        yield own


@contextlib.contextmanager
def _taken(path: pathlib.Path, mine: Identity, results: int) -> Iterator[None]:
    """Holds `path` for one experiment. Where nothing is finished inside, what was not there before is taken away."""
    new, claimed = _made(path), (path / LOCK).exists()
    lock = filelock.FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--out={path} is written to by {_holder(path)}; give another folder, or wait") from None
    except NotImplementedError:
        command.console.print(f"{path} is on a file system without locks: start one run at a time", soft_wrap=True)
    try:
        _claim(path, mine, results)
        claimed = True
        yield
    finally:
        finished = any((path / name).exists() for name in WRITTEN if name != EXPERIMENT)
        if claimed and not finished:
            (path / EXPERIMENT).unlink(missing_ok=True)
        if not (claimed and finished):
            (path / LOCK).unlink(missing_ok=True)
        lock.release()
        if new and not any(path.iterdir()):
            path.rmdir()


def _made(path: pathlib.Path) -> bool:
    """Makes the folder and says whether it is new. Raises ValueError where it cannot be written, or has no room."""
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out={path} is a file; give a folder")
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise ValueError(f"--out={path} cannot be written ({error.strerror}); give another folder") from None
    if free < ROOM:
        if new:
            path.rmdir()
        raise ValueError(f"--out={path} has {free / 1e6:.0f} MB of disk left; a run needs {ROOM / 1e6:.0f} MB or more")
    return new


def _claim(path: pathlib.Path, mine: Identity, results: int) -> None:
    """Writes whose folder it is. Raises ValueError where it holds something else."""
    inside = [entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name != "lost+found"]
    other, found = read(path), [name for name in inside if name in WRITTEN and name != EXPERIMENT]
    if inside and other is None and not _is_run(path):
        raise ValueError(f"--out={path} holds {sorted(inside)[0]!r}, which is of no jaxsafe run; give another folder")
    if OVERWRITE.value:
        _clear(path)
    elif found and other is None:
        raise ValueError(f"--out={path} holds a run that does not say its settings; give another folder or --overwrite")
    elif found and other is not None:
        if differs := differences(other.identity, mine):
            raise ValueError(f"--out={path} holds another experiment ({differs}); give another folder or --overwrite")
        command.console.print(f"goes on in {path}: {pieces(path, results)}", soft_wrap=True)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_text(path / EXPERIMENT, to_json(Kept(mine, socket.gethostname(), os.getpid(), since), indent=1) + "\n")


def _is_run(path: pathlib.Path) -> bool:
    try:
        return bool(read_run(path).task)
    except (ValueError, FileNotFoundError):
        return False


def _clear(path: pathlib.Path) -> None:
    """Takes away what runs write, and nothing else."""
    for name in WRITTEN:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def read(path: pathlib.Path) -> Kept | None:
    """What the experiment.json of a folder holds; None where there is none that can be read."""
    try:
        return msgspec.json.decode((path / EXPERIMENT).read_bytes(), type=Kept)
    except (OSError, msgspec.DecodeError):
        return None


def _holder(path: pathlib.Path) -> str:
    kept = read(path)
    return "another run" if kept is None else f"process {kept.pid} on {kept.host} since {kept.since}"


def differences(old: Identity, new: Identity) -> str:
    """In which settings two experiments differ, as "config.alpha 1.0 -> 2.0"; empty where they are the same.

    What the old one does not name was off there, such as a field that is newer.
    """
    if old.task != new.task:
        return f"{_named(old)}, not {_named(new)}"
    named = {name: value for name, value in new.config.items() if value or name in old.config}
    names = [name for name in {**old.config, **named} if _value(old, name) != _value(new, name)]
    said = [f"config.{name} {_value(old, name)} -> {_value(new, name)}" for name in names]
    more = f" and {len(said) - 4} more" if len(said) > 4 else ""
    return ", ".join(said[:4]) + more


def _named(kept: Identity) -> str:
    return f"{kept.task} of {kept.config.get('model')}"


def _value(kept: Identity, name: str) -> str:
    return _short(to_json(kept.config[name])) if name in kept.config else "nothing"


def _short(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def pieces(path: pathlib.Path, results: int = 0) -> str:
    """What is finished in the store of a folder: "1 directions, 2 of 30 results, 12 answers of an unfinished exam"."""
    files = [file for file in (path / "store").glob("*-*") if not file.name.startswith(".")]
    kinds = Counter(file.name.rpartition("-")[0] for file in files if file.suffix != ".jsonl")
    names = {"result": f"of {results} results" if results else "results" if kinds["result"] > 1 else "result"}
    found = [f"{n} {names.get(kind, kind)}" for kind, n in sorted(kinds.items())]
    answers = sum(file.read_bytes().count(b"\n") for file in files if file.suffix == ".jsonl")
    found += [f"{answers} answers of an unfinished exam"] if answers else []
    return f"{', '.join(found)} are finished and kept" if found else "nothing is finished yet"


OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what a run of another experiment left in --out")
