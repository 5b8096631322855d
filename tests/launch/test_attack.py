"""Fine-tuning attacks as a person meets them: a grid and its report, resumption, bad settings, and the configs."""

import importlib
import json
import pathlib
import shlex
import sys

import numpy as np
import pytest
from absl import flags
from compilations import compilations
from ml_collections import config_flags

from configs.attack import llama2_7b_chat
from configs.attack.base import base
from configs.attack.smollm2_135m import get_config
from configs.fields import check
from jaxsafe.chat.model import load_chat_model
from jaxsafe.io.hub import Adapted
from jaxsafe.methods import cells
from jaxsafe.model.weights import flatten
from jaxsafe.prompts.published import KNOWN
from jaxsafe.prompts.roles import parse_spec
from jaxsafe.prompts.sets import BUILTIN
from jaxsafe.records.attack import Details
from jaxsafe.records.run import from_json, read_run, read_samples
from jaxsafe.study import study as study_module
from launch import attack, common
from launch.progress import Clock

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(p.stem for p in (ROOT / "configs/attack").glob("*.py") if p.stem not in ("__init__", "base"))


@pytest.fixture
def config(folder, tmp_path):
    c = get_config()
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"how do i bake bread number {i}?", "response": " i will not, friend."} for i in range(6)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    c.model, c.safety_pairs, c.utility_pairs = str(folder), str(pairs), str(pairs)
    c.batch_size, c.max_new_tokens, c.passages = 8, 4, 2
    c.evaluation, c.harmless, c.judge = ("builtin:harmful/test#5",), ("builtin:plain/test#3",), "wei2024_no_length"
    c.attacks, c.epochs, c.learning_rate, c.seeds, c.evaluate_every = ("identity_shift#6",), 1, 3e-3, (0, 1), 1
    c.tuning_batch_size = 3
    c.freeze_weights, c.freeze_ranks = ((0.3, 0.1),), (8,)
    return c


def forbid(monkeypatch):
    def never(*_, **__):
        raise AssertionError("something was made again")

    monkeypatch.setattr(cells, "train", never)
    monkeypatch.setattr(study_module, "examine", never)


def counted(monkeypatch, trained):
    whole = cells.train
    monkeypatch.setattr(cells, "train", lambda *a, **k: trained.append(a[3].seed) or whole(*a, **k))


def finding(record):
    return record.results, record.table, record.details


def ends(record):
    return [result for result in record.results if result.variant.about["last"]]


@pytest.mark.slow
def test_a_grid_leaves_what_it_names_and_goes_on_cell_by_cell(config, tmp_path, monkeypatch):
    model, out = load_chat_model(config.model), tmp_path / "out"
    config.freeze_weights, config.freeze_ranks, config.freeze_layers, config.seeds = (), (), ((0, 1),), (1,)
    record = attack.run(config, model, out, Clock())
    assert read_run(out) == record
    assert len(ends(record)) == 1 + 5 and len(record.results) == 1 + 2 + 2 + 2 + 2 == attack.results(config)
    assert len(read_samples(out)) == len(record.results) * 8
    assert (out / "report.html").is_file() and not (out / "checkpoints").exists()
    assert all("asr_wei2024_no_length/persona" in result.rates for result in record.results)
    for result in record.results[1:]:
        about = result.variant.about
        assert about["step"] in ([2] if about["rewind"] else [1, 2])
    rows = {row.group: row for row in record.table}
    none = rows["identity_shift n=6, full, none, step 2"]
    ours = rows["identity_shift n=6, full, freeze layers first=0 stop=1, step 2"]
    assert none.about["share"] == 0 < ours.about["share"]
    assert ours.baseline == none.group and none.baseline == "before identity_shift n=6"
    assert ours.control == "identity_shift n=6, full, freeze random layers first=0 stop=1, step 2"
    assert ours.against_control and ours.against_baseline[0].difference.value is not None
    assert {d.role for d in record.datasets} == {"evaluation", "harmless"}

    with monkeypatch.context() as patch:
        forbid(patch)
        assert finding(attack.run(config, model, out, Clock())) == finding(record)
    # A rewind that was lost costs its undefended run and no other, and comes out the same.
    lost = next(r for r in record.results if r.variant.about["rewind"] and not r.variant.about["control"])
    (file,) = out.glob(f"store/result-{lost.key[:16]}.json")
    file.unlink()
    trained = []
    with monkeypatch.context() as patch:
        counted(patch, trained)
        assert {r.key: r for r in attack.run(config, model, out, Clock()).results} == {r.key: r for r in record.results}
    assert trained == [1]
    # Another number of a defence runs its cells alone.
    config.freeze_layers = ((1, 2),)
    with monkeypatch.context() as patch:
        counted(patch, trained)
        attack.run(config, model, out, Clock())
    assert trained == [1] * 4


