"""The library's page and the README's example run as they stand, block after block, on the tiny model."""

import re

import jax
import numpy as np
import pytest
from launches import ROOT

from jaxsafe.model.weights import flatten
from jaxsafe.records.run import read_run


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


BLOCKS = blocks_of("docs/library.md")
MODEL = '"smollm2-135m-instruct"'


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_no_block_has_more_than_ten_lines(number):
    assert len(BLOCKS[number].strip().splitlines()) <= 10


@pytest.fixture(scope="module")
def names(folder, tmp_path_factory):
    """What the page's names are when all of its blocks have run, in an empty folder."""
    assert sum(block.count(MODEL) for block in BLOCKS) == 1
    found = {"here": tmp_path_factory.mktemp("notebook")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found["here"])
        for block in BLOCKS:
            exec(block.replace(MODEL, repr(str(folder))), found)
    return found


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
def test_the_edited_parameters_are_saved(names):
    saved, masked, plain = (names[name].params for name in ("again", "masked", "model"))
    assert same(saved, masked) and not same(saved, plain)
    prompts = ["Who are you?"]
    assert names["again"].answers(prompts).texts == names["masked"].answers(prompts).texts


@pytest.mark.slow
def test_each_block_does_what_it_says(names):
    model, prepared = names["model"], names["prepared"]
    assert names["states"].shape[:2] == (model.config.layers, 2)
    assert names["steered"].answers(["Why?"]).texts != model.answers(["Why?"]).texts
    assert sum(candidate.chosen for candidate in prepared.record.strength.candidates) == 1
    assert names["after"].scores.shape == (1,)
    assert not same(names["safety_scores"], names["utility_scores"]) and not same(
        names["wanda"], names["safety_scores"]
    )
    assert not same(names["without_two"], model.params) and not same(names["fewer"].params, names["without_two"])
    assert not same(names["near"].params, model.params)


@pytest.mark.slow
def test_what_is_frozen_does_not_move(names):
    before, after, mask = (flatten(tree) for tree in (names["params"], names["tuned"].params, names["mask"]))
    assert any(where.any() for where in mask.values())
    for path, where in mask.items():
        moved = np.asarray(before[path] != after[path])
        assert not moved[np.asarray(where)].any() and moved.any()


@pytest.mark.slow
def test_variants_are_compared_and_everything_is_written(names):
    assert [row.group for row in names["run"].table] == ["as it is", "masked", "tuned"]
    for row in names["run"].table[1:]:
        assert row.against_baseline[0].first == "as it is" and row.against_baseline[0].n == 8
    files = ("mask.safetensors", "vectors.safetensors", "refusal.gguf", "edited/model.safetensors")
    runs = ("run.json", "samples.jsonl", "report.html")
    for name in (*files, *(f"runs/notebook/{run}" for run in runs)):
        assert (names["here"] / name).is_file(), name


@pytest.mark.slow
def test_the_example_of_the_readme(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of("README.md")
    assert block.count(MODEL) == 1
    names = {}
    exec(block.replace(MODEL, repr(str(folder))), names)
    assert [row.group for row in read_run("runs/halved").table] == ["as it is", "halved"]
    assert not same(names["halved"].params, names["model"].params)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1500
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links and all((ROOT / link).is_file() for link in links)
