"""A tiny model of every family goes through a launcher, and every launcher is gone through by several families."""

import itertools
import json
import shutil

import pytest
from families import FAMILY_MODELS
from launches import brittleness, finished, scans, short_attack, started, write_pairs
from tiny import tiny_params

from jaxsafe.io.hf import save_hf
from jaxsafe.model.families import config_from_hf

ONE_EACH = {attributes["model_type"]: name for name, attributes in FAMILY_MODELS.items()}


# A random model may refuse everything, on which nothing can be calibrated.
GIVEN = [f"--config.{name}={value}" for name, value in {"layers": (0, 2), "scored": (0, 3), "threshold": 0.5}.items()]
GIVEN += ["--config.alpha=0.5", "--config.calibration=()"]


TASKS = {
    "scans": lambda model, pairs: [*scans(model), *GIVEN],
    "brittleness": brittleness,
    "attack": short_attack,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    zip(ONE_EACH.values(), itertools.cycle(TASKS)),
    ids=map("-".join, zip(ONE_EACH, itertools.cycle(TASKS))),
)
def test_a_launcher_runs(name, task, folder, tmp_path):
    attributes = FAMILY_MODELS[name] | {"vocab_size": 300, "max_position_embeddings": 600}
    if name == "phi3":
        attributes["original_max_position_embeddings"] = 600
    config = config_from_hf(attributes)
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(folder, tokenizer, ignore=shutil.ignore_patterns("config.json", "model*"))
    model = save_hf(tmp_path / "model", config, tiny_params(config), like=tokenizer)
    command = TASKS[task](model, str(write_pairs(tmp_path / "pairs.jsonl")))
    finished(started([*command, f"--out={tmp_path / task}"]))
    assert json.loads((tmp_path / task / "run.json").read_text())["task"] == task
