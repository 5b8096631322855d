"""Figures that the report of any run may have: refusals of the same prompts by two groups of variants.

Colour says safe or harmful; hollow or pale against solid says first or second.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsafe.records.run import Comparison, KindRates
from jaxsafe.report.style import (
    LIGHT,
    Drawing,
    drawing,
    interval,
    new_axes,
    one_line,
    percent,
    percent_axis,
    styled,
    tone,
    value_of,
)


@styled
def rate_bars(name: str, comparisons: Sequence[Comparison]) -> Drawing:
    """Refusal rates of the first (pale) and the second group (solid) with intervals, two bars a set of prompts."""
    figure, axes = new_axes(26 + 58 * len(comparisons))
    for y, row in enumerate(comparisons):
        background = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1}
        axes.text(0.004, y - 0.36, one_line(row.label, 48), va="bottom", bbox=background)
        groups = ((row.first, row.first_rate, -0.17, 0.4), (row.second, row.second_rate, 0.14, 1.0))
        for group, rate, offset, alpha in groups:
            axes.barh(y + offset, value_of(rate), height=0.27, color=tone(row.harmful), alpha=alpha)
            ends = interval([rate])
            for color, width in ((LIGHT["paper"], 3), (LIGHT["ink"], 1.4)):
                axes.hlines(y + offset, *ends, color=color, linewidth=width)
            text = f"{percent(value_of(rate))} {one_line(group, 16)}"
            axes.text(1.03, y + offset, text, va="center_baseline", color=LIGHT["muted"])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(comparisons) - 0.6, -0.75)
    percent_axis(axes.xaxis)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    changes = (f"{row.label} {percent(value_of(row.first_rate))} to {_end(row)}" for row in comparisons)
    return drawing(figure, name, "Bars of refusal rates: " + "; ".join(changes))


def _end(row: Comparison) -> str:
    return percent(value_of(row.second_rate))


@styled
def dumbbells(name: str, kinds: Sequence[KindRates], harmful: bool | None) -> Drawing:
    """Refusal rates of each kind of prompt by the first (hollow) and the second group (solid), joined by a line.

    Args:
      name: prefix of the ids.
      kinds: drawn from top to bottom.
      harmful: whether the prompts are harmful; sets the colour.
    """
    figure, axes = new_axes(34 + 21 * len(kinds))
    y = np.arange(len(kinds))
    first = np.array([value_of(kind.first) for kind in kinds])
    second = np.array([value_of(kind.second) for kind in kinds])
    color = tone(harmful)
    axes.hlines(y, first, second, color=color, linewidth=2, alpha=0.5)
    dots: dict[str, Any] = {"s": 42, "edgecolor": color, "linewidth": 1.5, "zorder": 3, "clip_on": False}
    axes.scatter(first, y, facecolor=LIGHT["paper"], **dots)
    axes.scatter(second, y, facecolor=color, **dots)
    axes.set_yticks(y, [one_line(kind.kind, 24) for kind in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="both")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], pad=9)
    changes = (f"{kind.kind} {percent(a)} to {percent(b)}" for kind, a, b in zip(kinds, first, second, strict=True))
    return drawing(figure, name, "Refusal rates by kind of prompt: " + "; ".join(changes))
