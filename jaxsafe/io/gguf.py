"""GGUF files: weights, configuration and tokenizer, read without PyTorch."""

import functools
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsafe.io.gguf_parts import open_parts
from jaxsafe.io.gguf_tokenizer import build_tokenizer, ends
from jaxsafe.io.layout import Table
from jaxsafe.io.tensors import Index
from jaxsafe.model.attention import inverse_frequencies
from jaxsafe.model.attributes import MOST_LAYERS, is_size
from jaxsafe.model.config import ModelConfig, Rope
from jaxsafe.model.families import FAMILIES, FULL, HF_ACTIVATIONS, ORIGINAL, SLIDING, Family, config_from_hf
from jaxsafe.model.weights import hf_shapes
from jaxsafe.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURES = sorted({family.gguf for family in FAMILIES.values() if family.gguf})
# Factors by which Llama 3 stretches its rotary frequencies, which are derived from the configuration, and those by
# which Phi divides its own within the original context and beyond it.
ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS = (
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
)
# Layers of the Gemma models whose scores are divided by the root of the width of a head's share of the residual
# stream and not of its features; files do not say it.
WIDE_SCORES = {"gemma2": 46, "gemma3_text": 62}
# Keys under the architecture's name that are read, checked or without influence on the logits; others must be 0 or
# empty.
KNOWN_KEYS = frozenset(
    [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "attn_logit_softcapping",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "final_logit_softcapping",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    ]
)


