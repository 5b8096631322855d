"""Hugging Face folders of random decoders."""

import json

import ml_dtypes
import numpy as np
from decoders import hf_weights
from safetensors.numpy import save_file

from jaxsafe.model.families import config_to_hf

# Spelling and extras that no `config_to_hf` would write.
EXTRAS = {"_name_or_path": "somewhere/else", "eos_token_id": [2, 5], "use_cache": False}


def stored(config, seed=0):
    """The tensors of a checkpoint, by name, in the type in which they are stored."""
    dtype = ml_dtypes.bfloat16 if config.dtype == "bfloat16" else np.float32
    return {name: array.astype(dtype) for name, array in hf_weights(config, seed).items()}


def write_folder(folder, config, tensors=None, **attributes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | EXTRAS | attributes, indent=4))
    save_file(tensors or stored(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
