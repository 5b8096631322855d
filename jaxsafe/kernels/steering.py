"""Steering rules: what they read at a prompt, the edits that follow, and answers under several of them.

One pass over the prompts, which no rule steers, serves every rule. Its first member is SCANS, safety-conscious
activation steering (arXiv 2408.11491).

B batch, T prompt slots, L layers, D embed, A tokens of the affirmative, R last slots run again
"""

import functools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.kernels.forward import Given, extended, final_states, prompt_inputs, shared_states
from jaxsafe.kernels.generate import Generated, Prompted, decode
from jaxsafe.kernels.likelihood import in_blocks, nll_after
from jaxsafe.kernels.sampling import Drawing
from jaxsafe.model.attention import Slots, positions_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import At, AtAndMean, Reducer, at, collection, edit, readings
from jaxsafe.model.transformer import Cache, Params, Transformer, unembed, unembedding, variables
from jaxsafe.rows import Batch

DIVERGENCE_BLOCK = 8
"""The slots of which two distributions over the vocabulary exist at a time."""


@flax.struct.dataclass
class PromptStates:
    """What rules read of a batch of prompts.

    at_end: [L, B, D] the residual stream after each block at the instruction's end
    change: float32 [L, B, D] h(instruction's end) - h(affirmative); None where no affirmative was run
    mean:   float32 [L, B, D] the mean of the stream over the whole prompt; None where no rule reads it
    """

    at_end: Float[Array, "L B D"]
    change: Float[Array, "L B D"] | None = None
    mean: Float[Array, "L B D"] | None = None


@flax.struct.dataclass
class Prefilled:
    """One pass over a batch of prompts that no rule steers: its cache, and what rules read."""

    cache: Cache
    states: PromptStates


class Rule(Protocol):
    """How a model is steered, prompt by prompt: a pytree of arrays, so that other numbers are no other program.

    affirmative: the tokens whose residual stream it reads behind the instruction's end; None where it reads none
    reads_mean: whether it reads `PromptStates.mean`; reaches_prompt: whether it edits before the instruction's end
    """

    affirmative: Any = None
    reads_mean: Any = False
    reaches_prompt: Any = False

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """What the rule makes of each prompt, as one number."""

    def gate(self, states: PromptStates) -> Float[Array, "B ..."]:
        """What each row takes of the edits: 1 whole, 0 nothing, -1 the opposite; [B, n] for n edits of their own."""

    def harmful(self, gate: Float[Array, "B ..."]) -> Bool[Array, " B"]:
        """The prompts that are taken for harmful: those that a remedy for over-refusal does not act on."""
        return ~(gate.reshape(len(gate), -1) != 0).any(axis=1)

    def edits(self, gate: Float[Array, "B ..."], start: Int[Array, " B"]) -> dict[str, Any]:
        """{tap: edit} of rows whose instructions end at the positions `start`; the identity where `gate` is 0."""


@flax.struct.dataclass
class Decision:
    """What a rule makes of a batch of prompts: score, gate and verdict of each, and the edits that follow."""

    score: Float[Array, " B"]
    gate: Float[Array, "B ..."]
    harmful: Bool[Array, " B"]
    edits: dict[str, Any]


@flax.struct.dataclass
class Steering(Rule):
    """The rule of SCANS: a prompt is taken for harmful or not, and the model steered toward refusal or away from it.

    directions:  float32 [L, D] unit refusal directions v
    reference:   float32 [L, D] mean change of the harmful anchors from the instruction's end to the affirmative
    scored:      float32 [L] 1 for the layers whose cosines are averaged
    threshold:   float32 [] a prompt is harmful when its score is at least this
    strength:    float32 [L] what is added along v, in units of the residual stream; 0 leaves a layer alone
    affirmative: int32 [A] the tokens of the affirmative
    """

    directions: Float[Array, "L D"]
    reference: Float[Array, "L D"]
    scored: Float[Array, " L"]
    threshold: Float[Array, ""]
    strength: Float[Array, " L"]
    affirmative: Int[Array, " A"]

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """The mean cosine of a prompt's change with the reference (SCANS, section 3.3)."""
        assert states.change is not None
        return mean_cosine(layer_cosines(states.change, self.reference), self.scored)

    def sign(self, score: Float[Array, " B"]) -> Float[Array, " B"]:
        """+1 (toward refusal) for scores that reach the threshold, -1 for the others."""
        return jnp.where(score >= self.threshold, 1.0, -1.0)

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """`sign` of the prompts' scores."""
        return self.sign(self.score(states))

    def harmful(self, gate: Float[Array, " B"]) -> Bool[Array, " B"]:
        """Those that are steered toward refusal."""
        return gate > 0

    def edits(self, gate: Float[Array, " B"], start: Int[Array, " B"]) -> dict[str, Any]:
        """gate * strength * v added to the residual stream from position `start` on."""
        return {"resid": edit(add=self.strength[:, None] * self.directions, gate=gate, start=start)}


