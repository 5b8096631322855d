"""Figures that the report of any run may have: what becomes of prompts, by group of variants.

Colour says safe or harmful; hollow or pale against solid says first or second; hatched is broken.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from jaxsafe.records.run import Comparison, KindRates, Rate
from jaxsafe.report.style import (
    LEGEND,
    LIGHT,
    Drawing,
    drawing,
    interval,
    new_axes,
    one_line,
    percent,
    percent_axis,
    printable,
    styled,
    tone,
    value_of,
)

BROKEN: dict[str, Any] = {"facecolor": LIGHT["paper"], "edgecolor": LIGHT["muted"], "hatch": "////", "linewidth": 0.8}
COMPLIED: dict[str, Any] = {"color": LIGHT["harmful"]}
REFUSED: dict[str, Any] = {"color": LIGHT["safe"], "alpha": 0.4}
"""How outcomes are drawn."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What becomes of harmful prompts under one group of variants; the rest is refused."""

    name: str
    complied: Rate
    broken: Rate


@styled
def rate_bars(name: str, comparisons: Sequence[Comparison]) -> Drawing:
    """Refusals of the first (pale) and the second group (solid) with intervals, two bars a set of prompts.

    Broken answers are stacked upon them, hatched; what is left to the right complied.
    """
    figure, axes = new_axes(26 + 58 * len(comparisons))
    for y, row in enumerate(comparisons):
        background = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1}
        axes.text(0.004, y - 0.36, f"{one_line(row.label, 40)}, n = {row.n}", va="bottom", bbox=background)
        groups = (
            (row.first, row.first_rate, row.first_broken, -0.17, 0.4),
            (row.second, row.second_rate, row.second_broken, 0.14, 1.0),
        )
        for group, rate, broken, offset, alpha in groups:
            axes.barh(y + offset, value_of(rate), height=0.27, color=tone(row.harmful), alpha=alpha)
            axes.barh(y + offset, value_of(broken), left=value_of(rate), height=0.27, **BROKEN)
            _interval(axes, y + offset, rate)
            text = f"{percent(value_of(rate))} {one_line(group, 16)}"
            axes.text(1.03, y + offset, text, va="center_baseline", color=LIGHT["muted"])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(comparisons) - 0.6, -0.75)
    percent_axis(axes.xaxis)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return drawing(figure, name, "Bars of refusal rates: " + "; ".join(map(_change, comparisons)))


def _interval(axes: Axes, y: float, rate: Rate) -> None:
    """The interval of a rate as a dark line with a light edge, which stands out on every bar."""
    for color, width in ((LIGHT["paper"], 3), (LIGHT["ink"], 1.4)):
        axes.hlines(y, *interval([rate]), color=color, linewidth=width)


def _change(row: Comparison) -> str:
    rates = (row.first_rate, row.second_rate, row.first_broken, row.second_broken)
    refused, now, broken, now_broken = (percent(value_of(rate)) for rate in rates)
    return f"{row.label} {refused} to {now}, broken {broken} to {now_broken}"


@styled
def outcomes(name: str, rows: Sequence[Outcomes]) -> Drawing:
    """What becomes of harmful prompts, a stacked bar a variant: complied, broken (hatched) and refused (pale).

    The line is the 95% interval of the share that complied, the number behind a variant that of its answers.
    """
    figure, axes = new_axes(48 + 34 * len(rows))
    for y, row in enumerate(rows):
        complied, broken = value_of(row.complied), value_of(row.broken)
        refused = max(0.0, 1 - complied - broken)
        axes.text(0, y - 0.26, f"{printable(row.name, 48)} ({row.complied.n})", va="bottom")
        axes.barh(y, complied, height=0.4, **COMPLIED)
        axes.barh(y, broken, left=complied, height=0.4, **BROKEN)
        axes.barh(y, refused, left=complied + broken, height=0.4, **REFUSED)
        _interval(axes, y, row.complied)
    axes.set_ylim(len(rows) - 0.7, -0.8)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    looks = {"complied": COMPLIED, "broken": BROKEN, "refused": REFUSED}
    axes.legend(handles=[Patch(label=label, **look) for label, look in looks.items()], **LEGEND)
    shown = (f"{r.name} {percent(value_of(r.complied))} complied, {percent(value_of(r.broken))} broken" for r in rows)
    return drawing(figure, name, "Outcomes of harmful prompts: " + "; ".join(shown))


@styled
def dumbbells(name: str, kinds: Sequence[KindRates], harmful: bool | None) -> Drawing:
    """Refusal rates of each kind of prompt by the first (hollow) and the second group (solid), joined by a line.

    Thin lines above and below are their 95% intervals, the number behind a kind is that of its prompts.

    Args:
      name: prefix of the ids.
      kinds: drawn from top to bottom.
      harmful: whether the prompts are harmful; sets the colour.
    """
    figure, axes = new_axes(34 + 21 * len(kinds))
    y = np.arange(len(kinds))
    for place, rates in ((-0.22, [kind.first for kind in kinds]), (0.22, [kind.second for kind in kinds])):
        axes.hlines(y + place, *interval(rates), color=LIGHT["muted"], linewidth=1)
    first = np.array([value_of(kind.first) for kind in kinds])
    second = np.array([value_of(kind.second) for kind in kinds])
    color = tone(harmful)
    axes.hlines(y, first, second, color=color, linewidth=2, alpha=0.5)
    dots: dict[str, Any] = {"s": 42, "edgecolor": color, "linewidth": 1.5, "zorder": 3, "clip_on": False}
    axes.scatter(first, y, facecolor=LIGHT["paper"], **dots)
    axes.scatter(second, y, facecolor=color, **dots)
    axes.set_yticks(y, [f"{one_line(kind.kind, 20)} ({kind.first.n})" for kind in kinds])
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
