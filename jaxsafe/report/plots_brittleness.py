"""Figures of the report on brittleness.

Colour groups a family with its control and tells maps apart, always beside a shape, a dash or a place of its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from jaxsafe.records.brittleness import About, Energy
from jaxsafe.records.run import Rate
from jaxsafe.report.sections import DAMAGED, Line
from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    WIDTH,
    Drawing,
    array,
    drawing,
    interval,
    layer_axis,
    level,
    log_axis,
    new_axes,
    note,
    one_line,
    percent,
    percent_axis,
    printable,
    styled,
    upright,
    value_of,
)

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
FAR = 4.0
"""Perplexities above this multiple of the dense model's share the margin of the figure."""

_SHAPES, _CONTROL_SHAPES = "soDPXph", "v^<>d"
_HUES = (LIGHT["harmful"], LIGHT["safe"], LIGHT["ink"])
_LINES = (
    (LIGHT["ink"], "-"),
    (LIGHT["harmful"], DASHED),
    (LIGHT["safe"], (0, (1.2, 1.4))),
    (LIGHT["muted"], (0, (7, 2, 1.5, 2))),
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A line of the table of rates, and what its `about` says."""

    line: Line
    about: About

    @property
    def name(self) -> str:
        """The group of variants that it is."""
        return self.line.row.group

    @property
    def rates(self) -> Mapping[str, Rate]:
        """Its rates by name."""
        return self.line.row.rates


def families(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by their family, in the order of the run, without the dense model, which comes first."""
    groups: dict[str, list[Point]] = {}
    for point in points[1:]:
        groups.setdefault(point.about.family, []).append(point)
    return groups


def parameters(point: Point) -> str:
    """What sets a point apart within its family: "q=0.01 p=0.002"; its name where it has no parameters."""
    pairs = [f"{key}={value}" for key, value in point.about.parameters.items()]
    return " ".join(pairs) or point.name


def _hues(groups: Mapping[str, Sequence[Point]]) -> dict[str, str]:
    """Family -> colour; a control takes the colour of the first family that is compared with it."""
    methods = [name for name, rows in groups.items() if not rows[0].line.control]
    hues = dict(zip(methods, itertools.cycle(_HUES), strict=False))
    home = {row.name: name for name, rows in groups.items() for row in rows}
    for name in methods:
        for row in groups[name]:
            control = home.get(row.line.row.control or "")
            if control:
                hues.setdefault(control, hues[name])
    return {name: hues.get(name, LIGHT["muted"]) for name in groups}


@styled
def against_perplexity(name: str, points: Sequence[Point], metric: str, ringed: str | None = None) -> Drawing:
    """An attack success rate with its interval against perplexity on a logarithmic scale.

    Args:
      name: prefix of the ids.
      points: the dense model first; where a model counts as damaged is shaded.
      metric: name of the rate.
      ringed: name of the point to be ringed.
    """
    figure, axes = new_axes(300)
    x = array([1.0, *(point.line.ratio for point in points[1:])]) * (points[0].line.row.perplexity or math.nan)
    far = np.isinf(x) | (x > FAR * x[0])
    nearest = np.nanmax(x[~far], initial=DAMAGED * x[0])
    edge = FAR * x[0] if far.any() else nearest
    _scatter(axes, points, np.where(far, edge * 1.2, x), metric, ringed)
    axes.set_xlim(np.nanmin(x) / 1.1, edge * 1.4 if far.any() else edge * 1.06)
    axes.axvspan(DAMAGED * x[0], edge * 2, color=LIGHT["rule"], alpha=0.45, linewidth=0)
    word = {"ha": "left", "va": "top", "color": LIGHT["muted"]}
    note(axes, "damaged", (DAMAGED * x[0], 1), (4, -3), ("data", "axes fraction"), **word)
    _plain_ticks(axes, edge if far.any() else None)
    axes.set_xlabel("perplexity")
    return drawing(figure, name, _trade_off_words("perplexity", points, metric, x))


def _plain_ticks(axes: Axes, margin: float | None) -> None:
    """Ticks of the logarithmic x axis; beyond `margin` there is only its name, for the scale ends there."""
    log_axis(axes.xaxis)
    low, high = axes.get_xlim()
    if high < 10 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    if margin is not None:
        ticks = [tick for tick in axes.xaxis.get_major_locator()() if low <= tick < margin * 0.9]
        axes.set_xticks([*ticks, margin * 1.2], [*(f"{tick:g}" for tick in ticks), f"> {margin:.3g}"])
        axes.axvline(margin, color=LIGHT["muted"], linewidth=0.8, linestyle=DASHED)
    axes.xaxis.set_minor_locator(NullLocator())


@styled
def against_accuracy(
    name: str, points: Sequence[Point], metric: str, accuracy: str, label: str, ringed: str | None = None
) -> Drawing:
    """An attack success rate with its interval against another metric, as in Figure 2 of arXiv 2402.05162.

    Args:
      name: prefix of the ids.
      points: the dense model first.
      metric, accuracy: names of the rates.
      label: name of the x axis.
      ringed: name of the point to be ringed.
    """
    figure, axes = new_axes(300)
    x = array(value_of(point.rates.get(accuracy)) for point in points)
    _scatter(axes, points, x, metric, ringed)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel(label)
    return drawing(figure, name, _trade_off_words(label, points, metric, x))


def _scatter(axes: Axes, points: Sequence[Point], x: np.ndarray, metric: str, ringed: str | None) -> None:
    """The points of every family in its shape and colour, controls hollow, the dense model a star."""
    groups = families(points)
    place = {point.name: value for point, value in zip(points, x, strict=True)}
    handles, hues = [], _hues(groups)
    shapes = {False: itertools.cycle(_SHAPES), True: itertools.cycle(_CONTROL_SHAPES)}
    for family, rows in groups.items():
        color, hollow = hues[family], rows[0].line.control
        look: dict[str, Any] = {
            "marker": next(shapes[hollow]),
            "color": color,
            "markerfacecolor": LIGHT["paper"] if hollow else color,
        }
        order = sorted((row for row in rows if not math.isnan(place[row.name])), key=lambda row: place[row.name])
        rates = [row.rates.get(metric) for row in order]
        at = array(place[row.name] for row in order)
        axes.vlines(at, *interval(rates), color=color, linewidth=1, alpha=0.5)
        line: dict[str, Any] = {
            "linewidth": 0,
            "markersize": 6.5,
            "markeredgewidth": 1.4,
            "clip_on": False,
            "zorder": 3,
        }
        axes.plot(at, array(map(value_of, rates)), **look, **line)
        handles.append(Line2D([], [], **look, linewidth=0, markeredgewidth=1.4, label=one_line(family, 24)))
        spots = [(a, value_of(r)) for a, r, row in zip(at, rates, order, strict=True) if row.name == ringed]
        for spot in spots:
            axes.plot(*spot, "o", markersize=14, color=LIGHT["ink"], markerfacecolor="none", clip_on=False, zorder=4)
    dense = points[0].rates.get(metric)
    star: dict[str, Any] = {"marker": "*", "color": LIGHT["ink"], "linewidth": 0, "markersize": 11}
    axes.axhline(value_of(dense), color=LIGHT["muted"], linewidth=0.8, linestyle=DASHED)
    axes.vlines(x[0], *interval([dense]), color=LIGHT["ink"], linewidth=1)
    axes.plot(x[0], value_of(dense), **star, clip_on=False, zorder=4)
    axes.legend(handles=[Line2D([], [], **star, label="dense model"), *handles], **LEGEND | {"ncols": 2})
    axes.set_ylim(-0.02, 1)
    percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.set_ylabel("attack success")


def _trade_off_words(what: str, points: Sequence[Point], metric: str, x: np.ndarray) -> str:
    pairs = [(point, at, value_of(point.rates.get(metric))) for point, at in zip(points, x, strict=True)]
    shown = [f"{point.name}: {percent(y)} at {at:.3g}" for point, at, y in pairs if not math.isnan(at + y)]
    return f"Attack success against {what}. " + "; ".join(shown)


@styled
def harmless(name: str, points: Sequence[Point], metric: str) -> Drawing:
    """The share of harmless prompts that each point refuses, with its interval, a row a point under its family.

    Args:
      name: prefix of the ids.
      points: the dense model first.
      metric: name of the rate.
    """
    rows = list(_listed(points, metric))
    figure, axes = new_axes(34 + 17.5 * len(rows))
    for y, (label, point) in enumerate(rows):
        if point is None:
            axes.text(-0.02, y, label, ha="right", va="center_baseline", transform=axes.get_yaxis_transform())
            continue
        rate = point.rates[metric]
        color = LIGHT["muted"] if point.line.control else LIGHT["safe"]
        face = LIGHT["paper"] if point.line.control else color
        axes.hlines(y, *interval([rate]), color=color, linewidth=1.4, alpha=0.6)
        axes.plot(value_of(rate), y, "o", color=color, markerfacecolor=face, markeredgewidth=1.4, clip_on=False)
    upright(axes, value_of(points[0].rates.get(metric)))
    axes.set_yticks([y for y, (_, point) in enumerate(rows) if point], [label for label, point in rows if point])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    rates = [point.rates[metric] for _, point in rows if point]
    reached = max((v for rate in rates for v in (rate.value, rate.ci_high) if v is not None), default=1)
    end = next(end for end in (0.2, 0.4, 1) if reached <= end or end == 1)
    percent_axis(axes.xaxis)
    axes.set_xticks([0, end / 2, end])
    axes.set_xlim(0, end)
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    shown = (f"{point.name} {percent(value_of(point.rates[metric]))}" for _, point in rows if point)
    return drawing(figure, name, "Harmless prompts refused: " + "; ".join(shown))


def _listed(points: Sequence[Point], metric: str) -> Iterator[tuple[str, Point | None]]:
    """The dense model, then each family's name (without a point) before its points."""
    if metric in points[0].rates:
        yield "dense model", points[0]
    for family, rows in families(points).items():
        measured = [row for row in rows if metric in row.rates]
        if measured:
            yield one_line(family, 26), None
        seen: dict[str, int] = {}
        for row in measured:
            label = printable(parameters(row), 23)
            seen[label] = seen.get(label, 0) + 1
            yield label if seen[label] == 1 else f"{label} #{seen[label]}", row


@styled
def heat_map(name: str, layers: Mapping[str, Sequence[float]], highest: float, what: str, color: str) -> Drawing:
    """The share of each map's weights that were selected in every layer, a cell a map and layer.

    Args:
      name: prefix of the ids.
      layers: map -> [L] shares in 0..1.
      highest: the share at which the scale ends, so that figures can be compared.
      what: whose weights these are, for the words of the figure.
      color: the tone of the cells, paler for less.
    """
    values = np.stack([array(layers[key]) for key in layers])
    figure, axes = new_axes(92 + 19 * len(values))
    edges = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, highest or 1)
    shades = ListedColormap([to_rgba(color, alpha) for alpha in np.linspace(0.06, 1, len(edges) - 1)])
    grid: dict[str, Any] = {"edgecolor": LIGHT["paper"], "linewidth": 0.6}
    mesh = axes.pcolormesh(values, cmap=shades, norm=BoundaryNorm(edges, shades.N), **grid)
    axes.set_yticks(np.arange(len(values)) + 0.5, [one_line(key, 12) for key in layers])
    axes.set_ylim(len(values), 0)
    layer_axis(axes, values.shape[1])
    axes.set_xlim(0, values.shape[1])
    ticks = np.arange(0, values.shape[1], math.ceil(values.shape[1] / 8))
    axes.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
    scale = figure.colorbar(mesh, ax=axes, location="top", aspect=30, pad=0.03, ticks=edges)
    scale.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    scale.ax.tick_params(length=0)
    scale.outline.set_visible(False)
    words = f"Share of weights of {what} in {values.shape[1]} layers; mean by map: {_means(layers, '.2%')}"
    return drawing(figure, name, words)


