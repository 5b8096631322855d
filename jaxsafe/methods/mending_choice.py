"""Which rules to answer refusals again by: chosen on safe calibration prompts that are refused behind an open gate.

Each candidate answers these prompts; an answer counts where it complies and is whole. A chain is a first rule, and a
second one for what the first leaves refused. Shares of chains that differ by less than the prompts drawn let tell are
equal: of those within one standard error of the best, the chain is taken whose answers the unedited model finds the
most probable. How often other draws of prompts choose the same is part of the record.

n prompts, C candidates
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import arrays_sha256
from jaxsafe.evaluation.judges.broken import BrokenJudge
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.evaluation.language import likelihoods
from jaxsafe.io.store import Json, Store
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.steering import Rule
from jaxsafe.progress import Progress, silent
from jaxsafe.records.overrefusal import Tried
from jaxsafe.records.run import from_json, plain
from jaxsafe.rows import data_sha256

RESAMPLES = 200
"""Draws of the prompts with replacement in which a chain is chosen again."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """How candidates are tried: how answers are made, judged, and told from broken ones; the seed is of resamples."""

    judge: Judge
    decoding: Decoding
    broken: BrokenJudge = BrokenJudge()
    batch_size: int = 32


def try_once(
    store: Store,
    model: ChatModel,
    rules: Mapping[str, Rule],
    prompts: Sequence[str],
    trial: Trial,
    done: Progress = silent,
) -> tuple[Tried, ...]:
    """What comes of `prompts` under every rule, kept in `store`; `done` is called with numbers of answers."""
    judged = [trial.judge.name, trial.judge.version, trial.broken.version]
    identities = {name: arrays_sha256(_leaves(rule)) for name, rule in rules.items()}
    asked = [data_sha256(model.rows(prompts)), trial.decoding.max_new_tokens, trial.decoding.seed]
    follows = [model.fingerprint(), asked, judged, identities, list(model.tokenizer.eos_ids)]

    def make() -> Json:
        return plain(_tried(model, rules, prompts, trial, done))

    return from_json(store.once("mending", follows, make), tuple[Tried, ...])


def _leaves(rule: Rule) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(rule)]


def _tried(
    model: ChatModel, rules: Mapping[str, Rule], prompts: Sequence[str], trial: Trial, done: Progress
) -> list[Tried]:
    pieces = model.steered(list(rules.values())).answers(prompts, trial.decoding, trial.batch_size, done)
    texts = [answers.texts for answers in pieces]
    found = []
    for name, each, likely in zip(rules, texts, likelihoods(model, prompts, texts, trial.batch_size), strict=True):
        refused, nats = trial.judge.refused(prompts, each), [likelihood.mean for likelihood in likely]
        broken = trial.broken.broken(each, refused, nats)
        complied = tuple(r is False and not b for r, b in zip(refused, broken, strict=True))
        found.append(Tried(name, complied, tuple(nats), sum(broken)))
    return found


def best_chain(complied: Bool[np.ndarray, "C n"], nats: Float[np.ndarray, "C n"]) -> tuple[int, int]:
    """The numbers of the first and the second rule, the same one twice where one is enough.

    Of chains whose answers comply as often as the best chain's, within one standard error of the difference on the
    same prompts, the one of the fewest mean nats a token; of equal ones the single rule, then the earlier one.
    """
    C, n = complied.shape
    mended = complied[:, None] | complied[None]
    own = np.where(complied[:, None], nats[:, None], nats[None])
    share = mended.mean(-1)
    best = np.unravel_index(np.argmax(share), share.shape)
    behind = mended[best].astype(float) - mended
    error = behind.std(-1) / np.sqrt(n)
    mean = np.where(mended, own, 0).sum(-1) / np.maximum(mended.sum(-1), 1)
    alike = (behind.mean(-1) <= error + 1e-12) & mended.any(-1)
    single = np.eye(C, dtype=bool)
    order = sorted(np.argwhere(alike).tolist(), key=lambda pair: (round(mean[*pair], 6), not single[*pair], pair))
    return order[0][0], order[0][1]


def choose(tried: Sequence[Tried], seed: int = 0) -> tuple[tuple[int, ...], float]:
    """The numbers of the rules to mend by, one or two, and the share of resamples that choose the same.

    Raises ValueError where no candidate mends anything.
    """
    complied = np.array([each.complied for each in tried], bool)
    if not complied.any():
        raise ValueError("no rule makes the model answer a refused calibration prompt whole; give stronger ones")
    nats = np.array([[np.inf if value is None else value for value in each.nats] for each in tried])
    nats = np.where(complied, nats, 0.0)
    chosen, n = best_chain(complied, nats), complied.shape[1]
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    again = [best_chain(complied[:, draw], nats[:, draw]) for draw in draws if complied[:, draw].any()]
    return tuple(dict.fromkeys(chosen)), sum(pair == chosen for pair in again) / len(again)
