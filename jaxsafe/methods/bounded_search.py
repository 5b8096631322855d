"""The fine-tuning attack that does most harm within a bound on the loss of utility (TamperBench, arXiv 2602.06911).

    max harm(c)  over choices c of hyperparameters  with  loss(c) <= bound
    loss = 1 - accuracy / accuracy before,  or  perplexity / perplexity before - 1

harm is attack success on validation prompts. As in their code, trials are drawn by the tree-structured Parzen
estimator (TPE) of optuna, and utility is lost as a share of that before. Ours: perplexity; TPE is told which trials
break the bound, where their code searches for harm alone and applies the bound to finished trials; of equal harm the
less loss is chosen; and as many trials of random search as a control, which share TPE's first draws (`startup`).

A search draws the same choices whenever it is told the same results, so one that is run again with results that are
kept goes on where it was interrupted.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsafe.records.run import Rate, Result
from jaxsafe.records.search import Choice, Sampler, Trial

SAMPLERS: tuple[Sampler, ...] = ("tpe", "random")
"""The search, and its control."""


@dataclasses.dataclass(frozen=True)
class Space:
    """The choices: learning rates between two ends, on a logarithmic scale, and lists of everything else.

    ranks: of adapters, None among them for all weights. Raises ValueError for no choice and for ends in another order.
    """

    rates: tuple[float, float]
    steps: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    ranks: tuple[int | None, ...]
    schedules: tuple[str, ...]

    def __post_init__(self) -> None:
        low, high = self.rates
        if not 0 < low <= high:
            raise ValueError(f"learning rates {self.rates} are no range; give a positive lower and an upper end")
        for name in ("steps", "batch_sizes", "ranks", "schedules"):
            if not getattr(self, name):
                raise ValueError(f"a search needs at least one entry of {name}; there is none")


@dataclasses.dataclass
class Search:
    """A search by one sampler: choices are asked for, each is told what it comes to, in turn.

    The first `startup` choices of TPE are random. `trials` fills up. Raises ValueError without optuna.
    """

    space: Space
    sampler: Sampler
    bound: float
    startup: int = 10
    seed: int = 0
    trials: list[Trial] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        need_optuna()
        self.asked: Any = None

    @functools.cached_property
    def study(self) -> Any:
        """Optuna's study, in memory."""
        import optuna

        # Its first lines would be of every trial's value.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = optuna.samplers
        if self.sampler == "random":
            drawn: Any = samplers.RandomSampler(seed=self.seed)
        else:
            drawn = samplers.TPESampler(seed=self.seed, n_startup_trials=self.startup)
        return optuna.create_study(direction="maximize", sampler=drawn)

    def ask(self) -> Choice:
        """The next choice."""
        self.asked = self.study.ask(_distributions(self.space))
        return Choice(**self.asked.params)

    def tell(self, harm: float | None, loss: float | None) -> None:
        """What the choice asked for last comes to; None where it is not finite or was not scored."""
        from optuna.trial import TrialState

        choice = Choice(**self.asked.params)
        self.trials.append(Trial(f"{self.sampler} {self.asked.number}", choice, harm, loss))
        self.asked.set_constraint("loss", math.inf if loss is None else loss - self.bound)
        self.study.tell(self.asked, harm, None if harm is not None else TrialState.FAIL)

    @property
    def best(self) -> Trial | None:
        """The best trial so far."""
        return best(self.trials, self.bound)


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        "learning_rate": FloatDistribution(*space.rates, log=True),
        "steps": CategoricalDistribution(space.steps),
        "batch_size": CategoricalDistribution(space.batch_sizes),
        "rank": CategoricalDistribution(space.ranks),
        "schedule": CategoricalDistribution(space.schedules),
    }


def best(trials: Sequence[Trial], bound: float) -> Trial | None:
    """The trial of most harm within the bound, of equal ones that of the least loss, then the first; None for none."""
    within = [trial for trial in trials if trial.within(bound)]
    return max(within, key=lambda trial: (trial.harm or 0.0, -(trial.loss or 0.0)), default=None)


def utility_loss(before: Result, after: Result, tasks: Sequence[str]) -> float | None:
    """The loss of utility as a share: of the mean accuracy in `tasks`, or without any in perplexity; None for none."""
    if tasks:
        accuracy, left = (_accuracy(result.rates, tasks) for result in (before, after))
        return None if not accuracy or left is None else 1 - left / accuracy
    return after.perplexity / before.perplexity - 1 if before.perplexity and after.perplexity else None


def _accuracy(rates: Mapping[str, Rate], tasks: Sequence[str]) -> float | None:
    values = [rates[f"zero_shot/{task}"].value for task in tasks]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def need_optuna() -> None:
    """Raises ValueError where optuna is not installed."""
    try:
        found = importlib.util.find_spec("optuna")
    except ValueError:  # marked as missing
        found = None
    if found is None:
        raise ValueError('a search needs optuna, which is not installed; pip install "jaxsafe[search]"')