def _means(values: Mapping[str, Sequence[float]], form: str) -> str:
    rows = ((key, array(row)) for key, row in values.items())
    finite = ((key, row[np.isfinite(row)]) for key, row in rows)
    return ", ".join(f"{key} {row.mean():{form}}" for key, row in finite if row.size)


@styled
def per_layer(name: str, values: Mapping[str, Sequence[float]], label: str, chance: float | None = None) -> Drawing:
    """A number for every layer of every map: the maps of attention above, those of the MLP below.

    Args:
      name: prefix of the ids.
      values: map -> [L] numbers.
      label: name of the y axis.
      chance: the number that unrelated selections give, drawn as a level; or None.
    """
    others = tuple(key for key in values if key not in ATTENTION)
    panels = [[key for key in keys if key in values] for keys in (ATTENTION, others)]
    panels = [keys for keys in panels if keys]
    figure = Figure(figsize=(WIDTH / 72, (30 + 160 * len(panels)) / 72))
    rows = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, keys in zip(rows, panels, strict=True):
        for (color, dash), key in zip(itertools.cycle(_LINES), keys, strict=False):
            axes.plot(array(values[key]), color=color, linestyle=dash, linewidth=1.6, label=one_line(key, 12))
        if chance is not None:
            level(axes, chance, "chance", LIGHT["muted"], linestyle="-")
        axes.legend(**LEGEND | {"ncols": 4})
        axes.grid(axis="y")
    rows[0].set_ylim(bottom=0)
    layer_axis(rows[-1], max(len(value) for value in values.values()))
    figure.supylabel(label, fontsize=11.5, color=LIGHT["muted"])
    words = f"{label[:1].upper()}{label[1:]} in every layer; mean by map: {_means(values, '.2g')}"
    return drawing(figure, name, words)


