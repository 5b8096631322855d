"""Figures of the report on fine-tuning attacks.

A control is dashed and hollow beside what it is the control of; rewinds stand at the right end, where training ended.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from jaxsafe.records.attack import About
from jaxsafe.records.run import Difference, Rate, TableRow
from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    Drawing,
    drawing,
    interval,
    new_axes,
    one_line,
    percent,
    percent_axis,
    styled,
    upright,
    value_of,
)

_LOOKS: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {"color": LIGHT["safe"], "marker": "s", "linestyle": "-"},
    (True, False): {"color": LIGHT["muted"], "marker": "s", "linestyle": DASHED, "markerfacecolor": LIGHT["paper"]},
    (False, True): {"color": LIGHT["safe"], "marker": "D", "linestyle": "none"},
    (True, True): {"color": LIGHT["muted"], "marker": "D", "linestyle": "none", "markerfacecolor": LIGHT["paper"]},
}
"""(control, rewind) -> how a defence is drawn."""


@dataclasses.dataclass(frozen=True)
class Defended:
    """A defence against one attack and way of training.

    row: of the end of training; curve: attack success by training step, from the model before the attack on; prevented,
    beyond_random: by how much fewer of the harmful prompts are complied with than without a defence and than with its
    control, None where there is no such comparison; utility: perplexity of the given texts by step.
    """

    row: TableRow
    about: About
    curve: tuple[tuple[int, Rate], ...]
    prevented: Difference | None
    beyond_random: Difference | None
    utility: tuple[tuple[int, float], ...] = ()

    @property
    def undefended(self) -> bool:
        """Whether it is no defence at all."""
        return self.about.defence == "none"

    @property
    def words(self) -> str:
        """A defence without its region: "frozen", "random, rewound"."""
        if self.undefended:
            return "no defence"
        words = (["random"] if self.about.control else []) + ["rewound" if self.about.rewind else "frozen"]
        return ", ".join(words)

    @property
    def end(self) -> Rate | None:
        """Attack success at the end of training."""
        return self.curve[-1][1] if self.curve else None

    @property
    def look(self) -> dict[str, Any]:
        """How it is drawn."""
        if self.undefended:
            return {"color": LIGHT["harmful"], "marker": "o", "linestyle": "-"}
        return _LOOKS[self.about.control, self.about.rewind]


@styled
def curves(name: str, rows: Sequence[Defended]) -> Drawing:
    """Attack success by training step with its intervals, one line a defence of the same region.

    Args:
      name: prefix of the ids.
      rows: the undefended one first.
    """
    figure, axes = new_axes(270)
    width = max([1, *(step for row in rows for step, _ in row.curve)])
    for place, row in enumerate(rows):
        _curve(axes, row, width * 0.012 * place, width)
    _steps_axis(axes, width)
    axes.set_ylabel("attack success")
    axes.set_ylim(-0.02, 1.02)
    percent_axis(axes.yaxis)
    axes.legend(**LEGEND | {"ncols": 2})
    shown = (f"{row.words}: {_words(row)}" for row in rows)
    return drawing(figure, name, "Attack success by training step. " + "; ".join(shown))


@styled
def utility(name: str, rows: Sequence[Defended]) -> Drawing:
    """Perplexity of the given texts by training step, the mean over seeds, one line a defence of the same region."""
    figure, axes = new_axes(270)
    width = max([1, *(step for row in rows for step, _ in row.utility)])
    for row in rows:
        steps, values = zip(*(row.utility[-1:] if row.about.rewind else row.utility), strict=True)
        axes.plot(steps, values, **row.look, markeredgewidth=1.4, markersize=5.5, clip_on=False, label=row.words)
    _steps_axis(axes, width)
    axes.set_ylabel("perplexity")
    read = [value for row in rows for _, value in row.utility]
    if max(read) > 3 * min(read):  # below that a logarithmic scale has next to no ticks
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(**LEGEND | {"ncols": 2})
    ends = (f"{row.words}: " + ", ".join(f"{value:.3g} at {step}" for step, value in row.utility) for row in rows)
    return drawing(figure, name, "Perplexity by training step. " + "; ".join(ends))


def _steps_axis(axes: Axes, width: float) -> None:
    axes.set_xlim(-0.03 * width, 1.13 * width)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("training steps")
    axes.grid(axis="y")


def _shown(row: Defended) -> Sequence[tuple[int, Rate]]:
    return row.curve[-1:] if row.about.rewind else row.curve


def _curve(axes: Axes, row: Defended, shift: float, width: float) -> None:
    points, look = _shown(row), row.look
    if row.about.rewind:
        shift += 0.05 * width
    x = np.array([step for step, _ in points]) + shift
    y = [value_of(rate) for _, rate in points]
    axes.vlines(x, *interval(rate for _, rate in points), color=look["color"], linewidth=1, alpha=0.5)
    axes.plot(x, y, **look, markeredgewidth=1.4, markersize=5.5, clip_on=False, label=row.words, zorder=3)


def _words(row: Defended) -> str:
    return ", ".join(f"{percent(value_of(rate))} at {step}" for step, rate in _shown(row))


@styled
def differences(name: str, rows: Sequence[Defended]) -> Drawing:
    """How much lower each defence keeps attack success than no defence does, with intervals, a row a defence."""
    lines: list[tuple[str, Defended | None]] = []
    for region in dict.fromkeys(row.about.region for row in rows):
        lines.append((one_line(region, 26), None))
        lines += [(row.words, row) for row in rows if row.about.region == region]
    figure, axes = new_axes(44 + 17.5 * len(lines))
    for y, (label, row) in enumerate(lines):
        if row is None:
            axes.text(-0.02, y, label, ha="right", va="center_baseline", transform=axes.get_yaxis_transform())
            continue
        look = row.look | {"linestyle": "none"}
        axes.hlines(y, *interval([row.prevented]), color=look["color"], linewidth=1.4)
        axes.plot(value_of(row.prevented), y, **look, markeredgewidth=1.4, markersize=5.5, clip_on=False)
    upright(axes, 0)
    axes.set_yticks([y for y, (_, row) in enumerate(lines) if row], [label for label, row in lines if row])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(-0.5 if _lowest(rows) > -0.5 else -1, 1)
    axes.set_xticks([-0.5, 0, 0.5, 1], ["−50", "0", "50", "100"])
    axes.set_xlabel("points of attack success prevented")
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    shown = (f"{row.about.defence} {percent(value_of(row.prevented))}" for row in rows)
    return drawing(figure, name, "Attack success prevented: " + "; ".join(shown))


def _lowest(rows: Sequence[Defended]) -> float:
    return min((row.prevented.ci_low or 0.0 for row in rows if row.prevented), default=0.0)
