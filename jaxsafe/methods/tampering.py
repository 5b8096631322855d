"""Fine-tuning runs that differ in hyperparameters and seed, examined as variants of the model that they begin from."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from jaxsafe.chat.model import ChatModel
from jaxsafe.methods.trainer import FineTuning, described, train
from jaxsafe.progress import Watch
from jaxsafe.records.run import Result, Variant
from jaxsafe.records.search import Choice
from jaxsafe.rows import Row, data_sha256
from jaxsafe.study.study import Study


@dataclasses.dataclass(frozen=True)
class Tampering:
    """The runs of a study: the rows of each seed, and what watches their steps."""

    rows: Mapping[int, Sequence[Row]]
    watch: Watch

    def examine(self, study: Study, variant: Variant, settings: FineTuning) -> Result:
        """The result of `variant`, the model after a run by `settings`, which is made unless it is finished."""
        run, rows = described(settings), self.rows[settings.seed]
        del run["slots"]  # padding follows from the rows of all seeds
        variant = dataclasses.replace(variant, follows=["tampering", run, data_sha256(rows)])
        return study.examine(variant, functools.partial(self._made, study.model, rows, settings, variant.name))

    def _made(self, model: ChatModel, rows: Sequence[Row], settings: FineTuning, name: str) -> ChatModel:
        with self.watch(name, settings.steps) as done:
            for step in train(model.config, model.params, rows, settings, mesh=model.mesh):
                done(0 if step.begins else 1)
            return model.with_params(step.weights())


def choice_of(settings: FineTuning) -> Choice:
    """The hyperparameters of a run."""
    rank = None if settings.lora is None else settings.lora.rank
    return Choice(settings.learning_rate, settings.steps, settings.batch_size, rank, settings.schedule)


def chosen(settings: FineTuning, choice: Choice) -> FineTuning:
    """`settings` with the hyperparameters of `choice`. Raises ValueError for a rank where there are no adapters."""
    tried = dataclasses.asdict(choice)
    rank = tried.pop("rank")
    if rank is None:
        return dataclasses.replace(settings, **tried, decay=1.0, decay_every=1, lora=None)
    if settings.lora is None:
        raise ValueError(f"a choice of rank {rank} needs settings with adapters; these train all weights")
    lora = dataclasses.replace(settings.lora, rank=rank)
    return dataclasses.replace(settings, **tried, decay=1.0, decay_every=1, lora=lora)
