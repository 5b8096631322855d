"""Hugging Face folders: read (`config.json`, one or many safetensors files) and written."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from jaxsafe.io.atomic import new_folder, write_text
from jaxsafe.io.gguf import GgufFile, open_gguf
from jaxsafe.io.layout import Table, as_stored, file_tensors
from jaxsafe.io.shards import SafetensorsFolder
from jaxsafe.io.tensors import load_params
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.families import config_from_hf, config_to_hf
from jaxsafe.model.weights import flatten, shapes
from jaxsafe.parallel import fetch
from jaxsafe.reading import read_json

SHARD_BYTES = 4 * 2**30
# What belongs to a model besides its weights and travels with it on export.
COMPANIONS = """
    config.json generation_config.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json merges.txt
    special_tokens_map.json added_tokens.json chat_template.jinja
""".split()
DTYPE = ("dtype", "torch_dtype")
"""The names under which transformers 5 and 4 write the dtype of the weights."""


def read_config(folder: str | os.PathLike, dtype: str | None = None) -> ModelConfig:
    """The `ModelConfig` of `folder/config.json`, or of `folder` where that is itself such a file.

    `dtype` None keeps the checkpoint's (float16 becomes float32). Raises FileNotFoundError and ValueError, naming the
    file and the attribute.
    """
    path = pathlib.Path(folder)
    if path.suffix == ".json" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a config.json or the folder of one")
    else:
        path /= "config.json"
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{folder} is an adapter (LoRA), no model; give the folder of its base")
        raise FileNotFoundError(f"no config.json in {folder}; a Hugging Face model folder has one")
    attributes = read_json(path)
    try:
        return config_from_hf(attributes, dtype or _stored_dtype(attributes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _stored_dtype(attributes: Mapping[str, Any]) -> str:
    inner = attributes.get("text_config")
    places = (attributes, inner if isinstance(inner, dict) else {})
    said = [place.get(name) for place in places for name in DTYPE]
    return "bfloat16" if next(filter(None, said), None) == "bfloat16" else "float32"


def open_folder(folder: str | os.PathLike, dtype: str | None = None) -> tuple[ModelConfig, Table]:
    """The configuration and the tensors of a model folder. Raises as `read_config` and `SafetensorsFolder` do."""
    config = read_config(folder, dtype)
    source = SafetensorsFolder(folder)
    config = as_stored(config, Table(config, source))
    return config, Table(config, source)


def save_hf(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    like: str | os.PathLike | GgufFile | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Writes `params` as a Hugging Face folder that `transformers` loads with the same logits.

    `like` is the folder that the model came from: its configuration and tokenizer are copied unchanged, but for what
    `config` says otherwise: another dtype, a head that is tied no longer, a text model out of a model with images. It
    may be a GGUF file, opened or not: what that says of configuration and tokenizer is written in the way of such a
    folder.
    Without it a `config.json` is written from `config`. `card` becomes README.md. Weights are split into
    files of at most `shard_bytes`. The folder appears whole or not at all; one that exists and holds
    anything but an earlier export is refused with FileExistsError. Raises ValueError for a parameter that is
    missing, unknown or of another shape than `config` asks.

    Of several processes, all of which must call it, the first one writes; a tensor at a time is put together.
    """
    _check_shapes(config, params)
    if jax.process_index() > 0:
        for _ in _shards(config, params, shard_bytes):
            pass  # the parts that this process holds go to the first one
        multihost_utils.sync_global_devices("save_hf")
        return pathlib.Path(folder)
    with new_folder(folder, _exported) as out:
        if like is not None:
            _bring_companions(out, like)
        _write_config(out / "config.json", config)
        if card is not None:
            write_text(out / "README.md", card)
        _save_tensors(out, config, params, shard_bytes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")
    return pathlib.Path(folder)


def gguf_to_hf(path: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None) -> pathlib.Path:
    """Writes the GGUF file `path` as a Hugging Face folder: config.json, tokenizer and safetensors.

    `dtype` is as in `GgufFile.config`. The folder appears whole or not at all. Raises as `GgufFile` and `save_hf` do.
    """
    source = GgufFile(path)
    config, tensors = open_gguf(source, dtype)
    return save_hf(folder, config, load_params(config, tensors), like=source)


def _bring_companions(out: pathlib.Path, like: str | os.PathLike | GgufFile) -> None:
    """Puts into `out` what belongs to the model of `like`, a folder or a GGUF file, besides the weights."""
    if not isinstance(like, GgufFile) and not pathlib.Path(like).is_file():
        for name in COMPANIONS:
            if (file := pathlib.Path(like, name)).is_file():
                shutil.copyfile(file, out / name)
        return
    source = like if isinstance(like, GgufFile) else GgufFile(like)
    attributes = source.attributes()
    source.tokenizer().save_pretrained(str(out))
    described = read_json(out / "tokenizer_config.json")
    described["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that both transformers 4 and 5 know
    ends = {"bos_token_id": attributes["bos_token_id"], "eos_token_id": list(source.ends)}
    contents = {"tokenizer_config.json": described, "config.json": attributes, "generation_config.json": ends}
    for name, content in contents.items():
        write_text(out / name, json.dumps(content, indent=2) + "\n")


def _write_config(file: pathlib.Path, config: ModelConfig) -> None:
    """Makes `file`, which may be that of the model's source, say what `config` does."""
    attributes = config_to_hf(config)
    if file.is_file():
        source = read_json(file)
        before = config_from_hf(source, config.dtype)
        if source["model_type"] == config.family:
            changes: dict[str, Any] = {} if before.tied == config.tied else {"tie_word_embeddings": config.tied}
            named = [name for name in DTYPE if source.get(name)]
            if any(source[name] != config.dtype for name in named) or (not named and config.dtype != "float32"):
                changes |= dict.fromkeys(named or DTYPE[1:], config.dtype)
            if not changes:
                return
            attributes = source | changes
        else:
            attributes |= {key: value for key, value in source.items() if key.endswith("_token_id")}
    write_text(file, json.dumps(attributes, indent=2) + "\n")


def _exported(name: str) -> bool:
    weights = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in COMPANIONS or name == "README.md"


def _check_shapes(config: ModelConfig, params: Mapping[str, Any]) -> None:
    expected, found = ({k: tuple(v.shape) for k, v in flatten(t).items()} for t in (shapes(config), params))
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            want, got = expected.get(path, "no such parameter"), found.get(path, "absent")
            raise ValueError(f"parameter {path!r} is {got}; the config asks {want}")


def _save_tensors(out: pathlib.Path, config: ModelConfig, params: Mapping[str, Any], shard_bytes: int) -> None:
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    count = max(1, -(-total // shard_bytes))
    index, size = {}, 0
    for number, shard in enumerate(_shards(config, params, shard_bytes), start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        size += sum(a.nbytes for a in shard.values())
    if count > 1:
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        write_text(out / "model.safetensors.index.json", text + "\n")


def _shards(config: ModelConfig, params: Mapping[str, Any], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in file_tensors(config, params):
        # safetensors stores the buffer of a transposed array as if it were contiguous.
        stored = np.ascontiguousarray(fetch(array))
        if shard and size + stored.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = stored
        size += stored.nbytes
    yield shard
