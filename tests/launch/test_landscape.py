"""`launch.landscape` from a config to a report on the tiny model."""

import jax
import numpy as np
import pytest
from tiny import tiny_params

from configs.landscape.smollm2_135m import get_config
from jaxsafe.chat.model import load_chat_model
from jaxsafe.io.hf import save_hf
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.records.landscape import Details
from jaxsafe.records.run import from_json, read_run, read_samples
from jaxsafe.study import study as study_module
from launch.landscape import check, distance, results, run
from launch.progress import Clock


@pytest.fixture
def config(folder):
    c = get_config()
    c.model, c.judge, c.max_new_tokens, c.batch_size, c.passages = str(folder), "wei2024_no_length", 4, 8, 2
    c.evaluation, c.harmless = ("builtin:harmful/test#5",), ("builtin:plain/test#3",)
    c.steps, c.draws, c.together = 2, 2, 2
    return c


def test_an_empty_landscape_and_odd_steps_are_refused(config):
    check(config)
    config.steps = 0
    with pytest.raises(ValueError, match="the landscape is empty"):
        check(config)
    config.steps = 3
    with pytest.raises(ValueError, match="steps 3 is odd"):
        check(config)


@pytest.mark.slow
def test_a_run_leaves_everything_it_names_and_a_second_makes_nothing_again(config, folder, tmp_path, monkeypatch):
    model = load_chat_model(config.model)
    other = save_hf(tmp_path / "other", model.config, tiny_params(model.config, 1), like=folder)
    config.other_model, config.toward, config.controls, config.plane_steps = str(other), (0.5, 1.0), 2, 2
    out = tmp_path / "out"
    record = run(config, model, out, Clock())
    assert len(record.results) == results(config) == 1 + 2 * 2 + 8 + 2 + 2 * 2
    row = record.row("random +0.5")
    assert row.variants == ("random +0.5, draw 0", "random +0.5, draw 1") and row.baseline == "as it is"
    assert record.row("toward +1").control == "as far +1" and record.row("as far +1").about["control"] is True

    samples = read_samples(out)
    assert read_run(out) == record and len(samples) == 8 * len(record.results)
    texts = {}
    for sample in samples:
        texts.setdefault(sample.variant, []).append(sample.text)
    there = load_chat_model(other)
    asked = [sample.prompt for sample in samples if sample.variant == "as it is"]
    assert texts["toward +1"] == list(there.answers(asked, Decoding(4)).texts) != texts["as it is"]
    assert texts["plane +0.5, +0"] == texts["random +0.5, draw 0"]

    details = from_json(record.details, Details)
    assert [found.definition for found in details.visage] == ["paper", "code"] and details.prompts == 5
    for draw, value in enumerate(details.visage[1].by_direction):
        names = (f"random -0.5, draw {draw}", "as it is", f"random +0.5, draw {draw}")
        kept = [[s.refused is True for s in samples if s.variant == name and s.harmful] for name in names]
        assert value == pytest.approx(np.mean(kept))
    assert details.other == str(other) and details.distance == pytest.approx(distance(model.params, there.params))
    for name in ("report.html", "figures/basin.svg", "figures/plane.pdf", "figures/toward.svg", "tables/results.csv"):
        assert (out / name).is_file()

    def never(*_, **__):
        raise AssertionError("a point was made again")

    monkeypatch.setattr(study_module, "examine", never)
    config.together = 4
    again = run(config, model, out, Clock())
    assert (again.results, again.table, again.details) == (record.results, record.table, record.details)
    config.seed = 1
    with pytest.raises(AssertionError, match="made again"):
        run(config, model, tmp_path / "out", Clock())


def test_distance_is_a_share_of_the_norm(folder):
    params = load_chat_model(str(folder)).params
    assert distance(params, jax.tree.map(lambda a: 1.25 * a, params)) == pytest.approx(0.25, rel=1e-5)
