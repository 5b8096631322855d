"""Does a model still write language? A broken one does not refuse either, so this stands beside every rate.

Repetition and perplexity catch different failures: a loop has a low perplexity, noise repeats nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxsafe.evaluation.perplexity import halves
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.training import answer_nll
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.parallel import put_rows
from jaxsafe.text.batches import Batch, Row, bucket, map_batches
from jaxsafe.text.chat import check_context

Reading = Literal["halves", "whole"]


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n-grams of {n} words; need at least 1")
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(texts: Sequence[str], n: int = 4) -> float | None:
    """The share of n-grams of words that occurred before in their text, 1 - distinct / all, averaged over texts.

    Texts of fewer than `n` words have no n-gram and are left out; None where none is left. It grows with the
    length of a text, so compare answers of one `max_new_tokens`. Raises ValueError for `n` below 1. Source: seq-rep-n
    of Welleck et al., arXiv 1908.04319, on words.
    """
    shares = [1 - len(set(grams)) / len(grams) for grams in (_ngrams(text, n) for text in texts) if grams]
    return float(np.mean(shares)) if shares else None


def distinct(texts: Sequence[str], n: int = 2) -> float | None:
    """Distinct n-grams of words among all the texts together / all their n-grams; None where there are none.

    It is low also where every answer is the same one. Raises ValueError for `n` below 1. Source: after distinct-n
    of Li et al., arXiv 1510.03055, which divides by the number of words.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def answer_rows(model: ChatModel, prompts: Sequence[str], answers: Sequence[str]) -> list[Row]:
    """Each prompt as `model` is asked it, with its answer behind; what exceeds the context is cut off the answer."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if model.raw:
            row = model.tokenizer.raw_row(prompt, answer)
        else:
            row = model.tokenizer.chat_row(prompt, model.system, answer)
        fits = row.instruction_end < model.config.context
        rows.append(Row(row.ids[: model.config.context], row.instruction_end) if fits else row)
    return rows


def text_rows(model: ChatModel, texts: Sequence[str], read: Reading = "whole") -> list[Row]:
    """Passages as rows for `answer_perplexity`, so that a sweep over parameters tokenises them once.

    "halves": the second half of a text as the answer to its first (SCANS, arXiv 2408.11491, section 4.3). "whole":
    the text without any template, each token but the first counted, which is BOS where the tokenizer adds one.
    Raises ValueError for another reading and for a blank text.
    """
    if read == "halves":
        return halves(model, texts)
    if read == "whole":
        return [Row(model.tokenizer.raw_row(text).ids, 0) for text in texts]
    raise ValueError(f"unknown reading {read!r} of a text; need 'halves' or 'whole'")


@functools.partial(jax.jit, static_argnames=("config", "last"))
def _nll(config: ModelConfig, params: Params, batch: Batch, last: int) -> tuple[jax.Array, jax.Array]:
    return answer_nll(config, params, batch, last=last)


def answer_perplexity(
    model: ChatModel, rows: Sequence[Row], batch_size: int = 16, done: Callable[[int], None] = lambda count: None
) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of the rows' answers under `model`, and the number of tokens counted.

    The answers of an edited model are judged by the model before the edit. Programs are compiled by shape: another
    tree of parameters (`dataclasses.replace(model, params=...)`) runs the ones that are there. NaN where no row has an
    answer. `done` hears how many rows each finished batch had. Raises ValueError for no rows and for a row that
    exceeds the context.
    """
    check_context(rows, model.config.context)

    def call(batch: Batch, indices: np.ndarray) -> Any:
        longest = int(batch.tokens.shape[1] - 1 - batch.instruction_end.min())
        return _nll(model.config, model.params, put_rows(batch, model.mesh), bucket(longest))

    nll, count = map_batches(call, rows, batch_size, model.row_multiple, done)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return float(np.exp(nll.sum(dtype=np.float64) / count.sum())), int(count.sum())


def text_perplexity(
    model: ChatModel,
    texts: Sequence[str],
    batch_size: int = 16,
    done: Callable[[int], None] = lambda count: None,
    read: Reading = "whole",
) -> tuple[float, int]:
    """`answer_perplexity` of passages read as `text_rows` says."""
    return answer_perplexity(model, text_rows(model, texts, read), batch_size, done)
