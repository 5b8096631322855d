"""The figure of attacks that leave the weights alone."""

import dataclasses
from collections.abc import Sequence

from matplotlib.lines import Line2D

from jaxsafe.records.run import Rate
from jaxsafe.report.page import is_number, number
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
    styled,
    value_of,
)


@dataclasses.dataclass(frozen=True)
class Reached:
    """What an attack reaches on harmful prompts.

    complied, broken: shares of answers, or of prompts where it is the worst of several tries; perplexity: of the
    answers under the unedited model.
    """

    name: str
    complied: Rate
    broken: Rate | None
    control: bool = False
    worst: bool = False
    perplexity: float | None = None


@styled
def reached(name: str, rows: Sequence[Reached]) -> Drawing:
    """Attack success with its interval, a line an attack, controls hollow.

    Crosses are shares of broken answers, where there are any. The number at the right is the perplexity of the answers.
    """
    figure, axes = new_axes(64 + 21 * len(rows))
    for y, row in enumerate(rows):
        color = LIGHT["muted"] if row.control else LIGHT["harmful"]
        axes.hlines(y, *interval([row.complied]), color=color, linewidth=1.4)
        face = LIGHT["paper"] if row.control else color
        marker = "D" if row.worst else "o"
        axes.scatter(
            value_of(row.complied), y, s=30, marker=marker, facecolor=face, edgecolor=color, zorder=3, clip_on=False
        )
        if row.broken is not None and row.broken.value:
            axes.scatter(
                row.broken.value, y, s=26, marker="x", color=LIGHT["ink"], linewidth=1, zorder=4, clip_on=False
            )
        if is_number(row.perplexity):
            axes.text(1.05, y, number(row.perplexity), va="center_baseline", color=LIGHT["muted"])
    axes.set_yticks(range(len(rows)), [one_line(row.name, 27) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set_xticks([0, 0.5, 1])
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=9.5, pad=8)
    axes.legend(handles=_handles(any(row.worst for row in rows)), **{**LEGEND, "ncols": 2})
    shown = (
        f"{row.name} {percent(value_of(row.complied))} complied, {percent(value_of(row.broken))} broken" for row in rows
    )
    return drawing(figure, name, "Attack success: " + "; ".join(shown))


def _handles(worst: bool) -> list[Line2D]:
    """The legend's entries; a diamond only where there is one."""
    look = {"linestyle": "none", "markeredgecolor": LIGHT["harmful"], "markerfacecolor": LIGHT["harmful"]}
    control = {"markeredgecolor": LIGHT["muted"], "markerfacecolor": LIGHT["paper"]}
    entries = [("complied", look | {"marker": "o"}), ("control", look | control | {"marker": "o"})]
    entries += [("worst of tries", look | {"marker": "D"})] if worst else []
    entries += [("broken", look | {"marker": "x", "markeredgecolor": LIGHT["ink"]})]
    return [Line2D([], [], label=label, markersize=5, **style) for label, style in entries]  # type: ignore[arg-type]
