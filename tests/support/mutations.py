"""Files as accidents leave them: seeded changes to bytes and to values of JSON."""

import copy
import json
import pathlib
import random
from collections.abc import Callable, Container, Iterable
from typing import Any

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    3,
    2**40,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    [],
    [None],
    {},
    {"x": 1},
)


def bytes_mutated(data: bytes, seed: int) -> bytes:
    """`data` with one to four changes: bits flipped, bytes overwritten, cut out, put in, repeated, or the end lost."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # Headers say the most in the fewest bytes: half of the changes fall on the first 512.
        at = rng.randrange(min(len(out), rng.choice((512, len(out)))) or 1) if out else 0
        length = rng.choice((1, 1, 4, 8, 64))
        kind = rng.choice(("flip", "overwrite", "cut", "insert", "repeat", "end"))
        if kind == "flip" and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == "overwrite":
            out[at : at + length] = _filling(rng, length)
        elif kind == "cut":
            del out[at : at + length]
        elif kind == "insert":
            out[at:at] = _filling(rng, length)
        elif kind == "repeat":
            out[at:at] = out[at : at + length]
        elif kind == "end":
            del out[at:]
    return bytes(out)


def json_mutated(obj: Any, seed: int) -> Any:
    """A copy of `obj` in which one to three values are of another type or size, gone, renamed or twice there."""
    rng = random.Random(seed)
    holder = {"": copy.deepcopy(obj)}
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(holder))
        if not places:
            break
        inside, key = rng.choice(places)
        kind = rng.choice(("value", "value", "value", "gone", "renamed", "twice", "wrapped", "text"))
        if inside is holder and kind in ("gone", "renamed", "twice"):
            kind = "value"
        value = inside[key]
        if kind == "value":
            inside[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "wrapped":
            inside[key] = rng.choice(([value], {"x": value}))
        elif kind == "text":
            inside[key] = str(value)
        elif kind == "gone":
            del inside[key]
        elif kind == "renamed" and isinstance(inside, dict):
            inside[f"{key}_"] = inside.pop(key)
        elif isinstance(inside, list):
            inside.insert(key, copy.deepcopy(value))
        else:
            inside[f"{key}_"] = copy.deepcopy(value)
    return holder[""]


def json_bytes(obj: Any) -> bytes:
    """`obj` as a JSON file, NaN, infinities and lone surrogates as Python writes them."""
    return json.dumps(obj).encode()


def read_or_named(reader: Callable[[Any], Any], path: pathlib.Path, named: pathlib.Path, said: str) -> bool:
    """Whether `reader` reads what is at `path`; where it does not, one line holds `named`."""
    try:
        reader(path)
        return True
    except (ValueError, OSError) as error:
        line = str(error)
        assert "\n" not in line and len(line) < 700, (said, line)
        assert str(named) in line, (said, line)
        return False


def try_seed(
    folder: pathlib.Path, names: Iterable[str], of_json: Container[str], tried: Callable[..., bool], seed: int
) -> None:
    """Every file of `folder` with the changes of `seed`: of its bytes, and of its values where it is JSON."""
    for name in names:
        data = (folder / name).read_bytes()
        tried(folder, name, bytes_mutated(data, seed), f"{name}, bytes {seed}")
        if name in of_json:
            tried(folder, name, json_bytes(json_mutated(json.loads(data), seed)), f"{name}, values {seed}")


def _filling(rng: random.Random, length: int) -> bytes:
    return rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length), b'{["\\}]:,'[:length]))


def _places(obj: Any):
    """(container, key) of every value in `obj`, the outer ones first; long lists give their first values alone."""
    if isinstance(obj, dict | list):
        items = list(obj.items()) if isinstance(obj, dict) else list(enumerate(obj[:20]))
        for key, value in items:
            yield obj, key
            yield from _places(value)
