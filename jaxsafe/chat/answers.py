"""Answers of a model to prompts, as texts and as tokens.

n answers
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers to n prompts, or to fewer, where each has several samples, which are together.

    texts:   each answer without special tokens
    tokens:  int32 [n, new], 0 behind an answer
    lengths: int32 [n] how many tokens an answer has before its end-of-text token
    scores:  float32 [n] what a steering rule makes of each prompt; None without a rule
    gates:   float32 [n] what each prompt takes of the rule's edits, such as +1 and -1; None without a rule
    harmful: bool [n] which prompts the rule takes for harmful; None without a rule
    passes:  int32 [n] how often each prompt was answered; None where once
    nats:    float32 [n] the summed negative log-likelihood of the tokens under the model that is asked, as it is; None
             where a rule or other weights had a part in them, and where that is not known
    read:    how many prompt tokens were run for these answers; where several rules share a prefill, the answers under
             the first rule count them
    """

    texts: tuple[str, ...]
    tokens: Int[np.ndarray, "n new"]
    lengths: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"] | None = None
    gates: Float[np.ndarray, "n ..."] | None = None
    harmful: Bool[np.ndarray, " n"] | None = None
    passes: Int[np.ndarray, " n"] | None = None
    nats: Float[np.ndarray, " n"] | None = None
    read: int = 0

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each answer, without what is behind it."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    @property
    def written(self) -> int:
        """How many tokens the answers have."""
        return int(self.lengths.sum())


def collected(pieces: Iterable[tuple[Any, Answers]]) -> Answers:
    """The answers of (indices, answers) pairs in the order of the indices. Raises ValueError for no pairs."""
    indices, parts = zip(*pieces, strict=True)
    order = np.argsort(np.concatenate(indices))

    def joined(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)[order]

    texts = [text for part in parts for text in part.texts]
    arrays = {name: joined(name) for name in ("tokens", "lengths", "scores", "gates", "harmful", "passes", "nats")}
    return Answers(tuple(texts[i] for i in order), read=sum(part.read for part in parts), **arrays)
