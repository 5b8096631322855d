"""What a model makes of labelled prompts: the states that it reads them with, and whether it refuses them.

Every gate and every direction of a remedy for over-refusal is made of it.

n prompts, L layers, D embed, A tokens of the affirmative
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import arrays_sha256, digest
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.evaluation.samples import set_name
from jaxsafe.io.store import TREE, Json, Store, by_batch
from jaxsafe.kernels.generate import Generated, for_device
from jaxsafe.kernels.sampling import Decoding, drawing, row_seeds
from jaxsafe.kernels.steering import Prefilled, PromptStates, prefill_and_read, steered_answers
from jaxsafe.methods.scans import affirmative_ids
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.roles import labelled
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.rows import Batch, Row, answer_slots, check_context, data_sha256, in_order

States = dict[str, Any]
"""{name of an array of `Evidence`: what was read of some prompts}."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """Labelled prompts and what the unsteered model makes of them.

    prompts, harmful [n]; source [n]: the name of each prompt's set
    refused: bool [n] whether the answer refuses; tokens: int32 [n, new] and lengths [n]: the answers
    at_end:  float32 [n, L, D] the residual stream after each block at the instruction's end
    change:  float32 [n, L, D] its change from there to the affirmative
    mean:    float32 [n, L, D] its mean over the whole prompt
    """

    prompts: tuple[str, ...]
    harmful: Bool[np.ndarray, " n"]
    source: tuple[str, ...]
    refused: Bool[np.ndarray, " n"]
    tokens: Int[np.ndarray, "n new"]
    lengths: Int[np.ndarray, " n"]
    at_end: Float[np.ndarray, "n L D"]
    change: Float[np.ndarray, "n L D"]
    mean: Float[np.ndarray, "n L D"]

    def __len__(self) -> int:
        return len(self.prompts)

    def states(self, harmful: bool, refused: bool | None = None) -> Float[np.ndarray, "m L D"]:
        """`at_end` of prompts with this label, and with this outcome where one is given.

        Raises ValueError where there are none.
        """
        chosen = self.harmful == harmful
        if refused is not None:
            chosen &= self.refused == refused
        if not chosen.any():
            outcome = {None: "", True: " that the model refuses", False: " that the model answers"}[refused]
            raise ValueError(
                f"no {'harmful' if harmful else 'safe'} prompts{outcome} to learn a remedy from; give more"
            )
        return self.at_end[chosen]

    @property
    def sha256(self) -> str:
        """Digest of the prompts, their labels and what the model makes of them."""
        return digest(self.prompts, self.harmful.tolist(), self.refused.tolist(), arrays_sha256([self.at_end]))

    @property
    def layers(self) -> int:
        """L."""
        return self.at_end.shape[1]

    @property
    def direction(self) -> Float[np.ndarray, "L D"]:
        """Unit vectors from the states of safe prompts that are answered to those of harmful ones that are refused."""
        return unit_rows(mean_difference(self.states(True, True), self.states(False, False)))

    @property
    def residual_norm(self) -> Float[np.ndarray, " L"]:
        """The mean length of the states at the instruction's end, by layer: the unit of relative strengths."""
        return np.linalg.norm(self.at_end, axis=-1).mean(0)


def mean_difference(first: Float[np.ndarray, "m L D"], second: Float[np.ndarray, "k L D"]) -> Float[np.ndarray, "L D"]:
    """The difference of two means, by layer; float32."""
    return (first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)).astype(np.float32)


