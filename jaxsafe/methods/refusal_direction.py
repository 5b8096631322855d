"""The refusal direction (Arditi et al., arXiv 2406.11717) and the false-refusal vector (Wang et al., arXiv 2410.03415).

Candidates are differences of mean states after every block (the last fifth left out) at every position behind the
instruction's own words. One is chosen on further prompts: the one whose ablation leaves the least refusal of harmful
prompts ("bypass"), among those that make safe prompts refused where they are added ("induce") and whose ablation moves
the first token of safe answers by little (KL). Each is ablated at everything that writes to the residual stream.

n prompts, L layers, P positions, D embed, C candidates
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.ablation import ablation
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.refusal import ablated_scores, added_log_odds
from jaxsafe.methods.evidence import Evidence, unit_rows
from jaxsafe.model.taps import At
from jaxsafe.progress import Progress, silent
from jaxsafe.records.run import Json
from jaxsafe.rows import Batch, Call, Row


@dataclasses.dataclass(frozen=True)
class Search:
    """Which candidates are allowed: published limits. kl: nats, at most; induced: log-odds, at least."""

    kl: float = 0.1
    induced: float = 0.0
    last_share: float = 0.2
    validation: int = 32
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Direction:
    """A candidate that was chosen: unit `vector` float32 [D], after which block, how far from the prompt's end.

    bypass, induce: mean refusal log-odds of harmful prompts without it and of safe prompts with it; kl: nats;
    allowed: whether it keeps within the limits of the search.
    """

    vector: np.ndarray
    layer: int
    position: int
    bypass: float
    induce: float
    kl: float
    allowed: bool

    def stored(self) -> Json:
        """What `of` reads."""
        return [self.vector.tolist(), self.layer, self.position, self.bypass, self.induce, self.kl, self.allowed]

    @classmethod
    def of(cls, stored: Any) -> "Direction":
        """The direction that was `stored`."""
        return cls(np.asarray(stored[0], np.float32), *stored[1:])

    def __str__(self) -> str:
        return (
            f"direction after block {self.layer}, {self.position} tokens before the prompt's end; refusal log-odds "
            f"{self.bypass:.1f} without it, {self.induce:.1f} with it added, first-token KL {self.kl:.3f}"
            f"{'' if self.allowed else '; no candidate kept within all limits of the search'}"
        )


def ablated(vector: Float[np.ndarray, " D"], model: ChatModel) -> ChatModel:
    """`model` without the unit `vector` in its residual stream while it runs."""
    return model.with_edits(ablation(model.config, model.params, jnp.asarray(vector)))


def template_positions(rows: Sequence[Row]) -> int:
    """P: how many tokens up to the instruction's end are the same in all rows, at least 1."""
    ends = [row.ids[row.instruction_end :: -1] for row in rows]
    alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*ends, strict=False))
    return max(1, sum(1 for _ in alike))


def end_states(
    model: ChatModel, prompts: Sequence[str], positions: int, batch_size: int, done: Progress = silent
) -> Float[np.ndarray, "n P L D"]:
    """The stream after each block at the last `positions` positions of the prompts, the very last one first."""

    @jax.jit
    def read(params: Any, batch: Batch) -> Any:
        slots = batch.instruction_end[:, None] - jnp.arange(positions)[None]
        states = capture(
            model.config, params, batch.tokens, batch.valid, edits=model.edits, reduce={"resid": At(slots)}
        )
        return jnp.moveaxis(states["resid"], 0, 2).astype(jnp.float32)

    return model.map(lambda batch, indices: read(model.params, batch), model.rows(prompts), batch_size, done)


def refusal_tokens(evidence: Evidence, share: float = 0.05) -> tuple[int, ...]:
    """The tokens that refusals of the model begin with (see `openings`)."""
    begun = evidence.lengths > 0
    refusals, answers = (evidence.tokens[begun & (evidence.refused == refused), 0] for refused in (True, False))
    return openings(refusals, answers, share)


def openings(refusals: Int[np.ndarray, " n"], answers: Int[np.ndarray, " m"], share: float = 0.05) -> tuple[int, ...]:
    """Of the first tokens of refusals, each that opens at least `share` of them, and more often than it does answers.

    The paper names them by hand for each model. Raises ValueError where there is no such token.
    """

    def frequency(token: int, first: Int[np.ndarray, " n"]) -> float:
        return float((first == token).mean()) if len(first) else 0.0

    found = [int(t) for t in np.unique(refusals) if frequency(t, refusals) >= max(share, 2 * frequency(t, answers))]
    if not found:
        raise ValueError("refusals of this model begin with no token of their own; its refusal cannot be scored by one")
    return tuple(found)


def false_refusal(
    candidates: Float[np.ndarray, "P L D"], harmful: Float[np.ndarray, "P L D"], share: float = 1.0
) -> Float[np.ndarray, "P L D"]:
    """Directions of false refusal without `share` of their parts along the directions of harmful prompts.

    v_or - share (v_or . v_harm / |v_harm|^2) v_harm, float32.
    """
    along = np.sum(candidates * harmful, -1, keepdims=True) / np.maximum(np.sum(harmful**2, -1, keepdims=True), 1e-12)
    return (candidates - share * along * harmful).astype(np.float32)


def choose_direction(
    model: ChatModel,
    candidates: Float[np.ndarray, "P L D"],
    harmful: Sequence[str],
    safe: Sequence[str],
    refusal: Sequence[int],
    search: Search = Search(),
    done: Progress = silent,
) -> Direction:
    """The candidate of the least bypass among those that `search` allows; `harmful` and `safe` are prompts to try.

    Where none is, the limit on `induce` is dropped, and where none keeps that on KL either, the least KL decides.
    `done` is called with numbers of prompts.
    """
    layers = range(int(model.config.layers * (1 - search.last_share)))
    places = [(p, layer) for p in range(len(candidates)) for layer in layers]
    vectors = jnp.asarray(np.stack([candidates[place] for place in places]))
    numbers = jnp.asarray([layer for _, layer in places], jnp.int32)
    tokens = jnp.asarray(refusal, jnp.int32)

    def without(batch: Batch, indices: np.ndarray) -> Any:
        return [a.T for a in ablated_scores(model.config, model.params, batch, vectors, tokens)]

    def under(batch: Batch, indices: np.ndarray) -> Any:
        return added_log_odds(model.config, model.params, batch, vectors, numbers, tokens).T

    def means(call: Call, prompts: Sequence[str], told: Progress = silent) -> Any:
        scores = model.map(call, model.rows(prompts[: search.validation]), search.batch_size, told)
        return jax.tree.map(lambda a: a.mean(0), scores)

    (bypass, _), (_, kl) = means(without, harmful, done), means(without, safe, done)
    induce = means(under, safe)
    near, strong = kl <= search.kl, induce >= search.induced
    left = np.flatnonzero(near & strong if (near & strong).any() else near)
    best = int(left[np.argmin(bypass[left])]) if len(left) else int(np.argmin(kl))
    position, layer = places[best]
    vector = unit_rows(candidates[position, layer][None])[0]
    scores = float(bypass[best]), float(induce[best]), float(kl[best])
    return Direction(vector, layer, position, *scores, bool(near[best] and strong[best]))
