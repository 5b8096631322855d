"""Figures of the report on fine-tuning attacks.

A control is dashed and hollow beside what it is the control of; rewinds stand at the right end, where training ended.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxsafe.report.style import (
    DASHED,
    LEGEND,
    LIGHT,
    Row,
    array,
    new_axes,
    one_line,
    percent,
    percent_axis,
    styled,
    to_svg,
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


def name_of(row: Row) -> str:
    """A defence without its region: "frozen", "random, rewound"."""
    if row.get("defence") == "none":
        return "no defence"
    words = (["random"] if row.get("control") else []) + ["rewound" if row.get("rewind") else "frozen"]
    return ", ".join(words)


@styled
def curves(name: str, rows: Sequence[Row]) -> str:
    """Attack success by training step with its intervals, one line a defence of the same region.

    Args:
      name: prefix of the ids.
      rows: rows of run.json's table, the undefended one first; `curve` has step, value, ci_low and ci_high.
    """
    figure, axes = new_axes(270)
    steps = [point["step"] for row in rows for point in row["curve"]]
    width = max([1, *steps])
    for place, row in enumerate(rows):
        look = {"color": LIGHT["harmful"], "marker": "o", "linestyle": "-"}
        if row.get("defence") != "none":
            look = _LOOKS[bool(row.get("control")), bool(row.get("rewind"))]
        _curve(axes, row, look, width * 0.012 * place, width)
    axes.set_xlim(-0.03 * width, 1.13 * width)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("training steps")
    axes.set_ylabel("attack success")
    axes.set_ylim(-0.02, 1.02)
    percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.legend(**LEGEND | {"ncols": 2})
    shown = (f"{name_of(row)}: {_words(row)}" for row in rows)
    return to_svg(figure, name, "Attack success by training step. " + "; ".join(shown))


def _curve(axes: Axes, row: Row, look: dict[str, Any], shift: float, width: float) -> None:
    points = row["curve"]
    if row.get("rewind"):
        points, shift = points[-1:], shift + 0.05 * width
    x = array(point["step"] for point in points) + shift
    y, low, high = (array(point.get(field) for point in points) for field in ("value", "ci_low", "ci_high"))
    axes.vlines(x, low, high, color=look["color"], linewidth=1, alpha=0.5)
    axes.plot(x, y, **look, markeredgewidth=1.4, markersize=5.5, clip_on=False, label=name_of(row), zorder=3)


def _words(row: Row) -> str:
    points = row["curve"][-1:] if row.get("rewind") else row["curve"]
    return ", ".join(f"{percent(value_of(point))} at {point['step']}" for point in points)


@styled
def differences(name: str, rows: Sequence[Row]) -> str:
    """How much lower each defence keeps attack success than no defence does, with intervals, a row a defence.

    Args:
      name: prefix of the ids.
      rows: rows of run.json's table with `against_none` {value, ci_low, ci_high}.
    """
    lines: list[tuple[str, Row | None]] = []
    for region in dict.fromkeys(row["region"] for row in rows):
        lines.append((one_line(region, 26), None))
        lines += [(name_of(row), row) for row in rows if row["region"] == region]
    figure, axes = new_axes(44 + 17.5 * len(lines))
    for y, (label, row) in enumerate(lines):
        if row is None:
            axes.text(-0.02, y, label, ha="right", va="center_baseline", transform=axes.get_yaxis_transform())
            continue
        look = _LOOKS[bool(row.get("control")), bool(row.get("rewind"))] | {"linestyle": "none"}
        found = row["against_none"]
        axes.hlines(y, value_of(found, "ci_low"), value_of(found, "ci_high"), color=look["color"], linewidth=1.4)
        axes.plot(value_of(found), y, **look, markeredgewidth=1.4, markersize=5.5, clip_on=False)
    upright(axes, 0)
    axes.set_yticks([y for y, (_, row) in enumerate(lines) if row], [label for label, row in lines if row])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(-0.5 if _lowest(rows) > -0.5 else -1, 1)
    axes.set_xticks([-0.5, 0, 0.5, 1], ["−50", "0", "50", "100"])
    axes.set_xlabel("points of attack success prevented")
    axes.grid(axis="x")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    shown = (f"{row['defence']} {percent(value_of(row['against_none']))}" for row in rows)
    return to_svg(figure, name, "Attack success prevented: " + "; ".join(shown))


def _lowest(rows: Sequence[Row]) -> float:
    return min((value_of(row["against_none"], "ci_low") for row in rows), default=0.0)
