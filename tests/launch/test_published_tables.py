"""The papers' numbers as data: those of the docstrings, by names that the runs of these configurations have."""

import importlib
import re

import pytest

from jaxsafe.configs.published import TABLES
from jaxsafe.evaluation.samples import LABELS, rates
from jaxsafe.evaluation.settings import setting
from jaxsafe.records.run import Sample
from launch import common, scans
from launch.brittleness import grid_of

MODELS = ("llama2_7b_chat", "llama2_13b_chat", "vicuna_7b", "vicuna_13b")
SETS = {
    "XSTest safe": "xstest/safe",
    "XSTest unsafe": "xstest/harmful",
    "OKTest": "oktest/safe",
    "TruthfulQA": "truthfulqa/safe",
    "AdvBench": "advbench/harmful",
    "MaliciousInstruct": "malicious_instruct/harmful",
}


def module(task, name):
    return importlib.import_module(f"jaxsafe.configs.{task}.{name}")


def values(table):
    return {(rate.group, rate.rate): rate.value for rate in table.rates}


@pytest.mark.parametrize("name", MODELS)
def test_refusals_are_those_of_the_docstring(name):
    config = module("scans", name).get_config("published")
    (table,) = common.published(config)
    rows = re.findall(r"(XSTest safe|XSTest unsafe|[A-Z]\w+) +([\d.]+) -> +([\d.]+)", module("scans", name).__doc__)
    assert len(rows) == 6
    said = {
        (group, f"refusal_scans/{SETS[row[0]]}"): float(value) / 100
        for row in rows
        for group, value in zip((scans.PLAIN, scans.STEERED), row[1:], strict=True)
    }
    assert values(table) == pytest.approx(said)


@pytest.mark.parametrize("name", MODELS)
def test_refusals_go_by_the_names_that_an_exam_gives(name):
    config = module("scans", name).get_config("published")
    prompts = [(name, LABELS[harmful]) for name in config.evaluation for harmful in (False, True)]
    samples = [
        Sample("SCANS", name, "vanilla", label == "harmful", "", f"{name} {label}", "", True) for name, label in prompts
    ]
    (table,) = common.published(config)
    assert {rate.rate for rate in table.rates} <= rates([samples], common.settings(config), config.judge).keys()


ROW = r"([\d.]+) */ *([\d.]+) */ *([\d.]+) +([\d.]+)"


@pytest.mark.parametrize(
    ("name", "source", "row"),
    [
        ("llama2_7b_chat", "arXiv 2402.05162, table 6a", r"^    (\d), (\d) +[\d.]+% +" + ROW),
        ("llama2_7b_chat", "arXiv 2402.05162, table 7a", r"(\d{4}), (\d{4}) +" + ROW),
        ("llama2_13b_chat", "arXiv 2402.05162, table 7b", r"(\d{4}), (\d{4}) +" + ROW),
    ],
)
def test_attack_success_is_that_of_the_docstring_at_the_points_of_the_grid(name, source, row):
    document, config = module("brittleness", name).__doc__, module("brittleness", name).get_config("published")
    assert TABLES[source] in common.published(config)
    ranks, kinds = "7" in source.split()[-1], ("vanilla", "suffix", "decoding_mean")
    grid = {point.values: point for point in grid_of(config) if point.of_ranks is ranks and point.control is None}
    said = {}
    for second, first, *numbers in re.findall(row, document, re.MULTILINE):
        point = grid[(int(first), int(second)) if ranks else (int(first) / 100, int(second) / 100)]
        names = [f"unrefused_{config.judge}/{kind}" for kind in kinds] + ["zero_shot/mean"]
        said |= {(point.name, each): float(value) for each, value in zip(names, numbers, strict=True)}
    assert len(said) == len(TABLES[source].rates)
    assert values(TABLES[source]) == said


def test_attack_success_goes_by_the_names_that_an_exam_gives():
    asked = (setting("vanilla"), setting("suffix", ("x", "y")), setting("decoding"))
    samples = [
        Sample("dense", "advbench", each.name, True, "", "p", "", True) for each in asked for _ in range(each.width)
    ]
    named = rates([samples], asked, "wei2024").keys()
    used = {rate.rate for source in TABLES if "2402" in source for rate in TABLES[source].rates}
    assert used - named == {"zero_shot/mean"}


@pytest.mark.parametrize(("task", "name"), [("scans", "llama2_7b_chat"), ("brittleness", "llama2_7b_chat")])
def test_the_calibrated_configuration_is_held_against_nothing(task, name):
    assert common.published(module(task, name).get_config()) == ()
