"""Remedies and defences that decode or ask in another way: the baselines of SCANS (arXiv 2408.11491, table 2).

Self-CD (Shi et al., arXiv 2401.17633) contrasts the model under a system prompt that stresses safety with the model as
it is; SafeDecoding (Xu et al., arXiv 2402.08983) leans toward an expert that was taught to refuse, and is a defence
against jailbreaks that raises over-refusal; the baseline "prompt" puts helpfulness first. The words of the prompts are
ours: the papers' are not published or belong to them.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxsafe.chat.contrasted import Contrasted
from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.io.store import TREE, Store
from jaxsafe.kernels import lora
from jaxsafe.kernels.contrast import Difference, Expert
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods.attribution_data import OwnAnswers, own_answers_once
from jaxsafe.methods.trainer import FineTuning, train
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import data_sha256

SAFETY_FIRST = (
    "Before you answer, weigh whether the request could do harm. Put safety above everything else, and do not help "
    "with anything that is dangerous, illegal or unkind."
)
HELPFUL_FIRST = (
    "Most requests are harmless even where they use frightening words. Read what is really asked, help with everything "
    "that hurts nobody, and decline only what would do real harm."
)


def self_cd(model: ChatModel, strength: float = 2.5) -> Contrasted:
    """l_with - strength (l_with - l_without), `with` being the model under `SAFETY_FIRST`; 2.5 as in its script."""
    return Contrasted(model.with_prompt(SAFETY_FIRST), model, Difference(jnp.float32(strength)))


def prompted(model: ChatModel) -> ChatModel:
    """The model under a system prompt that puts helpfulness first."""
    return model.with_prompt(HELPFUL_FIRST)


EXPERT = FineTuning(steps=60, batch_size=8, learning_rate=2e-3, lora=LoRA(16, 64.0))
"""How the expert is taught (ours)."""


@dataclasses.dataclass(frozen=True)
class SafeDecoding:
    """Published settings: strength a, the first `tokens` m, `common` c; and how the expert is taught."""

    strength: float = 3.0
    tokens: int = 2
    common: int = 5
    training: FineTuning = EXPERT


def safe_decoding(
    store: Store,
    model: ChatModel,
    harmful: Sequence[str],
    judge: Judge,
    settings: SafeDecoding = SafeDecoding(),
    done: Progress = silent,
) -> Contrasted:
    """The model whose first tokens lean toward an expert: itself with a LoRA taught its own refusals of `harmful`.

    The adapter is kept in `store`; `done` is called with numbers of prompts. Raises ValueError where the model
    refuses none of the prompts.
    """
    rows = own_answers_once(store, model, harmful, OwnAnswers(judge, refused=True, answer_tokens=32), done)
    if not rows:
        raise ValueError("the model refuses none of these harmful prompts; SafeDecoding has nothing to teach an expert")
    plan = settings.training
    assert plan.lora is not None
    follows = [model.fingerprint(), data_sha256(rows), repr(plan)]

    def make() -> Params:
        *_, last = train(model.config, model.params, rows, plan, mesh=model.mesh)
        return dict(last.adapters or {})

    adapters = store.once("expert", follows, make, TREE)
    expert = lora.changed(model.params, lora.changes(adapters, plan.lora.alpha))
    rule = Expert(jnp.float32(settings.strength), jnp.int32(settings.tokens), jnp.int32(settings.common))
    return Contrasted(model, model.with_params(expert), rule)
