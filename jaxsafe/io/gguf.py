"""GGUF files of Llama and Mistral models: weights, configuration and tokenizer, read without PyTorch."""

import json
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsafe.io.atomic import write_text
from jaxsafe.io.hf import save_hf
from jaxsafe.io.tensors import Index, load_params
from jaxsafe.model.attention import inverse_frequencies
from jaxsafe.model.config import Rope
from jaxsafe.model.families import config_from_hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURE = "llama"
ACCEPTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Factors by which Llama 3 stretches its rotary frequencies; derived from the configuration, not learned.
ROPE_FACTORS = "rope_freqs.weight"
# Keys under `llama.` that are read, checked or without influence on the logits; others must be 0 or empty.
KNOWN_KEYS = frozenset(
    [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
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
    a quantisation outside ACCEPTED.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.where = str(path)
        self._reader = _open(pathlib.Path(path))
        if self._field("general.architecture") != ARCHITECTURE:
            raise ValueError(
                f"{path} has architecture {self._field('general.architecture')!r}; "
                f"only {ARCHITECTURE!r} (Llama and Mistral models) is supported"
            )
        self._tensors = {_hf_name(t.name): t for t in self._reader.tensors if t.name != ROPE_FACTORS}
        for tensor in self._tensors.values():
            if tensor.tensor_type.name not in ACCEPTED:
                raise ValueError(
                    f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}; accepted are {', '.join(ACCEPTED)}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of tensor `name`, dequantised to float32; only the blocks it touches are read."""
        from gguf import GGML_QUANT_SIZES, dequantize

        tensor, order = self._tensors[name], self._row_order(name)
        if len(index) == 1:
            whole = dequantize(tensor.data, tensor.tensor_type)
            return whole[index] if order is None else whole[order[index]]
        rows, columns = index
        start, stop, _ = columns.indices(int(tensor.shape[0]))
        # Blocks lie along the rows: `block` values in `unit` stored numbers.
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        unit, first, last = block_bytes // tensor.data.itemsize, start // block, -(-stop // block)
        stored = tensor.data[rows if order is None else order[rows], first * unit : last * unit]
        return dequantize(stored, tensor.tensor_type)[:, start - first * block : stop - first * block]

    def attributes(self) -> dict[str, Any]:
        """What a Hugging Face `config.json` of this model says.

        Raises ValueError for a key, a rotary scaling or a head layout that such a file cannot express.
        """
        unknown = sorted(
            key
            for key in self._reader.fields
            if key.startswith("llama.") and key.removeprefix("llama.") not in KNOWN_KEYS and self._field(key)
        )
        if unknown:
            raise ValueError(f"{self.where} has keys that are not understood: {', '.join(unknown)}")
        heads, embed = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self._number("attention.key_length", embed // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._number(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.where}: {key} is {self._number(key)}; only the head size {head_dim} is supported"
                )
        theta = _decimal(self._number("rope.freq_base", 10_000.0))
        window = self._field("llama.attention.sliding_window")
        names, types = self.shapes(), {t.tensor_type.name for t in self._tensors.values()}
        if "model.embed_tokens.weight" not in names:
            raise ValueError(f"{self.where} has no tensor token_embd.weight, so it is no whole model")
        attributes = {
            "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
            "model_type": "mistral" if window else "llama",
            "vocab_size": names["model.embed_tokens.weight"][0],
            "num_hidden_layers": self._number("block_count"),
            "hidden_size": embed,
            "intermediate_size": self._number("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": _decimal(self._number("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in names,
            "max_position_embeddings": self._number("context_length"),
            "torch_dtype": "bfloat16" if types <= {"BF16", "F32"} and "BF16" in types else "float32",
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }
        if window:
            return attributes | {"sliding_window": int(window)}
        return attributes | {
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in names,
        }

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The `transformers` tokenizer that the file's metadata describe, with its chat template."""
        from jaxsafe.io.gguf_tokenizer import build_tokenizer

        prefix = "tokenizer."
        fields = {k.removeprefix(prefix): self._field(k) for k in self._reader.fields if k.startswith(prefix)}
        try:
            return build_tokenizer(fields, context=self._number("context_length"))
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _number(self, key: str, *default: Any) -> Any:
        value = self._field(f"llama.{key}")
        if value is None:
            if not default:
                raise ValueError(f"{self.where} has no key llama.{key}, which a {ARCHITECTURE} model needs")
            return default[0]
        if isinstance(value, list):
            raise ValueError(f"{self.where}: llama.{key} differs from layer to layer, which is not supported")
        return value

    def _row_order(self, name: str) -> np.ndarray | None:
        """For q and k, the stored row of each row in Hugging Face's order; None where rows lie as they should.

        A head's H rotated channels are paired (0, 1), (2, 3), ... in a GGUF file, (0, H/2), (1, H/2 + 1), ...
        in a Hugging Face checkpoint.
        """
        heads = self._number("attention.head_count")
        if ".k_proj." in name:
            heads = self._number("attention.head_count_kv", heads)
        elif ".q_proj." not in name:
            return None
        rows = int(self._tensors[name].shape[-1])
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self._field("llama.rope.scaling.type") or "linear"
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.where}: rope scaling {kind!r} is not supported; use 'none' or 'linear'")
        factor = self._field("llama.rope.scaling.factor") or self._field("llama.rope.scale_linear") or 1.0
        linear = {"rope_type": "linear", "factor": _decimal(factor)} if kind == "linear" and factor != 1 else None
        factors = [t.data for t in self._reader.tensors if t.name == ROPE_FACTORS]
        if not factors:
            return linear
        # Released Llama 3 models share every number but `factor`; it is the largest stretch.
        rope = Rope(theta, "llama3", factor=float(factors[0].max()))
        expected = inverse_frequencies(Rope(theta), head_dim) / inverse_frequencies(rope, head_dim)
        if linear or factors[0].shape != expected.shape or not np.allclose(factors[0], expected, rtol=1e-4, atol=0):
            raise ValueError(f"{self.where}: the rotary factors in {ROPE_FACTORS} are not those of Llama 3")
        return {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }


def gguf_to_hf(path: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None) -> pathlib.Path:
    """Writes the GGUF file `path` as a Hugging Face folder: config.json, tokenizer and safetensors.

    `dtype` None keeps bfloat16 where the file holds it and takes float32, which holds every dequantised
    value exactly, elsewhere. The folder appears whole or not at all. Raises as `GgufFile` and `save_hf` do.
    """
    file = GgufFile(path)
    attributes = file.attributes()
    attributes["torch_dtype"] = dtype or attributes["torch_dtype"]
    config = config_from_hf(attributes, attributes["torch_dtype"])
    with tempfile.TemporaryDirectory() as like:
        file.tokenizer().save_pretrained(like)
        described = json.loads((pathlib.Path(like) / "tokenizer_config.json").read_text())
        # The name that both transformers 4 and 5 know.
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_text(pathlib.Path(like) / "tokenizer_config.json", json.dumps(described, indent=2) + "\n")
        write_text(pathlib.Path(like) / "config.json", json.dumps(attributes, indent=2) + "\n")
        return save_hf(folder, config, load_params(config, file), like=like)


def _open(path: pathlib.Path) -> Any:
    from gguf import GGUFReader

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is cut off, damaged or of an unknown GGUF version: {error}") from None
    if reader.byte_order == "S":
        raise ValueError(f"{path} is written in the other byte order; convert it with gguf-convert-endian")
    return reader


def _hf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight; names that are not known stay as they are."""
    match name.split("."):
        case ["blk", layer, part, kind] if part in INNER:
            return f"model.layers.{layer}.{INNER[part]}.{kind}"
        case [part, kind] if part in OUTER:
            return f"{OUTER[part]}.{kind}"
    return name


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the float32 `value`: 1e-5 for 9.99999974e-06."""
    return float(str(np.float32(value)))
