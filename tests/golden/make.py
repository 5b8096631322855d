"""Makes the golden checkpoints and logits beside this file with transformers and torch: `python tests/golden/make.py`.

Tiny random models, one of each family, in Hugging Face folders, and for each `<name>.npz` with left-padded `tokens`
int32 [B, T], `valid` bool [B, T] and the float32 `logits` [valid tokens, V] that transformers gives.
"""

import pathlib

import numpy as np
import torch
from families import FAMILY_MODELS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LENGTHS = (52, 48, 7)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": SIZES
    | {
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 96,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": SIZES
    | {
        "model_type": "mistral",
        "dtype": "float32",
        "vocab_size": 64,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "sliding_window": 11,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


MODELS |= {name: FAMILY_MODELS[name] | {"dtype": "float32"} for name in FAMILY_MODELS if "," not in name}


def torch_model(attributes: dict, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in which every weight matters: norms are not one, biases not zero."""
    rest = dict(attributes)
    config = AutoConfig.for_model(rest.pop("model_type"), **rest)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = np.random.default_rng(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = generator.standard_normal(tuple(weight.shape), np.float32)
        if name.endswith("norm.weight"):
            noise = ("gemma" not in config.model_type) + noise / 4  # Gemma adds the 1 itself
        elif "embed" in name or name.endswith(".bias"):
            noise = noise / 16
        else:
            noise = noise / weight.shape[1] ** 0.5 / (4 if "lm_head" in name else 1)
        weight.data = torch.from_numpy(noise)
    return model.eval()


def padded(lengths: tuple[int, ...], vocab: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded random `tokens` int32 [B, T] and `valid` bool [B, T]."""
    longest = max(lengths)
    tokens = np.random.default_rng(seed).integers(0, vocab, (len(lengths), longest), np.int32)
    return tokens, np.arange(longest) >= longest - np.array(lengths)[:, None]


def torch_logits(model: PreTrainedModel, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] with positions counted without padding."""
    mask = torch.from_numpy(valid.astype(np.int64))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float().numpy()


def make(folder: pathlib.Path) -> None:
    """Writes the checkpoints and the logits into `folder`."""
    for name, attributes in MODELS.items():
        torch_model(attributes).to(getattr(torch, attributes["dtype"])).save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        # Loaded afresh: a cast of the module would round its rotary frequencies too.
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        tokens, valid = padded(LENGTHS, attributes["vocab_size"])
        logits = torch_logits(model, tokens, valid)[valid]
        np.savez_compressed(folder / f"{name}.npz", tokens=tokens, valid=valid, logits=logits)


if __name__ == "__main__":
    make(pathlib.Path(__file__).parent)
