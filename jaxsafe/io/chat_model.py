"""A chat model ready to be asked: parameters, tokenizer, and how prompts are put to it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsafe.io.hub import load_hf, resolve
from jaxsafe.model.config import ModelConfig, config_to_hf
from jaxsafe.text.batches import Row
from jaxsafe.text.chat import Tokenizer


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model, its tokenizer, the devices it lies on, and the system prompt of every conversation.

    `system` None leaves the system prompt to the chat template. `raw` puts prompts without any template.
    """

    name: str
    config: ModelConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    mesh: Mesh | None = None
    system: str | None = None
    raw: bool = False

    def rows(self, prompts: Sequence[str]) -> list[Row]:
        """Each prompt as the model is asked it."""
        if self.raw:
            return [self.tokenizer.raw_row(prompt) for prompt in prompts]
        return self.tokenizer.rows(prompts, self.system)

    @property
    def row_multiple(self) -> int:
        """The number of devices that share the rows of a batch."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template in use; None for raw prompts."""
        return None if self.raw else self.tokenizer.template_sha256

    def config_sha256(self) -> str:
        """Digest of the model's configuration."""
        return hashlib.sha256(json.dumps(config_to_hf(self.config), sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Digest of configuration, weights (by their sums and sums of squares) and how prompts are put."""
        sums = jax.device_get(_sums(self.params))
        named = sorted((jax.tree_util.keystr(path), leaf.tolist()) for path, leaf in jax.tree.leaves_with_path(sums))
        content = [self.config_sha256(), named, self.template_sha256, self.system, self.raw]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@jax.jit
def _sums(params: Any) -> Any:
    return jax.tree.map(
        lambda a: jnp.stack([a.astype(jnp.float32).sum(), jnp.square(a.astype(jnp.float32)).sum()]), params
    )


def load_chat_model(
    name: str | os.PathLike,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    template: str | None = None,
    system: str | None = None,
    raw: bool = False,
) -> ChatModel:
    """Loads the model `name` (folder, GGUF file, hub name or "smollm2-135m-instruct") with its tokenizer.

    `template` is a Jinja chat template for a model that ships none. Raises FileNotFoundError and ValueError
    with one line that names what is wrong.
    """
    path = resolve(name)
    tokenizer = Tokenizer(path, template)
    if not raw:
        tokenizer.chat_template  # noqa: B018 (a model without one is refused before its weights are read)
    config, params = load_hf(path, dtype, mesh)
    return ChatModel(str(name), config, params, tokenizer, mesh, system, raw)