def unit(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """`x` divided by its length; zero stays zero."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)


def layer_cosines(change: Float[Array, "L B D"], reference: Float[Array, "L D"]) -> Float[Array, "B L"]:
    """cos(change, reference) at every layer, float32 (SCANS, section 3.3). A zero vector has cosine 0."""
    # A product and a sum, not a matrix product: in float32 on every device, and the same in every size of batch.
    return jnp.sum(unit(change.astype(jnp.float32)) * unit(reference)[:, None], axis=-1).T


def mean_cosine(cosines: Float[Array, "B L"], scored: Float[Array, " L"]) -> Float[Array, " B"]:
    """Mean of `cosines` over the layers where `scored` is 1, float32 (SCANS, section 3.3)."""
    return jnp.sum(cosines * scored[None], axis=-1) / jnp.maximum(scored.sum(), 1)


def start_positions(batch: Batch) -> Int[Array, " B"]:
    """The position (counted without padding) of each row's instruction end."""
    ends = jnp.asarray(batch.instruction_end)
    return jnp.take_along_axis(positions_of(jnp.asarray(batch.valid)), ends[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "slots", "mean"))
def prefill_and_read(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    affirmative: Int[Array, " A"] | None,
    slots: int,
    edits: Any = None,
    mean: bool = False,
) -> Prefilled:
    """One pass over the prompts, then one over the affirmative behind each instruction end, where there is one.

    The cache has T + `slots` (static, at least A) slots, of which the first T hold the prompts. The others are free:
    what decoding sees of them it has written before. `edits` are those that the model always has. With `mean`
    (static) the mean of each prompt's states is read.
    """
    B, T = batch.tokens.shape
    model = Transformer(config)

    def run(given: Given, reduce: Reducer) -> tuple[Cache, Float[Array, "L B P D"]]:
        collections = variables(params, edits) | {"reducers": collection({"resid": reduce}, "reduce")}
        options: dict[str, Any] = {"capture_intermediates": at("resid"), "mutable": ["intermediates"]}
        (_, cache), state = model.apply(collections, *given, last=0, **options)
        return cache, readings(state["intermediates"])["resid"]

    given = prompt_inputs(config, params, batch, slots, edits)
    first = T - given[0].shape[1]
    prompt = batch.valid & (jnp.arange(T)[None] <= batch.instruction_end[:, None])
    ends = jnp.asarray(batch.instruction_end)[:, None] - first
    cache, read = run(given, AtAndMean(ends, prompt[:, first:]) if mean else At(ends))
    at_end, means = read[:, :, 0], read[:, :, 1].astype(jnp.float32) if mean else None
    if means is not None and first:
        means = _mean_of_all(means, prompt, batch, shared_states(config, params, batch, edits))
    cache = extended(cache, T + slots)
    if affirmative is None:
        return Prefilled(cache, PromptStates(at_end, None, means))

    # The affirmative follows the instruction end; tokens that a row has behind it (a begun answer) are not seen.
    A = affirmative.shape[0]
    seen = jnp.concatenate([prompt, jnp.ones((B, slots), bool)], axis=1)
    tokens = jnp.broadcast_to(affirmative[None], (B, A))
    cache, behind = run((tokens, Slots(seen, T), cache), At(jnp.full((B, 1), A - 1)))
    change = at_end.astype(jnp.float32) - behind[:, :, 0].astype(jnp.float32)
    return Prefilled(cache, PromptStates(at_end, change, means))


def _mean_of_all(
    means: Float[Array, "L B D"], prompt: Bool[Array, "B T"], batch: Batch, shared: Float[Array, "L P D"]
) -> Float[Array, "L B D"]:
    """The means over whole prompts, float32, of those over the slots behind the first P, and the P `shared` states."""
    P = batch.shared
    held = prompt[:, :P].sum(1)  # the shared tokens that a row has in the first P slots; it runs the others again
    behind = prompt[:, P:].sum(1)
    sums = jnp.pad(jnp.cumsum(shared.astype(jnp.float32), axis=1), [(0, 0), (1, 0), (0, 0)])[:, held]
    share = 1 / jnp.maximum(held + behind, 1).astype(jnp.float32)
    return share[None, :, None] * (sums + means * behind.astype(jnp.float32)[None, :, None])


@functools.partial(jax.jit, static_argnames=("config",))
def anchor_states(
    config: ModelConfig, params: Params, batch: Batch, affirmative: Int[Array, " A"], edits: Any = None
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Residual stream at the instruction end and its change to the affirmative, each float32."""
    states = prefill_and_read(config, params, batch, affirmative, affirmative.shape[0], edits).states
    assert states.change is not None
    return states.at_end.swapaxes(0, 1).astype(jnp.float32), states.change.swapaxes(0, 1)


@jax.jit
def decide(rule: Any, states: PromptStates, batch: Batch, share: Float[Array, ""]) -> Decision:
    """What `rule`, a `Rule`, makes of prompts; its edits are `share` of what its gates say, so 0 leaves all alone."""
    gate = rule.gate(states)
    return Decision(rule.score(states), gate, rule.harmful(gate), rule.edits(gate * share, start_positions(batch)))


def rerun(batch: Batch, cache: Cache, tokens: Int[Array, "B X"], again: int) -> Given:
    """What the model is given to run the prompts' last `again` slots again, and the `tokens` behind them."""
    B, T = batch.tokens.shape
    filled = jnp.concatenate([batch.valid, jnp.ones((B, cache.length - T), bool)], axis=1)
    return jnp.concatenate([batch.tokens[:, T - again :], tokens], axis=1), Slots(filled, T - again), cache


@functools.partial(jax.jit, static_argnames=("config", "again"))
def steered_answers(
    config: ModelConfig, params: Params, batch: Batch, cache: Cache, edits: Any, drawing: Drawing, again: int
) -> Generated:
    """Answers under `edits` from the cache of a finished prefill, which other edits may use, too.

    Edits begin at the instruction end, so that keys and values before it are those of the prefill. Only the last
    `again` slots (static), which must reach back to every row's instruction end, are run again.
    """
    given = rerun(batch, cache, batch.tokens[:, :0], again)
    logits: Any
    filled: Any
    logits, filled = Transformer(config).apply(variables(params, edits), *given, last=1)
    return decode(config, params, batch, Prompted(logits[:, -1], filled), drawing, edits)


@functools.partial(jax.jit, static_argnames=("config", "again"))
def answer_divergence(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    cache: Cache,
    edits: tuple[Any, Any],
    answers: Generated,
    again: int,
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """KL(p || q) of the next-token distributions along given answers, p and q being those under the two `edits`.

    Its sum over the tokens of each row's answer (nats, float32), and their number, from the distributions of
    `DIVERGENCE_BLOCK` slots at a time. The cache needs as many free
    slots as the answers have tokens.
    """
    N = answers.tokens.shape[1]
    given = rerun(batch, cache, answers.tokens[:, :-1], again)

    head = unembedding(config, params)

    def divergence(*states: Float[Array, "B r D"]) -> Float[Array, "B r"]:
        before, after = (jax.nn.log_softmax(unembed(config, x, head)) for x in states)
        return jnp.sum(jnp.exp(before) * (before - after), axis=-1)

    states = [final_states(config, params, given, e)[:, -N:] for e in edits]
    kl = in_blocks(divergence, DIVERGENCE_BLOCK, *states)
    counted = jnp.arange(N)[None] < answers.lengths[:, None]
    return jnp.sum(jnp.where(counted, kl, 0), axis=1), jnp.asarray(answers.lengths)


@functools.partial(jax.jit, static_argnames=("config", "again", "block"))
def steered_nll(
    config: ModelConfig, params: Params, batch: Batch, cache: Cache, edits: Any, again: int, block: int = 64
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Summed negative log-likelihood (nats, float32) of each row's answer under `edits`, and its tokens.

    The rows of `batch`, prefilled as they are, hold their answers behind the instruction end, to which the last
    `again` slots (static) reach back. Logits of `block` slots (static) exist at a time.
    """
    given = rerun(batch, cache, batch.tokens[:, :0], again)
    return nll_after(config, params, batch, final_states(config, params, given, edits), block)


def vocabulary_projection(
    config: ModelConfig, params: Params, vectors: Float[Array, "M D"], top: int
) -> tuple[Float[Array, "M top"], Int[Array, "M top"]]:
    """The `top` tokens whose unembeddings point most along each of `vectors`: scores and ids.

    (SCANS, section 3.2; the logit lens without the last norm's scale.)
    """
    scores = unembed(config, vectors.astype(config.dtype), unembedding(config, params))
    values, ids = jax.lax.top_k(scores, top)
    return values, ids
