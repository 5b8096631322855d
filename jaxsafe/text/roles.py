"""Which prompts serve as anchors, which calibrate and which evaluate; no prompt serves twice."""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence

from jaxsafe.text.datasets import PromptSet, check_disjoint, load_prompts, normalised


@dataclasses.dataclass(frozen=True)
class Roles:
    """Prompt sets by what they are for: `anchors` and `calibration` shape the steering, `evaluation` measures it."""

    anchors: tuple[PromptSet, ...]
    calibration: tuple[PromptSet, ...]
    evaluation: tuple[PromptSet, ...]


def parse_spec(spec: str) -> tuple[str, str | None, int | None]:
    """Name, split and number of prompts of "name", "name/split", "name#64" or "name/split#64".

    Raises ValueError where the number is none.
    """
    match = re.fullmatch(r"(?P<name>[^/#]+)(/(?P<split>[^#]+))?(#(?P<n>\d+))?", spec.strip())
    if match is None:
        raise ValueError(f"prompt set {spec!r} is not of the form name, name/split, name#64 or name/split#64")
    return match["name"], match["split"], int(match["n"]) if match["n"] else None


def load_spec(spec: str, folder: str | pathlib.Path | None = None) -> PromptSet:
    """The prompts of `spec`, all of its split; published sets are looked for in `folder` where one is given."""
    name, split, _ = parse_spec(spec)
    path = None if name.startswith("builtin:") or not folder else folder
    return load_prompts(name, path=path, split=split)


def assign_roles(
    anchors: Sequence[str],
    calibration: Sequence[str],
    evaluation: Sequence[str],
    folder: str | pathlib.Path | None = None,
    extra: Sequence[PromptSet] = (),
    seed: int = 0,
) -> Roles:
    """Loads the sets of each role and checks that no prompt has two.

    "name#64" draws 64 prompts by `seed`, of those that no earlier role took from the same set; a set without
    a number gives all that are left. `extra` are further evaluation sets. Raises ValueError where sets of
    different names share a prompt across roles, and where a draw asks for more than there is.
    """
    taken: dict[str, set[str]] = {}

    def draw(spec: str) -> PromptSet:
        name, split, n = parse_spec(spec)
        used = taken.setdefault(f"{name}/{split}", set())
        whole = load_spec(spec, folder)
        left = whole.select([normalised(p) not in used for p in whole.prompts])
        if not len(left) or (n is not None and n > len(left)):
            raise ValueError(f"prompt set {spec!r} has {len(left)} prompts left to draw from; {n or 'some'} are asked")
        out = left if n is None else left.take(n, seed)
        used.update(normalised(p) for p in out.prompts)
        return out

    roles = Roles(
        tuple(draw(spec) for spec in anchors),
        tuple(draw(spec) for spec in calibration),
        (*(draw(spec) for spec in evaluation), *extra),
    )
    for first, second in itertools.combinations((roles.anchors, roles.calibration, roles.evaluation), 2):
        for a, b in itertools.product(first, second):
            check_disjoint(a, b)
    return roles


def labelled(sets: Sequence[PromptSet]) -> tuple[list[str], list[bool]]:
    """Prompts and labels of several sets. Raises ValueError for a prompt without a label, and for no prompts."""
    prompts = [p for s in sets for p in s.prompts]
    labels = [h for s in sets for h in s.harmful]
    if not prompts:
        raise ValueError("no prompts: give at least one prompt set")
    for s in sets:
        if None in s.harmful:
            raise ValueError(
                f"{s.name} has prompts labelled neither harmful nor safe, which anchors and calibration need"
            )
    return prompts, [bool(h) for h in labels]
