"""Where a system prompt lies in what a model is asked, and its embeddings as a soft prompt."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxsafe.chat.model import PROBE, ChatModel
from jaxsafe.kernels.forward import embed
from jaxsafe.model.soft_prompt import SoftPrompt, soft_prompt

OTHERS = ("x", "7?")
"""Short system prompts that begin and end in different tokens."""


def system_span(model: ChatModel) -> tuple[int, int]:
    """First position and number of the tokens that hold the model's system prompt, the same before every prompt.

    Raises ValueError for a model that has no system prompt, or is asked without a template.
    """
    if model.raw or not (model.system or "").strip():
        raise ValueError(f"{model.name} is asked without a system prompt; a soft prompt takes the place of one")
    own, *others = (model.row(PROBE, system=text).ids for text in (model.system, *OTHERS))
    first = min(_alike(own, other) for other in others)
    return first, len(own) - first - min(_alike(own[::-1], other[::-1]) for other in others)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def embedded_system(model: ChatModel) -> SoftPrompt:
    """The embeddings of the model's system prompt, float32: the model answers with them as it does without.

    Raises ValueError as `system_span` does.
    """
    first, count = system_span(model)
    ids = jnp.asarray([model.row(PROBE).ids[first : first + count]])
    return soft_prompt(embed(model.config, model.params, ids)[0].astype(jnp.float32), first)
