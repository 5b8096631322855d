"""Which prompts prepare a method and which evaluate it; no prompt serves twice."""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence

from jaxsafe.prompts.sets import Columns, PromptSet, check_disjoint, load_file, load_prompts, normalised

Roles = Mapping[str, tuple[PromptSet, ...]]
"""Prompt sets by what they are for, such as "anchors", "calibration", "evaluation"."""

FILES = r"(?P<file>.+\.(?i:csv|tsv|jsonl?|parquet|txt))(?::(?P<label>harmful|safe))?"
NAMES = r"(?P<name>[^/#@]+)(?:/(?P<split>[^#@]+))?"
COLUMNS = r"(?:@(?P<columns>[^#]+))?"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A prompt set as a config names it: a `name` with its `split`, or a file (`name` its path) with a label.

    columns: those that it names itself; n: how many prompts are drawn, or with `first`, are taken from the beginning.
    """

    name: str
    split: str | None = None
    n: int | None = None
    is_file: bool = False
    harmful: bool | None = None
    columns: Columns = Columns()
    first: bool = False


def parse_spec(text: str) -> Spec:
    """Reads "name", "name/split" or "file.csv", the latter with ":harmful" or ":safe".

    Each may name its columns behind that, as in "file.csv@prompt=turns,label=unsafe,kind=topic", and may end in "#64"
    or "#first64".
    Raises ValueError for anything else.
    """
    match = re.fullmatch(rf"(?:{FILES}|{NAMES}){COLUMNS}(?:#(?P<first>first)?(?P<n>\d+))?", text.strip())
    if match is None:
        raise ValueError(
            f"prompt set {text!r} is not name, name/split or a file such as x.csv:safe (each may name its columns, "
            "as in x.csv@prompt=question,label=harmful, and may end in #64 or #first64)"
        )
    n, first = int(match["n"]) if match["n"] else None, bool(match["first"])
    columns = _columns(text, match["columns"])
    if match["file"]:
        if match["label"] and columns.label:
            raise ValueError(f"prompt set {text!r} has one label for all and a column of labels; give one of them")
        label = {None: None, "harmful": True, "safe": False}[match["label"]]
        return Spec(match["file"], n=n, is_file=True, harmful=label, columns=columns, first=first)
    return Spec(match["name"], match["split"], n, columns=columns, first=first)


def _columns(text: str, said: str | None) -> Columns:
    pairs = [part.partition("=") for part in said.split(",")] if said else []
    named = {key.strip(): name.strip() for key, _, name in pairs}
    if len(named) < len(pairs) or not named.keys() <= {"prompt", "label", "kind"} or not all(named.values()):
        raise ValueError(
            f"prompt set {text!r}: columns are named once each, as in @prompt=question,label=harmful,kind=topic"
        )
    return Columns(**named)


def load_spec(spec: Spec, folder: str | pathlib.Path | None = None) -> PromptSet:
    """All prompts of `spec`; published sets are looked for in `folder` where one is given."""
    if spec.is_file:
        return load_file(spec.name, spec.harmful, spec.columns)
    path_of_published = None if spec.name.startswith("builtin:") or not folder else folder
    return load_prompts(spec.name, path=path_of_published, split=spec.split, columns=spec.columns)


def assign_roles(
    prepare: Mapping[str, Sequence[str]],
    evaluate: Mapping[str, Sequence[str]],
    folder: str | pathlib.Path | None = None,
    extra: Sequence[PromptSet] = (),
    seed: int = 0,
) -> dict[str, tuple[PromptSet, ...]]:
    """Loads the sets of each role and checks that no prompt has two; roles that evaluate may share prompts.

    "name#64" draws 64 prompts by `seed`, of those that no earlier role took from the same set and that no
    evaluation set of another name holds; "name#first64" takes the first 64 of the set, which none may have taken; a
    set without a number gives all that are left. `extra` are further sets of
    the first role that evaluates. Raises ValueError where sets of different names share a prompt across roles, and
    where a draw asks for more than there is.
    """
    taken: dict[str, set[str]] = {}
    measured = [(spec.name, load_spec(spec, folder)) for sets in evaluate.values() for spec in map(parse_spec, sets)]
    measured += [(prompts.name, prompts) for prompts in extra]

    def draw(text: str, evaluates: bool) -> PromptSet:
        spec = parse_spec(text)
        used = taken.setdefault(f"{spec.name}/{spec.split}", set())
        whole = load_spec(spec, folder)
        others = [s for name, s in measured if name != spec.name] if spec.n and not evaluates else []
        avoided = used.union(*({normalised(p) for p in s.prompts} for s in others))
        reach = spec.n if spec.first and spec.n else len(whole)
        left = whole.select([i < reach and normalised(p) not in avoided for i, p in enumerate(whole.prompts)])
        if not len(left) or (spec.n is not None and spec.n > len(left)):
            asked = spec.n or "some"
            raise ValueError(f"prompt set {text!r} has {len(left)} prompts left to draw from; {asked} are asked")
        chosen = left if spec.n is None else left.take(spec.n, seed)
        used.update(normalised(p) for p in chosen.prompts)
        return chosen

    roles = {role: tuple(draw(text, False) for text in sets) for role, sets in prepare.items()}
    tests = {role: tuple(draw(text, True) for text in sets) for role, sets in evaluate.items()}
    for role in list(tests)[:1]:
        tests[role] += tuple(extra)
    evaluated = tuple(prompts for sets in tests.values() for prompts in sets)
    for first, second in itertools.combinations((*roles.values(), evaluated), 2):
        for a, b in itertools.product(first, second):
            check_disjoint(a, b)
    return roles | tests


def check_unseen(name: str, texts: Sequence[str], evaluated: Sequence[PromptSet], within: bool = False) -> None:
    """Raises ValueError where the `texts` of `name` hold a prompt that is evaluated, compared by `normalised`.

    `within`: texts hold the marks of a template around their prompts.
    """
    seen = [normalised(text) for text in texts]
    whole, exact = "\n".join(f" {text} " for text in seen), set(seen)
    for prompts in evaluated:
        found = [p for p in prompts.prompts if (f" {normalised(p)} " in whole if within else normalised(p) in exact)]
        if found:
            raise ValueError(
                f"{name} and {prompts.name} share {len(found)} prompts, for example {found[0]!r}; what is scored must "
                "not be evaluated"
            )


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
