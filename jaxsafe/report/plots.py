"""Figures of the report on SCANS.

Colour says safe or harmful; hollow or pale against solid says before or after; nothing is said by colour alone.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxsafe.report.style import (
    DARK as DARK,
)
from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    Row,
    array,
    ends,
    layer_axis,
    level,
    log_axis,
    new_axes,
    note,
    one_line,
    percent,
    percent_axis,
    styled,
    to_svg,
    tone,
    upright,
    value_of,
)


@styled
def rate_bars(name: str, comparisons: Sequence[Row]) -> str:
    """Refusal rates before (pale) and after (solid) with their intervals, two bars a set of prompts.

    Args:
      name: prefix of the ids.
      comparisons: records with label, harmful, before and after; a rate has value, ci_low, ci_high in 0..1.
    """
    figure, axes = new_axes(26 + 58 * len(comparisons))
    for y, row in enumerate(comparisons):
        background = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1}
        label = one_line(row["label"], 48)
        axes.text(0.004, y - 0.36, label, va="bottom", bbox=background)
        for when, offset, alpha in (("before", -0.17, 0.4), ("after", 0.14, 1.0)):
            rate = row.get(when)
            axes.barh(y + offset, value_of(rate), height=0.27, color=tone(row.get("harmful")), alpha=alpha)
            interval = value_of(rate, "ci_low"), value_of(rate, "ci_high")
            for color, width in ((LIGHT["paper"], 3), (LIGHT["ink"], 1.4)):
                axes.hlines(y + offset, *interval, color=color, linewidth=width)
            text = f"{percent(value_of(rate))} {when}"
            axes.text(1.03, y + offset, text, va="center_baseline", color=LIGHT["muted"])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(comparisons) - 0.6, -0.75)
    percent_axis(axes.xaxis)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    changes = (f"{row['label']} {_change(row)}" for row in comparisons)
    return to_svg(figure, name, "Bars of refusal rates before and after: " + "; ".join(changes))


@styled
def dumbbells(name: str, rows: Sequence[Row], harmful: bool) -> str:
    """Refusal rates of each kind of prompt before (hollow) and after (solid), joined by a line.

    Args:
      name: prefix of the ids.
      rows: records with kind, before and after, drawn from top to bottom.
      harmful: whether the prompts are harmful; sets the colour.
    """
    figure, axes = new_axes(34 + 21 * len(rows))
    y = np.arange(len(rows))
    before, after = (np.array([value_of(row.get(when)) for row in rows]) for when in ("before", "after"))
    color = tone(harmful)
    axes.hlines(y, before, after, color=color, linewidth=2, alpha=0.5)
    dots: dict[str, Any] = {"s": 42, "edgecolor": color, "linewidth": 1.5, "zorder": 3, "clip_on": False}
    axes.scatter(before, y, facecolor=LIGHT["paper"], **dots)
    axes.scatter(after, y, facecolor=color, **dots)
    axes.set_yticks(y, [one_line(row["kind"], 24) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="both")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], pad=9)
    changes = (f"{row['kind']} {_change(row)}" for row in rows)
    return to_svg(figure, name, "Refusal rates by kind of prompt before and after: " + "; ".join(changes))


def _change(row: Row) -> str:
    return f"{percent(value_of(row.get('before')))} to {percent(value_of(row.get('after')))}"


@styled
def score_histogram(name: str, scores: Sequence[float], harmful: Sequence[bool], threshold: float | None) -> str:
    """Scores of harmful prompts above the axis and of safe prompts below it, with the threshold between them.

    Args:
      name: prefix of the ids.
      scores: [N] cosine scores.
      harmful: [N] whether each prompt is harmful.
      threshold: prompts at or above it count as harmful; None draws no line.
    """
    figure, axes = new_axes(240)
    values, truth = array(scores), np.array(harmful, dtype=bool)
    truth, values = truth[np.isfinite(values)], values[np.isfinite(values)]
    edges = np.histogram_bin_edges(values, bins=32)
    tallest = 1
    for group, sign, label in ((True, 1, "harmful prompts"), (False, -1, "safe prompts")):
        counts, _ = np.histogram(values[truth == group], edges)
        tallest = max(tallest, counts.max())
        axes.stairs(sign * counts, edges, fill=True, color=tone(group), alpha=0.85)
        axes.text(
            0.02,
            0.5 + 0.48 * sign,
            label,
            transform=axes.transAxes,
            color=tone(group),
            va="top" if group else "bottom",
        )
    axes.set_ylim(-1.15 * tallest, 1.15 * tallest)
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    if threshold is not None:
        upright(axes, threshold)
        note(axes, f"threshold {threshold:.3g}", (threshold, 1), (0, 4), ("data", "axes fraction"), ha="center")
    axes.set_xlabel("mean cosine with the harmful reference")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{abs(count):.0f}"))
    axes.set_ylabel("prompts")
    return to_svg(figure, name, _histogram_words(values, truth, threshold))


def _histogram_words(values: np.ndarray, truth: np.ndarray, threshold: float | None) -> str:
    groups = (("harmful", values[truth]), ("safe", values[~truth]))
    medians = [f"{label} prompts: median {np.median(group):.2f}" for label, group in groups if group.size]
    line = [] if threshold is None else [f"threshold {threshold:.3g}"]
    return "Histogram of scores. " + "; ".join(medians + line)


@styled
def roc(name: str, fpr: Sequence[float], tpr: Sequence[float], point: tuple[float, float, float] | None) -> str:
    """The receiver operating characteristic with the chosen threshold marked.

    Args:
      name: prefix of the ids.
      fpr, tpr: [K] false and true positive rates.
      point: (fpr, tpr, threshold) of the chosen threshold, or None.
    """
    figure, axes = new_axes(240)
    axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=DASHED)
    axes.step(array(fpr), array(tpr), where="post", color=LIGHT["ink"], clip_on=False)
    alt = "Receiver operating characteristic."
    if point is not None:
        x, y, threshold = point
        axes.scatter(
            x, y, s=70, facecolor=LIGHT["paper"], edgecolor=LIGHT["ink"], linewidth=1.8, zorder=4, clip_on=False
        )
        side, across = ("right", -10) if x > 0.5 else ("left", 10)
        note(axes, f"threshold {threshold:.3g}", (x, y), (across, -14 if y > 0.2 else 8), ha=side)
        alt += f" At threshold {threshold:.3g}: true positive rate {y:.1%}, false positive rate {x:.1%}."
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.grid()
    axes.tick_params(length=0, pad=7)
    axes.set_xlabel("safe prompts taken as harmful")
    axes.set_ylabel("harmful prompts found")
    return to_svg(figure, name, alt)


@styled
def layer_norms(
    name: str, norm: Sequence[float], residual: Sequence[float] | None, layers: Sequence[int] | None
) -> str:
    """Norm of the direction and of the residual stream in every layer, on a logarithmic scale.

    Args:
      name: prefix of the ids.
      norm, residual: [L] norms; residual may be None.
      layers: (first, last) steered layer, shaded; or None.
    """
    figure, axes = new_axes(240)
    axes.plot(array(norm), color=LIGHT["ink"], label="refusal direction")
    if residual:
        axes.plot(array(residual), color=LIGHT["muted"], linestyle=DASHED, label="residual stream")
    log_axis(axes.yaxis)
    axes.legend(**LEGEND)
    axes.set_ylabel("norm")
    layer_axis(axes, len(norm), layers)
    return to_svg(figure, name, f"Norm of the refusal direction in {len(norm)} layers, {ends(norm)}.")


@styled
def layer_separation(name: str, separation: Sequence[float], layers: Sequence[int] | None) -> str:
    """How well the projection on the direction separates harmful from safe prompts in every layer.

    Args:
      name: prefix of the ids.
      separation: [L] areas under the ROC curve in 0..1; 0.5 is chance.
      layers: (first, last) steered layer, shaded; or None.
    """
    figure, axes = new_axes(240)
    values = array(separation)
    axes.plot(values, color=LIGHT["ink"], marker="o", markersize=3.5, clip_on=False)
    level(axes, 0.5, "chance", LIGHT["muted"], linestyle=DASHED)
    axes.set_ylim(min(0.45, float(np.nanmin(values, initial=0.45))), 1)
    axes.set_ylabel("area under the ROC curve")
    layer_axis(axes, len(values), layers)
    return to_svg(figure, name, f"Separation of harmful and safe prompts in {len(values)} layers, {ends(separation)}.")


@styled
def strength_refusals(name: str, candidates: Sequence[Row]) -> str:
    """Refusal of safe and of harmful prompts against the strength, for one range of layers.

    Args:
      name: prefix of the ids.
      candidates: records with alpha_rel, refusal_safe, refusal_harmful, allowed, chosen; one range of layers.
        Those not allowed are drawn grey and hollow; the chosen one is marked.
    """
    figure, axes = new_axes(240)
    rows = [row for group in by_layers(candidates).values() for row in group]
    alpha = array(row["alpha_rel"] for row in rows)
    for field, harmful, marker in (("refusal_harmful", True, "s"), ("refusal_safe", False, "o")):
        label = "harmful prompts" if harmful else "safe prompts"
        _candidates(axes, rows, alpha, array(row.get(field) for row in rows), tone(harmful), marker, label)
    _mark_chosen(axes, rows, 0.6)
    axes.set_ylim(0, 1)
    percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.set_ylabel("refused")
    axes.set_xlabel("strength (fraction of the residual norm)")
    axes.legend(**LEGEND)
    return to_svg(figure, name, "Refusal rates against strength. " + _candidate_words(rows))


@styled
def strength_cost(name: str, candidates: Sequence[Row], limit: float | None) -> str:
    """Divergence on benign prompts against the strength, a line for each range of layers, with the limit.

    Args:
      name: prefix of the ids.
      candidates: records with alpha_rel, layers, kl_benign (nats), allowed, chosen.
        The scale is logarithmic, so zeros are left out.
      limit: largest divergence allowed in nats, or None.
    """
    figure, axes = new_axes(240)
    dashes = itertools.cycle((DASHED, (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))))
    for index, (layers, rows) in enumerate(by_layers(candidates).items()):
        alpha, cost = (array(row.get(field) for row in rows) for field in ("alpha_rel", "kl_benign"))
        cost[~(cost > 0)] = math.nan
        chosen = any(row.get("chosen") for row in rows)
        color, dash = (LIGHT["ink"], "-") if chosen else (LIGHT["muted"], next(dashes))
        label = layers if index else f"layers {layers}"
        _candidates(axes, rows, alpha, cost, color, "o", label, linestyle=dash)
        _mark_chosen(axes, rows, 0.05)
    if limit is not None:
        level(axes, limit, f"limit {limit:g}", LIGHT["harmful"])
    log_axis(axes.yaxis)
    axes.set_ylabel("KL on benign prompts (nats)")
    axes.set_xlabel("strength (fraction of the residual norm)")
    axes.legend(**LEGEND)
    return to_svg(figure, name, "Divergence on benign prompts against strength. " + _candidate_words(candidates))


def by_layers(candidates: Sequence[Row]) -> dict[str, list[Row]]:
    """Candidates that have a strength, by their range of layers ("10–19"), weakest first."""
    groups: dict[str, list[Row]] = {}
    complete = (row for row in candidates if row.get("layers") and row.get("alpha_rel") is not None)
    for row in sorted(complete, key=lambda row: (row["layers"], row["alpha_rel"])):
        groups.setdefault("–".join(map(str, row["layers"])), []).append(row)
    return groups


def _candidates(
    axes: Axes, rows: Sequence[Row], x: np.ndarray, y: np.ndarray, color: str, marker: str, label: str, **line: Any
) -> None:
    """A line through all candidates; markers filled where a candidate is allowed, grey and hollow where not."""
    allowed = np.array([row.get("allowed") is not False for row in rows])
    axes.plot(x, y, marker=marker, markevery=allowed, color=color, linewidth=1.4, label=label, clip_on=False, **line)
    axes.plot(x[~allowed], y[~allowed], marker, color=LIGHT["muted"], markerfacecolor=LIGHT["paper"], clip_on=False)


def _mark_chosen(axes: Axes, rows: Sequence[Row], height: float) -> None:
    """An upright at the chosen strength, its label on the roomier side at a height in fractions of the axes."""
    for alpha in [row["alpha_rel"] for row in rows if row.get("chosen")]:
        side, shift = ("right", -5) if alpha > np.mean(axes.get_xlim()) else ("left", 5)
        upright(axes, alpha)
        note(axes, "chosen", (alpha, height), (shift, 0), ("data", "axes fraction"), ha=side, va="center")


def _candidate_words(rows: Sequence[Row]) -> str:
    chosen = [f"Chosen: strength {row['alpha_rel']:g}" for row in rows if row.get("chosen")]
    barred = sum(row.get("allowed") is False for row in rows)
    return "; ".join([f"{len(rows)} candidates, {barred} not allowed", *chosen]) + "."
