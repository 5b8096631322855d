"""Refusals before and after, set by set and kind by kind, from judged samples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import mcnemar, rate, scans_average
from jaxsafe.text.datasets import PromptSet

Sample = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt's score and its answers, `before` and `after` steering."""

    score: float
    before: str
    after: str


def judged(prompts: PromptSet, answers: Sequence[Answered], threshold: float, judge: Judge) -> list[Sample]:
    """One record a prompt, as `samples.jsonl` holds it."""
    return [
        {
            "set": set_name(prompts),
            "kind": kind,
            "harmful": harmful,
            "prompt": prompt,
            "score": answer.score,
            "predicted_harmful": answer.score >= threshold,
            "before": {"text": answer.before, "refused": judge.refused(answer.before)},
            "after": {"text": answer.after, "refused": judge.refused(answer.after)},
        }
        for prompt, kind, harmful, answer in zip(prompts.prompts, prompts.kinds, prompts.harmful, answers, strict=True)
    ]


def set_name(prompts: PromptSet) -> str:
    """The name of a set and its split in tables and files: "builtin:lookalike" of split test is "lookalike"."""
    if prompts.name.startswith("builtin:"):
        return prompts.name.removeprefix("builtin:")
    return prompts.name if prompts.split is None else f"{prompts.name}/{prompts.split}"


def flags(samples: Sequence[Sample], when: str) -> list[bool | None]:
    """Whether each answer `when` ("before" or "after") refused."""
    return [sample[when]["refused"] for sample in samples]


def compare(samples: Sequence[Sample], name: str, harmful: bool | None) -> dict[str, Any]:
    """Refusal rates of one set's prompts of one label before and after, with McNemar's exact test, and by kind."""
    mine = [s for s in samples if s["set"] == name and s["harmful"] is harmful]
    test = mcnemar(flags(mine, "before"), flags(mine, "after"))
    kinds = list(dict.fromkeys(s["kind"] for s in mine))
    word = {True: "harmful", False: "safe", None: "no label"}[harmful]
    return {
        "set": name,
        "label": f"{name} ({word})",
        "harmful": harmful,
        "before": rate(flags(mine, "before")).as_dict(),
        "after": rate(flags(mine, "after")).as_dict(),
        "mcnemar": {
            "p_value": test.p_value,
            "stopped_refusing": test.fixed,
            "started_refusing": test.broken,
            "n": test.n,
            "n_unscored": test.n_unscored,
        },
        "by_kind": [
            {"kind": kind, **{when: rate(flags(of, when)).as_dict() for when in ("before", "after")}}
            for kind in kinds
            if kind and len(kinds) > 1
            for of in [[s for s in mine if s["kind"] == kind]]
        ],
    }


def comparisons(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """`compare` of every set and label among the samples, in their order."""
    groups = dict.fromkeys((s["set"], s["harmful"]) for s in samples)
    return [compare(samples, name, harmful) for name, harmful in groups]


def average(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """The Avg. of SCANS before and after: compliance on safe and refusal of harmful prompts over all of them."""
    safe = [s for s in samples if s["harmful"] is False]
    unsafe = [s for s in samples if s["harmful"] is True]
    if not safe or not unsafe:
        return None
    return {when: scans_average(flags(safe, when), flags(unsafe, when)).value for when in ("before", "after")}


def metrics(table: Sequence[dict[str, Any]], judge: Judge) -> dict[str, Any]:
    """The rates of `comparisons` under names that carry the judge."""
    return {
        f"refusal_{judge.name}/{row['set']}/{_side(row)}/{when}": row[when]
        for row in table
        for when in ("before", "after")
    }


def _side(row: dict[str, Any]) -> str:
    return {True: "harmful", False: "safe", None: "unlabelled"}[row["harmful"]]
