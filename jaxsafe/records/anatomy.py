"""What a run on the anatomy of safety has of its own: units, layers and how far attributions agree.

Numbers by layer are tuples of L, None where a layer holds nothing to compare.
"""

import dataclasses

from jaxsafe.model.layers import LayerRange
from jaxsafe.records.attack import LayerScan

ByLayer = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class RoleCount:
    """The units of one role (arXiv 2410.10862): heads and neurons, their share of all units, and units by layer."""

    role: str
    heads: int
    neurons: int
    share: float
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far apart a model reads normal and malicious prompts, layer by layer (arXiv 2408.17003, section 3.2).

    normal, malicious, mixed: mean cosines of pairs of prompts of one kind, and of both; gap: degrees by which a
    malicious prompt is further from a normal one than another normal one is, low and high: its 95% interval over
    prompts; prompts: of each kind; triples: how many were compared; layers: where the gap opens, None where it
    does not.
    """

    normal: tuple[float, ...]
    malicious: tuple[float, ...]
    mixed: tuple[float, ...]
    gap: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    prompts: tuple[int, int]
    triples: int
    layers: LayerRange | None


@dataclasses.dataclass(frozen=True)
class RefusalDirection:
    """Which candidate was chosen (arXiv 2406.11717): after which block, how far from the prompt's end; see `Direction`
    of the method. allowed: whether it is within the published limits."""

    layer: int
    position: int
    bypass: float
    induce: float
    kl: float
    allowed: bool


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How far two attributions agree in each layer, and what a random part of the same size comes to.

    measure: "Jaccard index" of sets of weights, or "captured energy" of the first in the span of the second; chance:
    the mean of `draws` random parts, low and high: the least and the most of them; exact: whether these are the mean
    and the 95% range of a uniformly random direction instead.
    """

    first: str
    second: str
    measure: str
    values: ByLayer
    chance: ByLayer
    low: ByLayer
    high: ByLayer
    draws: int
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Inside:
    """The share of a part's weights that lie in the safety layers.

    chance: the mean over all ranges of as many layers; beyond: the share of these that hold at least as much.
    """

    part: str
    share: float
    chance: float
    beyond: float


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a run on the anatomy of safety.

    scored: rows that scores, bases and moments are made from, by side; layers: the safety layers that parts are held
    against, of the scan where there is one, else of the gap.
    """

    scored: dict[str, int]
    roles: tuple[RoleCount, ...]
    gap: Gap
    scan: LayerScan | None
    layers: LayerRange | None
    direction: RefusalDirection
    overlaps: tuple[Overlap, ...]
    inside: tuple[Inside, ...]
