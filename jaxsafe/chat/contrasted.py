"""A model that answers by the logits of two: another model beside it, or itself under another prompt."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.model import KEEP, ChatModel, System
from jaxsafe.kernels.contrast import Contrast, contrasted_answers
from jaxsafe.kernels.sampling import Decoding, drawing, row_seeds
from jaxsafe.parallel import put_rows
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row, Tree, check_context, pad_rows


@dataclasses.dataclass(frozen=True)
class Contrasted:
    """What answers by `contrast` of the logits of `model` (the main one) and of `other`, two of one configuration.

    It is asked as `Steered` is, with one rule that is None. Texts that are read, not written, are read by `model`
    alone. Raises ValueError for models of different configurations or with edits.
    """

    model: ChatModel
    other: ChatModel
    contrast: Contrast
    rules: tuple[None] = (None,)

    def __post_init__(self) -> None:
        if self.model.config != self.other.config:
            raise ValueError(f"{self.model.name} and {self.other.name} differ in configuration; contrast needs one")
        if self.model.edits or self.other.edits:
            raise ValueError("models with edits cannot be contrasted; bake the edits into the weights")

    def with_prompt(self, system: System = KEEP, raw: bool | None = None, opening: str | None = None) -> "Contrasted":
        """The same contrast asked in another way; see `ChatModel.with_prompt`.

        Raises ValueError where the two are one model under two prompts and one of these would be replaced.
        """
        main = self.model.with_prompt(system, raw, opening)
        if self.one_model and (main.system, main.raw) != (self.model.system, self.model.raw):
            raise ValueError("a contrast of two prompts cannot be asked under a third; leave this setting out")
        prompt = (KEEP, None) if self.one_model else (system, raw)
        return dataclasses.replace(self, model=main, other=self.other.with_prompt(*prompt, opening))

    @property
    def one_model(self) -> bool:
        """Whether both are the same weights under two prompts."""
        return self.model.params is self.other.params

    def answer_batches(
        self, prompts: Sequence[str], decoding: Decoding = Decoding(), batch_size: int = 32
    ) -> Iterator[tuple[np.ndarray, tuple[Answers]]]:
        """(indices, answers) of each finished batch; see `ChatModel.answer_batches`."""
        model = self.model
        rows, decoding = model.asked(prompts, decoding)
        others, _ = self.other.asked(prompts, decoding)
        check_context(others, model.config.context, decoding.max_new_tokens)
        numbers = row_seeds(rows)
        params = (model.params,) if self.one_model else (model.params, self.other.params)

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            real = np.where(indices >= 0, indices, indices[0])  # what stands in the place of padding is left out
            both = pad_rows([*(rows[i] for i in real), *(others[i] for i in real)])
            draw = drawing(decoding, numbers[real])
            return contrasted_answers(model.config, params, put_rows(both, model.mesh), self.contrast, draw)

        for indices, generated in model.batches(call, rows, batch_size, decoding.max_new_tokens):
            read = sum(len(rows[i].ids) + len(others[i].ids) for i in indices)
            yield (
                indices,
                (dataclasses.replace(model.decoded(generated, read), passes=np.full(len(indices), 2, np.int32)),),
            )

    def nll(
        self, rows: Sequence[Row], batch_size: int = 16, done: Progress = silent
    ) -> tuple[tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
        """As `ChatModel.nll` of the main model."""
        return (self.model.nll(rows, batch_size, done),)
