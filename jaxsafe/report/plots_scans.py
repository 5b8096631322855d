"""Figures of what a SCANS run has of its own: classifier, directions, strength.

Colour says safe or harmful; nothing is said by colour alone.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxsafe.intervals import wilson
from jaxsafe.model.layers import LayerRange
from jaxsafe.records.scans import Candidate, Curve, Scores
from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    Drawing,
    array,
    drawing,
    ends,
    layer_axis,
    level,
    log_axis,
    new_axes,
    note,
    percent_axis,
    styled,
    tone,
    upright,
)


@styled
def score_histogram(name: str, split: Scores, threshold: float) -> Drawing:
    """Scores of harmful prompts above the axis and of safe prompts below it, with the threshold between them."""
    figure, axes = new_axes(240)
    values, truth = array(split.scores), np.array(split.harmful, dtype=bool)
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
    upright(axes, threshold)
    note(axes, f"threshold {threshold:.3g}", (threshold, 1), (0, 4), ("data", "axes fraction"), ha="center")
    axes.set_xlabel("mean cosine with the harmful reference")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{abs(count):.0f}"))
    axes.set_ylabel("prompts")
    return drawing(figure, name, _histogram_words(values, truth, threshold))


def _histogram_words(values: np.ndarray, truth: np.ndarray, threshold: float) -> str:
    groups = (("harmful", values[truth]), ("safe", values[~truth]))
    medians = [f"{label} prompts: median {np.median(group):.2f}" for label, group in groups if group.size]
    return "Histogram of scores. " + "; ".join([*medians, f"threshold {threshold:.3g}"])


@styled
def roc(name: str, curve: Curve, threshold: float, calibration: Curve | None = None) -> Drawing:
    """The receiver operating characteristic with the point of the verdict score >= threshold marked.

    That of the calibration prompts, on which the threshold may have been chosen, is drawn thin and dashed.
    """
    figure, axes = new_axes(240)
    axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
    if calibration is not None:
        look: dict[str, Any] = {"color": LIGHT["muted"], "linewidth": 1.2, "linestyle": DASHED}
        axes.step(array(calibration.fpr), array(calibration.tpr), where="post", label="calibration", **look)
    axes.step(array(curve.fpr), array(curve.tpr), where="post", color=LIGHT["ink"], clip_on=False, label="test")
    axes.legend(**LEGEND)
    x, y = chosen_point(curve, threshold)
    dot: dict[str, Any] = {"facecolor": LIGHT["paper"], "edgecolor": LIGHT["ink"], "linewidth": 1.8}
    axes.scatter(x, y, s=70, zorder=4, clip_on=False, **dot)
    side, across = ("right", -10) if x > 0.5 else ("left", 10)
    note(axes, f"threshold {threshold:.3g}", (x, y), (across, -14 if y > 0.2 else 8), ha=side)
    alt = f"At threshold {threshold:.3g}: true positive rate {y:.1%}, false positive rate {x:.1%}."
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.grid()
    axes.tick_params(length=0, pad=7)
    axes.set_xlabel("safe prompts taken as harmful")
    axes.set_ylabel("harmful prompts found")
    return drawing(figure, name, f"Receiver operating characteristic. {alt}")


def chosen_point(curve: Curve, threshold: float) -> tuple[float, float]:
    """The (fpr, tpr) that score >= threshold gives: those of the smallest threshold of the curve not below it."""
    above = [i for i, cut in enumerate(curve.thresholds) if cut >= threshold]
    index = min(above, key=lambda i: curve.thresholds[i], default=0)
    return curve.fpr[index], curve.tpr[index]


@styled
def layer_norms(name: str, norm: Sequence[float], residual: Sequence[float], steered: LayerRange) -> Drawing:
    """Norm of the direction and of the residual stream [L] in every layer, on a logarithmic scale."""
    figure, axes = new_axes(240)
    axes.plot(array(norm), color=LIGHT["ink"], label="refusal direction")
    axes.plot(array(residual), color=LIGHT["muted"], linestyle=DASHED, label="residual stream")
    log_axis(axes.yaxis)
    axes.legend(**LEGEND)
    axes.set_ylabel("norm")
    layer_axis(axes, len(norm), steered)
    return drawing(figure, name, f"Norm of the refusal direction in {len(norm)} layers, {ends(norm)}.")


@styled
def layer_separation(name: str, separation: Sequence[float], steered: LayerRange) -> Drawing:
    """How well the projection on the direction separates harmful from safe prompts in every layer.

    Args:
      name: prefix of the ids.
      separation: [L] areas under the ROC curve in 0..1; 0.5 is chance.
      steered: the layers that are shaded.
    """
    figure, axes = new_axes(240)
    values = array(separation)
    axes.plot(values, color=LIGHT["ink"], marker="o", markersize=3.5, clip_on=False)
    level(axes, 0.5, "chance", LIGHT["muted"], linestyle=DASHED)
    axes.set_ylim(min(0.45, float(np.nanmin(values, initial=0.45))), 1)
    axes.set_ylabel("area under the ROC curve")
    layer_axis(axes, len(values), steered)
    return drawing(figure, name, f"Separation of harmful and safe prompts in {len(values)} layers, {ends(separation)}.")


@styled
def strength_refusals(name: str, rows: Sequence[Candidate], counts: tuple[int, int]) -> Drawing:
    """Refusal of safe and of harmful prompts against the strength, for one range of layers, weakest first.

    `counts` are the numbers of safe and of harmful prompts, from which the 95% intervals follow. Candidates that are
    not allowed are grey and hollow; the chosen one is marked.
    """
    figure, axes = new_axes(240)
    for harmful, marker, word in ((True, "s", "harmful"), (False, "o", "safe")):
        rates, n = array(row.refusal_harmful if harmful else row.refusal_safe for row in rows), counts[harmful]
        ends = np.array([wilson(rate, n) for rate in rates]).T
        axes.vlines(array(row.alpha_rel for row in rows), *ends, color=tone(harmful), linewidth=1, alpha=0.5)
        _candidates(axes, rows, rates, marker=marker, color=tone(harmful), label=f"{word} (n = {n})")
    _mark_chosen(axes, rows, 0.6)
    axes.set_ylim(0, 1)
    percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.set_ylabel("refused")
    axes.set_xlabel("strength (fraction of the residual norm)")
    axes.legend(**LEGEND)
    return drawing(figure, name, "Refusal rates against strength. " + _candidate_words(rows))


@styled
def strength_cost(name: str, candidates: Sequence[Candidate], limit: float) -> Drawing:
    """Divergence on benign prompts against the strength, a line for each range of layers, with the limit in nats.

    The scale is logarithmic, so zeros are left out.
    """
    figure, axes = new_axes(240)
    dashes = itertools.cycle((DASHED, (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))))
    for index, (layers, rows) in enumerate(by_layers(candidates).items()):
        cost = array(row.kl_benign for row in rows)
        cost[~(cost > 0)] = math.nan
        color, dash = (LIGHT["ink"], "-") if any(row.chosen for row in rows) else (LIGHT["muted"], next(dashes))
        label = f"{layers}" if index else f"layers {layers}"
        _candidates(axes, rows, cost, marker="o", color=color, label=label, linestyle=dash)
        _mark_chosen(axes, rows, 0.05)
    level(axes, limit, f"limit {limit:g}", LIGHT["harmful"])
    log_axis(axes.yaxis)
    axes.set_ylabel("KL on benign prompts (nats)")
    axes.set_xlabel("strength (fraction of the residual norm)")
    axes.legend(**LEGEND)
    return drawing(figure, name, "Divergence on benign prompts against strength. " + _candidate_words(candidates))


def by_layers(candidates: Sequence[Candidate]) -> dict[LayerRange, list[Candidate]]:
    """Candidates by their range of layers, weakest first."""
    groups: dict[LayerRange, list[Candidate]] = {}
    for row in sorted(candidates, key=lambda row: (row.layers, row.alpha_rel)):
        groups.setdefault(row.layers, []).append(row)
    return groups


def _candidates(axes: Axes, rows: Sequence[Candidate], y: np.ndarray, **line: Any) -> None:
    """A line through all candidates; markers filled where a candidate is allowed, grey and hollow where not."""
    x = array(row.alpha_rel for row in rows)
    barred = np.array([not row.allowed for row in rows])
    hollow: dict[str, Any] = {"color": LIGHT["muted"], "markerfacecolor": LIGHT["paper"], "linestyle": "none"}
    axes.plot(x, y, markevery=~barred, linewidth=1.4, clip_on=False, **line)
    axes.plot(x[barred], y[barred], marker=line["marker"], clip_on=False, **hollow)


def _mark_chosen(axes: Axes, rows: Sequence[Candidate], height: float) -> None:
    """An upright at the chosen strength, its label on the roomier side at a height in fractions of the axes."""
    for alpha in [row.alpha_rel for row in rows if row.chosen]:
        side, shift = ("right", -5) if alpha > np.mean(axes.get_xlim()) else ("left", 5)
        upright(axes, alpha)
        note(axes, "chosen", (alpha, height), (shift, 0), ("data", "axes fraction"), ha=side, va="center")


def _candidate_words(rows: Sequence[Candidate]) -> str:
    chosen = [f"Chosen: strength {row.alpha_rel:g} in layers {row.layers}" for row in rows if row.chosen]
    barred = sum(not row.allowed for row in rows)
    return "; ".join([f"{len(rows)} candidates, {barred} not allowed", *chosen]) + "."
