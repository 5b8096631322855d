"""DRO, a safety prompt that is optimised as vectors (Zheng et al., arXiv 2401.18018).

x is the normed state after the last block at a prompt's last token; x_0 is x under the textual safety prompt. The
embeddings of that prompt's tokens are the vectors that are trained. Logistic regressions on the first four principal
coordinates V^T x of the states under all system prompts tell how likely the model complies (f_r) and whether the
request is harmless (f_h). With d = x - x_0 and l = 1 for harmless requests, 0 for harmful ones,

    loss = BCE(f_r(x) - f_r(x_0), l) + 0.01 BCE(f_h(x) - f_h(x_0), l) + 0.001 mean((V_rest^T d)^2)

BCE being taken of logits. V_rest completes V to a basis; |V_rest^T d|^2 = |d|^2 - |V^T d|^2, so none is made.
Published: the loss, AdamW at 1e-3, 40 epochs of 4 batches of 50 prompts, clipping at 1, 25 sampled answers a prompt.
Ours: the regressions are fitted by scikit-learn, the system prompts are none and the safety prompt (in our words).

n prompts, B batch, D embed, P tokens of the soft prompt
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxsafe.chat.model import ChatModel
from jaxsafe.chat.soft_prompts import embedded_system, system_span
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.io.store import TREE, Json, Store
from jaxsafe.kernels.forward import final_states, prompt_inputs
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.kernels.training import batch_plan
from jaxsafe.methods.decoders import SAFETY_FIRST
from jaxsafe.methods.dro_loss import WEIGHTS, Probes, fit_probes, loss
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.soft_prompt import SoftPrompt, soft_prompt
from jaxsafe.model.transformer import Edits, Params
from jaxsafe.parallel import put_rows
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.roles import labelled
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.rows import Batch, Row, bucket, data_sha256, pad_rows


@dataclasses.dataclass(frozen=True)
class DRO:
    """How the soft prompt begins (`system`), how compliance is sampled, and how it is trained."""

    system: str = SAFETY_FIRST
    samples: int = 25
    answer_tokens: int = 64
    components: int = 4
    weights: tuple[float, float] = WEIGHTS
    steps: int = 160
    batch_size: int = 50
    learning_rate: float = 1e-3
    clip: float = 1.0
    seed: int = 42


@functools.partial(jax.jit, static_argnames="config")
def last_states(config: ModelConfig, params: Params, batch: Batch, edits: Edits = None) -> Float[Array, "B D"]:
    """x of each prompt, float32; the rows of `batch` end where their instructions do."""
    given = prompt_inputs(config, params, batch, edits=edits)
    return final_states(config, params, given, edits)[:, -1].astype(jnp.float32)


def trained_vectors(
    model: ChatModel, rows: Sequence[Row], harmless: Bool[np.ndarray, " n"], probes: Probes, settings: DRO
) -> Float[Array, "P D"]:
    """The soft prompt that is trained on prompts, `rows` as the model is asked them under its system prompt.

    Raises ValueError as `system_span` does.
    """
    begun = embedded_system(model)
    textual = model.map(lambda batch, _: last_states(model.config, model.params, batch, model.edits), rows)
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip), optax.adamw(settings.learning_rate, weight_decay=1e-2)
    )

    @jax.jit
    def step(params: Params, vectors: Array, state: Any, batch: Batch, about: Sequence[Array]) -> tuple[Array, Any]:
        x_0, label, weight = about

        def mean(vectors: Array) -> Array:
            prompt = SoftPrompt(vectors, begun.first)
            x = last_states(model.config, params, batch, {**(model.edits or {}), "embed": prompt})
            return jnp.sum(loss(probes, x, x_0, label, settings.weights) * weight) / jnp.sum(weight)

        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of integer counts
            updates, state = optimizer.update(jax.grad(mean)(vectors), state, vectors)
        return optax.apply_updates(vectors, updates), state

    vectors: Any = begun.vectors
    state = optimizer.init(vectors)
    size = min(settings.batch_size, len(rows))
    size += -size % model.row_multiple
    length = bucket(max(len(row.ids) for row in rows))
    for indices in batch_plan([1] * len(rows), size, settings.steps, settings.seed):
        drawn = np.resize(indices, size)  # rows that fill up a batch count nothing
        counted = (np.arange(size) < len(indices)).astype(np.float32)
        batch = put_rows(pad_rows([rows[i] for i in drawn], length), model.mesh)
        about = put_rows((textual[drawn], harmless[drawn].astype(np.float32), counted), model.mesh)
        vectors, state = step(model.params, vectors, state, batch, about)
    return vectors[0]


def compliance_once(
    store: Store, model: ChatModel, prompts: Sequence[str], judge: Judge, settings: DRO, done: Progress = silent
) -> Float[np.ndarray, " n"]:
    """The share of sampled answers to each prompt that do not refuse, of those that can be scored; 0.5 of none."""
    asked = Decoding(settings.answer_tokens, Sampling(temperature=1.0), settings.seed, settings.samples)
    told = [judge.name, judge.version, settings.answer_tokens, settings.seed, settings.samples]
    follows = [model.fingerprint(), data_sha256(model.rows(prompts)), list(model.tokenizer.eos_ids), *told]

    def make() -> Json:
        texts = model.answers(prompts, asked, done=done).texts
        refused = judge.refused([p for p in prompts for _ in range(settings.samples)], texts)
        own = [refused[i : i + settings.samples] for i in range(0, len(refused), settings.samples)]
        scored = [[not r for r in each if r is not None] for each in own]
        return [sum(each) / len(each) if each else 0.5 for each in scored]

    return np.array(store.once("compliance", follows, make))


def dro(
    store: Store,
    model: ChatModel,
    sets: Sequence[PromptSet],
    judge: Judge,
    settings: DRO = DRO(),
    done: Progress = silent,
) -> ChatModel:
    """The model under a soft prompt that is trained on the labelled prompts of `sets`, kept in `store`.

    It is asked under `settings.system`, whose tokens hold the vectors; under another system prompt they would lie
    elsewhere. `done` is called with numbers of answers. Raises ValueError as `fit_probes` and `system_span` do.
    """
    prompts, harmful = labelled(sets)
    harmless, safe = ~np.array(harmful), model.with_prompt(settings.system)
    rows = safe.rows(prompts)
    asked = [model.with_prompt(None), safe]

    def make() -> Params:
        compliance = [compliance_once(store, each, prompts, judge, settings, done) for each in asked]
        states = [
            each.map(lambda batch, _: last_states(model.config, model.params, batch, model.edits), each.rows(prompts))
            for each in asked
        ]
        probes = fit_probes(
            np.concatenate(states), np.concatenate(compliance), np.tile(harmless, 2), settings.components
        )
        return {"vectors": trained_vectors(safe, rows, harmless, probes, settings)}

    follows = [safe.fingerprint(), data_sha256(rows), harmful, judge.name, judge.version, repr(settings)]
    vectors = store.once("soft-prompt", follows, make, TREE)["vectors"]
    return safe.with_edits({**(model.edits or {}), "embed": soft_prompt(vectors, system_span(safe)[0])})
