"""Does a model still write language? A broken one does not refuse either, so this stands beside every rate.

Repetition and perplexity catch different failures: a loop has a low perplexity, noise repeats nothing.
"""

import itertools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Row

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
    rows = [model.row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    context = model.config.context
    return [Row(row.ids[:context], row.instruction_end) if row.instruction_end < context else row for row in rows]


def spoken_rows(model: ChatModel, prompts: Sequence[str], answers: Sequence[str]) -> list[Row]:
    """`answer_rows`, for which an answer of nothing but spaces is none."""
    return answer_rows(model, prompts, [answer if answer.strip() else "" for answer in answers])


class Likelihood(NamedTuple):
    """Summed negative log-likelihood of an answer (nats) and its tokens, none for a blank one."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float | None:
        """Nats a token, to as many digits as do not follow from the batch that the answer was read in."""
        return round(self.nats / self.tokens, 4) if self.tokens else None


def row_likelihoods(
    model: ChatModel,
    rows: Sequence[Row],
    batch_size: int = 32,
    done: Progress = silent,
    known: Mapping[Row, Likelihood] = MappingProxyType({}),
) -> list[Likelihood]:
    """How likely the answer of each of `rows` is to `model`; equal ones are read once, those without one never.

    Nor are those that are `known`. `done` is called with numbers of rows, first with that of those which need no
    reading of their own.
    """
    read = [row for row in dict.fromkeys(rows) if row.instruction_end + 1 < len(row.ids) and row not in known]
    done(len(rows) - len(read))
    sums, counts = model.nll(read, batch_size, done) if read else ((), ())
    found = {row: Likelihood(float(nll), int(n)) for row, nll, n in zip(read, sums, counts, strict=True)}
    found |= known
    return [found.get(row, Likelihood(0.0, 0)) for row in rows]


def likelihoods(
    model: ChatModel,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    batch_size: int = 32,
    done: Progress = silent,
) -> list[list[Likelihood]]:
    """How likely several `answers` [k][n] to each of `prompts` [n] are to `model`; see `row_likelihoods`."""
    rows = [row for each in answers for row in spoken_rows(model, prompts, each)]
    found = iter(row_likelihoods(model, rows, batch_size, done))
    return [list(itertools.islice(found, len(prompts))) for _ in answers]


def text_rows(model: ChatModel, texts: Sequence[str], read: Reading = "whole") -> list[Row]:
    """Passages as rows whose answers a perplexity is of.

    "halves": the second half of a text as the answer to its first (SCANS, arXiv 2408.11491, section 4.3). "whole":
    the text without any template, each token but the first counted, which is BOS where the tokenizer adds one.
    Raises ValueError for another reading and for a blank text.
    """
    if read == "halves":
        return [_halves(model, text.split()) for text in texts]
    if read == "whole":
        return [Row(model.tokenizer.raw_row(text).ids, 0) for text in texts]
    raise ValueError(f"unknown reading {read!r} of a text; need 'halves' or 'whole'")


def _halves(model: ChatModel, words: Sequence[str]) -> Row:
    first, second = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
    return model.row(first, f" {second}" if model.raw else second)


def perplexity(nll: np.ndarray, counts: np.ndarray) -> tuple[float | None, int]:
    """exp of the mean of summed negative log-likelihoods `nll` (nats) over `counts` tokens, and their number.

    None where there are no tokens, and where it is beyond the floating-point numbers.
    """
    n = int(counts.sum())
    mean = float(nll.sum(dtype=np.float64)) / n if n else math.nan
    return (math.exp(mean) if mean < 700 else None), n


def builtin_prose() -> list[str]:
    """The passages that perplexity is measured on by default: prose written for this project."""
    return passages(resources.files("jaxsafe.prompts").joinpath("builtin/prose.txt").read_text(encoding="utf-8"))


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
