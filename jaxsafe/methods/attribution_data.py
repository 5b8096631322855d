"""Prompts with answers that scores are made from: the model's own, or those of a file.

The safety set holds harmful prompts with refusals, the utility set harmless ones with answers.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.io.store import Json, Log, Store, by_batch
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.content import cell_text
from jaxsafe.prompts.files import read_rows
from jaxsafe.rows import Row, check_context, data_sha256

PAIR = {"prompt": "user", "response": "assistant"}
"""The columns of a file of pairs, and whose words they hold."""


@dataclasses.dataclass(frozen=True)
class OwnAnswers:
    """Which of a model's own answers are kept: those that refuse (`refused`), or those that do not, by `judge`.

    Where the rule of `judge` counts words, its `cut` judges the answers that end at `answer_tokens`: the words that
    they lack are not the model's doing. answer_tokens: the most tokens of an answer; batch_size: prompts answered at a
    time.
    """

    judge: Judge
    refused: bool
    answer_tokens: int = 64
    batch_size: int = 32

    @property
    def cut_judge(self) -> Judge:
        """The judge of answers that are cut off."""
        return getattr(self.judge, "cut", None) or self.judge

    @property
    def piece(self) -> str:
        """The name of these answers in a store."""
        return f"own-answers-{'refused' if self.refused else 'answered'}"

    def follows(self, model: ChatModel, prompts: Sequence[str]) -> Json:
        """What the rows of `prompts` follow from, in values of JSON."""
        judged = [[judge.name, judge.version] for judge in (self.judge, self.cut_judge)]
        asked, ends = data_sha256(model.rows(prompts)), list(model.tokenizer.eos_ids)
        return [model.fingerprint(), asked, ends, judged, self.refused, self.answer_tokens]

    def verdicts(self, prompts: Sequence[str], answers: Sequence[tuple[str, Sequence[int]]]) -> list[bool | None]:
        """The verdict on each of `answers` (text and tokens): whether it refuses, None where that cannot be said."""
        texts = [text for text, _ in answers]
        whole = self.judge.refused(prompts, texts)
        if self.cut_judge is self.judge:
            return list(whole)
        cut = self.cut_judge.refused(prompts, texts)
        return [
            by_cut if len(ids) >= self.answer_tokens else by_whole
            for (_, ids), by_whole, by_cut in zip(answers, whole, cut, strict=True)
        ]


def own_answers_once(
    store: Store, model: ChatModel, prompts: Sequence[str], kept: OwnAnswers, done: Progress = silent
) -> list[Row]:
    """`own_answers`, kept in `store`, batch by batch while they are made."""
    name, follows = kept.piece, kept.follows(model, prompts)

    def make() -> Json:
        rows = own_answers(model, prompts, kept, done, store.log(name, follows))
        return [[list(row.ids), row.instruction_end] for row in rows]

    rows = [Row(tuple(ids), end) for ids, end in store.once(name, follows, make)]
    store.drop(name, follows, ".jsonl")
    return rows


def kept_count(store: Store, model: ChatModel, prompts: Sequence[str], kept: OwnAnswers) -> int | None:
    """How many of `prompts` have a row by `own_answers_once`; None where `store` does not hold them."""
    name, follows = kept.piece, kept.follows(model, prompts)
    return len(store.read(name, follows)) if store.has(name, follows) else None


def own_answers(
    model: ChatModel, prompts: Sequence[str], kept: OwnAnswers, done: Progress = silent, log: Log | None = None
) -> list[Row]:
    """The prompts whose greedy answer refuses (`kept.refused`) or does not, as rows with that answer.

    An answer has no end-of-text token, as published. Answers are kept in `log` batch by batch, and those that it holds
    are not made again; `done` is called with the number of prompts of each finished batch. Raises ValueError where no
    prompt is left.
    """
    rows = model.rows(prompts)

    def make(left: list[int]) -> Iterator[tuple[list[int], list[Json]]]:
        decoding = Decoding(kept.answer_tokens)
        for some, own in model.answer_batches([rows[i] for i in left], decoding, kept.batch_size):
            yield [left[i] for i in some], [[text, ids] for text, ids in zip(own.texts, own.ids, strict=True)]

    own = by_batch(len(rows), make, log, done)
    verdicts = kept.verdicts(prompts, own)
    chosen = [
        Row(row.ids + tuple(ids), row.instruction_end)
        for row, (_, ids), verdict in zip(rows, own, verdicts, strict=True)
        if ids and verdict is kept.refused
    ]
    if not chosen:
        kind = "refused" if kept.refused else "answered"
        raise ValueError(f"none of the {len(prompts)} prompts is {kind} by {model.name}, judged by {kept.judge.name}")
    return chosen


def prompts_of_pairs(path: str | pathlib.Path) -> list[str]:
    """The prompts of a file of pairs, in its order. Raises as `pairs_from_file` does, but for lengths."""
    return [texts["prompt"] for texts in _pairs(path)]


def pairs_from_file(model: ChatModel, path: str | pathlib.Path, raw: bool = False) -> list[Row]:
    """Rows of a file with the columns prompt and response, in its order.

    `raw` takes prompts as they stand, for files that hold the template's markers. Raises FileNotFoundError, and
    ValueError for a missing column, an empty cell, and a row longer than the context.
    """
    asked = model.with_prompt(raw=raw or model.raw)
    pairs = _pairs(path)
    rows = [asked.row(texts["prompt"], texts["response"]) for texts in pairs]
    check_context(rows, model.config.context, name=str(path), texts=[texts["prompt"] for texts in pairs])
    return rows


def _pairs(path: str | pathlib.Path) -> list[dict[str, str]]:
    """The texts of a file of pairs, by column."""
    pairs = []
    for i, line in enumerate(read_rows(pathlib.Path(path)), 1):
        where = f"{path}, row {i}"
        texts = {name: cell_text(line, name, where, role) if line.get(name) else "" for name, role in PAIR.items()}
        if missing := [name for name, text in texts.items() if not text.strip()]:
            raise ValueError(f"{where}: no {missing[0]}; pairs need the columns prompt and response")
        pairs.append(texts)
    return pairs


def draw(rows: Sequence[Row], n: int, seed: int) -> list[Row]:
    """`n` of the rows (all, where there are fewer), drawn by `numpy.random.default_rng(seed)` as published."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]
