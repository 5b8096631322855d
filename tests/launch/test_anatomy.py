"""The anatomy run on a tiny model, from pairs to report, and what it leaves to a second run."""

import csv

import pytest
from tiny import PROMPTS

from configs.anatomy.smollm2_135m import get_config
from jaxsafe.chat.model import load_chat_model
from jaxsafe.methods import anatomy as parts
from jaxsafe.records.anatomy import Details
from jaxsafe.records.run import from_json, read_run
from jaxsafe.study import study as study_module
from launch import anatomy
from launch.anatomy import check, results, run
from launch.progress import Clock


@pytest.fixture
def config(folder, tmp_path):
    c = get_config()
    for side, answer in (("safety", " i will not, friend."), ("utility", " the tallest tree of the forest")):
        c[f"{side}_pairs"] = str(tmp_path / f"{side}.csv")
        with (tmp_path / f"{side}.csv").open("w", newline="") as file:
            lines = csv.DictWriter(file, ("prompt", "response"))
            lines.writeheader()
            lines.writerows({"prompt": p, "response": answer} for p in PROMPTS)
    c.model, c.batch_size, c.max_new_tokens, c.layer_tokens, c.passages = str(folder), 8, 3, 3, 2
    c.evaluation, c.harmless = ("builtin:harmful/test#4",), ("builtin:plain/test#3",)
    c.malicious, c.normal = ("builtin:harmful/calibration#8",), ("builtin:plain/calibration#8",)
    c.weights, c.ranks, c.draws, c.triples = (0.05, 0.01), (28, 16), 3, 40
    c.over_refusal = ("builtin:lookalike/calibration#2",)
    return c


@pytest.mark.slow
def test_a_run_leaves_everything_it_names_and_a_second_makes_nothing_again(config, tmp_path, monkeypatch):
    model, out = load_chat_model(config.model), tmp_path / "out"
    check(config)
    record = run(config, model, out, Clock())
    groups = [row.group for row in record.table]
    assert groups[::2] == [
        "dense",
        "random for set difference q=0.05 p=0.01",
        "random for orthogonal r_s=28 r_u=16",
        *(f"random for {role} units" for role in ("safety", "utility", "redundant")),
        "random for refusal direction",
    ]
    assert len(record.results) == 13 == results(config)
    for row in record.table[1::2]:
        assert (row.baseline, row.control) == ("dense", f"random for {row.group}") and row.against_control
    assert read_run(out) == record and (out / "report.html").is_file()
    found = from_json(record.details, Details)
    units = {role.role: role for role in found.roles}
    assert sum(role.share for role in found.roles) == pytest.approx(1)
    assert all(sum(role.layers) == role.heads + role.neurons for role in found.roles)
    pruned = record.row("redundant units")
    assert pruned.about["sparsity"] > 0 and units["redundant"].neurons > 0
    assert found.scan is not None and found.layers == found.scan.layers and len(found.overlaps) == 9
    page = (out / "report.html").read_text()
    assert all(f"fig-{name}" in page for name in ("perplexity", "roles", "gap", "agreement"))

    def never(*_, **__):
        raise AssertionError("something was made again")

    for module, name in ((study_module, "examine"), (parts, "input_moments"), (parts, "end_states")):
        monkeypatch.setattr(module, name, never)
    again = run(config, model, out, Clock())
    assert (again.results, again.table, again.details) == (record.results, record.table, record.details)


def test_what_is_read_is_not_evaluated(config):
    config.malicious = ("builtin:harmful/test",)
    with pytest.raises(ValueError, match="share"):
        check(config)


def test_a_factor_of_one_scales_nothing(config):
    config.layer_alpha = 1.0
    with pytest.raises(ValueError, match=r"layer_alpha 1\.0 scales nothing"):
        anatomy.check(config)
