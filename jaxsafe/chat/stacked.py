"""Several models that differ in their weights alone and answer in one program.

n prompts or rows, M models, B batch
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.generate import for_device
from jaxsafe.kernels.sampling import Decoding, drawing, row_seeds
from jaxsafe.kernels.stacked import stacked_answers, stacked_nll
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row, Tree, answer_slots, bucket, in_order, reported


@dataclasses.dataclass(frozen=True)
class Stacked:
    """`model` with each of the weights in `stack`, whose tensors have a leading axis M.

    It is asked as `Steered` is, with a rule for each of the weights that is None: all of them are held at once, and
    what they answer is what each would by itself.
    """

    model: ChatModel
    stack: Params

    @property
    def rules(self) -> tuple[None, ...]:
        """None for each of the weights."""
        return (None,) * len(jax.tree.leaves(self.stack)[0])

    def with_prompt(self, *prompt: Any, **named: Any) -> "Stacked":
        """The same weights asked in another way; see `ChatModel.with_prompt`."""
        return dataclasses.replace(self, model=self.model.with_prompt(*prompt, **named))

    def answer_batches(
        self, prompts: Sequence[str], decoding: Decoding = Decoding(), batch_size: int = 32
    ) -> Iterator[tuple[np.ndarray, tuple[Answers, ...]]]:
        """(indices, answers of each model) of each finished batch; see `ChatModel.answer_batches`."""
        model = self.model
        rows, decoding = model.asked(prompts, decoding)
        numbers = row_seeds(rows)

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            program = for_device(stacked_answers, "config")
            return program(model.config, self.stack, batch, drawing(decoding, numbers[indices]), model.edits)

        for indices, by_model in model.batches(call, rows, batch_size, decoding.max_new_tokens):
            read = sum(len(rows[i].ids) for i in indices)
            yield (
                indices,
                tuple(model.decoded(dataclasses.replace(generated, nats=None), read) for generated in by_model),
            )

    def nll(
        self, rows: Sequence[Row], batch_size: int = 16, done: Progress = silent
    ) -> tuple[tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]], ...]:
        """As `ChatModel.nll`, of each model."""

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            last = bucket(answer_slots(rows, indices))
            return stacked_nll(self.model.config, self.stack, batch, self.model.edits, last)

        return in_order(reported(self.model.batches(call, rows, batch_size), done))