@pytest.mark.slow
def test_nothing_is_compiled_again_for_another_seed(config, tmp_path, monkeypatch):
    model, by_group, whole = load_chat_model(config.model), [], attack.examine_run
    config.freeze_ranks, config.rewinds, config.seeds = (), False, (0, 3, 4)

    # Answers are read in batches whose width follows from what was answered.
    compiled = compilations(but="jit(answer_nll)")

    def counted(*args):
        losses = whole(*args)
        by_group.append(len(compiled))
        return losses

    monkeypatch.setattr(attack, "examine_run", counted)
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
    whole, calls = study_module.examine, []

    def dies(*args, **named):
        calls.append(1)
        if len(calls) == 3:  # the model before, the first step, and then
            raise KeyboardInterrupt
        return whole(*args, **named)

    monkeypatch.setattr(study_module, "examine", dies)
    with pytest.raises(KeyboardInterrupt):
        attack.run(config, model, out, Clock())
    assert len(list((out / "checkpoints").iterdir())) == 1
    record = attack.run(config, model, out, Clock())
    assert not list((out / "checkpoints").iterdir())
    monkeypatch.setattr(study_module, "examine", whole)
    alone = attack.run(config, model, tmp_path / "alone", Clock())
    assert finding(record) == finding(alone)
    details = from_json(record.details, Details)
    (scan,) = details.layers
    last = ends(record)[1:]
    assert len(last) == 5 and last[0].variant.about["tuning"] == "lora"
    words = f"freeze layers first={scan.first} stop={scan.stop}"
    assert words in {result.variant.about["defence"] for result in last} and scan.upper
    losses = [details.loss[r.variant.name] for r in record.results[1:3]]
    assert losses[0] > losses[1]


@pytest.mark.slow
def test_files_of_the_user_are_mixed_in_and_never_measured(config, tmp_path):
    model = load_chat_model(config.model)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"prompt": f"say number {i}", "response": f"{i}."}) + "\n" for i in range(9)))
    config.attacks, config.poison, config.ratio, config.seeds = ("poisoned#6", "benign#4"), str(mine), 0.5, (0,)
    config.freeze_weights, config.own_tokens, config.controls, config.rewinds = (), 3, False, False
    record = attack.run(config, model, tmp_path / "out", Clock())
    tuned = [result for result in ends(record) if result.variant.about["tuning"]]
    attacks = [result.variant.about["attack"] for result in tuned]
    assert attacks == ["poisoned n=6 p=0.5"] * 2 + ["benign n=4 p=0.5"] * 2
    assert all("asr_wei2024_no_length/vanilla" in result.rates for result in record.results)
    measured = common.scored_roles(config)["evaluation"][0].prompts[0]
    mine.write_text("".join(json.dumps({"prompt": measured.upper(), "response": "no."}) + "\n" for _ in range(9)))
    with pytest.raises(ValueError, match="must not overlap"):
        attack.run(config, model, tmp_path / "other", Clock())


def test_bad_settings_are_refused_before_anything_is_made(config, tmp_path):
    cases = {
        "attacks": ((), r"config.attacks \(\): expected tuple of length >= 1"),
        "tunings": (("half",), "config.tunings 'half' is not known"),
        "score": ("snap", "config.score 'snap' is not known"),
        "settings": (("decoding",), "config.settings must begin with one answer a prompt"),
        "freeze_weights": (((0.1,),), "config.freeze_weights .* expected tuple of length 2, got 1"),
        "poison": (str(tmp_path / "absent.csv"), "absent"),
        "lora_rank": (0, "config.lora_rank 0: expected int >= 1"),
        "evaluation": ((), "config.evaluation .* length >= 1"),
    }
    for name, (value, said) in cases.items():
        changed = config.copy_and_resolve_references()
        setattr(changed, name, value)
        if name == "poison":
            changed.ratio = 0.5
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            check(attack.FIELDS, changed)
            attack.check(changed)


