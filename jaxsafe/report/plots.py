"""Figures of the reports: small matplotlib drawings returned as inline SVG that takes the page's colours and font.

A figure is 360 units wide, the width of a phone's text column, so its text is as large as the page's own.
Colour says safe or harmful; hollow or pale against solid says before or after; nothing is said by colour alone.
"""

import functools
import io
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

Row = Mapping[str, Any]
"""A record of run.json, any value of which may be None."""

LIGHT = {
    "ink": "#1e2329",
    "muted": "#5c6570",
    "rule": "#d3d7db",
    "paper": "#fdfdfb",
    "safe": "#0a5f9e",
    "harmful": "#ad3f08",
}
"""Role -> colour on light paper. Blue against vermilion stays apart in every common colour blindness."""
DARK = {
    "ink": "#e6e4df",
    "muted": "#a3abb5",
    "rule": "#3b424b",
    "paper": "#15181c",
    "safe": "#77bbee",
    "harmful": "#f59b6a",
}
"""Role -> colour on dark paper."""

WIDTH = 360
DASHED = (0, (4, 3))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxsafe",
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11.5,
    "axes.labelsize": 11.5,
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
}
_LEGEND: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 3}
_VARIABLES = {color: f"var(--{role}, {color})" for role, color in LIGHT.items()}

P = ParamSpec("P")


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draws under the style of the reports and leaves matplotlib's settings as they were."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an SVG element to be put into a page.

    Args:
      figure: drawn with the colours of `LIGHT`; each becomes the CSS variable of its role.
      name: prefix of every id, unique among the figures of the page.
      alt: what the figure shows, for those who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        # A style element inside an inline SVG would style the whole page.
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _inline(key, value, name) for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")


def _inline(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLES.get(match[0], match[0]), value)


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    return figure, figure.add_subplot()


def _array(values: Iterable[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _value(rate: Row | None, field: str = "value") -> float:
    value = (rate or {}).get(field)
    return math.nan if value is None else float(value)


def _label(text: object, limit: int = 30) -> str:
    """Text of unknown origin on one line that XML allows."""
    words = "".join(c if c.isprintable() else " " for c in str(text)).replace("_", " ").strip()
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _tone(harmful: object) -> str:
    return LIGHT["harmful"] if harmful else LIGHT["safe"]


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axis.set_ticks(np.linspace(0, 1, 5))


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers; within two decades also at 2 and 5."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@_styled
def rate_bars(name: str, comparisons: Sequence[Row]) -> str:
    """Refusal rates before (pale) and after (solid) with their intervals, two bars a set of prompts.

    Args:
      name: prefix of the ids.
      comparisons: records with label, harmful, before and after; a rate has value, ci_low, ci_high in 0..1.
    """
    figure, axes = _axes(26 + 58 * len(comparisons))
    for y, row in enumerate(comparisons):
        background = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1}
        label = _label(row["label"], 48)
        axes.text(0.004, y - 0.36, label, va="bottom", bbox=background)
        for when, offset, alpha in (("before", -0.17, 0.4), ("after", 0.14, 1.0)):
            rate = row.get(when)
            axes.barh(y + offset, _value(rate), height=0.27, color=_tone(row.get("harmful")), alpha=alpha)
            interval = _value(rate, "ci_low"), _value(rate, "ci_high")
            for color, width in ((LIGHT["paper"], 3), (LIGHT["ink"], 1.4)):
                axes.hlines(y + offset, *interval, color=color, linewidth=width)
            text = f"{_percent(_value(rate))} {when}"
            axes.text(1.03, y + offset, text, va="center_baseline", color=LIGHT["muted"])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(comparisons) - 0.6, -0.75)
    _percent_axis(axes.xaxis)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    changes = (f"{row['label']} {_change(row)}" for row in comparisons)
    return to_svg(figure, name, "Bars of refusal rates before and after: " + "; ".join(changes))


@_styled
def dumbbells(name: str, rows: Sequence[Row], harmful: bool) -> str:
    """Refusal rates of each kind of prompt before (hollow) and after (solid), joined by a line.

    Args:
      name: prefix of the ids.
      rows: records with kind, before and after, drawn from top to bottom.
      harmful: whether the prompts are harmful; sets the colour.
    """
    figure, axes = _axes(34 + 21 * len(rows))
    y = np.arange(len(rows))
    before, after = (np.array([_value(row.get(when)) for row in rows]) for when in ("before", "after"))
    tone = _tone(harmful)
    axes.hlines(y, before, after, color=tone, linewidth=2, alpha=0.5)
    dots: dict[str, Any] = {"s": 42, "edgecolor": tone, "linewidth": 1.5, "zorder": 3, "clip_on": False}
    axes.scatter(before, y, facecolor=LIGHT["paper"], **dots)
    axes.scatter(after, y, facecolor=tone, **dots)
    axes.set_yticks(y, [_label(row["kind"], 24) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    _percent_axis(axes.xaxis)
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="both")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], pad=9)
    changes = (f"{row['kind']} {_change(row)}" for row in rows)
    return to_svg(figure, name, "Refusal rates by kind of prompt before and after: " + "; ".join(changes))


