"""What a search for the most harmful fine-tuning within a bound has of its own (arXiv 2602.06911)."""

import dataclasses
from typing import Literal

BASE = "base attack"
Sampler = Literal["tpe", "random"]


@dataclasses.dataclass(frozen=True)
class About:
    """A variant's columns in the table.

    run: "before", "base attack", "trial" or "best"; sampler: whose trial or choice it is, None for others; validation:
    whether it is of the prompts and texts that choose, and not of those that are reported.
    """

    run: str
    sampler: Sampler | None = None
    control: bool = False
    validation: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """The hyperparameters of a fine-tuning run; rank: of its adapters, None where all weights are trained."""

    learning_rate: float
    steps: int
    batch_size: int
    rank: int | None
    schedule: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """A choice with what it comes to on validation data.

    name: of its variant; harm: attack success, in [0, 1]; loss: of utility, as a share of that before, negative where
    utility grows. None where it is not finite or nothing was scored.
    """

    name: str
    choice: Choice
    harm: float | None
    loss: float | None

    def within(self, bound: float) -> bool:
        """Whether it may be chosen."""
        return self.harm is not None and self.loss is not None and self.loss <= bound


@dataclasses.dataclass(frozen=True)
class Searched:
    """The trials of a sampler in their order, and the name of the best within the bound, None where none is."""

    sampler: Sampler
    trials: tuple[Trial, ...]
    best: str | None


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a search.

    bound: on the loss of utility, as a share; utility: "perplexity", or the tasks whose mean accuracy it is; base: the
    attack that the search begins from; searches: that of each sampler, the random control last; optuna: its version.
    """

    bound: float
    utility: str
    base: Trial
    searches: tuple[Searched, ...]
    optuna: str
