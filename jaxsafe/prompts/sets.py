"""Prompt sets: read from files or by name, labelled, sampled, and checked against each other for overlap."""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from jaxsafe.prompts.content import cell_text
from jaxsafe.prompts.files import Row, read_rows
from jaxsafe.prompts.labels import label_of
from jaxsafe.prompts.published import KNOWN, KnownSet, Label, locate, recognised

BUILTIN = ("builtin:harmful", "builtin:lookalike", "builtin:plain")
USUAL_PROMPTS = ("prompt", "goal", "question", "instruction", "behavior", "request", "query", "text")
USUAL_KINDS = ("kind", "category")
USUAL_LABEL = "label"


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their labels.

    name: of the data set; prompts: texts, stripped; harmful: a label a prompt, True (should be refused), False
    (should be answered) or None (unknown); kinds: a category a prompt, "" where there is none; split: the part
    of the data set that was asked for. Raises ValueError unless all three have one length.
    """

    name: str
    prompts: tuple[str, ...]
    harmful: tuple[bool | None, ...]
    kinds: tuple[str, ...]
    split: str | None = None

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.harmful) == len(self.kinds):
            lengths = f"{len(self.prompts)}, {len(self.harmful)} and {len(self.kinds)}"
            raise ValueError(f"{self.name}: prompts, harmful and kinds have {lengths} entries; need equally many")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Hex digest of prompts, labels and kinds in order; the same whatever file format they came from."""
        prompts = [unicodedata.normalize("NFC", p) for p in self.prompts]
        content = json.dumps([prompts, self.harmful, self.kinds], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def safe(self) -> "PromptSet":
        """The prompts labelled safe."""
        return self.select([label is False for label in self.harmful])

    @property
    def unsafe(self) -> "PromptSet":
        """The prompts labelled harmful."""
        return self.select([label is True for label in self.harmful])

    def select(self, which: Sequence[bool] | Sequence[int] | np.ndarray) -> "PromptSet":
        """The sub-set at a boolean mask of length len(self), or at integer positions in the order given.

        Raises ValueError for a mask of another length, a position outside the set, or anything else.
        """
        array = np.asarray(which)
        if array.size == 0:
            positions: list[int] = []
        elif array.dtype == bool:
            if array.shape != (len(self),):
                raise ValueError(f"{self.name}: mask has shape {array.shape}, need ({len(self)},)")
            positions = np.flatnonzero(array).tolist()
        elif np.issubdtype(array.dtype, np.integer) and array.ndim == 1:
            positions = array.tolist()
            if min(positions) < 0 or max(positions) >= len(self):
                raise ValueError(f"{self.name}: positions {min(positions)}..{max(positions)} of {len(self)} prompts")
        else:
            raise ValueError(f"{self.name}: select takes booleans or integers, got {array.dtype}{array.shape}")
        return PromptSet(
            self.name,
            tuple(self.prompts[i] for i in positions),
            tuple(self.harmful[i] for i in positions),
            tuple(self.kinds[i] for i in positions),
            self.split,
        )

    def labelled(self, harmful: bool) -> "PromptSet":
        """The set with `harmful` as the label of prompts that have none."""
        return replace(self, harmful=tuple(harmful if label is None else label for label in self.harmful))

    def take(self, n: int, seed: int) -> "PromptSet":
        """`n` prompts drawn with `seed`, in file order, as even over labels and then over kinds as can be.

        Raises ValueError unless 1 <= n <= len(self).
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"{self.name}: cannot take {n} of {len(self)} prompts")
        rng = random.Random(seed)
        chosen: list[int] = []
        by_label = _groups(range(len(self)), lambda i: self.harmful[i])
        for part, quota in zip(by_label, _even_quotas([len(g) for g in by_label], n, rng), strict=True):
            by_kind = _groups(part, lambda i: self.kinds[i])
            for group, m in zip(by_kind, _even_quotas([len(g) for g in by_kind], quota, rng), strict=True):
                chosen += rng.sample(group, m)
        return self.select(sorted(chosen))

    def without(self, other: "PromptSet") -> "PromptSet":
        """The prompts whose normalised text is not in `other`: for one, what is left after `take`."""
        gone = {normalised(p) for p in other.prompts}
        return self.select([normalised(p) not in gone for p in self.prompts])


def _groups(positions: Iterable[int], key: Callable[[int], object]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for i in positions:
        groups.setdefault(key(i), []).append(i)
    return list(groups.values())


def _even_quotas(sizes: list[int], n: int, rng: random.Random) -> list[int]:
    """How many to draw from strata of these sizes for `n` in all: one each in turn, in a drawn order."""
    order = rng.sample(range(len(sizes)), len(sizes))
    quotas = [0] * len(sizes)
    while n:
        for g in order:
            if n and quotas[g] < sizes[g]:
                quotas[g] += 1
                n -= 1
    return quotas


def normalised(text: str) -> str:
    """The text without case, punctuation and extra space: equal for prompts that are one prompt to a reader."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    visible = [c for c in folded if unicodedata.category(c) != "Cf"]  # soft hyphens, zero-width spaces
    words = "".join(" " if unicodedata.category(c)[0] in "PZ" else c for c in visible).split()
    return " ".join(words or folded.split())


def check_disjoint(first: PromptSet, second: PromptSet) -> None:
    """Raise ValueError if a prompt is in both sets, compared by `normalised`."""
    ours = {normalised(p) for p in first.prompts}
    shared = {normalised(p): p for p in second.prompts if normalised(p) in ours}
    if shared:
        names = " and ".join(f"{s.name} (split {s.split or 'all'})" for s in (first, second))
        example = next(iter(shared.values()))
        raise ValueError(f"{names} share {len(shared)} prompts, for example {example!r}; they must not overlap")


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns: of the prompt, its label and its kind; None for the usual ones."""

    prompt: str | None = None
    label: str | None = None
    kind: str | None = None


def load_prompts(
    name: str,
    path: str | Path | None = None,
    split: str | None = None,
    *,
    columns: Columns = Columns(),
    harmful: bool | None = None,
    contextual: str = "join",
) -> PromptSet:
    """Load a prompt set by name, or any CSV, TSV, JSON, JSONL, Parquet or text file (one prompt a line).

    name: a published set (`published.KNOWN`), `builtin:harmful`, `builtin:lookalike`, `builtin:plain`, or
    a name of your own for the file at `path`. path: the file, or for a published set also a folder that holds
    it, there or one level below; without it a published set comes from the Hugging Face hub or its cache.
    split: a published split of the set, "all" of them, a value of the file's `split` column, or `firstN` /
    `afterN` (the first N rows / the rows after them). columns: those of the prompt, its label (safe/unsafe, 0/1, ...)
    and its category, where they are not the usual ones; a file of your own may have its labels in a column `label`.
    harmful: one label for the whole file. contextual: HarmBench prompts with a context are context and behaviour
    joined as in its own pipeline ("join"), or left out ("skip").

    Raises FileNotFoundError where there is no such file; ValueError for an unknown name, split or column, an
    unreadable or empty file, and a blank prompt.
    """
    if contextual not in ("join", "skip"):
        raise ValueError(f"contextual={contextual!r} must be 'join' or 'skip'")
    column, label, kind = columns.prompt, columns.label, columns.kind
    if label is not None and harmful is not None:
        raise ValueError(f"give label={label!r} or harmful={harmful}, not both")
    known = next((k for k in KNOWN if k.name == name), None)
    files, row_split = _files(name, known, None if path is None else Path(path), split)
    lines = [_Line(f"{f}, row {i}", row, of) for f, of in files for i, row in enumerate(read_rows(f), 1)]
    lines = _select_split(lines, row_split, known, name)

    seen = list(dict.fromkeys(key for line in lines for key in line.row))
    wanted = (column,) if column else known.columns if known else USUAL_PROMPTS
    prompt_columns = [_column(seen, wanted, name)]
    if known and not column:
        prompt_columns += [other for other in known.columns if other in seen and other not in prompt_columns]
    usual_kinds = known.kinds if known else USUAL_KINDS
    has_kind = kind or {k.lower() for k in usual_kinds} & {s.lower() for s in seen}
    kind_column = _column(seen, (kind,) if kind else usual_kinds, name) if has_kind else None
    if known is None and harmful is None and USUAL_LABEL in map(str.lower, seen):
        label = label or USUAL_LABEL
    label_column = _column(seen, (label,), name) if label else None
    if contextual == "skip" and known and known.context:
        lines = [line for line in lines if not _cell(line.row, known.context)]
    if not lines:
        raise ValueError(f"{name}: no prompts left in split {split or 'all'} with contextual={contextual!r}")
    return PromptSet(
        name,
        tuple(line.prompt(prompt_columns, known.context if known else None) for line in lines),
        tuple(line.label(label_column) if harmful is None else harmful for line in lines),
        tuple(_cell(line.row, kind_column) for line in lines),
        split,
    )


def load_file(path: str | Path, harmful: bool | None = None, columns: Columns = Columns()) -> PromptSet:
    """The prompts of a file, named by it: as published where its columns are those of a published set.

    `harmful` is one label for the whole file; `columns` are named for files of one's own. Raises as `load_prompts`.
    """
    file = Path(path)
    known = recognised(file, read_rows(file)) if columns == Columns() else None
    name = known.name if known else str(file)
    return replace(load_prompts(name, file, columns=columns, harmful=harmful), name=file.stem)


@dataclass(frozen=True)
class _Line:
    where: str
    row: Row
    published: Label

    def prompt(self, columns: Sequence[str], context: str | None) -> str:
        column = next((name for name in columns if self.row.get(name)), columns[0])
        before = _cell(self.row, context)
        text = "" if self.row.get(column) is None else cell_text(self.row, column, self.where).strip()
        if all(unicodedata.category(letter)[0] in "CZ" for letter in text):  # invisible ones, too
            raise ValueError(f"{self.where}: the prompt in column {column!r} is blank")
        return f"{before}\n\n---\n\n{text}" if before else text

    def label(self, column: str | None) -> bool | None:
        try:
            return self.published(self.row) if column is None else label_of(self.row.get(column), column)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


def _cell(row: Row, column: str | None) -> str:
    value = row.get(column) if column is not None else None
    if isinstance(value, Mapping):  # a yes or no for each category
        return ", ".join(name for name, true in value.items() if true is True)
    return "" if value is None else str(value).strip()


def _column(seen: list[str], wanted: Sequence[str], name: str) -> str:
    """The first wanted column that was seen, spelt as wanted or else in another case."""
    for w in wanted:
        alike = [s for s in seen if s.lower() == w.lower()]
        if w not in seen and len(alike) > 1:
            raise ValueError(f"{name}: the columns {' and '.join(alike)} differ in case alone; name the one to read")
        if alike:
            return w if w in seen else alike[0]
    raise ValueError(f"{name}: no column {' or '.join(wanted)}; the file has {', '.join(seen)}")


def _files(
    name: str, known: KnownSet | None, path: Path | None, split: str | None
) -> tuple[list[tuple[Path, Label]], str | None]:
    """The files to read, each with its published label, and the split still to be cut from their rows."""
    if name in BUILTIN:
        if path is not None:
            raise ValueError(f"{name} is part of the package; load it without path={path}")
        kind = name.removeprefix("builtin:")
        file = Path(str(resources.files("jaxsafe.prompts") / "builtin" / f"{kind}.jsonl"))
        return [(file, lambda row: kind == "harmful")], split
    if known is not None:
        published = split == "all" or any(f.split == split for f in known.files)
        return _known_files(known, path, split if published else None), None if published else split
    if path is None:
        names = ", ".join([*(k.name for k in KNOWN), *BUILTIN])
        raise ValueError(f"unknown data set {name!r}; known are {names}; give path= for a file of your own")
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder, which only a published set may be; give a file as path=")
    return [(path, lambda row: None)], split


def _known_files(known: KnownSet, path: Path | None, split: str | None) -> list[tuple[Path, Label]]:
    wanted = [f for f in known.files if f.split == split] or list(known.files)
    if path is None or path.is_dir():
        if split is None and not known.joined:
            wanted = wanted[:1]
        return [(locate(known, f, path), f.label) for f in wanted]
    owner = next((f for f in known.files if path.name in f.names), None)
    if owner and owner not in wanted:
        raise ValueError(f"{known.name}: {path} is published as split {owner.split}, not {split}")
    if not owner and len({f.label for f in wanted}) > 1:
        splits = ", ".join(f.split for f in wanted)
        raise ValueError(f"{known.name}: cannot tell which part {path} is; give split= one of {splits}")
    return [(path, (owner or wanted[0]).label)]


def _select_split(lines: list[_Line], split: str | None, known: KnownSet | None, name: str) -> list[_Line]:
    if split is None or split == "all":
        return lines
    if cut := re.fullmatch(r"(first|after)([1-9]\d*)", split):
        n = int(cut[2])
        chosen = lines[:n] if cut[1] == "first" else lines[n:]
        if n > len(lines) or not chosen:
            raise ValueError(f"{name}: split {split!r} does not fit the {len(lines)} rows there are")
        return chosen
    chosen = [line for line in lines if _cell(line.row, "split") == split]
    if not chosen:
        seen = (
            [f.split for f in known.files if f.split != "all"]
            if known
            else sorted({_cell(line.row, "split") for line in lines} - {""})
        )
        raise ValueError(
            f"{name}: unknown split {split!r}; need one of {', '.join([*seen, 'all', 'firstN', 'afterN'])}"
        )
    return chosen
