"""The anatomy run on a tiny model, from pairs to report, and what it refuses."""

import csv

import pytest
from tiny import PROMPTS

from configs.anatomy.smollm2_135m import get_config
from jaxsafe.chat.model import load_chat_model
from jaxsafe.records.anatomy import Details
from jaxsafe.records.run import from_json, read_run
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
    c.malicious, c.normal = ("builtin:harmful/calibration#4",), ("builtin:plain/calibration#4",)
    c.candidate_positions, c.prune = 2, ("redundant",)
    c.weights, c.ranks, c.draws, c.triples = (0.05, 0.01), (28, 16), 2, 40
    c.over_refusal = ("builtin:lookalike/calibration#2",)
    return c


@pytest.mark.slow
def test_a_run_leaves_everything_that_it_names(config, tmp_path):
    out = tmp_path / "out"
    check(config)
    record = run(config, load_chat_model(config.model), out, Clock())
    parts = ("set difference q=0.05 p=0.01", "orthogonal r_s=28 r_u=16", "redundant units", "refusal direction")
    groups = [row.group for row in record.table]
    assert groups == ["dense", *(name for part in parts for name in (part, f"random for {part}"))]
    assert len(record.results) == results(config) == len(groups)
    for row in record.table[1::2]:
        assert (row.baseline, row.control) == ("dense", f"random for {row.group}") and row.against_control
    assert read_run(out) == record
    details = from_json(record.details, Details)
    units = {role.role: role for role in details.roles}
    assert record.row("redundant units").about["sparsity"] > 0 and units["redundant"].neurons > 0
    assert details.scored == {"safety": len(PROMPTS), "utility": len(PROMPTS)}
    assert details.scan is not None and details.layers == details.scan.layers
    assert len(details.overlaps) == 9 and [each.part for each in details.inside] == ["weights", "units"]
    page = (out / "report.html").read_text()
    assert all(f"fig-{name}" in page for name in ("perplexity", "roles", "gap", "agreement"))


def test_what_is_read_is_not_evaluated():
    config = get_config()
    config.malicious = ("builtin:harmful/test",)
    with pytest.raises(ValueError, match="has 0 prompts left to draw from"):
        check(config)


def test_a_factor_of_one_scales_nothing():
    config = get_config()
    config.layer_alpha = 1.0
    with pytest.raises(ValueError, match=r"layer_alpha 1\.0 scales nothing"):
        check(config)
