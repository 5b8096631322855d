"""What a run of fine-tuning attacks has of its own (arXiv 2310.03693, arXiv 2408.17003)."""

import dataclasses

from jaxsafe.model.layers import LayerRange


@dataclasses.dataclass(frozen=True)
class About:
    """A variant's columns in the table.

    tuning: how the attack trains, None for the model before it; defence: its name; region: what it keeps, as of its
    control; rewind: whether it is wound back after training; share: of the weights or directions that are kept; step:
    of training, 0 before it; last: whether it is the run's last.
    """

    attack: str
    tuning: str | None = None
    defence: str = "none"
    region: str = "nothing"
    control: bool = False
    rewind: bool = False
    share: float | None = None
    step: int = 0
    last: bool = True


@dataclasses.dataclass(frozen=True)
class LayerEnd:
    """One range of layers that was tried, `first` <= layer < `stop`, and how many prompts were refused with it."""

    first: int
    stop: int
    refused: int


@dataclasses.dataclass(frozen=True)
class LayerScan:
    """The range `first` <= layer < `stop`, and how many prompts were refused at every range that was tried.

    upper, lower: for each end tried, in this order; dense: refused without scaling.
    """

    first: int
    stop: int
    dense: int
    upper: tuple[LayerEnd, ...]
    lower: tuple[LayerEnd, ...]

    @property
    def layers(self) -> LayerRange:
        """The range."""
        return LayerRange(self.first, self.stop)


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a run of attacks.

    The table has a row for each attack, way of training, defence and step, with the columns of `About`, and one for
    the model before each attack. loss: the training loss by variant.
    """

    layers: tuple[LayerScan, ...]
    loss: dict[str, float | None]