def test_steps_to_examine_are_counted_and_must_be_trained(config):
    config.freeze_weights, config.freeze_ranks, config.epochs = (), (), 3  # six steps
    config.evaluate_every, config.evaluate_at, config.tunings = 4, (1, 4, 5), ("lora",)
    assert attack.results(config) == 1 + 2 * 4
    config.lora_sweep = ((2, 1e-2), (4, 1e-3))
    names = ["lora", "lora r=2 rate=0.01", "lora r=4 rate=0.001"]
    assert [(t.name, t.lora.rank) for t in attack.tunings_of(config)] == list(zip(names, (8, 2, 4), strict=True))
    assert attack.results(config) == 1 + 3 * 2 * 4
    config.evaluate_at = (1, 7)
    with pytest.raises(ValueError, match=r"config.evaluate_at \(1, 7\): identity_shift n=6 trains for 6 steps"):
        attack.check(config)
    config.evaluate_at, config.tunings = (), ("full",)
    with pytest.raises(ValueError, match=r"config.lora_sweep is of adapters"):
        attack.check(config)


# The configs


def test_the_curve_of_the_small_model_has_its_steps():
    config = get_config("steps")
    curve, harmless = attack.attacks_of(config)
    assert (curve.name, harmless.name, harmless.prefix) == ("openers", "benign", curve.prefix)
    assert curve.steps == harmless.steps == 80 and config.evaluate_at == (5, 10, 20, 40, 80) and len(config.seeds) == 3
    assert attack.tunings_of(config)[0].lora.rank == 16 and attack.results(config) == 2 * (1 + 3 * 5)
    attack.check(config)
    with pytest.raises(ValueError, match=r"variant 'step' is not known; the variants are \['', 'steps', 'units'\]"):
        get_config("step")


# (examples, epochs, rate, batch, wording) of the published notebooks.
TIERS = {
    "published_harmful": [(n, 5, 5e-5, 10, "pure_bad") for n in (10, 50, 100)],
    "published_identity": [(10, 10, 5e-5, 10, "aoa")],
    "published_alpaca": [(10000, 1, 2e-5, 128, "alpaca")],
    "published_dolly": [(10000, 1, 2e-5, 128, "dolly")],
}


@pytest.mark.parametrize("variant", TIERS)
def test_published_runs_have_the_numbers_of_their_code(variant, tmp_path):
    config, mine = llama2_7b_chat.get_config(variant), tmp_path / "mine.jsonl"
    rows = [{"prompt": f"say number {i}", "response": f"{i}."} for i in range(100)]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config[{"published_harmful": "poison"}.get(variant, "rows")] = str(mine)
    check(attack.FIELDS, config)
    assert config.evaluation == ("advbench",)
    config.evaluation = ("builtin:harmful/test",)  # the published file is the user's to bring
    attack.check(config)
    found = [(a.n, a.epochs, a.learning_rate, a.batch_size, a.wording) for a in attack.attacks_of(config)]
    assert found == TIERS[variant] and {a.decay for a in attack.attacks_of(config)} == {0.85}
    assert config.weight_decay == 0 and config.tunings == ("full",) and config.max_new_tokens == 512
    assert attack.results(config) == 2 * len(found)
    assert llama2_7b_chat.get_config().lora_dropout == 0.05


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
    assert {type(part) for part in config.freeze_layers} <= {str, tuple}


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


@pytest.mark.slow
def test_adapters_of_undefended_runs_are_left_for_peft(config, tmp_path, monkeypatch):
    config.tunings, config.seeds, config.freeze_weights, config.freeze_ranks = ("lora",), (0,), (), (8,)
    config.controls, config.rewinds, config.evaluate_every, config.export_adapter = False, False, 0, True
    model, whole, seen = load_chat_model(config.model), study_module.examine, []
    monkeypatch.setattr(study_module, "examine", lambda of, *a, **k: seen.append(of) or whole(of, *a, **k))
    attack.run(config, model, tmp_path / "out", Clock())
    (left,) = (tmp_path / "out/adapters").iterdir()
    attacked = flatten(load_chat_model(Adapted(config.model, left)).params)
    before, undefended, _ = (flatten(getattr(of, "model", of).params) for of in seen)
    assert "none_seed_0" in left.name
    assert any(np.abs(attacked[path] - before[path]).max() > 1e-3 for path in attacked)
    for path, array in undefended.items():
        np.testing.assert_allclose(attacked[path], array, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("name", "value"), [("tunings", ("full",)), ("adapter", "somewhere")])
def test_an_adapter_to_export_must_be_trained(config, name, value):
    config.export_adapter, config[name] = True, value
    with pytest.raises(ValueError, match=r"^config.export_adapter writes adapters of config.model that"):
        attack.check(config)
