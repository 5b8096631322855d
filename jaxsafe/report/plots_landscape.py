"""Figures of the report on the safety landscape: safety above, capability below, along lines and over a plane.

A random control is dashed and hollow beside the line that it is the control of.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxsafe.records.run import Rate, TableRow
from jaxsafe.report.sections import DAMAGED
from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    WIDTH,
    Drawing,
    array,
    drawing,
    interval,
    level,
    log_axis,
    new_axes,
    one_line,
    percent,
    percent_axis,
    styled,
    value_of,
)

UNREFUSED: dict[str, Any] = {"color": LIGHT["harmful"], "marker": "o"}
COMPLIED: dict[str, Any] = {"color": LIGHT["ink"], "marker": "s", "linewidth": 1.2, "markersize": 3.5}
BROKEN: dict[str, Any] = {"color": LIGHT["muted"], "linestyle": (0, (1.2, 1.4))}
HOLLOW: dict[str, Any] = {"linestyle": DASHED, "markerfacecolor": LIGHT["paper"]}


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of the rates that are drawn: no refusal seen, complied, broken."""

    unrefused: str
    complied: str
    broken: str


@dataclasses.dataclass(frozen=True)
class Walk:
    """The points of a line by their offsets, the model itself among them; label: of the line."""

    label: str
    offsets: tuple[float, ...]
    rows: tuple[TableRow, ...]

    def rates(self, name: str) -> list[Rate | None]:
        """A rate at every point."""
        return [row.rates.get(name) for row in self.rows]

    def values(self, name: str) -> Float[np.ndarray, " P"]:
        """The values of a rate."""
        return array(map(value_of, self.rates(name)))

    @property
    def perplexity(self) -> Float[np.ndarray, " P"]:
        """Of each point, NaN where there is none."""
        return array(row.perplexity for row in self.rows)


@styled
def curves(name: str, walk: Walk, names: Names, origin: TableRow, control: Walk | None = None) -> Drawing:
    """Safety and, where it was measured, perplexity along a line, each draw of it thin, and its random control."""
    measured = bool(np.isfinite(walk.perplexity).any())
    figure = Figure(figsize=(WIDTH / 72, (400 if measured else 280) / 72))
    above, *below = figure.subplots(1 + measured, 1, sharex=True, height_ratios=(2, 1)[: 1 + measured], squeeze=False)[
        :, 0
    ]
    _safety(above, walk, names, control)
    for axes in below:
        _perplexity(axes, walk, origin, control)
    for axes in (above, *below):
        axes.grid(axis="y")
        axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
    axes.set_xlabel(f"offset, {one_line(walk.label, 40)}")
    return drawing(figure, name, _words(walk, names))


def _safety(axes: Axes, walk: Walk, names: Names, control: Walk | None) -> None:
    _draws(axes, walk, names.unrefused)
    axes.fill_between(walk.offsets, *interval(walk.rates(names.unrefused)), color=LIGHT["harmful"], alpha=0.15, lw=0)
    axes.plot(walk.offsets, walk.values(names.unrefused), **UNREFUSED, clip_on=False, label="no refusal seen")
    axes.plot(walk.offsets, walk.values(names.complied), **COMPLIED, clip_on=False, label="complied")
    axes.plot(walk.offsets, walk.values(names.broken), **BROKEN, label="broken")
    if control is not None:
        look = UNREFUSED | HOLLOW
        axes.plot(control.offsets, control.values(names.unrefused), **look, clip_on=False, label=control.label)
    axes.set_ylim(-0.02, 1.02)
    percent_axis(axes.yaxis)
    axes.set_ylabel("harmful prompts")
    axes.legend(**LEGEND | {"ncols": 2})


def _perplexity(axes: Axes, walk: Walk, origin: TableRow, control: Walk | None) -> None:
    look: dict[str, Any] = {"color": LIGHT["safe"], "marker": "o", "clip_on": False}
    axes.plot(walk.offsets, walk.perplexity, **look)
    if control is not None:
        axes.plot(control.offsets, control.perplexity, **look, **HOLLOW)
    if origin.perplexity:
        level(axes, DAMAGED * origin.perplexity, "damaged above", LIGHT["muted"], linestyle=DASHED)
    log_axis(axes.yaxis)
    axes.set_ylabel("perplexity")


def _draws(axes: Axes, walk: Walk, name: str) -> None:
    """A thin line for every draw of the direction; the model itself is the same for all."""
    draws = max(len(row.seeds.get(name, ())) for row in walk.rows)
    for draw in range(draws if draws > 1 else 0):
        shares = [row.seeds.get(name, (None,)) for row in walk.rows]
        values = array(share[min(draw, len(share) - 1)] for share in shares)
        axes.plot(walk.offsets, values, color=LIGHT["harmful"], linewidth=0.7, alpha=0.6)


def _words(walk: Walk, names: Names) -> str:
    points = zip(walk.offsets, walk.values(names.unrefused), walk.values(names.broken), walk.perplexity, strict=True)
    shown = (
        f"{a:+.3g}: {percent(u)} ({percent(b)} broken)" + (f", perplexity {p:.3g}" if np.isfinite(p) else "")
        for a, u, b, p in points
    )
    return f"No refusal seen by offset ({walk.label}). " + "; ".join(shown)


@dataclasses.dataclass(frozen=True)
class Plane:
    """A rate and the perplexity over two offsets, each of them [A A] with the first offset along x."""

    offsets: tuple[float, ...]
    share: Float[np.ndarray, "A A"]
    perplexity: Float[np.ndarray, "A A"]


@styled
def contours(name: str, plane: Plane, label: str, origin: TableRow) -> Drawing:
    """A rate over a plane, darker for more; the line is where perplexity says that the model is damaged."""
    figure, axes = new_axes(360)
    edges = np.linspace(0, 1, 11)
    shades = ListedColormap([to_rgba(LIGHT["harmful"], alpha) for alpha in np.linspace(0.04, 0.95, len(edges) - 1)])
    filled = axes.contourf(
        plane.offsets, plane.offsets, plane.share, levels=edges, cmap=shades, norm=BoundaryNorm(edges, shades.N)
    )
    bound = DAMAGED * (origin.perplexity or np.inf)
    finite = np.where(np.isfinite(plane.perplexity), plane.perplexity, 1e30)
    if (finite > bound).any():
        axes.contour(
            plane.offsets,
            plane.offsets,
            np.log(finite),
            levels=[np.log(bound)],
            colors=LIGHT["ink"],
            linestyles="dashed",
            linewidths=1.2,
        )
    axes.plot(0, 0, "+", color=LIGHT["ink"], markersize=9)
    axes.set_aspect("equal")
    axes.set_xlabel("offset, first direction")
    axes.set_ylabel("offset, second direction")
    scale = figure.colorbar(filled, ax=axes, location="top", aspect=30, pad=0.03, ticks=edges[::2])
    scale.ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    scale.ax.tick_params(length=0)
    scale.outline.set_visible(False)
    middle = len(plane.offsets) // 2
    words = f"{label} over a plane: {percent(plane.share[middle, middle])} at the model itself, "
    corners = plane.share[[0, 0, -1, -1], [0, -1, 0, -1]]
    return drawing(figure, name, words + f"{percent(float(np.mean(corners)))} on average at the corners")
