"""Strengths in comparable units: how far an edit moves the answers that a model gives anyway."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.steering import Rule
from jaxsafe.methods.evidence import Evidence

TOKENS = 8
"""So many first tokens of an answer count."""


def benign_answers(model: ChatModel, evidence: Evidence, most: int = 32) -> tuple[list[str], Answers]:
    """Up to `most` safe prompts that the model answers, evenly over their order, and the first tokens of the answers.

    Raises ValueError where it answers none.
    """
    answered = np.flatnonzero(~evidence.harmful & ~evidence.refused & (evidence.lengths > 0))
    if not len(answered):
        raise ValueError("the model answers none of the safe prompts, so that no edit's effect on answers can be told")
    some = answered[np.linspace(0, len(answered) - 1, min(most, len(answered))).astype(int)]
    tokens, lengths = evidence.tokens[some][:, :TOKENS], np.minimum(evidence.lengths[some], TOKENS)
    return [evidence.prompts[i] for i in some], Answers((), tokens, lengths)


def divergences_of(
    model: ChatModel, rules: Sequence[Rule | None], benign: tuple[list[str], Answers], batch_size: int = 32
) -> list[float]:
    """KL(unsteered || steered) of the next token, nats a token of the benign answers, of every rule."""
    prompts, answers = benign
    nats = model.steered(rules).divergences(model.rows(prompts), answers, batch_size)
    return [float(total) / max(1, answers.written) for total in nats.sum(1)]


def strength_of_kl(
    model: ChatModel,
    rule: Callable[[float], Rule],
    kl: float,
    benign: tuple[list[str], Answers],
    highest: float = 1.0,
    rounds: int = 12,
) -> float:
    """The strength in (0, `highest`] at which `rule(strength)` moves benign answers by `kl` nats a token, by bisection.

    `highest` where even that moves them by less.
    """
    if divergences_of(model, [rule(highest)], benign)[0] <= kl:
        return highest
    low, high = 0.0, highest
    for _ in range(rounds):
        middle = (low + high) / 2
        below = divergences_of(model, [rule(middle)], benign)[0] <= kl
        low, high = (middle, high) if below else (low, middle)
    return low
