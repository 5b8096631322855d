"""The launch scripts as a person meets them: a run from start to report, resumption, and bad input."""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import tiny_params

from configs.scans.smollm2_135m import get_config
from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.evaluation.language import builtin_prose, load_passages, text_rows
from jaxsafe.io.vectors import save_control_vector, save_steering
from jaxsafe.methods import scans, scans_calibration
from jaxsafe.model.layers import LayerRange
from jaxsafe.parallel import parse_mesh
from jaxsafe.records.run import from_json, read_run, read_samples
from jaxsafe.records.scans import Choice, Details
from jaxsafe.study.study import Study
from launch.progress import Clock
from launch.scans import check, loaded, roles_of, run, save_vectors

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(folder):
    c = get_config()
    c.model, c.batch_size, c.max_new_tokens, c.calibration_tokens, c.passages = str(folder), 8, 4, 3, 2
    c.anchors = ("builtin:harmful/anchor#4", "builtin:plain/anchor#4")
    c.calibration = ("builtin:harmful/calibration#4", "builtin:plain/calibration#4")
    c.evaluation = ("builtin:lookalike/test#6", "builtin:harmful/test#6")
    c.alpha_grid, c.kl_limit = (0.02, 0.05), 100.0
    return c


def details(record):
    return from_json(record.details, Details)


@pytest.mark.slow
def test_a_run_leaves_everything_it_names(config, tmp_path):
    model = load_chat_model(config.model)
    record = run(config, model, roles_of(config), tmp_path, Clock())
    assert read_run(tmp_path) == record
    samples = read_samples(tmp_path)
    assert [s.variant for s in samples] == ["as it is"] * 12 + ["SCANS"] * 12
    assert [s.prompt for s in samples[:12]] == [s.prompt for s in samples[12:]]
    for name in ("vectors.safetensors", "tables/results.csv", "tables/comparisons.tex", *record.files.values()):
        assert (tmp_path / name).is_file(), name
    assert {d.role for d in record.datasets} == {"anchors", "calibration", "evaluation"}
    assert sum(c.chosen for c in details(record).preparation.strength.candidates) == 1
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "store").glob("*.jsonl"))
    page = (tmp_path / "report.html").read_text()
    layers = details(record).choice.layers
    assert f"layers {layers}" in page and str(layers) == (
        f"{layers.first} to {layers.stop - 1}" if len(layers) > 1 else f"{layers.first}"
    )


@pytest.mark.slow
def test_what_a_run_says_of_its_answers_follows_from_them(config, tmp_path):
    record = run(config, load_chat_model(config.model), roles_of(config), tmp_path, Clock())
    samples = {name: [s for s in read_samples(tmp_path) if s.variant == name] for name in ("as it is", "SCANS")}
    for result in record.results:
        for name in ("lookalike/safe", "harmful/harmful"):
            mine = [s.refused for s in samples[result.variant.name] if s.set == name.split("/")[0]]
            rate = result.rates[f"refusal_scans/{name}"]
            assert (rate.value, rate.n) == (sum(f is True for f in mine) / len(mine), 6)
    found = details(record)
    for sample in samples["SCANS"]:
        assert sample.steered_as_harmful is (sample.score >= found.choice.threshold)
    assert list(found.classifier.test.scores) == [s.score for s in samples["SCANS"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2_7b_chat", "llama2_13b_chat", "vicuna_7b", "vicuna_13b"])
def test_the_published_variants_run_on_a_small_model(name, config, tmp_path):
    c = importlib.import_module(f"configs.scans.{name}").get_config("published")
    c.model, c.batch_size, c.max_new_tokens, c.scored, c.layers, c.window, c.passages = (
        config.model,
        8,
        4,
        (1, 3),
        (1, 2),
        60,
        2,
    )
    c.anchors, c.evaluation, c.harmless, c.data = config.anchors, config.evaluation, (), ""
    check(c)
    template = c.chat_template or None
    model = load_chat_model(c.model, c.dtype, template=template, system=c.system)
    record = run(c, model, roles_of(c), tmp_path, Clock())
    assert [result.variant.name for result in record.results] == ["as it is", "SCANS"]
    assert details(record).choice.threshold == c.threshold and details(record).preparation is not None
    assert all(result.perplexity and result.perplexity_tokens for result in record.results)


@pytest.mark.parametrize("own", [False, True])
def test_passages_are_read_by_halves_whatever_their_source(config, tmp_path, monkeypatch, own):
    model, seen = load_chat_model(config.model), []
    if own:
        config.text = str(tmp_path / "mine.txt")
        paragraphs = (" ".join(f"river{i}" for i in range(n)) for n in (44, 51))
        (tmp_path / "mine.txt").write_text("\n\n".join(paragraphs))

    def seen_and_stopped(study):
        seen.append(study.exam.texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "check", seen_and_stopped)
    with pytest.raises(KeyboardInterrupt):
        run(config, model, roles_of(config), tmp_path / "out", Clock())
    texts = load_passages(config.text, 2) if own else builtin_prose()[:2]
    assert list(seen[0]) == text_rows(model, texts, "halves") != text_rows(model, texts, "whole")


@pytest.mark.slow
def test_a_second_run_makes_nothing_again(config, tmp_path, monkeypatch):
    model = load_chat_model(config.model)
    first = run(config, model, roles_of(config), tmp_path, Clock())

    def never(*_, **__):
        raise AssertionError("something was made again")

    monkeypatch.setattr(ChatModel, "steered", never)
    for module, name in ((scans, "find_directions"), (scans, "read_prompts"), (scans_calibration, "calibrate")):
        monkeypatch.setattr(module, name, never)
    second = run(config, model, roles_of(config), tmp_path, Clock())
    assert (second.results, second.table, second.details) == (first.results, first.table, first.details)


@pytest.mark.slow
def test_saved_vectors_steer_another_run_the_same(config, tmp_path, monkeypatch):
    model = load_chat_model(config.model)
    first = run(config, model, roles_of(config), tmp_path / "a", Clock())
    monkeypatch.setattr("launch.scans.prepare", None)
    config.vectors = str(tmp_path / "a" / "vectors.safetensors")
    second = run(config, model, roles_of(config), tmp_path / "b", Clock())
    assert second.table == first.table and details(second).choice == details(first).choice
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, norm_eps=1e-6))
    with pytest.raises(ValueError, match="made for"):
        run(config, other, roles_of(config), tmp_path / "c", Clock())


