"""Safety tuning: a short supervised run that teaches a chat model to refuse, and with it to refuse too much.

Harmful requests are paired with short refusals, benign ones with what the model itself would answer.
"""

import dataclasses
import os
from collections.abc import Generator, Sequence
from importlib import resources

import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import digest
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods.trainer import FineTuning, Step, train
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.rows import Row

ANSWERED_AT_ONCE = 48
"""Benign prompts; the last of three batches of the built-in ones has no shape of its own."""


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """A run of `steps` batches of `batch_size` rows; AdamW with a linear warm-up and a cosine decay.

    Benign answers are cut after `answer_tokens` tokens.
    """

    steps: int = 48
    batch_size: int = 10
    learning_rate: float = 2e-4
    warmup: int = 5
    answer_tokens: int = 12
    seed: int = 0

    def digest(self, model: ChatModel, sets: Sequence[PromptSet]) -> str:
        """What the tuned weights follow from, as a short name for a cache."""
        data = [prompts.sha256 for prompts in sets], builtin_refusals()
        return digest(dataclasses.asdict(self), model.fingerprint(), data)[:12]


def builtin_refusals() -> list[str]:
    """Short refusals that fit any request, written for this project."""
    text = resources.files("jaxsafe.prompts").joinpath("builtin/refusals.txt").read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def tuning_rows(
    model: ChatModel,
    harmful: Sequence[str],
    benign: Sequence[str],
    refusals: Sequence[str],
    settings: TuningSettings,
    done: Progress = silent,
) -> list[Row]:
    """Prompts with the answers to learn; a refusal ends with the end-of-text token, a cut answer does not."""
    rng = np.random.default_rng(settings.seed)
    end = (model.tokenizer.hf.eos_token_id,)
    own = model.answers(benign, Decoding(settings.answer_tokens), ANSWERED_AT_ONCE, done)
    rows = []
    for row in model.rows(harmful):
        refusal = refusals[int(rng.integers(len(refusals)))]
        rows.append(Row(row.ids + tuple(model.tokenizer.plain_ids(refusal)) + end, row.instruction_end))
    for row, tokens, length in zip(model.rows(benign), own.tokens, own.lengths, strict=True):
        answer = tuple(int(t) for t in tokens[:length])
        whole = answer + end if length < settings.answer_tokens else answer
        rows.append(Row(row.ids + whole, row.instruction_end))
    return rows


def safety_tune(
    model: ChatModel, rows: Sequence[Row], settings: TuningSettings, folder: str | os.PathLike | None = None
) -> Generator[Step, None, None]:
    """The steps of tuning on `rows`; a run that was interrupted goes on from its checkpoint in `folder`.

    No other is written, which takes as long as four steps: weights that are to last are saved while the last step is
    in hand, where an interruption still keeps it.
    """
    run = FineTuning(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule="cosine",
        warmup=min(settings.warmup, settings.steps - 1),
        final_share=0.1,
        seed=settings.seed,
        checkpoint_every=settings.steps + 1,
        checkpoint_end=False,
    )
    return train(model.config, model.params, rows, run, mesh=model.mesh, folder=folder)
