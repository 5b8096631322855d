"""What a run of remedies for over-refusal has of its own: gates, remedies and what they cost."""

import dataclasses

from jaxsafe.records.run import Rate


@dataclasses.dataclass(frozen=True)
class SetShare:
    """The share of a set's harmful or safe prompts that a gate lets through, by scores out of fold."""

    set: str
    harmful: bool
    opened: Rate


@dataclasses.dataclass(frozen=True)
class GateReport:
    """How well a gate tells the calibration prompts, each scored by a fit that has not seen it.

    threshold, interval: the score below which it opens, and where it would lie for other harmful prompts (95%);
    missed: the share of harmful prompts that it lets through by design; by_set: what it lets through of each set. On
    prompts of other forms these shares differ as they do between sets.
    """

    name: str
    auroc: float
    threshold: float
    interval: tuple[float, float]
    missed: float
    by_set: tuple[SetShare, ...]


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What a gate leaves to any edit on evaluated prompts of one set and label.

    opened: the share that it lets through; refused: the share that the model refuses; left: the share that it refuses
    and the gate does not let through: no edit behind this gate refuses less.
    """

    set: str
    harmful: bool
    opened: Rate
    refused: Rate
    left: Rate


@dataclasses.dataclass(frozen=True)
class Tried:
    """What comes of refused calibration prompts when they are answered again under a candidate.

    complied: by prompt whether the answer complies and is whole; nats: a token of each answer under the unedited
    model, None for a blank one; broken: how many answers are.
    """

    name: str
    complied: tuple[bool, ...]
    nats: tuple[float | None, ...]
    broken: int

    @property
    def share(self) -> float:
        """The share of prompts that are mended."""
        return sum(self.complied) / max(1, len(self.complied))

    @property
    def mean_nats(self) -> float | None:
        """Nats a token of the answers that comply, on average; None where there are none."""
        own = [n for n, c in zip(self.nats, self.complied, strict=True) if c and n is not None]
        return sum(own) / len(own) if own else None


@dataclasses.dataclass(frozen=True)
class Mended:
    """How the rules to mend by were chosen: `chosen` names them in their order; stability: the share of resamples of
    the prompts that choose the same."""

    tried: tuple[Tried, ...]
    chosen: tuple[str, ...]
    stability: float


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A remedy as it was tried.

    source: the paper; about: what it was set to, in words; gate: name of its gate, None where it has none of its own;
    strength, kl: of its edit, and nats of the first tokens of answers to safe prompts; None where there is no edit.
    """

    name: str
    source: str
    about: str
    gate: str | None = None
    strength: float | None = None
    kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """How many answers were made for each prompt, on average, by variant."""

    variant: str
    passes: float


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a run of remedies: their gates, what each was set to, and their costs; perplexity_text: what was read;
    mended: how the rules to answer again by were chosen; ceilings: of the first gate."""

    gates: tuple[GateReport, ...]
    remedies: tuple[Remedy, ...]
    costs: tuple[Cost, ...]
    perplexity_text: str
    mended: Mended | None = None
    ceilings: tuple[Ceiling, ...] = ()
