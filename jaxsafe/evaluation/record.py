"""What a run writes down of itself: `run.json` and `samples.jsonl`."""

import datetime
import json
import math
import os
import pathlib
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import jax

import jaxsafe
from jaxsafe.evaluation.comparison import set_name
from jaxsafe.io.atomic import write_text
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.text.datasets import PromptSet

SCHEMA = 1


def environment() -> dict[str, Any]:
    """Versions, revision, date and devices."""
    device = jax.devices()[0]
    return {
        "schema": SCHEMA,
        "jaxsafe": jaxsafe.__version__,
        "jax": jax.__version__,
        "git": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
    }


def git_revision() -> str | None:
    """The commit of the source tree, with "+" where it has changes; None outside a repository."""
    folder = pathlib.Path(jaxsafe.__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A clone of something else around an installed copy says nothing about it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def model_record(model: ChatModel) -> dict[str, Any]:
    """Which model a run used."""
    return {
        "name": model.name,
        "sha256": model.config_sha256(),
        "fingerprint": model.fingerprint(),
        "dtype": model.config.dtype,
        "layers": model.config.layers,
    }


def data_record(prompts: PromptSet, role: str) -> dict[str, Any]:
    """Which prompts a run used, and for what."""
    return {
        "name": set_name(prompts),
        "sha256": prompts.sha256,
        "n": len(prompts),
        "split": prompts.split,
        "role": role,
    }


def plain(value: Any) -> Any:
    """`value` as JSON holds it: mappings, lists, and None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_run(folder: str | os.PathLike, run: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> None:
    """Writes `samples.jsonl`, then `run.json`, each whole or not at all."""
    out = pathlib.Path(folder)
    lines = "".join(json.dumps(plain(sample), ensure_ascii=False, allow_nan=False) + "\n" for sample in samples)
    write_text(out / "samples.jsonl", lines)
    write_text(out / "run.json", json.dumps(plain(run), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
