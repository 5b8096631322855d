"""The same launchers run on a tiny model of every family."""

import json
import shutil

import pytest
from families import FAMILY_MODELS
from launches import attack, brittleness, finished, scans, started, write_pairs
from tiny import tiny_params

from jaxsafe.io.hf import save_hf
from jaxsafe.model.families import config_from_hf

ONE_EACH = {attributes["model_type"]: name for name, attributes in FAMILY_MODELS.items()}


# A random model may refuse everything, on which nothing can be calibrated.
GIVEN = [f"--config.{name}={value}" for name, value in {"layers": (0, 2), "scored": (0, 3), "threshold": 0.5}.items()]
GIVEN += ["--config.alpha=0.5", "--config.calibration=()"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_EACH.values(), ids=ONE_EACH)
def test_every_launcher_runs(name, folder, tmp_path):
    attributes = FAMILY_MODELS[name] | {"vocab_size": 300, "max_position_embeddings": 600}
    if name == "phi3":
        attributes["original_max_position_embeddings"] = 600
    config = config_from_hf(attributes)
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(folder, tokenizer, ignore=shutil.ignore_patterns("config.json", "model*"))
    model = save_hf(tmp_path / "model", config, tiny_params(config), like=tokenizer)
    pairs = str(write_pairs(tmp_path / "pairs.jsonl"))
    for task, command in {
        "scans": [*scans(model), *GIVEN],
        "brittleness": brittleness(model, pairs),
        "attack": attack(model, pairs),
    }.items():
        out = tmp_path / task
        finished(started([*command, f"--out={out}"]))
        assert json.loads((out / "run.json").read_text())["task"] == task
