"""Perplexity of a text as a chat model's answer, plain or steered by SCANS."""

import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.steering import Steering, rerun_slots, scans_prefill, steered_nll
from jaxsafe.parallel import put_rows
from jaxsafe.text.batches import Batch, Row, bucket, map_batches
from jaxsafe.text.chat import check_context


def builtin_prose() -> list[str]:
    """The passages that perplexity is measured on by default: prose written for this project."""
    return passages(resources.files("jaxsafe.text").joinpath("builtin/prose.txt").read_text(encoding="utf-8"))


def passages(text: str, shortest: int = 40) -> list[str]:
    """The paragraphs of `text` (blocks between blank lines, or lines) of at least `shortest` words."""
    blocks = re.split(r"\n\s*\n", text)
    if len(blocks) == 1:
        blocks = text.splitlines()
    return [" ".join(block.split()) for block in blocks if len(block.split()) >= shortest]


def load_passages(path: str | os.PathLike, most: int | None = None) -> list[str]:
    """The first `most` passages of a text file. Raises FileNotFoundError, and ValueError where it has none."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no text file at {path}")
    found = passages(file.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{path} has no paragraph of at least 40 words")
    return found[:most]


def halves(model: ChatModel, texts: Sequence[str]) -> list[Row]:
    """Each text as a conversation: its first half asked, its second half answered (SCANS, section 4.3)."""
    rows = []
    for text in texts:
        words = text.split()
        first, second = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
        if model.raw:
            rows.append(model.tokenizer.raw_row(first, " " + second))
        else:
            rows.append(model.tokenizer.chat_row(first, model.system, second))
    return rows


def perplexities(
    model: ChatModel,
    steerings: Sequence[Steering],
    affirmative: Any,
    texts: Sequence[str],
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[list[float], int]:
    """exp of the mean negative log-likelihood of the texts' second halves under each steering, and the tokens counted.

    Each text is classified and steered as a prompt would be; a steering of no strength gives the model's own. The
    steerings must share their `reference`: one pass over a text serves all of them.
    """
    rows = halves(model, texts)
    affirmative = jnp.asarray(affirmative)
    check_context(rows, model.config.context, len(affirmative))

    def call(batch: Batch, indices: np.ndarray) -> Any:
        again = min(bucket(rerun_slots(batch)), batch.tokens.shape[1])
        placed = put_rows(batch, model.mesh)
        start = (model.config, model.params, placed)
        prefilled = scans_prefill(*start, affirmative, steerings[0].reference, len(affirmative))
        nll, count = zip(*(steered_nll(*start, prefilled, steering, again) for steering in steerings), strict=True)
        return jnp.stack(nll, axis=1), count[0]

    nll, count = map_batches(call, rows, batch_size, model.row_multiple, done)
    n = int(count.sum())
    return [math.exp(float(total) / n) for total in nll.sum(0)], n
