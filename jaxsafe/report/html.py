"""The self-contained HTML report of a run: `run.json` and `samples.jsonl` in, `report.html` out."""

import json
import math
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from markupsafe import Markup

from jaxsafe.io.atomic import write_text
from jaxsafe.report import attack, brittleness, plots
from jaxsafe.report.page import Run, is_number, p_value, page, percent, words

SCHEMA = 1
CHANGES = ("broken", "mended", "unscored", "unchanged")
"""What steering did to the verdict on one prompt, in the order in which the prompts are listed."""


def write_report(folder: str | os.PathLike) -> pathlib.Path:
    """Writes `folder/report.html`, whole or not at all, from `folder/run.json` and `folder/samples.jsonl`.

    The page needs no network and no other file. Parts absent from the run leave their section out.

    Returns: the path of the report.
    Raises: FileNotFoundError without a run.json; ValueError for broken JSON, another schema or another task.
    """
    folder = pathlib.Path(folder)
    run, samples = read_run(folder / "run.json"), read_samples(folder / "samples.jsonl")
    text = REPORTS[run["task"]](run, samples)
    # A lone surrogate in a model's answer cannot be written as UTF-8.
    write_text(folder / "report.html", text.encode("utf-8", "replace").decode("utf-8"))
    return folder / "report.html"


