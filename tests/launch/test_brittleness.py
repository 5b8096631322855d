"""The brittleness run, from pairs to report and export."""

import csv
import importlib

import numpy as np
import pytest
from tiny import PROMPTS

from configs.brittleness.smollm2_135m import get_config
from jaxsafe.chat.model import load_chat_model
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.io.masks import load_mask
from jaxsafe.io.store import Store
from jaxsafe.methods.attribution_data import OwnAnswers, own_answers
from jaxsafe.model.weights import flatten
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.brittleness import Details
from jaxsafe.records.run import Scored, from_json, read_run, read_samples
from jaxsafe.study import study as study_module
from launch import common
from launch.brittleness import results, run
from launch.progress import Clock


@pytest.fixture
def config(folder, tmp_path):
    c = get_config()
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="") as file:
        lines = csv.DictWriter(file, ("prompt", "response"))
        lines.writeheader()
        lines.writerows({"prompt": p, "response": " i will not, friend."} for p in PROMPTS)
    c.model, c.safety_pairs, c.utility_pairs = str(folder), str(pairs), str(pairs)
    c.batch_size, c.max_new_tokens, c.passages = 8, 4, 2
    c.evaluation, c.harmless, c.judge = ("builtin:harmful/test#5",), ("builtin:plain/test#4",), "wei2024"
    c.set_difference, c.orthogonal, c.top, c.similarity_rank = ((0.05, 0.01),), ((16, 16),), (0.1,), 4
    c.data = ""
    return c


@pytest.mark.slow
def test_a_run_leaves_everything_it_names_and_a_second_makes_nothing_again(config, tmp_path, monkeypatch):
    model = load_chat_model(config.model)
    out = tmp_path / "out"
    config.export = "set difference q=0.05 p=0.01"
    record = run(config, model, out, Clock())
    names = [result.variant.name for result in record.results]
    assert names[0] == "dense" and len(names) == 7 == results(config)
    assert record.row(names[1]).control == f"random for {names[1]}" and record.row(names[1]).baseline == "dense"
    assert read_run(out) == record and len(read_samples(out)) == 7 * 9
    for name in ("report.html", "mask.safetensors", "export/model.safetensors", "tables/comparisons.csv"):
        assert (out / name).is_file()
    mask, meta = load_mask(out / "mask.safetensors", model.config)
    assert meta["point"] == config.export
    exported = load_chat_model(out / "export")
    for path, where in flatten(mask).items():
        assert (np.asarray(flatten(exported.params)[path])[np.asarray(where)] == 0).all()
    found = from_json(record.details, Details)
    assert found.overlap and found.similarity and found.energy.ranks[-1] == 32
    assert found.scored == {"safety": len(PROMPTS), "utility": len(PROMPTS)}
    sparsity = record.results[1].variant.about["sparsity"]
    assert 0 < sparsity < 0.05 and record.results[2].variant.about["sparsity"] == pytest.approx(sparsity)

    def never(*_, **__):
        raise AssertionError("a point was made again")

    monkeypatch.setattr(study_module, "examine", never)
    config.export = ""
    again = run(config, model, out, Clock())
    assert (again.results, again.table, again.details) == (record.results, record.table, record.details)
    config.seed = 1
    with pytest.raises(AssertionError, match="made again"):
        run(config, model, out, Clock())


def test_own_answers_that_are_left_out_are_counted(config, tmp_path):
    model, store = load_chat_model(config.model), Store(tmp_path)
    config.utility_pairs, config.answer_tokens, config.samples = "", 4, 3
    prompts = PromptSet("mine", PROMPTS, (False,) * len(PROMPTS), ("",) * len(PROMPTS))
    roles = {"safety": (), "utility": (prompts,)}
    assert common.scored_records(config, model, roles, store) == ()
    rows = common.scored_rows(config, model, "utility", roles["utility"], store, Clock())
    (found,) = common.scored_records(config, model, roles, store)
    kept = own_answers(model, PROMPTS, OwnAnswers(judge("scans"), False, 4))
    # The exam's judge calls every answer of so few words a refusal.
    assert config.judge == "wei2024" and config.scoring_judge == "scans"
    assert found == Scored("utility", len(PROMPTS), len(kept), 3, "scans") and len(rows) == 3
    assert found.dropped == len(PROMPTS) - len(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2_7b_chat", "llama2_13b_chat"])
def test_the_published_variants_run_from_pairs_to_report(name, config, tmp_path):
    """On a small model of Llama's shape: every table's points, by their own orders and groups, in one sweep."""
    c = importlib.import_module(f"configs.brittleness.{name}").get_config("published")
    c.model, c.dtype, c.data = config.model, "float32", ""
    c.safety_pairs, c.utility_pairs = config.safety_pairs, config.utility_pairs
    c.evaluation, c.max_new_tokens, c.passages, c.controls = ("builtin:harmful/test#first3",), 2, 0, 0
    c.set_difference, c.orthogonal, c.top, c.bottom = ((0.05, 0.02),), ((16, 8),), (0.05,), (0.1,)
    c.top_ranks, c.bottom_ranks, c.similarity_rank = (1,), (2,), 4
    record = run(c, load_chat_model(c.model, system=c.system), tmp_path / "out", Clock())
    assert [result.variant.name for result in record.results] == [
        "dense",
        "set difference q=0.05 p=0.02",
        "top fraction=0.05 per row block by block",
        "bottom fraction=0.1 per row block by block",
        "orthogonal r_s=16 r_u=8 block by block",
        "top ranks rank=1 block by block",
        "bottom ranks rank=2 block by block",
    ]
    for result in record.results:
        rates = {f"asr_wei2024/{setting}" for setting in ("vanilla", "vanilla_no_system", "decoding_mean")}
        assert rates <= result.rates.keys()
    asked = {sample.prompt for sample in read_samples(tmp_path / "out")}
    assert len(asked) == 3 and (tmp_path / "out/report.html").is_file()
    again = run(c, load_chat_model(c.model, system=c.system), tmp_path / "out", Clock())
    assert again.results == record.results


def test_bad_settings_are_refused_before_anything_is_made(config, tmp_path):
    model = load_chat_model(config.model)
    cases = {
        "export": ("no such", "is no point"),
        "score": ("snap", "score 'snap' is not known"),
        "settings": (("decoding",), "must begin with one that gives one answer"),
        "evaluation": ((), "config.evaluation is empty"),
        "judge": ("me", "unknown judge"),
    }
    for name, (value, said) in cases.items():
        changed = config.copy_and_resolve_references()
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=said):
            run(changed, model, tmp_path / "out", Clock())
    assert not (tmp_path / "out").exists()
    overlapping = config.copy_and_resolve_references()
    overlapping.safety, overlapping.safety_pairs = ("builtin:harmful/test",), ""
    with pytest.raises(ValueError, match=r"overlap|left to draw"):
        run(overlapping, model, tmp_path / "out", Clock())