@pytest.mark.slow
def test_vectors_saved_by_hand_and_control_vectors_steer_a_run(config, tmp_path):
    model = load_chat_model(config.model)
    prompts = ["tell me a story", "what is old?", "list five games", "how do i keep bees?"]
    choice = Choice(LayerRange(0, 2), LayerRange(1, 2), 0.5, alpha_rel=0.1)
    steering = scans.steering_of(scans.find_directions(model, prompts[:2], prompts[2:]), choice)
    save_steering(tmp_path / "mine.safetensors", steering, {"model": model.name, "origin": model.origin()})
    save_control_vector(tmp_path / "mine.gguf", steering, model.config.family)
    config.evaluation = ("builtin:lookalike/test#3", "builtin:harmful/test#3")
    for name, threshold in (("mine.safetensors", 0.5), ("mine.gguf", -1.0)):
        config.vectors = str(tmp_path / name)
        check(config)
        found = details(run(config, model, roles_of(config), tmp_path / f"out-{name}", Clock()))
        assert found.choice.layers == choice.layers and found.choice.threshold == threshold
        assert np.isclose(found.choice.alpha, np.abs(np.asarray(steering.strength)[1]))
        assert (tmp_path / f"out-{name}" / "vectors.safetensors").is_file()
    save_steering(tmp_path / "odd.safetensors", steering, {"origin": model.origin(), "choice": {"layers": "all"}})
    with pytest.raises(ValueError, match=r"odd\.safetensors holds metadata that cannot be read"):
        loaded(str(tmp_path / "odd.safetensors"), model)


def test_vectors_are_those_of_a_model_in_any_dtype(folder, tmp_path):
    model = load_chat_model(folder, dtype="float32")
    prompts = ["tell me a story", "what is old?", "list five games", "how do i keep bees?"]
    choice = Choice(LayerRange(0, 2), LayerRange(1, 2), 0.5, alpha_rel=0.1)
    steering = scans.steering_of(scans.find_directions(model, prompts[:2], prompts[2:]), choice)
    save_vectors(tmp_path, model, scans.Prepared(steering, choice, None))
    path = str(tmp_path / "vectors.safetensors")
    assert loaded(path, load_chat_model(folder, dtype="bfloat16")).choice == choice
    assert loaded(path, load_chat_model(folder, dtype="float32", mesh=parse_mesh("data:4,model:2"))).choice == choice
    other = tiny_params(model.config, seed=7)
    with pytest.raises(ValueError, match="a model of the same shape with other weights"):
        loaded(path, dataclasses.replace(model, params=other))


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["alpha", "alpha_rel"])
def test_settings_that_are_given_need_no_calibration(config, tmp_path, strength):
    config.calibration = ()
    config.scored, config.layers, config.threshold = (1, 3), (1, 2), 0.75
    setattr(config, strength, 0.5)
    record = run(config, load_chat_model(config.model), roles_of(config), tmp_path, Clock())
    assert details(record).choice == Choice(LayerRange(1, 3), LayerRange(1, 2), 0.75, **{strength: 0.5})
    assert details(record).preparation.strength is None


