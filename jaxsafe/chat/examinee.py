"""What an exam can question: a model under steering rules, or one that decodes in another way."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.progress import Progress
from jaxsafe.rows import Row


class Examinee(Protocol):
    """Several ways of answering that share their work, one a rule; see `Steered`, the usual one."""

    @property
    def model(self) -> ChatModel:
        """The model that is asked."""

    @property
    def rules(self) -> Sequence[Any]:
        """One entry for each way; None where nothing is steered."""

    def with_prompt(self, *prompt: Any, **named: Any) -> "Examinee":
        """The same, asked in another way; see `ChatModel.with_prompt`."""

    def answer_batches(
        self, prompts: Sequence[str], decoding: Decoding = Decoding(), batch_size: int = 32
    ) -> Iterator[tuple[np.ndarray, tuple[Answers, ...]]]:
        """(indices, answers under each rule) of each finished batch."""

    def nll(
        self, rows: Sequence[Row], batch_size: int = 16, done: Progress = ...
    ) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Summed negative log-likelihood (nats) of each row's answer, and its tokens, under each rule."""
