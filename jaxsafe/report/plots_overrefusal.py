"""Figures of remedies for over-refusal."""

from collections.abc import Sequence

from jaxsafe.intervals import wilson
from jaxsafe.records.overrefusal import Tried
from jaxsafe.records.run import Rate, TableRow
from jaxsafe.report.style import (
    LIGHT,
    Drawing,
    drawing,
    interval,
    new_axes,
    note,
    one_line,
    percent,
    percent_axis,
    styled,
    value_of,
)


def pooled(row: TableRow, judge: str, side: str) -> Rate | None:
    """Refusals of all "safe" or "harmful" prompts of a row together, None where it has none."""
    found = [r for name, r in row.rates.items() if name.startswith(f"refusal_{judge}/") and name.endswith(f"/{side}")]
    n = sum(rate.n for rate in found)
    if not n:
        return None
    share = sum((rate.value or 0.0) * rate.n for rate in found) / n
    return Rate(share, *wilson(share, n), n)


@styled
def tradeoff(name: str, rows: Sequence[tuple[TableRow, bool]], judge: str) -> Drawing:
    """Over-refusal against kept refusal: a point a variant with both intervals; (row, whether it is a control)."""
    figure, axes = new_axes(330)
    words = []
    for row, control in rows:
        safe, harmful = pooled(row, judge, "safe"), pooled(row, judge, "harmful")
        if safe is None or harmful is None:
            continue
        x, y = value_of(safe), value_of(harmful)
        color = LIGHT["muted"] if control else LIGHT["safe"]
        axes.hlines(y, *interval([safe]), color=color, linewidth=0.8, alpha=0.5)
        axes.vlines(x, *interval([harmful]), color=color, linewidth=0.8, alpha=0.5)
        face = LIGHT["paper"] if control else color
        axes.scatter(x, y, s=34, facecolor=face, edgecolor=color, zorder=3, clip_on=False)
        if not control:
            note(axes, one_line(row.group, 18), (x, y), (6, -12), color=LIGHT["ink"])
        words.append(f"{row.group}: {percent(x)} of safe, {percent(y)} of harmful prompts refused")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    axes.grid()
    axes.tick_params(length=0, pad=7)
    axes.set_xlabel("safe prompts refused")
    axes.set_ylabel("harmful prompts refused")
    return drawing(figure, name, "Over-refusal against kept refusal. " + "; ".join(words))


@styled
def candidates(name: str, tried: Sequence[Tried], chosen: Sequence[str]) -> Drawing:
    """Candidates to mend by: the share of refused prompts that each mends, and nats a token of these answers."""
    figure, axes = new_axes(40 + 24 * len(tried))
    y = list(map(float, range(len(tried))))
    share = [each.share for each in tried]
    colors = [LIGHT["safe"] if each.name in chosen else LIGHT["muted"] for each in tried]
    axes.barh(y, share, height=0.6, color=colors)
    for place, each in zip(y, tried, strict=True):
        nats = "" if each.mean_nats is None else f", {each.mean_nats:.2f} nats"
        axes.text(1.02, place, f"{percent(each.share)}{nats}", va="center_baseline", color=LIGHT["muted"])
    axes.set_yticks(y, [one_line(each.name, 24) for each in tried])
    axes.set_ylim(len(tried) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.set_xticks([0, 0.5, 1])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    words = "; ".join(f"{each.name} {percent(each.share)}" for each in tried)
    return drawing(figure, name, f"Refused prompts mended, by candidate: {words}; chosen: {', '.join(chosen)}")
