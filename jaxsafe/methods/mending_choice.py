"""Which rule to answer refusals again by: chosen on safe calibration prompts that are refused behind an open gate.

Each candidate answers these prompts; an answer counts where it complies and is whole. Rates of candidates that differ
by less than the prompts drawn let tell are equal: of those within one standard error of the best, the one whose answers
the unedited model finds the most probable is taken. It is followed by the one that mends the most of what it leaves.

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

RESAMPLES = 1000


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
        of_complied = [n for n, c in zip(nats, complied, strict=True) if c and n is not None]
        found.append(Tried(name, complied, float(np.mean(of_complied)) if of_complied else None, sum(broken)))
    return found


def within_one_error(complied: Bool[np.ndarray, "C n"], seed: int = 0) -> tuple[Bool[np.ndarray, " C"], np.ndarray]:
    """The candidates whose share is within one standard error of the best, and how often each is best in resamples.

    The error is that of the difference to the best on the same prompts, over `RESAMPLES` draws of prompts with
    replacement.
    """
    n = complied.shape[1]
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    shares: Float[np.ndarray, "C draws"] = complied[:, draws].mean(-1)
    best = int(np.argmax(complied.mean(1)))
    error = (shares - shares[best]).std(1)
    wins = (shares == shares.max(0)) / (shares == shares.max(0)).sum(0)
    return complied.mean(1) >= complied[best].mean() - error - 1e-12, wins.mean(1)


def choose(tried: Sequence[Tried], seed: int = 0) -> tuple[list[int], np.ndarray]:
    """The numbers of the rules to mend by, one or two, and how often each candidate is best in resamples.

    Raises ValueError where no candidate mends anything.
    """
    complied = np.array([each.complied for each in tried], bool)
    if not complied.any():
        raise ValueError("no rule makes the model answer a refused calibration prompt whole; give stronger ones")
    alike, wins = within_one_error(complied, seed)

    def gentleness(number: int) -> tuple[float, float]:
        nats = tried[number].nats
        return (np.inf if nats is None else nats, -float(complied[number].mean()))

    first = min(np.flatnonzero(alike & complied.any(1)).tolist(), key=gentleness)
    gained = (complied & ~complied[first]).sum(1)
    second = int(np.argmax(gained))
    return ([first, second] if gained[second] else [first]), wins
