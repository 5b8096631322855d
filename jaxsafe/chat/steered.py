"""Several steerings of one model, which answer from one prefill.

n prompts or rows, B batch, A tokens of the affirmative
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxsafe.chat.answers import Answers, collected
from jaxsafe.chat.mending import Hand, Mending
from jaxsafe.kernels.generate import Generated, for_device
from jaxsafe.kernels.sampling import Decoding, drawing, row_seeds
from jaxsafe.kernels.steering import (
    Decision,
    PromptStates,
    Rule,
    answer_divergence,
    decide,
    prefill_and_read,
    steered_answers,
    steered_nll,
)
from jaxsafe.parallel import fetch, put_rows
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row, Tree, answer_slots, bucket, reported, row_bucket

if TYPE_CHECKING:
    from jaxsafe.chat.model import ChatModel


FEWEST = 8
"""Fewer rows are not answered again by themselves: each number of rows is a program of its own."""


class Found(NamedTuple):
    """Answers to a batch, and what a rule makes of its prompts; see `Answers`."""

    generated: Generated
    score: Any = None
    gate: Any = None
    harmful: Any = None
    passes: Any = None


@dataclasses.dataclass(frozen=True)
class Steered:
    """A model under each of some steering rules; None is the model itself, `Mending` answers again what is refused.

    One pass over the prompts, which no rule steers, serves all rules; without any rule the model answers as it does by
    itself. Raises ValueError for no rules, and for rules whose affirmatives differ.
    """

    model: "ChatModel"
    rules: tuple[Rule | Mending | None, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("no rules to steer by; give at least one, or None for the model itself")
        different = sorted({tuple(np.asarray(ids).tolist()) for ids in self._affirmatives()})
        if len(different) > 1:
            raise ValueError(
                f"rules that share a prefill need one affirmative; these have the token ids {different[0]} and "
                f"{different[1]}"
            )

    def with_prompt(self, *prompt: Any, **named: Any) -> "Steered":
        """The same rules for the model asked in another way; see `ChatModel.with_prompt`."""
        return dataclasses.replace(self, model=self.model.with_prompt(*prompt, **named))

    def answer_batches(
        self,
        prompts: Sequence[str] | Sequence[Row],
        decoding: Decoding = Decoding(),
        batch_size: int = 32,
        by_rule: Progress = silent,
    ) -> Iterator[tuple[np.ndarray, tuple[Answers, ...]]]:
        """(indices, answers under each rule) of each finished batch; see `ChatModel.answer_batches`.

        `by_rule` is called with a batch's number of rows whenever they are answered under one more rule.
        """
        model = self.model
        if not self._steers:
            for indices, own in model.answer_batches(prompts, decoding, batch_size):
                by_rule(len(indices) * len(self.rules))
                yield indices, (own, *[dataclasses.replace(own, read=0)] * (len(self.rules) - 1))
            return
        texts = [prompt if isinstance(prompt, str) else "" for prompt in prompts for _ in range(decoding.samples)]
        rows, decoding = model.asked(prompts, decoding)
        numbers = row_seeds(rows)
        slots = max(decoding.max_new_tokens, self._affirmative_tokens)

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            hand = Hand(batch, self._prefill(batch, slots), drawing(decoding, numbers[indices]))
            behind = 1 + answer_slots(rows, indices)
            prompted = [texts[i] for i in indices if i >= 0]
            unsteered = functools.cache(lambda: self._answered(None, hand, behind))

            def under(rule: Rule | Mending | None) -> Found:
                # One rule at a time: many at once would be minutes in which nothing is finished or interrupted.
                if rule is None:
                    found = unsteered()
                elif isinstance(rule, Mending):
                    found = self._mended(rule, unsteered(), hand, behind, prompted)
                else:
                    found = self._answered(rule, hand, behind)
                by_rule(len(prompted))
                return found

            return tuple(map(under, self.rules))

        for indices, results in model.batches(call, rows, batch_size, slots):
            read = sum(len(rows[i].ids) for i in indices)
            yield (
                indices,
                tuple(
                    dataclasses.replace(
                        model.decoded(found.generated, 0 if place else read),
                        scores=found.score,
                        gates=found.gate,
                        harmful=found.harmful,
                        passes=found.passes,
                    )
                    for place, found in enumerate(results)
                ),
            )

    def answers(
        self,
        prompts: Sequence[str] | Sequence[Row],
        decoding: Decoding = Decoding(),
        batch_size: int = 32,
        done: Progress = silent,
    ) -> tuple[Answers, ...]:
        """The answers to `prompts` under each rule; `done` is called with each finished batch's number of rows."""
        pieces = list(reported(self.answer_batches(prompts, decoding, batch_size), done))
        return tuple(collected((indices, own[i]) for indices, own in pieces) for i in range(len(self.rules)))

    def nll(
        self, rows: Sequence[Row], batch_size: int = 16, done: Progress = silent
    ) -> tuple[tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]], ...]:
        """Summed negative log-likelihood (nats) of each row's answer, and its tokens, under each rule.

        Each row is steered by what the rule reads at its instruction's end, as a prompt is. Raises ValueError for no
        rows and for one that exceeds the context.
        """
        model, acting = self.model, self._reading
        if all(rule is None for rule in acting):
            return (model.nll(rows, batch_size, done),) * len(self.rules)
        slots = self._affirmative_tokens
        places = list(map(id, acting))  # rules are not compared, which arrays do entry by entry

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            last = min(bucket(1 + answer_slots(rows, indices)), batch.tokens.shape[1])
            prefilled = self._prefill(batch, slots)
            start = (model.config, model.params, batch, prefilled.cache)

            @functools.cache
            def under(place: int) -> Tree:
                edits = self._edits(self._decision(acting[place], prefilled.states, batch))
                return steered_nll(*start, edits, self._again(acting[place], batch, last))

            return tuple(under(places.index(place)) for place in places)

        return model.map(call, rows, batch_size, done, slots)

    def divergences(
        self, rows: Sequence[Row], answers: Answers, batch_size: int = 32, done: Progress = silent
    ) -> Float[np.ndarray, "rules n"]:
        """KL(unsteered || steered) of the next token, summed (nats) along each of `answers` to `rows`, by rule."""
        model = self.model
        if not self._steers:
            return np.zeros((len(self.rules), len(rows)), np.float32)
        new = answers.tokens.shape[1]
        slots = max(new, self._affirmative_tokens)

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            again = max(self._again(rule, batch, 1 + answer_slots(rows, indices)) for rule in self._reading)
            lengths = answers.lengths[indices] * (indices >= 0)
            given = put_rows(Generated(answers.tokens[indices], lengths.astype(np.int32)), model.mesh)
            prefilled = self._prefill(batch, slots)
            start = (model.config, model.params, batch, prefilled.cache)
            plain = self._edits(self._decision(None, prefilled.states, batch))
            decisions = [self._decision(rule, prefilled.states, batch) for rule in self._reading]
            return tuple(fetch(answer_divergence(*start, (plain, self._edits(d)), given, again)[0]) for d in decisions)

        return np.stack(model.map(call, rows, batch_size, done, slots))

    @property
    def _steers(self) -> bool:
        return any(rule is not None for rule in self.rules)

    @property
    def _reading(self) -> list[Rule | None]:
        """What acts on a text that is read, which is no refusal, so that there is nothing to mend."""
        return [None if isinstance(rule, Mending) else rule for rule in self.rules]

    def _affirmatives(self) -> list[Any]:
        rules = [rule for rule in self.rules if rule is not None]
        return [rule.affirmative for rule in rules if rule.affirmative is not None]

    @property
    def _affirmative_tokens(self) -> int:
        """A, or 0 where no rule reads an affirmative."""
        return max(map(len, self._affirmatives()), default=0)

    def _prefill(self, batch: Batch, slots: int) -> Any:
        affirmative = next(map(jnp.asarray, self._affirmatives()), None)
        mean = any(rule.reads_mean for rule in self.rules if rule is not None)
        start = (self.model.config, self.model.params, batch)
        return prefill_and_read(*start, affirmative, slots, self.model.edits, mean)

    def _again(self, rule: Rule | None, batch: Batch, behind: int) -> int:
        """How many last slots are run again under `rule`: those `behind` the instruction's end, or all."""
        return batch.tokens.shape[1] if self._acting(rule).reaches_prompt else behind

    def _decision(self, rule: Rule | None, states: PromptStates, batch: Batch) -> Decision:
        """What `rule` makes of the prompts; for None, the edits of another rule at no strength: the same program."""
        return decide(self._acting(rule), states, batch, jnp.float32(rule is not None))

    def _acting(self, rule: Rule | None) -> Rule:
        if rule is not None:
            return rule
        other = next(other for other in self.rules if other is not None)
        return other.rules[0] if isinstance(other, Mending) else other

    def _answered(self, rule: Rule | None, hand: Hand, behind: int) -> Found:
        """The answers under `rule`; instructions end at most `behind` slots before the end of the prompts."""
        model, batch = self.model, hand.batch
        decision = self._decision(rule, hand.prefilled.states, batch)
        start = (model.config, model.params, batch, hand.prefilled.cache)
        again = self._again(rule, batch, behind)
        program = for_device(steered_answers, "config", "again")
        generated: Any = program(*start, self._edits(decision), hand.drawing, again)
        if rule is None:
            return fetch(Found(generated))
        return fetch(Found(generated.replace(nats=None), decision.score, decision.gate, decision.harmful))

    def _mended(self, mending: Mending, first: Found, hand: Hand, behind: int, prompts: Sequence[str]) -> Found:
        """The `first` answers, those replaced that refuse `prompts` and no longer do under a rule that acts on them."""
        batch, model = hand.batch, self.model
        decisions = [self._decision(rule, hand.prefilled.states, batch) for rule in mending.rules]
        verdict, *_ = verdicts = [fetch((d.score, d.gate, d.harmful)) for d in decisions]
        tokens, lengths = (np.array(a) for a in (first.generated.tokens, first.generated.lengths))
        passes = np.ones(len(lengths), np.int32)

        def refusing(rows: Sequence[int], generated: Generated) -> list[bool]:
            texts = model.decoded(generated).texts[: len(rows)]
            return [bool(r) for r in mending.judge.refused([prompts[row] for row in rows], texts)]

        everything = range(len(prompts))
        left = [row for row, refused in zip(everything, refusing(everything, first.generated), strict=True) if refused]
        for rule, (_, gate, _) in zip(mending.rules, verdicts, strict=True):
            rows = [row for row in left if gate[row] != 0]
            if not rows:
                continue
            count = row_bucket(max(len(rows), FEWEST), len(lengths), model.row_multiple)
            few = hand.rows(np.array(rows + rows[:1] * (count - len(rows))))
            again = self._answered(rule, few, behind).generated
            passes[rows] += 1
            mended = [i for i, refused in enumerate(refusing(rows, again)) if not refused]
            for i in mended:
                tokens[rows[i]], lengths[rows[i]] = again.tokens[i], again.lengths[i]
            left = [row for row in left if row not in {rows[i] for i in mended}]
        answers: Any = first.generated
        score, gate, harmful = verdict
        return Found(answers.replace(tokens=tokens, lengths=lengths, nats=None), score, gate, harmful, passes)

    def _edits(self, decision: Decision) -> dict[str, Any]:
        """The edits of a decision and those of the model. Raises ValueError where both edit one tap."""
        own = self.model.edits or {}
        if both := own.keys() & decision.edits.keys():
            raise ValueError(f"tap {min(both)!r} is edited by the model and by a rule; leave one of the two out")
        return {**own, **decision.edits}