class GgufFile:
    """The tensors of a GGUF file under Hugging Face's names and layouts (a `TensorSource`), read when asked for.

    Raises FileNotFoundError, and ValueError for a file that is damaged, of another architecture, or that holds
    a quantisation that the `gguf` package cannot undo.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.where = str(path)
        parts = open_parts(path)
        self._fields = parts[0].fields
        self._architecture = self._field("general.architecture")
        if self._architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path} has architecture {self._architecture!r}; supported are {', '.join(ARCHITECTURES)}"
            )
        tensors: dict[str, Any] = {}
        for tensor in (tensor for part in parts for tensor in part.tensors):
            if tensor.name in tensors:
                raise ValueError(f"{path}: tensor {tensor.name!r} stands in two parts")
            tensors[tensor.name] = tensor
        factors = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)
        self._factors = {name: tensors.pop(name).data.reshape(-1) for name in factors if name in tensors}
        self._stored = tensors
        kinds = {tensor.tensor_type: tensor for tensor in reversed(self._stored.values())}
        for kind, tensor in kinds.items():
            if not _readable(kind):
                raise ValueError(f"{path}: {tensor.name} is stored as {kind.name}, which the gguf package cannot read")

    @property
    def _family(self) -> str:
        """The family of the model; where two share an architecture, the second is the one with a window."""
        names = [name for name, family in FAMILIES.items() if family.gguf == self._architecture]
        return names[-1 if self._number("attention.sliding_window", 0) else 0]

    @functools.cached_property
    def _tensors(self) -> dict[str, Any]:
        """The tensors by Hugging Face's names; those that the model does not have keep their own."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        config = self.config()
        (architecture,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        names = get_tensor_name_map(architecture, config.layers)
        fused = [name.format(layer) for name in FAMILIES[config.family].fused for layer in range(config.layers)]
        # Of a fused map and its parts, which the package calls alike, files hold the former.
        stored = {
            names.get_name(name, (".weight", ".bias")): name for name in (*hf_shapes(config), "lm_head.weight", *fused)
        }
        return {stored.get(name, name): tensor for name, tensor in self._stored.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of tensor `name`, dequantised to float32; only the blocks it touches are read."""
        from gguf import GGML_QUANT_SIZES, dequantize

        tensor, order = self._tensors[name], self._row_order(name)
        if len(index) == 1:
            whole = dequantize(tensor.data, tensor.tensor_type)
            if name.endswith("norm.weight") and FAMILIES[self._family].fixed.get("norm") == "plus_one":
                whole = whole - 1
            return whole[index] if order is None else whole[order[index]]
        rows, columns = index
        start, stop, _ = columns.indices(int(tensor.shape[0]))
        # Blocks lie along the rows: `block` values in `unit` stored numbers.
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        unit, first, last = block_bytes // tensor.data.itemsize, start // block, -(-stop // block)
        stored = tensor.data[rows if order is None else order[rows], first * unit : last * unit]
        return dequantize(stored, tensor.tensor_type)[:, start - first * block : stop - first * block]

    def config(self, dtype: str | None = None) -> ModelConfig:
        """The configuration; `dtype` None is bfloat16 where the file holds it, else float32, which holds every value.

        Raises ValueError as `attributes` and `config_from_hf` do.
        """
        attributes = self.attributes()
        try:
            return config_from_hf(attributes, dtype or attributes["torch_dtype"])
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def attributes(self) -> dict[str, Any]:
        """What a Hugging Face `config.json` of this model says.

        Raises ValueError for a key, a rotary scaling or a head layout that such a file cannot express.
        """
        family, stored = FAMILIES[self._family], self._stored
        prefix = f"{self._architecture}."
        unknown = sorted(
            key
            for key in self._fields
            if key.startswith(prefix) and key.removeprefix(prefix) not in KNOWN_KEYS and self._field(key)
        )
        if unknown:
            raise ValueError(f"{self.where} has keys that are not understood: {', '.join(unknown)}")
        if "token_embd.weight" not in stored:
            raise ValueError(f"{self.where} has no tensor token_embd.weight, so it is no whole model")
        heads, embed = self._count("attention.head_count"), self._count("embedding_length")
        head_dim = self._count("attention.key_length", embed // heads)
        if self._number("attention.value_length", head_dim) != head_dim:
            raise ValueError(
                f"{self.where}: attention.value_length is {self._number('attention.value_length')}; "
                f"only the head size {head_dim} is supported"
            )
        types = {t.tensor_type.name for t in stored.values()}
        attributes = {
            "architectures": [family.architecture],
            "model_type": self._family,
            "vocab_size": next(iter(_shape(stored["token_embd.weight"])), 0),
            "num_hidden_layers": self._count("block_count"),
            "hidden_size": embed,
            "intermediate_size": self._count("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": HF_ACTIVATIONS[family.fixed.get("activation", "silu")],
            "rms_norm_eps": _decimal(self._number("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in stored,
            "max_position_embeddings": self._count("context_length"),
            "torch_dtype": "bfloat16" if types <= {"BF16", "F32"} and "BF16" in types else "float32",
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }
        biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        attributes |= {name: biases[name] in stored for name in family.flags.values() if name in biases}
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if cap in family.flags.values() and self._number(cap, None) is not None:
                attributes[cap] = _decimal(self._number(cap))
        if "query_pre_attn_scalar" in family.defaults:
            wide = attributes["num_hidden_layers"] == WIDE_SCORES[self._family]
            attributes["query_pre_attn_scalar"] = embed // heads if wide else head_dim
        return attributes | self._windows(family) | self._ropes(family, head_dim)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The `transformers` tokenizer that the file's metadata describe, with its chat template."""
        with reading(self.where, "describes no tokenizer that can be made"):
            return build_tokenizer(self._tokenizer_fields, self._count("context_length"))

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The id of every token that ends an answer: end of text, of a turn, of a message."""
        try:
            return tuple(ends(self._tokenizer_fields))
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    @functools.cached_property
    def _tokenizer_fields(self) -> dict[str, Any]:
        prefix = "tokenizer."
        return {key.removeprefix(prefix): self._field(key) for key in self._fields if key.startswith(prefix)}

    def _field(self, key: str) -> Any:
        field = self._fields.get(key)
        with reading(self.where, f"has a field {key} that cannot be read"):
            return None if field is None else field.contents()

    def _number(self, key: str, *default: Any) -> Any:
        """The number under `key`, of float32 and not negative. Raises ValueError for anything else."""
        name = f"{self._architecture}.{key}"
        value = self._field(name)
        if value is None:
            if not default:
                raise ValueError(f"{self.where} has no key {name}, which a {self._architecture} model needs")
            return default[0]
        if isinstance(value, list):
            raise ValueError(f"{self.where}: {name} differs from layer to layer, which is not supported")
        if isinstance(value, bool | str) or not 0 <= value <= float(np.finfo(np.float32).max):
            raise ValueError(f"{self.where}: {name} is {value!r:.40}; a number is expected")
        return value

    def _count(self, key: str, *default: int) -> int:
        """The size under `key` (see `is_size`). Raises ValueError for anything else."""
        value = self._number(key, *default)
        if not is_size(value):
            raise ValueError(f"{self.where}: {self._architecture}.{key} is {value!r}; a whole number is expected")
        return value

    def _row_order(self, name: str) -> np.ndarray | None:
        """For q and k, the stored row of each row in Hugging Face's order; None where rows lie as they should.

        A head's H rotated channels are paired (0, 1), (2, 3), ... in a GGUF file, (0, H/2), (1, H/2 + 1), ...
        in a Hugging Face checkpoint.
        """
        if not FAMILIES[self._family].paired:
            return None
        heads = self._count("attention.head_count")
        if ".k_proj." in name:
            heads = self._count("attention.head_count_kv", heads)
        elif ".q_proj." not in name:
            return None
        rows = int(self._tensors[name].shape[-1])
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _windows(self, family: Family) -> dict[str, Any]:
        """The attributes that say which positions each layer sees."""
        window = self._number("attention.sliding_window", 0)
        if not window or not family.window:
            return {family.window: None} if family.window and family.window in family.defaults else {}
        found: dict[str, Any] = {family.window: int(window)} | ({family.switch: True} if family.switch else {})
        pattern = self._field(f"{self._architecture}.attention.sliding_window_pattern")
        if pattern is None or family.slides is None:
            return found
        if not isinstance(pattern, list):
            every = self._count("attention.sliding_window_pattern")
            pattern = [(i + 1) % every != 0 for i in range(min(self._count("block_count"), MOST_LAYERS))]
        return found | {"layer_types": [SLIDING if slides else FULL for slides in pattern]}

    def _ropes(self, family: Family, head_dim: int) -> dict[str, Any]:
        """The attributes of the rotary embeddings. Raises ValueError for those that a file cannot express."""
        theta = _decimal(self._number("rope.freq_base", 10_000.0))
        turned = self._number("rope.dimension_count", head_dim)
        found = {"rope_theta": theta, "rope_scaling": self._rope_scaling(theta, head_dim)}
        if local := self._number("rope.freq_base_swa", None):
            found["rope_local_base_freq"] = _decimal(local)
        if SHORT_FACTORS in self._factors:
            found[ORIGINAL] = self._count("rope.scaling.original_context_length")
        if "partial_rotary_factor" in family.defaults:
            return found | {"partial_rotary_factor": turned / head_dim}
        if turned != head_dim:
            raise ValueError(
                f"{self.where}: rope.dimension_count is {turned}; only the head size {head_dim} is supported"
            )
        return found

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self._field(f"{self._architecture}.rope.scaling.type") or "linear"
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise ValueError(
                f"{self.where}: rope scaling {kind!r} is not supported; use 'none', 'linear', 'yarn' or 'longrope'"
            )
        factor = _decimal(self._number("rope.scaling.factor", 0) or self._number("rope.scale_linear", 0) or 1.0)
        magnitude = self._number("rope.scaling.attn_factor", None)
        if SHORT_FACTORS in self._factors and LONG_FACTORS in self._factors:
            lists = {"short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
            stretch = {name: [_decimal(value) for value in self._factors[held]] for name, held in lists.items()}
            return {"rope_type": "longrope", **stretch, **({"attention_factor": magnitude} if magnitude else {})}
        if kind == "yarn":
            usual = 0.1 * math.log(factor) + 1
            if magnitude and not any(math.isclose(magnitude, value, rel_tol=1e-4) for value in (1, usual)):
                raise ValueError(
                    f"{self.where}: rope.scaling.attn_factor is {magnitude:g}; only {usual:g}, yarn's own, is supported"
                )
            original = self._count("rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, ORIGINAL: original}
        linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
        if ROPE_FACTORS not in self._factors:
            return linear
        # Released Llama 3 models share every number but `factor`; it is the largest stretch.
        factors = self._factors[ROPE_FACTORS]
        rope = Rope(theta, "llama3", factor=float(factors.max()))
        expected = inverse_frequencies(Rope(theta), head_dim) / inverse_frequencies(rope, head_dim)
        if linear or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
            raise ValueError(f"{self.where}: the rotary factors in {ROPE_FACTORS} are not those of Llama 3")
        return {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            ORIGINAL: rope.original_context,
        }


def open_gguf(file: GgufFile, dtype: str | None = None) -> tuple[ModelConfig, Table]:
    """The configuration and the tensors of a GGUF file. Raises as `GgufFile.config` does."""
    config = file.config(dtype)
    return config, Table(config, file)


def _readable(kind: Any) -> bool:
    """Whether the `gguf` package undoes this quantisation."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the float32 `value`: 1e-5 for 9.99999974e-06."""
    return float(str(np.float32(value)))