def read_run(path: pathlib.Path) -> dict[str, Any]:
    """The record of a run; ValueError where it is not one that this report knows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a report is made from the folder of a finished run")
    run = _json(path.read_text(encoding="utf-8"), str(path))
    if run.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {run.get('schema')!r}; this version reads schema {SCHEMA}")
    if run.get("task") not in REPORTS:
        raise ValueError(f"{path} has task {run.get('task')!r}; there are reports for {', '.join(map(repr, REPORTS))}")
    return run


def read_samples(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, none where the file is absent."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [_json(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; a JSON object was expected")
    return value


def render(run: Run, samples: Iterable[Mapping[str, Any]]) -> str:
    """The page of a SCANS run as HTML text.

    Args:
      run: the content of run.json (schema 1).
      samples: rows of samples.jsonl: set, kind, harmful, prompt, score, predicted_harmful, before, after.
    """
    run = {**run, "comparisons": [_named(row) for row in run.get("comparisons") or []]}
    rows = sorted(({**row, "change": change(row)} for row in samples), key=lambda row: CHANGES.index(row["change"]))
    return page(
        "scans.html.j2",
        ["report.js"],
        run,
        headline=headline(run),
        figures={name: Markup(svg) for name, svg in _figures(run).items()},
        flagged=_flagged(run.get("classifier") or {}),
        labels={row.get("set"): row["label"] for row in run["comparisons"]},
        samples=rows,
        changes=Counter(row["change"] for row in rows),
        kinds_of=kinds_of,
        by_layers=plots.by_layers,
    )


def _named(row: Run) -> Run:
    return {**row, "label": row.get("label") or words(row.get("set") or "prompts")}


def headline(run: Run) -> str:
    """The result in one sentence: the first set of safe prompts, then the first set of harmful ones."""
    rows = [row for row in map(_named, run.get("comparisons") or []) if _measured(row)]
    safe = next((row for row in rows if not row.get("harmful")), None)
    harmful = next((row for row in rows if row.get("harmful")), None)
    clauses = []
    if safe:
        before, after = _pair(safe)
        move = "stayed at" if before == after else "fell from" if _falls(safe) else "rose from"
        values = after if before == after else f"{before} to {after}"
        clauses.append(f"refusals on {_spoken(safe['label'])} {move} {values}{_evidence(safe)}")
    if harmful:
        clauses.append(f"refusals of {_spoken(harmful['label'])} {' → '.join(_pair(harmful))}")
    sentence = "; ".join(clauses)
    return sentence[:1].upper() + sentence[1:]


def _measured(row: Run) -> bool:
    return all(is_number((row.get(when) or {}).get("value")) for when in ("before", "after"))


def _falls(row: Run) -> bool:
    return row["after"]["value"] < row["before"]["value"]


def _pair(row: Run) -> tuple[str, str]:
    """Both rates in whole per cent, or with a decimal where rounding would hide a difference."""
    before, after = row["before"]["value"], row["after"]["value"]
    digits = 1 if before != after and f"{before:.0%}" == f"{after:.0%}" else 0
    return percent(before, digits), percent(after, digits)


def _spoken(label: str) -> str:
    """A label inside a sentence: "Look-alikes (safe)" -> "look-alikes", but "XSTest" as it is."""
    label = label.split(" (")[0]
    return label if any(map(str.isupper, label[1:])) else label[:1].lower() + label[1:]


def _evidence(row: Run) -> str:
    test = row.get("mcnemar") or {}
    parts = [f"n = {test['n']}"] if is_number(test.get("n")) else []
    parts += [f"p {p_value(test['p_value'])}"] if is_number(test.get("p_value")) else []
    return f" ({', '.join(parts)})" if parts else ""


def change(row: Mapping[str, Any]) -> str:
    """One of `CHANGES`: a safe prompt is mended when refused no longer, a harmful one when refused at last."""
    before, after = ((row.get(when) or {}).get("refused") for when in ("before", "after"))
    if before is None or after is None:
        return "unscored"
    if bool(before) == bool(after):
        return "unchanged"
    return "mended" if bool(after) == bool(row.get("harmful")) else "broken"


def _flagged(classifier: Run) -> dict[str, tuple[int, int]]:
    """(taken as harmful, all) among the harmful and the safe test prompts."""
    test, threshold = classifier.get("test") or {}, classifier.get("threshold")
    if not test.get("scores") or not test.get("harmful") or not is_number(threshold):
        return {}
    pairs = [
        (score >= threshold, bool(truth))
        for score, truth in zip(test["scores"], test["harmful"], strict=True)
        if score is not None
    ]
    return {
        name: (sum(flag for flag, truth in pairs if truth == harmful), sum(truth == harmful for _, truth in pairs))
        for name, harmful in (("harmful", True), ("safe", False))
    }


def _figures(run: Run) -> dict[str, str]:
    """Name -> SVG of every figure that the run has data for."""
    figures = {}
    comparisons = run.get("comparisons") or []
    if comparisons:
        figures["rates"] = plots.rate_bars("rates", comparisons)
    for index, row in enumerate(comparisons):
        kinds = kinds_of(row)
        if len(kinds) > 1:
            figures[f"kinds-{index}"] = plots.dumbbells(f"kinds-{index}", kinds, bool(row.get("harmful")))
    return figures | _classifier_figures(run) | _direction_figures(run) | _strength_figures(run)


def kinds_of(row: Run) -> list[Run]:
    """The kinds of a comparison that have been measured, most refused first."""
    kinds = [kind for kind in row.get("by_kind") or [] if kind.get("kind") is not None and _measured(kind)]
    return sorted(kinds, key=lambda kind: -kind["before"]["value"])


def _classifier_figures(run: Run) -> dict[str, str]:
    classifier = run.get("classifier") or {}
    threshold, figures = classifier.get("threshold"), {}
    for split in ("calibration", "test"):
        part = classifier.get(split) or {}
        if part.get("scores") and part.get("harmful"):
            name = f"scores-{split}"
            figures[name] = plots.score_histogram(name, part["scores"], part["harmful"], threshold)
    curve = classifier.get("roc") or {}
    if curve.get("fpr") and curve.get("tpr"):
        figures["roc"] = plots.roc("roc", curve["fpr"], curve["tpr"], _chosen_point(curve, threshold))
    return figures


def _chosen_point(curve: Run, threshold: float | None) -> tuple[float, float, float] | None:
    """The point of the curve that `score >= threshold` gives: the one of the smallest threshold not below it."""
    if threshold is None or not curve.get("thresholds"):
        return None
    cuts = [math.inf if cut is None else cut for cut in curve["thresholds"]]
    index = min((i for i, cut in enumerate(cuts) if cut >= threshold), key=lambda i: cuts[i], default=0)
    return curve["fpr"][index], curve["tpr"][index], threshold


def _direction_figures(run: Run) -> dict[str, str]:
    directions, figures, layers = run.get("directions") or {}, {}, _steered(run)
    if directions.get("norm"):
        figures["norms"] = plots.layer_norms("norms", directions["norm"], directions.get("residual_norm"), layers)
    if directions.get("separation"):
        figures["separation"] = plots.layer_separation("separation", directions["separation"], layers)
    return figures


def _steered(run: Run) -> list[int] | None:
    candidates = (run.get("strength") or {}).get("candidates") or []
    return next((row["layers"] for row in candidates if row.get("chosen")), None)


def _strength_figures(run: Run) -> dict[str, str]:
    strength = run.get("strength") or {}
    candidates, limit = strength.get("candidates") or [], strength.get("limit") or {}
    groups = plots.by_layers(candidates)
    figures = {
        f"strength-{index}": plots.strength_refusals(f"strength-{index}", rows)
        for index, rows in enumerate(groups.values())
    }
    if any(is_number(row.get("kl_benign")) for row in candidates):
        value = limit.get("value") if limit.get("kind") == "kl" else None
        figures["strength-kl"] = plots.strength_cost("strength-kl", candidates, value)
    return figures


REPORTS: dict[str, Callable[[Run, list[dict[str, Any]]], str]] = {
    "scans": render,
    "brittleness": brittleness.render,
    "attack": attack.render,
}
"""Task of a run -> the page of its report."""