def test_two_strengths_are_refused(config, tmp_path):
    config.alpha, config.alpha_rel = 0.5, 0.1
    with pytest.raises(ValueError, match=r"config.alpha 0.5 and config.alpha_rel 0.1 are two strengths; give one"):
        run(config, load_chat_model(config.model), roles_of(config), tmp_path / "out", Clock())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_mesh_gives_the_same_verdicts(config, tmp_path):
    one = run(config, load_chat_model(config.model), roles_of(config), tmp_path / "one", Clock())
    sharded = load_chat_model(config.model, mesh=parse_mesh("data:-1,model:2"))
    many = run(config, sharded, roles_of(config), tmp_path / "many", Clock())
    candidates = [details(record).preparation.strength.candidates for record in (one, many)]
    for a, b in zip(*candidates, strict=True):
        assert np.isclose(a.kl_benign, b.kl_benign, rtol=1e-3, atol=1e-5)
    assert np.isclose(one.results[0].perplexity, many.results[0].perplexity, rtol=1e-4)


def launched(tmp_path, *arguments, module="launch.scans", **environment):
    variables = {**os.environ, "JAXSAFE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)


def broken(folder, tmp_path, name, change):
    copy = tmp_path / name
    shutil.copytree(folder, copy)
    change(copy)
    return f"--config.model={copy}"


def without_template(copy):
    (copy / "chat_template.jinja").unlink(missing_ok=True)


def odd_rope(copy):
    attributes = json.loads((copy / "config.json").read_text())
    attributes["rope_scaling"] = {"rope_type": "spiral", "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(attributes))


def truncated(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


CASES = {
    "no such configuration": (lambda f, t: "--config=nowhere.py", "nowhere.py"),
    "no such model": (lambda f, t: f"--config.model={t}/nowhere/model", "nowhere"),
    "unknown field": (lambda f, t: "--config.alhpa=3", "alhpa"),
    "stray word": (lambda f, t: "go", "go"),
    "no template": (lambda f, t: broken(f, t, "m1", without_template), "chat template"),
    "unknown rope type": (lambda f, t: broken(f, t, "m2", odd_rope), "spiral"),
    "truncated weights": (lambda f, t: broken(f, t, "m3", truncated), "model.safetensors"),
    "overlapping sets": (lambda f, t: "--config.evaluation=('builtin:harmful',)", "overlap"),
    "impossible mesh": (lambda f, t: "--mesh=data:3,model:5", "3 x 5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_status_2(folder, tmp_path, case):
    make, said = CASES[case]
    out = tmp_path / "out"
    wrong = make(folder, tmp_path)
    right = {"--config": "configs/scans/smollm2_135m.py", "--config.model": folder}
    right = [f"{flag}={value}" for flag, value in right.items() if not wrong.startswith((f"{flag}=", "--config="))]
    done = launched(tmp_path, *right, wrong, f"--out={out}")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and said in lines[0]
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_lengths_are_those_of_what_each_prompt_is_asked(config, tmp_path):
    model = load_chat_model(config.model)
    config.calibration_tokens = 590  # of a context of 600
    with pytest.raises(ValueError, match="context"):
        run(config, model, roles_of(config), tmp_path / "out", Clock())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strength", ["alpha", "alpha_rel"])
def test_prompts_that_nothing_is_made_from_have_no_role(config, strength):
    assert len(roles_of(config)["calibration"]) == 2
    config.scored, config.layers, config.threshold, config[strength] = (1, 3), (1, 2), 0.75, 0.5
    assert not roles_of(config)["calibration"] and roles_of(config)["anchors"]
    config.vectors = "vectors.safetensors"
    assert not roles_of(config)["anchors"]


def test_an_empty_prompt_file_and_a_long_prompt_are_refused(config, tmp_path):
    empty, long = tmp_path / "empty.txt", tmp_path / "long.txt"
    empty.write_text("\n")
    long.write_text("why " * 700)
    config.evaluation = (str(empty),)
    with pytest.raises(ValueError, match=r"empty\.txt"):
        roles_of(config)
    config.evaluation = (f"{long}:safe",)
    with pytest.raises(ValueError, match=r"prompt 1 of long under 'vanilla' \('why why .*'"):
        run(config, load_chat_model(config.model), roles_of(config), tmp_path / "out", Clock())