def _change(row: Row) -> str:
    return f"{_percent(_value(row.get('before')))} to {_percent(_value(row.get('after')))}"


@_styled
def score_histogram(name: str, scores: Sequence[float], harmful: Sequence[bool], threshold: float | None) -> str:
    """Scores of harmful prompts above the axis and of safe prompts below it, with the threshold between them.

    Args:
      name: prefix of the ids.
      scores: [N] cosine scores.
      harmful: [N] whether each prompt is harmful.
      threshold: prompts at or above it count as harmful; None draws no line.
    """
    figure, axes = _axes(240)
    values, truth = _array(scores), np.array(harmful, dtype=bool)
    truth, values = truth[np.isfinite(values)], values[np.isfinite(values)]
    edges = np.histogram_bin_edges(values, bins=32)
    tallest = 1
    for group, sign, label in ((True, 1, "harmful prompts"), (False, -1, "safe prompts")):
        counts, _ = np.histogram(values[truth == group], edges)
        tallest = max(tallest, counts.max())
        axes.stairs(sign * counts, edges, fill=True, color=_tone(group), alpha=0.85)
        axes.text(
            0.02,
            0.5 + 0.48 * sign,
            label,
            transform=axes.transAxes,
            color=_tone(group),
            va="top" if group else "bottom",
        )
    axes.set_ylim(-1.15 * tallest, 1.15 * tallest)
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    if threshold is not None:
        _upright(axes, threshold)
        _note(axes, f"threshold {threshold:.3g}", (threshold, 1), (0, 4), ("data", "axes fraction"), ha="center")
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


def _note(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], coords: Any = "data", **style: Any
) -> None:
    """A word beside a point, shifted from it by some units of the page."""
    axes.annotate(text, at, xycoords=coords, xytext=shift, textcoords="offset points", **style)


def _upright(axes: Axes, x: float) -> None:
    axes.axvline(x, color=LIGHT["ink"], linewidth=1.2, linestyle=DASHED)


def _level(axes: Axes, y: float, label: str, color: str, **line: Any) -> None:
    """A horizontal line with its label above the right end."""
    axes.axhline(y, color=color, linewidth=1.2, **line)
    _note(axes, label, (1, y), (0, 3), ("axes fraction", "data"), ha="right", color=color)


@_styled
def roc(name: str, fpr: Sequence[float], tpr: Sequence[float], point: tuple[float, float, float] | None) -> str:
    """The receiver operating characteristic with the chosen threshold marked.

    Args:
      name: prefix of the ids.
      fpr, tpr: [K] false and true positive rates.
      point: (fpr, tpr, threshold) of the chosen threshold, or None.
    """
    figure, axes = _axes(240)
    axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=DASHED)
    axes.step(_array(fpr), _array(tpr), where="post", color=LIGHT["ink"], clip_on=False)
    alt = "Receiver operating characteristic."
    if point is not None:
        x, y, threshold = point
        axes.scatter(
            x, y, s=70, facecolor=LIGHT["paper"], edgecolor=LIGHT["ink"], linewidth=1.8, zorder=4, clip_on=False
        )
        side, across = ("right", -10) if x > 0.5 else ("left", 10)
        _note(axes, f"threshold {threshold:.3g}", (x, y), (across, -14 if y > 0.2 else 8), ha=side)
        alt += f" At threshold {threshold:.3g}: true positive rate {y:.1%}, false positive rate {x:.1%}."
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _percent_axis(axes.xaxis)
    _percent_axis(axes.yaxis)
    axes.grid()
    axes.tick_params(length=0, pad=7)
    axes.set_xlabel("safe prompts taken as harmful")
    axes.set_ylabel("harmful prompts found")
    return to_svg(figure, name, alt)


@_styled
def layer_norms(
    name: str, norm: Sequence[float], residual: Sequence[float] | None, layers: Sequence[int] | None
) -> str:
    """Norm of the direction and of the residual stream in every layer, on a logarithmic scale.

    Args:
      name: prefix of the ids.
      norm, residual: [L] norms; residual may be None.
      layers: (first, last) steered layer, shaded; or None.
    """
    figure, axes = _axes(240)
    axes.plot(_array(norm), color=LIGHT["ink"], label="refusal direction")
    if residual:
        axes.plot(_array(residual), color=LIGHT["muted"], linestyle=DASHED, label="residual stream")
    _log_axis(axes)
    axes.legend(**_LEGEND)
    axes.set_ylabel("norm")
    _layer_axis(axes, len(norm), layers)
    return to_svg(figure, name, f"Norm of the refusal direction in {len(norm)} layers, {_ends(norm)}.")


