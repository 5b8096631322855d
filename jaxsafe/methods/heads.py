"""Attention heads that tell harmful prompts from benign ones, found by linear probes, and masks that ablate them.

The head baseline of Wei et al. (ICML 2024, arXiv 2402.05162). A head is its output rows of q, k, v and its input
columns of o; their published code masks the other axis of each.

n prompts, B batch, L layers, D embed, N heads, K kv_heads, H head_dim
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.units import Head
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import At
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch


def head_accuracies(
    model: ChatModel,
    harmful: Sequence[str],
    benign: Sequence[str],
    batch_size: int = 32,
    validation: float = 2 / 7,
    seed: int = 0,
    done: Progress = silent,
) -> np.ndarray:
    """Accuracy on held-out prompts with which each head tells harmful from benign, float64 [L, N].

    A probe is a logistic regression on the head's output at the last token of the prompt; the share `validation` of
    each kind, drawn by `seed`, is held out. `done` is called with the number of prompts of each batch that was read.
    Raises ValueError where a kind has too few prompts to be split.
    """
    states = head_states(model, [*harmful, *benign], batch_size, done)
    return probe_accuracies(states, np.arange(len(states)) < len(harmful), validation, seed)


def head_states(model: ChatModel, prompts: Sequence[str], batch_size: int = 32, done: Progress = silent) -> np.ndarray:
    """What each head hands to the output map at the last token of each prompt, float32 [n, L, N, H]."""

    def call(batch: Batch, indices: np.ndarray) -> jax.Array:
        return _at_end(model.config, model.params, batch)

    return model.map(call, model.rows(prompts), batch_size, done)


@functools.partial(jax.jit, static_argnames="config")
def _at_end(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """[B, L, N, H] at each row's instruction end."""
    reduce = {"heads": At(batch.instruction_end[:, None])}
    read = capture(config, params, batch.tokens, batch.valid, ("heads",), reduce=reduce)["heads"]
    states = read.reshape(config.layers, -1, config.heads, config.head_dim).swapaxes(0, 1)
    return states.astype(jnp.float32)


def probe_accuracies(states: np.ndarray, labels: np.ndarray, validation: float = 2 / 7, seed: int = 0) -> np.ndarray:
    """Held-out accuracy of one probe a head, float64 [L, N], from `states` [n, L, N, H] and boolean `labels` [n].

    Features are standardised on the training part. Of each kind, `labels` True first, the first
    round(count * validation) of a permutation by `numpy.random.default_rng(seed)` are held out.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for kind in (True, False):
        members = rng.permutation(np.flatnonzero(labels == kind))
        count = round(len(members) * validation)
        if not 0 < count < len(members):
            name = "harmful" if kind else "benign"
            raise ValueError(f"{len(members)} {name} prompts cannot be split with a share of {validation:.3g} held out")
        held[members[:count]] = True
    out = np.empty(states.shape[1:3])
    for layer, head in np.ndindex(*out.shape):
        features = states[:, layer, head].astype(np.float64)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features[~held], labels[~held])
        out[layer, head] = probe.score(features[held], labels[held])
    return out


def ranking(accuracies: np.ndarray) -> list[Head]:
    """The heads of `accuracies` [L, N], most accurate first, ties by layer and then by head."""
    order = np.argsort(-accuracies, axis=None, kind="stable")
    return [(int(i) // accuracies.shape[1], int(i) % accuracies.shape[1]) for i in order]
