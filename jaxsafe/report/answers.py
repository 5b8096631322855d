"""The answers of a run side by side: a row a prompt, two variants at a time."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsafe.records.run import Run, Sample, TableRow

LONGEST = 1500
"""Characters of one answer that the page holds."""
BUDGET = 4_000_000
"""Characters of all answers that the page holds; prompts beyond it are left to samples.jsonl."""
VERDICTS = ("stopped refusing", "started refusing", "broke", "mended", "unscored", "unchanged")
"""What became of the outcome of one prompt, in the order in which prompts are listed."""

Key = tuple[str, str, str, str, int]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt as one of the samples has it, and its answers by variant, None where there is none."""

    sample: Sample
    answers: tuple[Sample | None, ...]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers by prompt.

    variants: those that have answers, in the order of the run; first, second: indices of the two that are shown at
    first, None where there is but one; left_out: prompts beyond `BUDGET`.
    """

    variants: tuple[str, ...]
    rows: tuple[Asked, ...]
    first: int
    second: int | None
    left_out: int

    def pair(self, row: Asked) -> tuple[Sample | None, Sample | None]:
        """The two answers that are shown at first."""
        return row.answers[self.first], None if self.second is None else row.answers[self.second]

    @property
    def counts(self) -> Counter[str]:
        """How often each verdict comes about between the two variants that are shown at first."""
        return Counter(verdict(*self.pair(row)) for row in self.rows)

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads: a row a prompt, [text, outcome, reading] or None a variant."""
        cells = [[a and [a.text, a.outcome, reading(a)] for a in row.answers] for row in self.rows]
        return {"variants": self.variants, "answers": cells}


def side_by_side(run: Run, samples: Iterable[Sample], best: TableRow | None) -> Answers:
    """The answers to each prompt, first those whose verdict changes from the baseline of `best` to `best`."""
    found: dict[Key, dict[str, Sample]] = {}
    for sample in samples:
        key = (sample.set, sample.setting, sample.prompt, str(sample.suffix), sample.sample)
        found.setdefault(key, {})[sample.variant] = dataclasses.replace(sample, text=_clipped(sample.text))
    having = dict.fromkeys(variant for answered in found.values() for variant in answered)
    names = [result.variant.name for result in run.results]
    variants = [*(name for name in names if name in having), *(name for name in having if name not in names)]
    first, second = _chosen(run, variants, best)
    kept = _within(found)
    rows = [
        Asked(next(iter(answered.values())), tuple(map(answered.get, variants)))
        for key, answered in found.items()
        if key in kept
    ]
    answers = Answers(tuple(variants), tuple(rows), first, second, len(found) - len(kept))
    ordered = sorted(rows, key=lambda row: VERDICTS.index(verdict(*answers.pair(row))))
    return dataclasses.replace(answers, rows=tuple(ordered))


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _chosen(run: Run, variants: Sequence[str], best: TableRow | None) -> tuple[int, int | None]:
    """Indices of the baseline of `best` and of `best`, or else of the first and the second variant."""
    groups = {row.group: row.variants for row in run.table}
    first = [variants.index(name) for name in groups.get(best.baseline or "", ()) if name in variants] if best else []
    second = [variants.index(name) for name in best.variants if name in variants] if best else []
    start = first[0] if first else 0
    others = [*second, *(i for i in range(len(variants)) if i != start)]
    return start, others[0] if others else None


def _within(found: dict[Key, dict[str, Sample]]) -> set[Key]:
    """Keys whose answers fit into the budget, taken in turn from every set and setting, first samples first."""
    groups: dict[tuple[str, str], list[Key]] = defaultdict(list)
    for key in found:
        groups[key[:2]].append(key)
    turns = [
        (turn, key)
        for group in groups.values()
        for turn, key in enumerate(sorted(group, key=lambda key: (key[4], key[3])))
    ]
    kept, used = set(), 0
    for _, key in sorted(turns, key=lambda item: item[0]):
        used += sum(len(answer.text) for answer in found[key].values())
        if used > BUDGET:
            break
        kept.add(key)
    return kept


def verdict(first: Sample | None, second: Sample | None) -> str:
    """What became of the outcome of one prompt, one of `VERDICTS`."""
    before, after = first and first.outcome, second and second.outcome
    if before is None or after is None:
        return "unscored"
    if before == after:
        return "unchanged"
    if after == "broken":
        return "broke"
    return "started refusing" if after == "refused" else "stopped refusing" if before == "refused" else "mended"


def judgement(change: str, harmful: bool | None) -> str:
    """Whether a change of the verdict is for the better or the worse, "" where neither can be said."""
    if change == "broke":
        return "worse"
    if harmful is None or not change.endswith("refusing"):
        return ""
    return "better" if (change == "started refusing") == harmful else "worse"


def reading(sample: Sample) -> str:
    """What a steering rule read at the prompt, "" where there is none."""
    score = [f"score {sample.score:.2f}"] if sample.score is not None else []
    taken = {True: ["taken as harmful"], False: ["taken as safe"], None: []}[sample.steered_as_harmful]
    return ", ".join(score + taken)
