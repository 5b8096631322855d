"""Figures of the report on the anatomy of safety.

Marks and dashes say what colour says.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jaxsafe.model.layers import LayerRange
from jaxsafe.records.anatomy import Gap, Overlap, RoleCount
from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    WIDTH,
    Drawing,
    array,
    drawing,
    ends,
    layer_axis,
    level,
    new_axes,
    note,
    shade_layers,
    styled,
)

_LOOKS = {
    "safety": (LIGHT["harmful"], "-"),
    "utility": (LIGHT["safe"], DASHED),
    "redundant": (LIGHT["muted"], (0, (1.2, 1.4))),
}
"""Role -> colour and dash; complex units are all others."""
RATIOS = np.arange(-4, 5)
"""Powers of two at which the shades of the agreement change; beyond the outermost there is one."""


@styled
def roles(name: str, counts: Sequence[RoleCount]) -> Drawing:
    """How many units of each layer are of safety, of utility and redundant."""
    figure, axes = new_axes(200)
    shown = [count for count in counts if count.role in _LOOKS]
    for count in shown:
        color, dash = _LOOKS[count.role]
        axes.plot(array(count.layers), color=color, linestyle=dash, linewidth=1.6, label=count.role)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("units")
    axes.grid(axis="y")
    axes.legend(**LEGEND)
    layer_axis(axes, len(counts[0].layers))
    return drawing(figure, name, "Units by layer: " + "; ".join(f"{c.role} {ends(c.layers)}" for c in shown))


@styled
def gap(name: str, found: Gap, layers: LayerRange | None) -> Drawing:
    """Mean cosines of pairs of prompts above, the gap between kinds with its interval below; `layers` are shaded."""
    figure = Figure(figsize=(WIDTH / 72, 340 / 72))
    above, below = figure.subplots(2, 1, sharex=True)
    for label, curve, color, dash in (
        ("both normal", found.normal, LIGHT["safe"], "-"),
        ("both malicious", found.malicious, LIGHT["harmful"], (0, (1.2, 1.4))),
        ("one of each", found.mixed, LIGHT["ink"], DASHED),
    ):
        above.plot(array(curve), color=color, linestyle=dash, linewidth=1.6, label=label)
    above.set_ylabel("cosine")
    above.grid(axis="y")
    above.legend(**LEGEND | {"ncols": 2})
    at = np.arange(len(found.gap))
    below.fill_between(at, array(found.low), array(found.high), color=LIGHT["harmful"], alpha=0.25, linewidth=0)
    below.plot(at, array(found.gap), color=LIGHT["harmful"], linewidth=1.6)
    level(below, 0, "no gap", LIGHT["muted"], linestyle="-")
    below.set_ylabel("gap, degrees")
    below.grid(axis="y")
    layer_axis(below, len(found.gap))
    if layers is not None:
        for axes in (above, below):
            shade_layers(axes, layers)
    where = f"layers {layers} are shaded" if layers else "no layers are shaded"
    return drawing(figure, name, f"Gap in degrees {ends(found.gap)} layer; {where}")


def pair_name(overlap: Overlap) -> str:
    """A pair as "weights · units"."""
    return f"{overlap.first} · {overlap.second}"


@styled
def agreement(name: str, overlaps: Sequence[Overlap], layers: LayerRange | None) -> Drawing:
    """A strip of layers a pair: its overlap as a multiple of chance, + above and − below all that is random.

    `layers` are framed.
    """
    figure, axes = new_axes(70 + 32 * len(overlaps))
    tones = [to_rgba(LIGHT["safe"], a) for a in (1, 0.65, 0.35, 0.1)]
    tones += [to_rgba(LIGHT["harmful"], a) for a in (0.1, 0.35, 0.65, 1)]
    shades, edge = ListedColormap(tones), BoundaryNorm(RATIOS, len(tones))
    L = max(len(overlap.values) for overlap in overlaps)
    for row, overlap in enumerate(overlaps):
        y = 2.0 * row
        power = _powers(overlap)
        mesh = axes.pcolormesh(
            np.arange(L + 1) - 0.5,
            [y + 1, y + 2],
            np.ma.masked_invalid(power)[None],
            cmap=shades,
            norm=edge,
            edgecolor=LIGHT["paper"],
            linewidth=0.4,
        )
        note(axes, pair_name(overlap), (-0.5, y + 0.9), (0, 1), ha="left", va="bottom", color=LIGHT["ink"])
        for layer, mark in enumerate(_marks(overlap)):
            strong = abs(power[layer]) >= 2
            color = LIGHT["paper"] if strong else LIGHT["ink"]
            axes.text(layer, y + 1.5, mark, ha="center", va="center", fontsize=7, color=color)
        if layers is not None:
            axes.hlines(y + 2.12, layers.first - 0.5, layers.stop - 0.5, color=LIGHT["ink"], linewidth=1.6)
    axes.set_ylim(2 * len(overlaps) + 0.4, 0)
    layer_axis(axes, L)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    scale = figure.colorbar(mesh, ax=axes, location="top", aspect=34, pad=0.01, ticks=RATIOS[1:-1])
    scale.ax.xaxis.set_major_formatter(FuncFormatter(lambda power, _: _times(round(power))))
    scale.ax.tick_params(length=0)
    scale.outline.set_visible(False)
    return drawing(figure, name, "Overlap by chance, mean over layers: " + "; ".join(map(_words, overlaps)))


def _times(power: int) -> str:
    return f"×{2**power}" if power >= 0 else f"÷{2**-power}"


def _powers(overlap: Overlap) -> np.ndarray:
    """The logarithm to base 2 of an overlap by chance, within the shades; NaN where there is none."""
    values, chance = array(overlap.values), array(overlap.chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log2(values / chance), RATIOS[0] + 0.01, RATIOS[-1] - 0.01)


def _marks(overlap: Overlap) -> list[str]:
    values, low, high = array(overlap.values), array(overlap.low), array(overlap.high)
    return ["+" if value > b else "−" if value < a else "" for value, a, b in zip(values, low, high, strict=True)]


def _words(overlap: Overlap) -> str:
    values, chance = array(overlap.values), array(overlap.chance)
    known = np.isfinite(values) & np.isfinite(chance)
    if not known.any():
        return f"{pair_name(overlap)} nothing"
    return f"{pair_name(overlap)} {values[known].mean():.2g} by {chance[known].mean():.2g}"
