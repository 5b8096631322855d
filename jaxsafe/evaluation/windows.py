"""Perplexity by the two published protocols: of one long text, cut into windows of so many tokens."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsafe.chat.examinee import Examinee
from jaxsafe.chat.model import ChatModel
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Row

PUBLISHED_WINDOW = 2048
"""Tokens of a window of arXiv 2408.11491, its template included."""
MARKS = {"scans": ("[INST] ", " [/INST] "), "scans_vicuna": ("USER: ", " \nASSISTANT: ")}
"""What stands before a window's first half, behind BOS, and before its second half, by the name of the protocol."""
PROTOCOLS = ("wei2024", *MARKS)


class Windows(NamedTuple):
    """What perplexity is of: the answers of `rows`, and those of `before`, where no steering acts yet."""

    rows: tuple[Row, ...]
    before: tuple[Row, ...] = ()


def windows(model: ChatModel, text: str, protocol: str, most: int | None = None, length: int | None = None) -> Windows:
    """The first `most` windows of `text` by a published protocol, of `length` tokens each (None: as published).

    "wei2024" (arXiv 2402.05162): the tokens of the text, with BOS where the tokenizer adds one, in windows of the
    model's context that do not overlap; each token of a window but the first counts. "scans" and "scans_vicuna"
    (arXiv 2408.11491): the tokens without BOS in windows of 2048, or half the context, where that is less; each is put
    as a request, its first half, and an answer, the rest, by marks that are tokenized apart from the text ([INST] and
    [/INST]; USER: and ASSISTANT:), and every token but the first counts, the marks and the request included. The end of
    the text that fills no window is left out, so that the mean over windows of their means, which both papers take, is
    that over tokens.

    A steering rule acts from the end of the request on. It reads the request of a window there; the published code
    puts the whole window, marks and all, into the template once more for that.

    Raises ValueError for another protocol, and for a text or a length that gives no window.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r} of perplexity; need one of {', '.join(PROTOCOLS)}")
    if protocol == "wei2024":
        length = model.config.context if length is None else length
        ids = model.tokenizer.raw_row(text).ids
        return Windows(tuple(Row(tuple(each), 0) for each in _cut(ids, length, 2)[:most]))
    start, end = MARKS[protocol]
    bos = () if model.tokenizer.hf.bos_token_id is None else (model.tokenizer.hf.bos_token_id,)
    before, between = (*bos, *model.tokenizer.plain_ids(start)), tuple(model.tokenizer.plain_ids(end))
    asked = len(model.tokenizer.plain_ids(end.rstrip()))
    length = min(PUBLISHED_WINDOW, model.config.context // 2) if length is None else length
    pieces = _cut(model.tokenizer.plain_ids(text), length - len(before) - len(between), 2)[:most]
    halves = [(piece[: len(piece) // 2], piece[len(piece) // 2 :]) for piece in pieces]
    rows = [Row((*before, *first, *between, *second), len(before) + len(first) + asked - 1) for first, second in halves]
    return Windows(tuple(rows), tuple(Row(row.ids[: row.instruction_end + 1], 0) for row in rows))


def read_by_rule(
    examinee: Examinee, texts: Windows, batch_size: int = 16, done: Progress = silent
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(summed negative log-likelihood in nats, tokens) of every answer, of `before` and of `rows`, under each rule.

    `done` is called with numbers of rows. Raises ValueError for a rule that edits before the instruction's end where
    there are rows that no steering reaches.
    """
    read = list(examinee.nll(texts.rows, batch_size, done))
    if not texts.before:
        return read
    if any(getattr(rule, "reaches_prompt", False) for rule in examinee.rules):
        raise ValueError("a rule edits requests, which these texts count as they are; read them 'whole' or by 'halves'")
    before = examinee.model.nll(texts.before, batch_size, done)
    return [(np.concatenate([before[0], nll]), np.concatenate([before[1], n])) for nll, n in read]


def _cut(ids: Sequence[int], length: int, least: int) -> list[Sequence[int]]:
    """`ids` in pieces of `length`; the rest is left out."""
    if length < least:
        raise ValueError(f"windows leave {length} tokens of text each; need at least {least}: give longer ones")
    if len(ids) < length:
        raise ValueError(f"a text of {len(ids)} tokens fills no window, which takes {length}; give a longer text")
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def load_text(path: str | os.PathLike) -> str:
    """The lines of a text file, joined as both papers join those of WikiText-2: by two line breaks, blank ones empty.

    A line keeps its own break, as the published data set has it. Raises FileNotFoundError, and ValueError where there
    is no text.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no text file at {path}")
    lines = file.read_text(encoding="utf-8").split("\n")
    kept = [f"{line}\n" if line.strip() else "" for line in (lines if lines[-1] else lines[:-1])]
    if not any(kept):
        raise ValueError(f"{path} has no text; give a file with a text to read")
    return "\n\n".join(kept)
