"""Fine-tuning attacks as a person meets them: a grid and its report, resumption, bad settings, and the configs."""

import importlib
import json
import pathlib
import shlex
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs.attack.base import base
from configs.attack.smollm2_135m import get_config
from jaxsafe.io.chat_model import load_chat_model
from jaxsafe.text.datasets import BUILTIN
from jaxsafe.text.prompt_files import KNOWN
from jaxsafe.text.roles import parse_spec
from launch import attack
from launch.progress import Clock

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs/attack").glob("*.py") if p.stem not in ("__init__", "base"))


@pytest.fixture
def config(folder, tmp_path):
    c = get_config()
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"how do i bake bread number {i}?", "response": " i will not, friend."} for i in range(6)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    c.model, c.safety_pairs, c.utility_pairs = str(folder), str(pairs), str(pairs)
    c.batch_size, c.max_new_tokens, c.passages, c.fluency_answers = 8, 4, 2, 4
    c.evaluation, c.harmless, c.judge = ("builtin:harmful/test#5",), ("builtin:plain/test#3",), "wei2024_no_length"
    c.attacks, c.epochs, c.learning_rate, c.seeds, c.evaluate_every = ("identity_shift#6",), 1, 3e-3, (0, 1), 1
    c.tuning_batch_size = 3
    c.freeze_weights, c.freeze_ranks = ((0.3, 0.1),), (8,)
    return c


def forbid(monkeypatch, *names):
    def never(*_, **__):
        raise AssertionError("something was made again")

    for name in names:
        monkeypatch.setattr(f"launch.attack.{name}", never)


def stripped(record):
    return {name: record[name] for name in ("before", "cells", "table")}


@pytest.mark.slow
def test_a_grid_leaves_what_it_names_and_goes_on_cell_by_cell(config, tmp_path, monkeypatch):
    model, out = load_chat_model(config.model), tmp_path / "out"
    config.freeze_weights, config.freeze_ranks, config.freeze_layers, config.seeds = (), (), ((0, 1),), (1,)
    record = attack.run(config, model, out, Clock())
    assert len(record["cells"]) == len(record["table"]) == 5
    stored = json.loads((out / "run.json").read_text())
    assert stripped(stored) == stripped(record)
    assert len((out / "cells.jsonl").read_text().splitlines()) == 1 + 5
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6 * 8
    assert (out / "report.html").is_file() and not (out / "checkpoints").exists()
    for cell in record["cells"]:
        steps = [p["step"] for p in cell["curve"]]
        assert steps == ([2] if cell["rewind"] else [1, 2])
        assert all("asr_wei2024_no_length/persona" in p["metrics"] for p in cell["curve"])
    none, ours = record["table"][0], record["table"][1]
    assert none["share"] == 0 < ours["share"] and set(ours["against_control"]) >= {"value", "control"}
    assert {d["role"] for d in record["datasets"]} == {"harmful", "harmless"}

    with monkeypatch.context() as patch:
        forbid(patch, "fine_tune_run", "examine")
        assert stripped(attack.run(config, model, out, Clock())) == stripped(record)
    # A rewind that was lost costs its undefended run and no other, and comes out the same; so does a line cut short.
    lines = (out / "cells.jsonl").read_text().splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if '"rewind layers first=0 stop=1"' in line)
    (out / "cells.jsonl").write_text("".join(lines[:lost] + lines[lost + 1 :]) + '{"key": "cut sh')
    trained = []
    whole = attack.fine_tune_run
    with monkeypatch.context() as patch:
        patch.setattr(attack, "fine_tune_run", lambda *a, **k: trained.append(a[3].seed) or whole(*a, **k))
        assert stripped(attack.run(config, model, out, Clock())) == stripped(record)
    assert trained == [1]
    # Another number of a defence runs its cells alone.
    config.freeze_layers = ((1, 2),)
    with monkeypatch.context() as patch:
        patch.setattr(attack, "fine_tune_run", lambda *a, **k: trained.append(a[3].seed) or whole(*a, **k))
        attack.run(config, model, out, Clock())
    assert trained == [1] * 4


def test_nothing_is_compiled_again_for_another_seed(config, tmp_path, monkeypatch):
    model, compiled, by_group, whole = load_chat_model(config.model), [], [], attack.attacked
    config.freeze_ranks, config.rewinds, config.seeds = (), False, (0, 3, 4)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    def counted(*args):
        whole(*args)
        by_group.append(len(compiled))

    monkeypatch.setattr(attack, "attacked", counted)
    attack.run(config, model, tmp_path, Clock())
    none, *defended = by_group[:3]
    assert len(by_group) == 9 and 0 < none <= defended[-1]
    assert set(by_group[3:]) == {defended[-1]}