@styled
def energy(name: str, found: Energy) -> Drawing:
    """The share of the output's energy in the top ranks of every map, on safety (solid) and utility data (dashed)."""
    ranks, safety, utility = found.ranks, found.safety, found.utility
    keys = [*dict.fromkeys([*safety, *utility])]
    count = math.ceil(len(keys) / 2)
    figure = Figure(figsize=(WIDTH / 72, (44 + 92 * count) / 72))
    grid = figure.subplots(count, 2, sharex=True, sharey=True, squeeze=False)
    for axes, key in itertools.zip_longest(grid.flat, keys):
        if key is None:
            axes.set_visible(False)
            continue
        for part, label, tone, dash in ((safety, "safety", "harmful", "-"), (utility, "utility", "safe", DASHED)):
            if key in part:
                axes.plot(array(ranks), array(part[key]), color=LIGHT[tone], linestyle=dash, label=label)
        note(axes, one_line(key, 12), (1, 0), (-3, 4), "axes fraction", ha="right")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.grid(axis="y")
        ticks = np.asarray(ranks)[:: math.ceil(len(ranks) / 5)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    # A column whose last panel is empty shows its ticks one row above.
    for axes in grid.flat[len(keys) - 2 : len(keys)]:
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    figure.supxlabel("top ranks", fontsize=11.5, color=LIGHT["muted"])
    first = ranks[0]
    shown = [
        f"{key} {label} {percent(float(array(part[key])[0]))}"
        for key in keys
        for label, part in (("safety", safety), ("utility", utility))
        if key in part
    ]
    return drawing(figure, name, f"Energy captured by the top {first} ranks: " + ", ".join(shown))
