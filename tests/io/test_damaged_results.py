"""Files of results, adapters and prompts as accidents leave them: they are read, or named in one line."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import runs
from mutations import bytes_mutated, json_bytes, json_mutated, read_or_named, try_seed
from safetensors.numpy import save_file
from tiny import tiny_config, tiny_params

from jaxsafe.io.masks import load_mask, save_mask
from jaxsafe.io.peft import read_adapter
from jaxsafe.io.vectors import load_vectors, save_control_vector, save_steering
from jaxsafe.kernels.steering import Steering
from jaxsafe.model.weights import flatten, linear_maps, nest
from jaxsafe.prompts.sets import load_file
from jaxsafe.records.run import read_run, read_samples

SHORT = 100
"""Changes of each file that are tried in a usual run."""
MORE = 520
"""And in a slow one; a seed changes 15 things, and the three files of damages make ten thousand changes."""
KINDS = [("cut", "safe"), ("burn", "harmful")] * 4
ROWS = [{"prompt": f"How do I {verb} it?", "label": label} for verb, label in KINDS]


CONFIG = tiny_config(layers=2, embed=5, mlp=7, heads=3, kv_heads=1, head_dim=2)


def mask():
    """A mask of every linear map."""
    weights = flatten(tiny_params(CONFIG))
    return nest({path: np.asarray(weights[path]) > 0 for path in linear_maps(CONFIG)})


def steering() -> Steering:
    rng = np.random.default_rng(0)
    directions, reference = rng.standard_normal((2, CONFIG.layers, CONFIG.embed)).astype(np.float32)
    scored, strength = np.ones(CONFIG.layers, np.float32), np.array([0, 2.5], np.float32)
    return Steering(directions, reference, scored, np.float32(0.4), strength, np.array([5, 9], np.int32))


READERS = {
    "run.json": lambda file: read_run(file.parent),
    "samples.jsonl": lambda file: read_samples(file.parent),
    "mask.safetensors": lambda file: load_mask(file, CONFIG),
    "vectors.safetensors": lambda file: load_vectors(file, CONFIG),
    "vector.gguf": lambda file: load_vectors(file, CONFIG, affirmative=[1]),
    "adapter_config.json": lambda file: read_adapter(file.parent),
    "adapter_model.safetensors": lambda file: read_adapter(file.parent),
} | dict.fromkeys(["p.csv", "p.json", "p.jsonl", "p.txt", "p.parquet"], load_file)
JSON = ["run.json", "adapter_config.json", "p.json"]


@pytest.fixture
def folder(tmp_path):
    """A folder with one file of every kind."""
    runs.save(tmp_path, next(iter(runs.RUNS.values()))(), next(iter(runs.SAMPLES.values()))())
    save_mask(tmp_path / "mask.safetensors", CONFIG, mask(), {"q": 0.05})
    save_steering(tmp_path / "vectors.safetensors", steering(), {"model": "tiny"})
    save_control_vector(tmp_path / "vector.gguf", steering(), "llama")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    factors = {"A": np.ones((2, 5), np.float32), "B": np.ones((6, 2), np.float32)}
    named = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{k}.weight": a for k, a in factors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    (tmp_path / "p.csv").write_text("prompt,label\n" + "".join(f'"{r["prompt"]}",{r["label"]}\n' for r in ROWS))
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "p.txt").write_text("".join(row["prompt"] + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    return tmp_path


def tried(folder, name, content, said):
    """Whether the file `name` is read with this `content`; where it is not, one line names it."""
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        return read_or_named(READERS[name], file, folder, said)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(folder, name):
    READERS[name](folder / name)


@pytest.mark.parametrize("name", READERS)
def test_changed_bytes_are_read_or_named(folder, name):
    data = (folder / name).read_bytes()
    read = [tried(folder, name, bytes_mutated(data, seed), f"{name}, bytes {seed}") for seed in range(SHORT)]
    assert False in read and True in read


@pytest.mark.parametrize("name", JSON)
def test_changed_values_are_read_or_named(folder, name):
    content = json.loads((folder / name).read_text())
    changed = (json_bytes(json_mutated(content, seed)) for seed in range(SHORT))
    read = [tried(folder, name, data, f"{name}, values {seed}") for seed, data in enumerate(changed)]
    assert False in read and True in read


@pytest.mark.slow
def test_many_more_changes_are_read_or_named(folder):
    for seed in range(SHORT, SHORT + MORE):
        try_seed(folder, READERS, JSON, tried, seed)