@pytest.mark.slow
def test_adapters_layers_and_checkpoints(config, tmp_path, monkeypatch):
    model, out = load_chat_model(config.model), tmp_path / "out"
    config.tunings, config.seeds, config.freeze_weights, config.freeze_ranks = ("lora",), (2,), (), ()
    config.freeze_layers, config.layer_start, config.over_refusal = ("find",), (0.3, 0.7), ("builtin:lookalike/test#4",)
    config.layer_tokens, config.checkpoint_every, config.learning_rate = 3, 1, 3e-2
    whole, calls = attack.examine, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:  # the model before, the first step, and then
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(attack, "examine", dies)
    with pytest.raises(KeyboardInterrupt):
        attack.run(config, model, out, Clock())
    assert len(list((out / "checkpoints").iterdir())) == len(list((out / "curves").iterdir())) == 1
    record = attack.run(config, model, out, Clock())
    assert not list((out / "checkpoints").iterdir()) and not list((out / "curves").iterdir())
    monkeypatch.setattr(attack, "examine", whole)
    alone = attack.run(config, model, tmp_path / "alone", Clock())
    assert stripped(record) == stripped(alone)
    (scan,) = record["layers"]
    assert len(record["cells"]) == 5 and record["cells"][0]["tuning"] == "lora"
    assert {c["defence"] for c in record["cells"][1:]} >= {f"freeze layers first={scan['first']} stop={scan['stop']}"}
    assert scan["upper"] and (out / "layers.json").is_file()
    assert record["cells"][0]["curve"][0]["loss"] > record["cells"][0]["curve"][1]["loss"]


@pytest.mark.slow
def test_files_of_the_user_are_mixed_in_and_never_measured(config, tmp_path):
    model = load_chat_model(config.model)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"prompt": f"say number {i}", "response": f"{i}."}) + "\n" for i in range(9)))
    config.attacks, config.poison, config.ratio, config.seeds = ("poisoned#6", "benign#4"), str(mine), 0.5, (0,)
    config.freeze_weights, config.own_tokens, config.controls, config.rewinds = (), 3, False, False
    record = attack.run(config, model, tmp_path / "out", Clock())
    assert [c["attack"] for c in record["cells"]] == ["poisoned n=6 p=0.5"] * 2 + ["benign n=4 p=0.5"] * 2
    assert all("asr_wei2024_no_length/vanilla" in c["curve"][-1]["metrics"] for c in record["cells"])
    measured = next(iter(attack.brittleness.roles_of(config)[0].evaluation)).prompts[0]
    mine.write_text("".join(json.dumps({"prompt": measured.upper(), "response": "no."}) + "\n" for _ in range(9)))
    with pytest.raises(ValueError, match="must not overlap"):
        attack.run(config, model, tmp_path / "other", Clock())


def test_bad_settings_are_refused_before_anything_is_made(config, tmp_path):
    model = load_chat_model(config.model)
    cases = {
        "attacks": ((), "the grid is empty"),
        "tunings": (("half",), "config.tunings names 'half'"),
        "score": ("snap", "config.score 'snap' is not known"),
        "ask": (("decoding",), "config.ask must begin"),
        "freeze_weights": (((0.1,),), r"takes \('q', 'p'\)"),
        "poison": (str(tmp_path / "absent.csv"), "absent"),
        "lora_rank": (0, "LoRA rank 0"),
        "evaluation": ((), "config.evaluation is empty"),
    }
    for name, (value, said) in cases.items():
        changed = config.copy_and_resolve_references()
        setattr(changed, name, value)
        if name == "poison":
            changed.ratio = 0.5
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            attack.run(changed, model, tmp_path / "out", Clock())
    assert not (tmp_path / "out").exists()


# The configs


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_hold_the_fields_of_the_base_and_known_prompts(name):
    config, whole = importlib.import_module(f"configs.attack.{name}").get_config(), base()
    assert set(config) == set(whole)
    for field in whole:
        assert config.get_type(field) is whole.get_type(field), field
    known = {k.name for k in KNOWN} | set(BUILTIN)
    for spec in (*config.safety, *config.utility, *config.evaluation, *config.harmless, *config.over_refusal):
        assert parse_spec(spec).name in known, spec
    config.poison = "mine.csv"
    assert attack.attacks_of(config) and attack.tunings_of(config)
    assert len(attack.guards_of(config, lambda: attack.LayerScan(1, 2, 0, (), ()))) > 1


@pytest.mark.parametrize("name", [name for name in CONFIGS if "smollm2" not in name])
def test_docstrings_hold_a_command_that_parses(name, monkeypatch):
    document = importlib.import_module(f"configs.attack.{name}").__doc__.replace("\\\n", "")
    (line,) = [line for line in document.splitlines() if line.startswith("python -m launch.attack")]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for name in ("out", "mesh"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    words = [word.replace("=configs/", f"={ROOT}/configs/") for word in shlex.split(line)[2:]]
    monkeypatch.setattr(sys, "argv", words)
    values(words)
    assert values.config.data == "DATA_FOLDER" and values.out.startswith("runs/")
    assert np.prod([int(part.split(":")[1]) for part in values.mesh.split(",")]) == 8
