"""`launch.jailbreak` from a config to a report, on a tiny model of which every attack's success is known."""

import importlib

import numpy as np
import pytest
from one_direction import CALM, HARMFUL, SAFE, one_direction

from configs.jailbreak.smollm2_135m import get_config
from jaxsafe.configs import fields
from jaxsafe.configs.jailbreak.base import FIELDS, NAMES
from jaxsafe.records.jailbreak import Details
from jaxsafe.records.run import from_json, read_run, read_samples
from launch import jailbreak
from launch.jailbreak import check, direction_of, results, roles_of, run
from launch.progress import Clock


def small_config(folder, *attacks):
    c = get_config()
    for name, prompts in (("harmful", HARMFUL), ("safe", SAFE)):
        for split, chosen in (("calibration", prompts[:2]), ("test", prompts[2:])):
            (folder / f"{name}_{split}.txt").write_text("\n".join(chosen))
    (folder / "suffixes.txt").write_text(CALM)
    c.model, c.batch_size, c.max_new_tokens, c.passages, c.calibration_tokens = "one direction", 16, 2, 0, 2
    c.evaluation, c.harmless = (f"{folder}/harmful_test.txt:harmful",), (f"{folder}/safe_test.txt:safe",)
    c.calibration = (f"{folder}/harmful_calibration.txt:harmful", f"{folder}/safe_calibration.txt:safe")
    c.attacks, c.openings, c.suffixes = attacks, (CALM,), f"{folder}/suffixes.txt"
    c.temperatures, c.top_ps, c.top_ks = (0.1,), (), (1,)
    c.scaled_layers, c.scales, c.controls = (0, 1), (0.1,), 2
    return c


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A run of every attack: its folder, its number of results and its record; the direction, as built and as found."""
    folder, directions = tmp_path_factory.mktemp("jailbreak"), []
    model, built = one_direction(folder / "model")
    config = small_config(folder, *(name for name in NAMES if name != "persona"))  # whose control is a long one
    check(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jailbreak, "direction_of", lambda *a: directions.append(direction_of(*a)) or directions[0])
        record = run(config, model, roles_of(config), folder / "out", Clock())
    return folder / "out", results(config), record, (built, directions[0])


def test_attacks_get_past_the_direction_that_refuses_and_their_controls_do_not(launched):
    _, count, record, _ = launched
    reached = {row.group: row.rates["asr_scans/jailbreak"].value for row in record.table}
    neutral = next(name for name in reached if name.startswith("neutral prefill"))
    assert reached == {
        "plain request": 0,
        f"prefill '{CALM}'": 1,
        neutral: 0,
        "no template": 0,
        "temperature 0.1": 0,
        "top-k 1": 0,
        "draws at temperature 1": pytest.approx(reached["draws at temperature 1"]),
        "refusal ablated": 1,
        "random direction ablated": 0,
        "layers 0 x 0.1": 1,
        "other layers x 0.1": 0,
        "suffix 1": 1,
        "neutral suffix 1": 0,
    }
    assert all(row.rates["broken/jailbreak"].value == 0 for row in record.table if "draws" not in row.group)
    assert len(record.results) == count == 1 + 2 + 1 + 4 + 3 + 3 + 2


def test_every_attempt_stands_beside_the_plain_request_and_its_control(launched):
    _, _, record, _ = launched
    rows = {row.group: row for row in record.table}
    assert {row.baseline for row in record.table[1:]} == {"plain request"}
    controls = {name: row.control for name, row in rows.items() if row.control}
    assert controls["suffix 1"] == "neutral suffix 1"
    assert {controls[way] for way in ("temperature 0.1", "top-k 1")} == {"draws at temperature 1"}
    assert controls["layers 0 x 0.1"] == "other layers x 0.1" and len(rows["other layers x 0.1"].variants) == 2
    assert controls["refusal ablated"] == "random direction ablated"


def test_the_run_is_recorded_with_its_worst_cases_and_what_stands_behind_openings(launched):
    out, count, record, _ = launched
    assert read_run(out) == record
    details = from_json(record.details, Details)
    assert [(each.attack, each.control, each.k) for each in details.tries] == [
        ("decoding", False, 2),
        ("decoding", True, 2),
    ]
    assert [(each.opening, each.behind.value, each.whole.value) for each in details.begun][:1] == [(CALM, 1.0, 1.0)]
    assert len(read_samples(out)) == count * 8
    page = (out / "report.html").read_text()
    assert "fig-reached" in page and "Several tries at each prompt" in page


def test_the_direction_that_is_ablated_is_the_one_that_refuses(launched):
    _, _, record, (built, found) = launched
    np.testing.assert_allclose(found.vector, built, atol=1e-5)
    assert found.allowed and found.bypass < -5 and found.induce > 0 and found.kl == pytest.approx(0, abs=1e-6)
    assert from_json(record.details, Details).direction == str(found)


WRONG = [
    ({"suffixes": ""}, "give both or none"),
    ({"attacks": ("prefill",)}, "give both or none"),
    ({"raw": True}, "would do nothing"),
    ({"openings": ("Yes", "Yes")}, "has an entry twice"),
    ({"temperatures": (), "top_ks": ()}, "attack 'decoding' needs an entry of config.temperatures"),
    ({"scales": (1.0,)}, "a factor of 1 scales nothing"),
    ({"calibration": ("builtin:harmful/calibration#24",)}, "needs harmful and safe prompts"),
    ({"evaluation": ("builtin:plain/test#4",)}, "has no harmful prompt"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_cannot_be_is_refused_before_any_work(changes, message, tmp_path):
    config = small_config(tmp_path, *NAMES)
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        check(config)


@pytest.mark.parametrize("name", ["smollm2_135m", "llama2_7b_chat"])
def test_every_config_fits_the_fields(name):
    config = importlib.import_module(f"configs.jailbreak.{name}").get_config()
    fields.check(FIELDS, config)
    check_counts = {"smollm2_135m": 40, "llama2_7b_chat": 1 + 2 + 1 + 2 + 98 + 4 + 16}
    assert results(config) == check_counts[name]
