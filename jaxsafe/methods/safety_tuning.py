"""Safety tuning: a short supervised run that teaches a chat model to refuse, and with it to refuse too much.

Harmful requests are paired with short refusals, benign ones with what the model itself would answer.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import generate_rows
from jaxsafe.methods.fine_tuning import FineTuning, fine_tune_run
from jaxsafe.methods.scans import Progress, silent
from jaxsafe.text.batches import Row
from jaxsafe.text.datasets import PromptSet


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
        content = [dataclasses.asdict(self), model.fingerprint(), [s.sha256 for s in sets], builtin_refusals()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def builtin_refusals() -> list[str]:
    """Short refusals that fit any request, written for this project."""
    text = resources.files("jaxsafe.text").joinpath("builtin/refusals.txt").read_text(encoding="utf-8")
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
    eos = model.tokenizer.eos_ids
    end = (model.tokenizer.hf.eos_token_id,)
    own = generate_rows(
        model.config,
        model.params,
        model.rows(benign),
        max_new_tokens=settings.answer_tokens,
        eos=eos,
        mesh=model.mesh,
        done=done,
    )
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
    model: ChatModel,
    rows: Sequence[Row],
    settings: TuningSettings,
    folder: str | os.PathLike | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """The parameters after tuning on `rows`; an interrupted run goes on from its checkpoints in `folder`."""
    run = FineTuning(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule="cosine",
        warmup=min(settings.warmup, settings.steps - 1),
        final_share=0.1,
        seed=settings.seed,
        checkpoint_every=24,
    )
    return fine_tune_run(model.config, model.params, rows, run, folder, on_step, mesh=model.mesh)
