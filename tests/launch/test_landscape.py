"""`launch.landscape` from a config to a report on the tiny model: one run, two points in a program."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from tiny import tiny_params

from configs.landscape.smollm2_135m import get_config
from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.io.hf import save_hf
from jaxsafe.kernels.directions import difference, moved, random_direction
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.records.landscape import Details
from jaxsafe.records.run import Run, from_json, read_run, read_samples
from jaxsafe.study import study as study_module
from launch.landscape import check, results, run
from launch.progress import Clock


def small_config(folder):
    c = get_config()
    c.model, c.judge, c.max_new_tokens, c.batch_size, c.passages = str(folder), "wei2024_no_length", 4, 8, 1
    c.evaluation, c.harmless = ("builtin:harmful/test#4",), ()
    c.steps, c.draws, c.plane_steps, c.together = 2, 2, 2, 2
    return c


@dataclasses.dataclass(frozen=True)
class Walked:
    """A finished run with its models and its answers by variant."""

    model: ChatModel
    other: ChatModel
    record: Run
    out: pathlib.Path

    @property
    def config(self):
        c = small_config(self.model.name)
        c.other_model, c.toward, c.controls = self.other.name, (1.0,), 1
        return c

    def samples(self, variant):
        return [sample for sample in read_samples(self.out) if sample.variant == variant]


@pytest.fixture(scope="module")
def walked(folder, tmp_path_factory):
    out, model = tmp_path_factory.mktemp("walk"), load_chat_model(str(folder))
    other = save_hf(out / "other", model.config, tiny_params(model.config, 1), like=folder)
    before = Walked(model, load_chat_model(str(other)), None, out / "out")
    return dataclasses.replace(before, record=run(before.config, model, before.out, Clock()))


def test_an_empty_landscape_and_odd_steps_are_refused(folder):
    config = small_config(folder)
    check(config)
    config.steps = 3
    with pytest.raises(ValueError, match="steps 3 is odd"):
        check(config)
    config.steps = config.plane_steps = 0
    with pytest.raises(ValueError, match="the landscape is empty"):
        check(config)


@pytest.mark.slow
def test_every_point_is_held_against_the_model_itself(walked):
    record = walked.record
    assert len(record.results) == results(walked.config) == 1 + 2 * 2 + 8 + 1 + 1
    row = record.row("random +0.5")
    assert row.variants == ("random +0.5, draw 0", "random +0.5, draw 1") and row.baseline == "as it is"
    assert record.row("toward +1").control == "as far +1" and record.row("as far +1").about["control"] is True


@pytest.mark.slow
def test_points_of_one_program_are_those_one_by_one(walked):
    config, theta = walked.model.config, walked.model.params
    way = difference(theta, walked.other.params)
    first, second = (random_direction(config, theta, seed) for seed in (0, 1))
    far = random_direction(config, way, 0, skip=())
    points = {
        "as it is": (first, 0.0),
        "random -0.5, draw 0": (first, -0.5),
        "random +0.5, draw 1": (second, 0.5),
        "plane +0.5, +0": (first, 0.5),
        "toward +1": (way, 1.0),
        "as far +1, draw 0": (far, 1.0),
    }
    seen = set()
    for name, (direction, offset) in points.items():
        samples = walked.samples(name)
        there = walked.model.with_params(moved(theta, [direction], np.array([offset], np.float32)))
        texts = there.answers([sample.prompt for sample in samples], Decoding(4), 8).texts
        assert tuple(sample.text for sample in samples) == texts
        seen.add(texts)
    assert len(seen) == len(points)


@pytest.mark.slow
def test_the_line_ends_at_the_other_model(walked):
    samples = walked.samples("toward +1")
    texts = walked.other.answers([sample.prompt for sample in samples], Decoding(4), 8).texts
    assert tuple(sample.text for sample in samples) == texts


@pytest.mark.slow
def test_visage_is_of_the_answers_of_the_random_lines(walked):
    details = from_json(walked.record.details, Details)
    assert [found.definition for found in details.visage] == ["paper", "code"] and details.prompts == 4
    for draw, value in enumerate(details.visage[1].by_direction):
        names = (f"random -0.5, draw {draw}", "as it is", f"random +0.5, draw {draw}")
        kept = [[s.refused is True for s in walked.samples(name)] for name in names]
        assert value == pytest.approx(np.mean(kept))
    theta, other = (
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(model.params)])
        for model in (walked.model, walked.other)
    )
    assert details.other == walked.other.name
    assert details.distance == pytest.approx(np.linalg.norm(other - theta) / np.linalg.norm(theta), rel=1e-5)


@pytest.mark.slow
def test_everything_is_written_and_nothing_is_made_again(walked, monkeypatch):
    assert read_run(walked.out) == walked.record
    for name in ("report.html", "figures/basin.svg", "figures/plane.pdf", "figures/toward.svg", "tables/results.csv"):
        assert (walked.out / name).is_file()

    def never(*_, **__):
        raise AssertionError("a point was made again")

    monkeypatch.setattr(study_module, "examine", never)
    config = walked.config
    config.together = 4
    again = run(config, walked.model, walked.out, Clock())
    assert (again.results, again.table, again.details) == tuple(
        getattr(walked.record, part) for part in ("results", "table", "details")
    )
    config.seed = 1
    with pytest.raises(AssertionError, match="made again"):
        run(config, walked.model, walked.out, Clock())
