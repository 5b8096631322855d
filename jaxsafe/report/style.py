"""The look of the figures: small matplotlib drawings, as files and as inline SVG in the page's colours and font.

A figure is 360 units wide, the width of a phone's text column, so its text is as large as the page's own.
Nothing is said by colour alone.
"""

import dataclasses
import functools
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from jaxsafe.model.layers import LayerRange
from jaxsafe.records.run import Difference, Rate

LIGHT = {
    "ink": "#1e2329",
    "muted": "#5c6570",
    "rule": "#d3d7db",
    "paper": "#fdfdfb",
    "safe": "#0a5f9e",
    "harmful": "#ad3f08",
}
"""Role -> colour on light paper. Blue against vermilion stays apart in every common colour blindness."""
DARK = {
    "ink": "#e6e4df",
    "muted": "#a3abb5",
    "rule": "#3b424b",
    "paper": "#15181c",
    "safe": "#77bbee",
    "harmful": "#f59b6a",
}
"""Role -> colour on dark paper."""

WIDTH = 360
DASHED = (0, (4, 3))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxsafe",
    "pdf.fonttype": 42,
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11.5,
    "axes.labelsize": 11.5,
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
}
LEGEND: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 3}
_VARIABLES = {color: f"var(--{role}, {color})" for role, color in LIGHT.items()}

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure under a name that is unique in its report.

    svg: the content of its file; inline: an SVG element to be put into a page, its colours CSS variables and its ids
    prefixed with the name; it carries what the figure shows in words, for those who do not see it.
    """

    name: str
    svg: str
    inline: str
    figure: Figure = dataclasses.field(compare=False, repr=False)

    def pdf(self) -> bytes:
        """The figure as a PDF."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            metadata = dict.fromkeys(("Creator", "Producer", "CreationDate"))
            self.figure.savefig(buffer, format="pdf", metadata=metadata)
        return buffer.getvalue()


def styled(draw: Callable[P, Drawing]) -> Callable[P, Drawing]:
    """Draws under the style of the reports and leaves matplotlib's settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Drawing:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def drawing(figure: Figure, name: str, alt: str) -> Drawing:
    """What becomes of a figure.

    Args:
      figure: drawn with the colours of `LIGHT`; each becomes the CSS variable of its role.
      name: prefix of every id, unique among the figures of the page.
      alt: what the figure shows, for those who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    return Drawing(name, svg, _element(svg, name, alt), figure)


def _element(svg: str, name: str, alt: str) -> str:
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        # A style element inside an inline SVG would style the whole page.
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _inline(key, value, name) for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")


def _inline(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: _VARIABLES.get(match[0], match[0]), value)


def new_axes(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the full width and the given height in units of the page, with its axes."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    return figure, figure.add_subplot()


def array(values: Iterable[Any]) -> np.ndarray:
    """Values as floats, NaN where there is none."""
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def value_of(rate: Rate | Difference | None) -> float:
    """The value of a rate, NaN where it was not measured."""
    return math.nan if rate is None or rate.value is None else rate.value


def interval(rates: Iterable[Rate | Difference | None]) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper ends of the intervals of rates, NaN where there are none."""
    known = list(rates)
    return array(rate and rate.ci_low for rate in known), array(rate and rate.ci_high for rate in known)


def printable(text: object, limit: int = 30) -> str:
    """Text of unknown origin on one line that XML allows."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def one_line(text: object, limit: int = 30) -> str:
    """`printable` of a name, its underscores as spaces."""
    return printable(str(text).replace("_", " "), limit)


def percent(value: float) -> str:
    """A share in whole per cent, a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.0%}"


def tone(harmful: object) -> str:
    """The colour of harmful or of safe prompts."""
    return LIGHT["harmful"] if harmful else LIGHT["safe"]


def percent_axis(axis: Axis) -> None:
    """Ticks at the quarters from 0% to 100%."""
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axis.set_ticks(np.linspace(0, 1, 5))


def log_axis(axis: Axis) -> None:
    """A logarithmic axis with plain numbers; within two decades also at 2 and 5."""
    scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def note(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], coords: Any = "data", **style: Any
) -> None:
    """A word beside a point, shifted from it by some units of the page."""
    axes.annotate(text, at, xycoords=coords, xytext=shift, textcoords="offset points", **style)


def upright(axes: Axes, x: float) -> None:
    """A dashed vertical line."""
    axes.axvline(x, color=LIGHT["ink"], linewidth=1.2, linestyle=DASHED)


def level(axes: Axes, y: float, label: str, color: str, **line: Any) -> None:
    """A horizontal line with its label above the right end."""
    axes.axhline(y, color=color, linewidth=1.2, **line)
    note(axes, label, (1, y), (0, 3), ("axes fraction", "data"), ha="right", color=color)


def shade_layers(axes: Axes, layers: LayerRange) -> float:
    """Shades `layers` on an axis of layers; where their middle lies."""
    low, high = layers.first - 0.5, layers.stop - 0.5
    axes.axvspan(low, high, color=LIGHT["rule"], alpha=0.6, linewidth=0)
    return (low + high) / 2


def layer_axis(axes: Axes, count: int, steered: LayerRange | None = None) -> None:
    """The x axis of `count` layers, the steered ones shaded."""
    if steered is not None:
        middle = shade_layers(axes, steered)
        note(axes, "steered", (middle, 0), (0, 4), ("data", "axes fraction"), ha="center", color=LIGHT["muted"])
    axes.set_xlim(-0.5, count - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")


def ends(values: Sequence[float]) -> str:
    """The first and the last value in words."""
    first, last = array(values)[[0, -1]]
    return f"from {first:.3g} in the first to {last:.3g} in the last"
