"""Remedies for over-refusal by name, each fitted to the same labelled prompts, with controls of the same size.

The control has a random direction in place of the fitted one: same norm, same layers and positions, same gate. Gates
and strengths of a remedy that its authors fit to each model are found on the prompts: a strength is that which moves
the first tokens of safe answers by a stated KL.

L layers, D embed
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.mending import Mending
from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import arrays_sha256
from jaxsafe.io.store import Store
from jaxsafe.kernels.ablation import written_directions
from jaxsafe.kernels.actions import Ablate, Action, Add, Clamp, Gated, named_span
from jaxsafe.kernels.gates import Gate, Open
from jaxsafe.kernels.steering import Rule, Steering
from jaxsafe.methods import adasteer as ada
from jaxsafe.methods import alphasteer as alpha
from jaxsafe.methods import cast, gate_fits, mending_choice, refusal_direction
from jaxsafe.methods.dose import benign_answers, divergences_of, strength_of_kl
from jaxsafe.methods.evidence import Evidence, unit_rows
from jaxsafe.methods.gate_fits import Fitted
from jaxsafe.methods.mending_choice import Trial
from jaxsafe.methods.refusal_direction import Direction
from jaxsafe.model.layers import LayerRange
from jaxsafe.progress import Watch, unwatched
from jaxsafe.records.overrefusal import Mended, Remedy
from jaxsafe.records.run import Json


@dataclasses.dataclass(frozen=True)
class RemedyFit:
    """How remedies are fitted.

    gate_layers: blocks whose states the gate reads; layers: blocks that are steered (None: the middle third); missed:
    share of harmful prompts that a gate may let through; kl: nats a token of the first tokens of safe answers, by
    which an edit moves them; span: where edits act; strengths: of candidates for mending, in mean lengths of the
    states; candidate_prompts, candidate_positions: on how many prompts of a kind candidates for a direction are tried,
    and from how many last positions they are taken; published: "llama3.1-8b", ... for the settings that AdaSteer and
    AlphaSteer publish, "" for ours.
    """

    gate_layers: tuple[int, ...] | None = None
    layers: LayerRange | None = None
    missed: float = 0.05
    kl: float = 0.1
    span: str = "end+4"
    strengths: tuple[float, ...] = (0.02, 0.03, 0.05)
    candidate_prompts: int = 32
    candidate_positions: int = 8
    published: str = ""
    seed: int = 0


DEFAULTS = RemedyFit()
MOST = 48
"""So many refused prompts are enough to choose rules to mend by."""


class Made(NamedTuple):
    """A remedy that was fitted: what answers by it, its control (None: it has none), and what is to be said of it."""

    rule: Rule | Mending
    control: Rule | Mending | None
    remedy: Remedy


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What remedies are fitted with: a model, what it makes of labelled prompts, a store, and how rules are tried."""

    model: ChatModel
    evidence: Evidence
    store: Store
    trial: Trial
    fit: RemedyFit = RemedyFit()
    watch: Watch = unwatched

    @functools.cached_property
    def gate(self) -> Fitted:
        """The logistic regression that gates every remedy without a gate of its own."""
        L, layers = self.evidence.layers, self.fit.gate_layers
        chosen = layers if layers is not None else tuple(range(L // 2, L - L // 10, 2))
        fit = gate_fits.logistic(self.evidence, chosen)
        return gate_fits.fitted("logistic regression", fit, self.evidence, self.fit.missed, seed=self.fit.seed)

    @functools.cached_property
    def benign(self) -> tuple[list[str], Answers]:
        """Safe prompts that the model answers, with the first tokens of its answers."""
        return benign_answers(self.model, self.evidence)

    @property
    def layers(self) -> LayerRange:
        """The blocks that are steered."""
        L = self.evidence.layers
        return self.fit.layers or LayerRange(max(1, L // 3), max(2, 2 * L // 3))

    @functools.cached_property
    def random(self) -> Float[np.ndarray, "L D"]:
        """Random unit vectors, one a layer."""
        shape = self.evidence.direction.shape
        return unit_rows(np.random.default_rng(self.fit.seed).standard_normal(shape).astype(np.float32))

    @functools.cached_property
    def refusal(self) -> Direction:
        """The refusal direction: the best candidate of all layers and positions."""
        return self._once("refusal", 0.1, lambda: self._mean_state(True, True) - self._mean_state(False, False))

    @functools.cached_property
    def false_refusal(self) -> Direction:
        """The direction of false refusal, orthogonal to that of harmful prompts."""

        def candidates() -> np.ndarray:
            kinds = (True, True), (False, False), (False, True)
            harmful, answered, pseudo = (self._mean_state(*kind) for kind in kinds)
            return refusal_direction.false_refusal(pseudo - answered, harmful - answered)

        return self._once("false_refusal", 0.2, candidates)

    def _once(self, name: str, kl: float, candidates: Callable[[], np.ndarray]) -> Direction:
        """The best of `candidates`, [P, L, D], kept in the store: a search takes minutes."""
        follows = [self.model.fingerprint(), self.evidence.sha256, self.fit.candidate_prompts]
        follows += [self.fit.candidate_positions, kl]
        found = self.store.once(f"direction-{name}", follows, lambda: self._chosen(candidates(), kl).stored())
        return Direction.of(found)

    def _halves(self, harmful: bool, refused: bool) -> tuple[list[str], list[str]]:
        """Prompts with this label and outcome: every second one makes candidates, the others choose among them.

        Raises ValueError for fewer than two.
        """
        e = self.evidence
        prompts = [e.prompts[i] for i in np.flatnonzero((e.harmful == harmful) & (e.refused == refused))]
        if len(prompts) < 2:
            kind = f"{'harmful' if harmful else 'safe'} prompts that the model {'refuses' if refused else 'answers'}"
            raise ValueError(f"a refusal direction needs two or more {kind}; there are {len(prompts)} of {len(e)}")
        return prompts[::2], prompts[1::2]

    def _mean_state(self, harmful: bool, refused: bool) -> Float[np.ndarray, "P L D"]:
        """The mean state of prompts with this label and outcome, at the last positions that all prompts share."""
        shared = refusal_direction.template_positions(self.model.rows(self.evidence.prompts))
        positions, prompts = min(shared, self.fit.candidate_positions), self._halves(harmful, refused)[0]
        return refusal_direction.end_states(self.model, prompts, positions, refusal_direction.Search().batch_size).mean(
            0
        )

    def _chosen(self, candidates: Float[np.ndarray, "P L D"], kl: float) -> Direction:
        """The best of `candidates` on prompts that none of them is made of."""
        search = refusal_direction.Search(kl=kl, validation=self.fit.candidate_prompts)
        harmful, safe = self._halves(True, True)[1], self._halves(False, False)[1]
        with self.watch("candidates for a direction", 2 * min(search.validation, len(harmful), len(safe))) as done:
            tokens = refusal_direction.refusal_tokens(self.evidence)
            return refusal_direction.choose_direction(self.model, candidates, harmful, safe, tokens, search, done)

    def away(self, strength: float, directions: np.ndarray | None = None, span: str | None = None) -> Add:
        """What steers away from refusal: -strength |state| along `directions` in the steered blocks."""
        v = self.evidence.direction if directions is None else directions
        size = strength * self.evidence.residual_norm * self.layers.mask(self.evidence.layers)
        return Add(jnp.asarray(-size[:, None] * v, jnp.float32), named_span(span or self.fit.span))

    def clamp(self, directions: np.ndarray | None = None, one_sided: bool = False, span: str = "end") -> Clamp:
        """What clamps the stream's part along `directions` to the mean of safe prompts that are answered."""
        steered, answered = self.layers.mask(self.evidence.layers), self.evidence.states(False, False)
        v = (self.evidence.direction if directions is None else directions) * steered[:, None]
        level = np.einsum("nld,ld->l", answered, v) / len(answered)
        return Clamp(jnp.asarray(v, jnp.float32), jnp.asarray(level, jnp.float32), named_span(span), one_sided)

    def ablate(self, vector: np.ndarray, span: str) -> Ablate:
        """What takes `vector` [D] out of everything that is written to the stream."""
        return Ablate(written_directions(self.model.config, self.model.params, jnp.asarray(vector)), named_span(span))

    def strength(self, rule: Callable[[float], Rule]) -> float:
        """The strength of `rule` that moves safe answers by `fit.kl`."""
        return strength_of_kl(self.model, rule, self.fit.kl, self.benign)

    def kl(self, rule: Rule) -> float:
        """By how much `rule` moves safe answers, nats a token."""
        return divergences_of(self.model, [rule], self.benign)[0]


def identity(rule: Rule | Mending) -> Json:
    """What answers under a rule follow from besides the model and the prompts."""
    if isinstance(rule, Mending):
        return ["mending", [identity(each) for each in rule.rules], rule.judge.name, rule.judge.version]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(rule)]
    return [str(jax.tree.structure(rule)), arrays_sha256(leaves)]


def random_scans(steering: Steering, random: Float[np.ndarray, "L D"]) -> Steering:
    """The steering of SCANS along random directions."""
    return steering.replace(directions=jnp.asarray(random))  # type: ignore[attr-defined]


def steer(bench: Bench) -> Made:
    """Steering away from refusal behind the gate, as strong as `fit.kl` allows."""
    strength = bench.strength(lambda s: Gated(Open(), bench.away(s)))
    about = f"blocks {bench.layers}, {bench.fit.span}, away from refusal"
    return _gated(bench, "steer", "ours", about, [bench.away(strength), bench.away(strength, bench.random)], strength)


def clamp(bench: Bench) -> Made:
    """The state at the instruction's end clamped along the direction to that of answered prompts, behind the gate."""
    about = f"blocks {bench.layers} at the instruction's end, to the level of answered prompts"
    return _gated(bench, "clamp", "ours", about, [bench.clamp(), bench.clamp(bench.random)])


def cap(bench: Bench) -> Made:
    """As `clamp`, but only what exceeds the level is taken away, at all positions from the instruction's end on."""
    about = f"blocks {bench.layers} from the instruction's end on, what exceeds the level of answered prompts"
    actions = [bench.clamp(v, True, "answer") for v in (None, bench.random)]
    return _gated(bench, "cap", "ours (one-sided ablation)", about, actions)


def ablation(bench: Bench) -> Made:
    """The refusal direction ablated everywhere, in every prompt."""
    found = bench.refusal
    return _ablated(bench, "ablation", "arXiv 2406.11717", found, Open())


def gated_ablation(bench: Bench) -> Made:
    """The refusal direction ablated everywhere, in prompts that the gate lets through."""
    return _ablated(bench, "gated_ablation", "arXiv 2406.11717; the gate is ours", bench.refusal, bench.gate.gate, True)


def false_refusal(bench: Bench) -> Made:
    """The direction of false refusal ablated everywhere, in every prompt."""
    return _ablated(bench, "false_refusal", "arXiv 2410.03415", bench.false_refusal, Open())


def conditional(bench: Bench) -> Made:
    """CAST: steering away from refusal where its condition does not take a prompt for harmful."""
    gate = cast.condition(bench.evidence)
    vectors = cast.principal_directions(bench.evidence.states(True, True), bench.evidence.states(False, False))
    strength = bench.strength(lambda s: Gated(Open(), bench.away(s, vectors, "answer")))
    rule, control = (Gated(gate, bench.away(strength, v, "answer")) for v in (vectors, bench.random))
    about = f"condition at block {int(np.argmax(np.asarray(gate.layer)))}, blocks {bench.layers} steered"
    return Made(rule, control, Remedy("cast", "arXiv 2409.05907", about, "condition", strength, bench.fit.kl))


def adasteer(bench: Bench) -> Made:
    """AdaSteer with the published coefficients of the model, or with ours, as strong as `fit.kl` allows."""
    L = bench.evidence.layers
    if bench.fit.published in ada.PUBLISHED:
        rule, strength = ada.adasteer(bench.evidence, *ada.PUBLISHED[bench.fit.published]), None
    else:

        def own(s: float) -> ada.AdaSteer:
            return ada.adasteer(
                bench.evidence,
                ada.Coefficient(max(1, L // 3), -s / 100, 0.0, -s, 0.0),
                ada.Coefficient(max(1, L // 2), -s / 100, 0.0, -s, 0.0),
            )

        strength = bench.strength(own)
        rule = own(strength)
    norms = jnp.linalg.norm(rule.vectors, axis=-1, keepdims=True)
    control = rule.replace(vectors=jnp.stack([norms[0] * bench.random, norms[1] * bench.random[::-1]]))  # type: ignore[attr-defined]
    about = f"coefficients {'published for ' + bench.fit.published if strength is None else 'ours, by KL'}"
    return Made(rule, control, Remedy("adasteer", "arXiv 2504.09466", about, None, strength, bench.kl(rule)))


def alphasteer(bench: Bench) -> Made:
    """AlphaSteer with the published blocks of the model, or with the steered blocks, as strong as `fit.kl` allows."""
    published = alpha.PUBLISHED.get(bench.fit.published)
    layers = bench.layers
    shares = published or dict.fromkeys(range(max(1, layers.first), layers.stop), 0.5)
    unit = alpha.alphasteer(bench.evidence, shares, 1.0)

    def scaled(s: float) -> alpha.AlphaSteer:
        return unit.replace(add=s * unit.add)  # type: ignore[attr-defined]

    strength = bench.strength(scaled)
    rule = scaled(strength)
    control = rule.replace(add=jnp.linalg.norm(rule.add, axis=-1, keepdims=True) * bench.random)  # type: ignore[attr-defined]
    about = f"blocks {sorted(shares)}, shares {'published' if published else '0.5 (ours)'}"
    return Made(rule, control, Remedy("alphasteer", "arXiv 2506.07022", about, None, strength, bench.kl(rule)))


def _gated(
    bench: Bench, name: str, source: str, about: str, actions: Sequence[Action], strength: float | None = None
) -> Made:
    rule, control = (Gated(bench.gate.gate, action) for action in actions)
    kl = bench.kl(Gated(Open(), actions[0]))
    return Made(rule, control, Remedy(name, source, about, bench.gate.report.name, strength, kl))


def _ablated(bench: Bench, name: str, source: str, found: Direction, gate: Gate, is_gated: bool = False) -> Made:
    rule, control = (Gated(gate, bench.ablate(v, "all")) for v in (found.vector, bench.random[found.layer]))
    gate_name = bench.gate.report.name if is_gated else None
    return Made(rule, control, Remedy(name, source, f"everywhere; {found}", gate_name, None, found.kl))


def candidates(bench: Bench, directions: np.ndarray | None = None) -> dict[str, Action]:
    """What refusals may be answered again by: additions of several strengths and spans, and clamping."""
    v = bench.evidence.direction if directions is None else directions
    adds = {
        f"away {strength:g} at {span}": bench.away(strength, v, span)
        for span in ("end", "end+4", "answer")
        for strength in bench.fit.strengths
    }
    return adds | {"clamp at end+4": bench.clamp(v, span="end+4")}


def mend(bench: Bench) -> tuple[Made, Mended]:
    """Answer first, mend second, by rules that are chosen on refused safe prompts which the gate lets through.

    Raises ValueError where there are none.
    """
    e, gate, judge = bench.evidence, bench.gate.gate, bench.trial.judge
    opened = gate_fits.score_of(gate, e) < bench.gate.report.threshold
    prompts = [p for p, chosen in zip(e.prompts, opened & e.refused & ~e.harmful, strict=True) if chosen]
    prompts = [prompts[i] for i in np.linspace(0, len(prompts) - 1, min(MOST, len(prompts))).astype(int)]
    if not prompts:
        raise ValueError("the model refuses no safe calibration prompt that the gate lets through: nothing to mend")
    actions, of_control = candidates(bench), candidates(bench, bench.random)
    rules = {name: Gated(gate, action) for name, action in actions.items()}
    with bench.watch("rules to mend by", len(prompts)) as done:
        tried = mending_choice.try_once(bench.store, bench.model, rules, prompts, bench.trial, done)
    numbers, stability = mending_choice.choose(tried, bench.fit.seed)
    names = tuple(tried[number].name for number in numbers)
    rule, control = (
        Mending(tuple(Gated(gate, chosen[name]) for name in names), judge) for chosen in (actions, of_control)
    )
    about = f"refusals answered again by {', then by '.join(names)}; blocks {bench.layers}"
    remedy = Remedy("mend", "ours", about, bench.gate.report.name, None, bench.kl(Gated(Open(), actions[names[0]])))
    return Made(rule, control, remedy), Mended(tried, names, stability)


REMEDIES: Mapping[str, Callable[[Bench], Made]] = {
    "mend": lambda bench: mend(bench)[0],
    "steer": steer,
    "clamp": clamp,
    "cap": cap,
    "ablation": ablation,
    "gated_ablation": gated_ablation,
    "false_refusal": false_refusal,
    "cast": conditional,
    "adasteer": adasteer,
    "alphasteer": alphasteer,
}
"""Remedies that are rules of steering, by name."""
