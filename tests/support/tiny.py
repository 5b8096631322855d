"""Random models of a few thousand weights and a tokenizer of 300 tokens, made on the spot for tests."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

from jaxsafe.chat.model import ChatModel
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.kernels.training import batch_plan
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import flatten, nest, shapes, weights
from jaxsafe.rows import Batch, Row, pad_rows

CORPUS = """
how do i bake bread for a winter picnic with my old friends? tell me the rules of a quiet game.
write a short poem about rivers, boats and lanterns. what is the tallest tree in the northern forest?
explain why the sky turns red in the evening. please list three uses of a wooden spoon.
give me a plan to repair the broken window of the kitchen. who invented the paper kite?
"""
PROMPTS = (
    "How do I bake bread?",
    "Tell me the rules of chess.",
    "Write a poem about rivers and boats for my friends, please.",
    "Who invented the kite?",
    "Why?",
    "List three uses of a wooden spoon in the kitchen.",
)
SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_config(**changes: Any) -> ModelConfig:
    """Three layers of 32 features, two key/value heads for four heads, room for 160 tokens."""
    usual = ModelConfig(vocab=300, layers=3, embed=32, mlp=48, heads=4, kv_heads=2, head_dim=8, context=160)
    return dataclasses.replace(usual, **changes)


def tiny_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of a lively random model: each layer changes the stream, and the logits differ by whole nats."""
    rng = np.random.default_rng(seed)
    table, wanted = weights(config), flatten(shapes(config))

    def draw(path: str) -> Any:
        shape, weight = wanted[path].shape, table[path]
        if weight.kind == "bias":
            values = 0.1 * rng.standard_normal(shape)
        elif weight.kind == "norm":
            values = (config.norm != "plus_one") + 0.2 * rng.standard_normal(shape)
        elif not weight.linear:
            values = rng.standard_normal(shape)
        else:
            fan_in = np.prod([getattr(config, axis) for axis in weight.inputs])
            values = 1.4 * rng.standard_normal(shape) / np.sqrt(fan_in)
        return jnp.asarray(values, config.dtype)

    return nest({path: draw(path) for path in wanted})


def tiny_tokenizer(
    folder: pathlib.Path,
    template: str | None = TEMPLATE,
    around: str = "$A",
    eos: int | list[int] | None = None,
    override: str | None = None,
) -> Tokenizer:
    """Writes a byte-level BPE tokenizer with a chat `template` to `folder`, and opens it as the library does.

    `around` is what the tokenizer puts around every text ("<s> $A" in Llama's); `eos` goes to
    generation_config.json; `override` is the template that the library is told to use.
    """
    core = Core(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in SPECIALS],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS.splitlines(), trainer)
    if around != "$A":
        marks = [(text, core.token_to_id(text)) for text in around.split() if text != "$A"]
        core.post_processor = processors.TemplateProcessing(single=around, pair=f"{around} $B:1", special_tokens=marks)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    wrapped.save_pretrained(str(folder))
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return Tokenizer(folder, override)


def tiny_chat_model(folder: pathlib.Path, seed: int = 0, **changes: Any) -> ChatModel:
    """A random model with its tokenizer; `changes` go to the configuration."""
    config = tiny_config(**changes)
    return ChatModel("tiny", config, tiny_params(config, seed), tiny_tokenizer(folder))


def random_rows(lengths: list[int], vocab: int = 300, seed: int = 0, behind: list[int] | None = None) -> list[Row]:
    """Rows of random ids; `behind[i]` tokens of row i stand behind its instruction end."""
    rng = np.random.default_rng(seed)
    behind = behind or [0] * len(lengths)
    return [Row(tuple(rng.integers(8, vocab, n).tolist()), n - 1 - b) for n, b in zip(lengths, behind, strict=True)]


def decoding(
    max_new_tokens: int, seed: int = 0, samples: int = 1, eos: Sequence[int] = (-1,), **sampling: Any
) -> Decoding:
    """A `Decoding` from loose numbers, by default without an end-of-text token; `sampling` are fields of `Sampling`."""
    return Decoding(max_new_tokens, Sampling(**sampling), seed, samples, tuple(eos))


def training_batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> list[Batch]:
    """The batches of a `batch_plan`, each padded to `batch_size` rows."""
    plan = batch_plan([len(row.ids) for row in rows], batch_size, steps, seed)
    return [pad_rows([rows[i] for i in indices], count=batch_size) for indices in plan]
