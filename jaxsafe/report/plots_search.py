"""The figure of the report on a search within a bound: harm against the loss of utility, a point a trial."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from jaxsafe.records.search import Trial
from jaxsafe.report.page import percent
from jaxsafe.report.style import DASHED, LEGEND, LIGHT, Drawing, array, drawing, new_axes, note, percent_axis, styled

LOOKS: dict[str, dict[str, Any]] = {
    "tpe": {"color": LIGHT["harmful"], "marker": "o"},
    "random": {"color": LIGHT["muted"], "marker": "s", "markerfacecolor": LIGHT["paper"], "markersize": 7.5},
    "base attack": {"color": LIGHT["ink"], "marker": "^", "markersize": 7},
}
"""By whose trial it is; a random one is hollow and larger, so that it is seen around one of the same place."""
LABELS = {"tpe": "TPE", "random": "random", "base attack": "base attack"}


@styled
def bounded(name: str, bound: float, trials: Mapping[str, Sequence[Trial]], best: Mapping[str, Trial]) -> Drawing:
    """Harm against the loss of utility by whose trials they are, the bound, and a star at the best of each within it.

    The axis of losses is linear within the bound and logarithmic outside; what is beyond all numbers lies at its end.
    """
    figure, axes = new_axes(300)
    known = [trial.loss for each in trials.values() for trial in each if trial.loss is not None]
    unit = max(bound, 0.01)
    low, high = min([-unit, *known]), 2 * max([2 * unit, *known])
    for kind in sorted(trials, key="random".__eq__, reverse=True):
        x = [high if trial.loss is None else trial.loss for trial in trials[kind]]
        y = array(trial.harm for trial in trials[kind])
        axes.plot(x, y, **LOOKS[kind], linestyle="none", clip_on=False, label=LABELS[kind])
        if kind in best:
            mark: dict[str, Any] = LOOKS[kind] | {"marker": "*", "markersize": 14, "clip_on": False, "zorder": 4}
            axes.plot(array([best[kind].loss]), array([best[kind].harm]), **mark)
    axes.axvline(bound, color=LIGHT["ink"], linewidth=1.2, linestyle=DASHED)
    note(axes, "bound", (bound, 1), (-4, -14), ("data", "axes fraction"), ha="right", color=LIGHT["ink"])
    axes.set_xscale("symlog", linthresh=unit, linscale=1)
    axes.set_xlim(1.3 * low, high)
    axes.set_xticks(
        [tick for tick in (-unit, 0.0, unit, 10 * unit, 100 * unit, 1000 * unit) if 1.3 * low <= tick <= high]
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}%" if value else "0"))
    axes.set_xlabel("loss of utility")
    axes.set_ylabel("attack success")
    axes.set_ylim(-0.02, 1.02)
    percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.legend(**LEGEND)
    return drawing(figure, name, _words(bound, trials, best))


def _words(bound: float, trials: Mapping[str, Sequence[Trial]], best: Mapping[str, Trial]) -> str:
    said = [f"Attack success against the loss of utility, at most {percent(bound, 0)} of which is allowed"]
    for kind, each in trials.items():
        within = sum(trial.within(bound) for trial in each)
        top = best.get(kind)
        most = f", most harm {percent(top.harm, 0)} at {_signed(top.loss)}" if top and kind != "base attack" else ""
        said.append(f"{LABELS[kind]}: {within} of {len(each)} within the bound{most}")
    return "; ".join(said)


def _signed(loss: float | None) -> str:
    return "–" if loss is None or not np.isfinite(loss) else f"{100 * loss:+.3g}%"
