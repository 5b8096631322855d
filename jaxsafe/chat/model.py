"""A chat model: the one place that knows how a model is asked.

n prompts or rows, B batch
"""

import dataclasses
import enum
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxsafe.chat.answers import Answers, collected
from jaxsafe.chat.steered import Steered
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.digest import digest
from jaxsafe.io.hub import Named, located, open_model
from jaxsafe.io.peft import read_adapter
from jaxsafe.io.tensors import load_params
from jaxsafe.kernels.generate import Generated, generate
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.kernels.sampling import Decoding, row_seeds
from jaxsafe.kernels.sketch import sketch
from jaxsafe.kernels.steering import Rule
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.families import config_to_hf
from jaxsafe.model.soft_prompt import SoftPrompt
from jaxsafe.model.transformer import Edits, Params
from jaxsafe.parallel import fetch, put_rows
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import (
    Batch,
    Call,
    Row,
    Tree,
    answer_slots,
    bucket,
    check_context,
    in_order,
    reported,
    run_batches,
)


class Keep(enum.Enum):
    """The type of `KEEP`."""

    KEEP = "keep"


KEEP = Keep.KEEP
"""In place of a system prompt: the model's own."""
PROBE = "How are you?"
System = str | None | Keep
"""A system prompt; None leaves it to the chat template."""


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model, its tokenizer, the devices that hold it, and how it is asked.

    `system` is the system prompt of every conversation; None leaves it to the chat template. `raw` asks prompts
    without any template. `opening` begins every answer: the model goes on from it, and it counts as asked, not as said.
    `edits` {tap: edit} change every pass; their gates and starts are the same for all rows. `adapter_sha256` is the
    digest of an adapter that is merged into the weights.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    mesh: Mesh | None = None
    system: str | None = None
    raw: bool = False
    edits: Edits = None
    adapter_sha256: str | None = None
    opening: str = ""

    def row(self, prompt: str, answer: str = "", system: System = KEEP) -> Row:
        """`prompt` as the model is asked it, and `answer` behind it; raw prompts have no system prompt.

        Raises ValueError for a blank prompt, for one that the chat template changes, and for a token that the model
        lacks.
        """
        if self.raw:
            asked = self.tokenizer.raw_row(prompt, self.opening).ids
        else:
            own = self.system if isinstance(system, Keep) else system
            asked = self.tokenizer.chat_row(prompt, own, self.opening).ids
        row = Row((*asked, *self.tokenizer.plain_ids(answer)), len(asked) - 1)
        self.tokenizer.check_vocabulary(row.ids, self.config.vocab)
        return row

    def rows(self, prompts: Sequence[str]) -> list[Row]:
        """Each prompt as the model is asked it."""
        return [self.row(prompt) for prompt in prompts]

    def batches(
        self, call: Call, rows: Sequence[Row], batch_size: int = 32, new_tokens: int = 0
    ) -> Iterator[tuple[Any, Tree]]:
        """`call(batch, indices)` over batches of `rows` on the devices, as (indices, result) of each finished one.

        See `run_batches`. Raises ValueError for no rows, for one that, with `new_tokens`, exceeds the context, and for
        a token that the model lacks.
        """
        check_context(rows, self.config.context, new_tokens)
        self.tokenizer.check_vocabulary((max(row.ids) for row in rows), self.config.vocab)

        def placed(batch: Batch, indices: np.ndarray) -> Tree:
            return call(put_rows(batch, self.mesh), indices)

        return run_batches(placed, rows, batch_size, self.row_multiple)

    def map(
        self, call: Call, rows: Sequence[Row], batch_size: int = 32, done: Progress = silent, new_tokens: int = 0
    ) -> Tree:
        """The results of `batches` in the order of `rows`; `done` is called with each batch's number of rows."""
        return in_order(reported(self.batches(call, rows, batch_size, new_tokens), done))

    def asked(self, prompts: Sequence[str] | Sequence[Row], decoding: Decoding) -> tuple[list[Row], Decoding]:
        """A row for every answer to `prompts` (texts, or rows as they are), and `decoding` with the tokenizer's ends.

        Ends that `decoding` has are kept.
        """
        rows = [self.row(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        repeated = [row for row in rows for _ in range(decoding.samples)]
        return repeated, dataclasses.replace(decoding, eos=decoding.eos or self.tokenizer.eos_ids)

    def answer_batches(
        self,
        prompts: Sequence[str] | Sequence[Row],
        decoding: Decoding = Decoding(),
        batch_size: int = 32,
    ) -> Iterator[tuple[np.ndarray, Answers]]:
        """(indices, answers) of each finished batch; answer i is one to prompt i // `decoding.samples`.

        What is drawn depends on the seed and on the prompt's tokens, not on the batch. Raises ValueError for no
        prompts, a blank one, one that exceeds the context, and a number of `decoding` out of range.
        """
        rows, decoding = self.asked(prompts, decoding)
        numbers = row_seeds(rows)

        def call(batch: Batch, indices: np.ndarray) -> Generated:
            return generate(self.config, self.params, batch, decoding, self.edits, numbers[indices])

        for indices, generated in self.batches(call, rows, batch_size, decoding.max_new_tokens):
            yield indices, self.decoded(generated, read=sum(len(rows[i].ids) for i in indices))

    def answers(
        self,
        prompts: Sequence[str] | Sequence[Row],
        decoding: Decoding = Decoding(),
        batch_size: int = 32,
        done: Progress = silent,
    ) -> Answers:
        """The answers to `prompts` in their order, samples of a prompt together; see `answer_batches`."""
        return collected(reported(self.answer_batches(prompts, decoding, batch_size), done))

    def nll(
        self, rows: Sequence[Row], batch_size: int = 16, done: Progress = silent
    ) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Summed negative log-likelihood (nats) of each row's answer, and the number of its tokens.

        Programs are compiled by shape: a model with other parameters runs those that are there. Raises ValueError for
        no rows and for one that exceeds the context.
        """

        def call(batch: Batch, indices: np.ndarray) -> Tree:
            last = bucket(answer_slots(rows, indices))
            return answer_nll(self.config, self.params, batch, self.edits, last)

        nll, counts = self.map(call, rows, batch_size, done)
        return nll, counts

    def decoded(self, generated: Generated, read: int = 0) -> Answers:
        """`generated` tokens with their texts."""
        texts = self.tokenizer.decode(generated.tokens, generated.lengths)
        nats = None if generated.nats is None else np.asarray(generated.nats)
        return Answers(tuple(texts), np.asarray(generated.tokens), np.asarray(generated.lengths), nats=nats, read=read)

    def with_params(self, params: Params) -> "ChatModel":
        """The model with these weights."""
        return dataclasses.replace(self, params=params)

    def with_edits(self, edits: Edits) -> "ChatModel":
        """The model with these edits in place of its own."""
        return dataclasses.replace(self, edits=edits)

    def with_prompt(self, system: System = KEEP, raw: bool | None = None, opening: str | None = None) -> "ChatModel":
        """The model asked with this system prompt, with or without the chat template, its answers begun by `opening`.

        Raises ValueError for another prompt where a soft prompt lies in the place of this one's tokens.
        """
        asked = dataclasses.replace(
            self,
            system=self.system if isinstance(system, Keep) else system,
            raw=self.raw if raw is None else raw,
            opening=self.opening if opening is None else opening,
        )
        soft = isinstance((self.edits or {}).get("embed"), SoftPrompt)
        if soft and (asked.system, asked.raw) != (self.system, self.raw):
            raise ValueError("a soft prompt lies in the place of this system prompt's tokens; it goes with no other")
        return asked

    def steered(self, rules: Sequence[Rule | None]) -> Steered:
        """The model under each of `rules`, all answering from one prefill; None is the model itself.

        Raises ValueError for no rules, and for rules of different affirmatives.
        """
        return Steered(self, tuple(rules))

    @property
    def row_multiple(self) -> int:
        """The number of devices that share the rows of a batch."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template in use; None for raw prompts."""
        return None if self.raw else self.tokenizer.template_sha256

    def origin(self) -> dict[str, Any]:
        """What tells the model from others in whatever dtype it is, for files of vectors; one pass over its weights."""
        return self._origin

    @functools.cached_property
    def _origin(self) -> dict[str, Any]:
        shape = dataclasses.replace(self.config, dtype="float32")
        return {"configuration": digest(config_to_hf(shape)), "sketch": dict(sketch(self.params))}

    def config_sha256(self) -> str:
        """Digest of the model's configuration."""
        return hashlib.sha256(json.dumps(config_to_hf(self.config), sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Digest of configuration, weights and edits (by their sums and sums of squares) and how prompts are asked."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        sums = fetch(_sums((self.params, self.edits)))
        by_path = sorted((jax.tree_util.keystr(path), leaf.tolist()) for path, leaf in jax.tree.leaves_with_path(sums))
        asked: list[Any] = [self.template_sha256, self.system, self.raw]
        if self.tokenizer.template_args and not self.raw:
            asked.append(dict(self.tokenizer.template_args))
        if self.opening:
            asked.append(["opening", self.opening])
        return digest(config_to_hf(self.config), by_path, *asked)


@jax.jit
def _sums(tree: Any) -> Any:
    return jax.tree.map(
        lambda a: jnp.stack([a.astype(jnp.float32).sum(), jnp.square(a.astype(jnp.float32)).sum()]), tree
    )


def load_chat_model(
    name: Named,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    template: str | None = None,
    system: str | None = None,
    raw: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> ChatModel:
    """Loads the model `name` (folder, GGUF file, hub name or "smollm2-135m-instruct") with its tokenizer.

    A PEFT adapter (LoRA) is merged into the weights: `Adapted(model, adapter)`, or its folder alone, which names its
    base. The tokenizer is the base's; a chat template beside the adapter takes the place of the base's.

    Tokens that the tokenizer has beyond the model's vocabulary are refused where every conversation has them, and else
    in the prompt that does.

    `template` is a Jinja chat template for a model that ships none, `template_args` what templates are called with,
    such as {"enable_thinking": False}. Raises FileNotFoundError and ValueError
    with one line that names what is wrong.
    """
    path, folder = located(name)
    adapter = None if folder is None else read_adapter(folder)
    tokenizer = Tokenizer(path, template, template_args)
    if folder is not None and not template:
        tokenizer = with_adapter_template(tokenizer, folder)
    # What would be refused with every prompt is refused before the weights are read.
    # A GGUF file, which takes seconds to open, is opened once.
    config, tensors = open_model(tokenizer.gguf or path, dtype, adapter)
    probe = tokenizer.raw_row(PROBE) if raw else tokenizer.chat_row(PROBE, system)
    tokenizer.check_vocabulary((*probe.ids, *tokenizer.eos_ids), config.vocab)
    params, digest_of = load_params(config, tensors, mesh), None if adapter is None else adapter.sha256
    return ChatModel(str(name), config, params, tokenizer, mesh, system, raw, adapter_sha256=digest_of)


def with_adapter_template(base: Tokenizer, folder: pathlib.Path) -> Tokenizer:
    """`base` with the chat template beside an adapter, where there is one.

    Raises ValueError where the tokenizer beside it has other tokens, or ends answers elsewhere, than that of the base.
    """
    if not (folder / "tokenizer.json").is_file():
        return base
    own = Tokenizer(folder)
    if own.hf.get_vocab() != base.hf.get_vocab():
        raise ValueError(f"the tokenizer beside the adapter {folder} has other tokens than the base {base.path}")
    if not set(own.eos_ids) <= set(base.eos_ids):
        raise ValueError(
            f"the tokenizer beside the adapter {folder} ends answers at {list(own.eos_ids)}, the base {base.path} at "
            f"{list(base.eos_ids)}; name all of them in the base's generation_config.json"
        )
    return base.with_template(own.chat_template) if own.hf.chat_template else base
