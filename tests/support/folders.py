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


SAFETENSORS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16"}
SAFETENSORS |= {"float16": "F16", "float32": "F32", "float64": "F64"}


def write_safetensors(file, tensors):
    """A safetensors file of arrays of any floating type, written by hand."""
    header, place = {}, 0
    for name, array in tensors.items():
        kind = SAFETENSORS[str(array.dtype)]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [place, place := place + array.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))