def unit_rows(x: Float[np.ndarray, "L D"]) -> Float[np.ndarray, "L D"]:
    """Each row divided by its length; zero stays zero."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.where(length > 0, length, 1)).astype(np.float32)


def evidence_once(
    store: Store,
    model: ChatModel,
    sets: Sequence[PromptSet],
    judge: Judge,
    asked: tuple[Decoding, int],
    done: Progress = silent,
) -> Evidence:
    """The evidence of labelled `sets`, kept in `store`, answers batch by batch; `asked` is decoding and batch size.

    One pass over a prompt serves its states and its answer. `done` is called with numbers of prompts. Raises ValueError
    for a prompt without a label, for prompts of one kind only, and for one beyond the context.
    """
    decoding, batch_size = asked
    prompts, labels = labelled(sets)
    if len(set(labels)) < 2:
        raise ValueError("remedies are learnt from harmful and safe prompts; there is one kind only")
    rows = model.rows(prompts)
    check_context(rows, model.config.context, max(decoding.max_new_tokens, len(affirmative_ids(model))))
    follows = [model.fingerprint(), data_sha256(rows), affirmative_ids(model).tolist()]
    answered = [*follows, decoding.max_new_tokens, decoding.seed, list(model.tokenizer.eos_ids)]
    read: list[tuple[np.ndarray, States]] = []

    def make(left: list[int]) -> Any:
        for indices, (states, generated) in _read_and_answered(model, [rows[i] for i in left], decoding, batch_size):
            answers, mine = model.decoded(generated), [left[i] for i in indices]
            read.append((np.array(mine), states))
            yield mine, [[text, ids] for text, ids in zip(answers.texts, answers.ids, strict=True)]

    def whole() -> Json:
        return by_batch(len(prompts), make, store.log("evidence", answered), done)

    def states() -> dict[str, np.ndarray]:
        # A run that goes on has those of the prompts alone that it has answered itself.
        all_read = sum(len(mine) for mine, _ in read) == len(rows)
        return in_order(read if all_read else _read(model, rows, batch_size))

    found = store.once("evidence", answered, whole)
    store.drop("evidence", answered, ".jsonl")
    kept = store.once("states", follows, states, TREE)
    tokens = np.zeros((len(prompts), decoding.max_new_tokens), np.int32)
    for row, (_, ids) in enumerate(found):
        tokens[row, : len(ids)] = ids
    return Evidence(
        tuple(prompts),
        np.array(labels),
        tuple(set_name(s) for s in sets for _ in s.prompts),
        np.array([bool(r) for r in judge.refused(prompts, [text for text, _ in found])]),
        tokens,
        np.array([len(ids) for _, ids in found], np.int32),
        **{name: np.asarray(array) for name, array in kept.items()},
    )


def _read_and_answered(
    model: ChatModel, rows: Sequence[Row], decoding: Decoding, batch_size: int
) -> Iterator[tuple[np.ndarray, tuple[States, Generated]]]:
    """(indices, (states, answers)) of each finished batch of prompts."""
    rows, decoding = model.asked(rows, decoding)
    numbers, slots = row_seeds(rows), max(decoding.max_new_tokens, len(affirmative_ids(model)))
    program = for_device(steered_answers, "config", "again")

    def call(batch: Batch, indices: np.ndarray) -> Any:
        read, again = _prefilled(model, batch, slots), 1 + answer_slots(rows, indices)
        drawn = drawing(decoding, numbers[indices])
        answers = program(model.config, model.params, batch, read.cache, model.edits, drawn, again)
        return _by_prompt(read.states), answers

    return model.batches(call, rows, batch_size, slots)


def _read(model: ChatModel, rows: Sequence[Row], batch_size: int) -> Iterator[tuple[np.ndarray, States]]:
    """(indices, states) of each finished batch of prompts."""
    slots = len(affirmative_ids(model))
    return model.batches(lambda batch, _: _by_prompt(_prefilled(model, batch, slots).states), rows, batch_size, slots)


def _prefilled(model: ChatModel, batch: Batch, slots: int) -> Prefilled:
    affirmative = jnp.asarray(affirmative_ids(model))
    return prefill_and_read(model.config, model.params, batch, affirmative, slots, model.edits, mean=True)


def _by_prompt(states: PromptStates) -> States:
    names = ("at_end", "change", "mean")
    return {name: jnp.swapaxes(getattr(states, name), 0, 1).astype(jnp.float32) for name in names}