@_styled
def layer_separation(name: str, separation: Sequence[float], layers: Sequence[int] | None) -> str:
    """How well the projection on the direction separates harmful from safe prompts in every layer.

    Args:
      name: prefix of the ids.
      separation: [L] areas under the ROC curve in 0..1; 0.5 is chance.
      layers: (first, last) steered layer, shaded; or None.
    """
    figure, axes = _axes(240)
    values = _array(separation)
    axes.plot(values, color=LIGHT["ink"], marker="o", markersize=3.5, clip_on=False)
    _level(axes, 0.5, "chance", LIGHT["muted"], linestyle=DASHED)
    axes.set_ylim(min(0.45, float(np.nanmin(values, initial=0.45))), 1)
    axes.set_ylabel("area under the ROC curve")
    _layer_axis(axes, len(values), layers)
    return to_svg(figure, name, f"Separation of harmful and safe prompts in {len(values)} layers, {_ends(separation)}.")


def _layer_axis(axes: Axes, count: int, layers: Sequence[int] | None) -> None:
    if layers is not None:
        axes.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=LIGHT["rule"], alpha=0.6, linewidth=0)
        middle = (layers[0] + layers[-1]) / 2
        _note(axes, "steered", (middle, 0), (0, 4), ("data", "axes fraction"), ha="center", color=LIGHT["muted"])
    axes.set_xlim(-0.5, count - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")


def _ends(values: Sequence[float]) -> str:
    first, last = _array(values)[[0, -1]]
    return f"from {first:.3g} in the first to {last:.3g} in the last"


@_styled
def strength_refusals(name: str, candidates: Sequence[Row]) -> str:
    """Refusal of safe and of harmful prompts against the strength, for one range of layers.

    Args:
      name: prefix of the ids.
      candidates: records with alpha_rel, refusal_safe, refusal_harmful, allowed, chosen; one range of layers.
        Those not allowed are drawn grey and hollow; the chosen one is marked.
    """
    figure, axes = _axes(240)
    rows = [row for group in by_layers(candidates).values() for row in group]
    alpha = _array(row["alpha_rel"] for row in rows)
    for field, harmful, marker in (("refusal_harmful", True, "s"), ("refusal_safe", False, "o")):
        label = "harmful prompts" if harmful else "safe prompts"
        _candidates(axes, rows, alpha, _array(row.get(field) for row in rows), _tone(harmful), marker, label)
    _mark_chosen(axes, rows, 0.6)
    axes.set_ylim(0, 1)
    _percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.set_ylabel("refused")
    axes.set_xlabel("strength (fraction of the residual norm)")
    axes.legend(**_LEGEND)
    return to_svg(figure, name, "Refusal rates against strength. " + _candidate_words(rows))


@_styled
def strength_cost(name: str, candidates: Sequence[Row], limit: float | None) -> str:
    """Divergence on benign prompts against the strength, a line for each range of layers, with the limit.

    Args:
      name: prefix of the ids.
      candidates: records with alpha_rel, layers, kl_benign (nats), allowed, chosen.
        The scale is logarithmic, so zeros are left out.
      limit: largest divergence allowed in nats, or None.
    """
    figure, axes = _axes(240)
    dashes = itertools.cycle((DASHED, (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))))
    for index, (layers, rows) in enumerate(by_layers(candidates).items()):
        alpha, cost = (_array(row.get(field) for row in rows) for field in ("alpha_rel", "kl_benign"))
        cost[~(cost > 0)] = math.nan
        chosen = any(row.get("chosen") for row in rows)
        color, dash = (LIGHT["ink"], "-") if chosen else (LIGHT["muted"], next(dashes))
        label = layers if index else f"layers {layers}"
        _candidates(axes, rows, alpha, cost, color, "o", label, linestyle=dash)
        _mark_chosen(axes, rows, 0.05)
    if limit is not None:
        _level(axes, limit, f"limit {limit:g}", LIGHT["harmful"])
    _log_axis(axes)
    axes.set_ylabel("KL on benign prompts (nats)")
    axes.set_xlabel("strength (fraction of the residual norm)")
    axes.legend(**_LEGEND)
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
        _upright(axes, alpha)
        _note(axes, "chosen", (alpha, height), (shift, 0), ("data", "axes fraction"), ha=side, va="center")


def _candidate_words(rows: Sequence[Row]) -> str:
    chosen = [f"Chosen: strength {row['alpha_rel']:g}" for row in rows if row.get("chosen")]
    barred = sum(row.get("allowed") is False for row in rows)
    return "; ".join([f"{len(rows)} candidates, {barred} not allowed", *chosen]) + "."
