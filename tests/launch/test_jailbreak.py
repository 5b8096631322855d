"""`launch.jailbreak` from a config to a report, on tiny models."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_chat_model

from configs.jailbreak.smollm2_135m import get_config
from jaxsafe.configs import fields
from jaxsafe.configs.jailbreak.base import FIELDS, NAMES
from jaxsafe.kernels.ablation import orthogonalised
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods.refusal_direction import Direction
from jaxsafe.records.jailbreak import Details
from jaxsafe.records.run import from_json, read_run, read_samples
from launch import jailbreak
from launch.jailbreak import check, results, roles_of, run
from launch.progress import Clock


def small_config(*attacks):
    c = get_config()
    c.model, c.batch_size, c.max_new_tokens, c.passages, c.calibration_tokens = "tiny", 16, 4, 2, 4
    c.evaluation, c.harmless = ("builtin:harmful/test#4",), ("builtin:plain/test#3",)
    c.calibration = ("builtin:harmful/calibration#24", "builtin:plain/calibration#24")
    c.attacks, c.openings, c.scales, c.controls = attacks, ("Sure, here is", "Yes"), (0.5,), 2
    c.temperatures, c.top_ps, c.top_ks = (0.5,), (), (3,)
    return c


@pytest.mark.slow
def test_every_attempt_stands_beside_the_plain_request_and_its_control(tmp_path):
    suffixes = tmp_path / "suffixes.txt"
    suffixes.write_text("and so on\n")
    config = small_config(*(name for name in NAMES if name != "ablation"))
    config.suffixes = str(suffixes)
    check(config)
    model = tiny_chat_model(tmp_path / "model", context=600)
    record = run(config, model, roles_of(config), tmp_path / "out", Clock())
    assert read_run(tmp_path / "out") == record
    assert len(record.results) == results(config) == 1 + 4 + 1 + 2 + 4 + 3 + 2
    rows = {row.group: row for row in record.table}
    assert {row.baseline for row in record.table[1:]} == {"plain request"}
    controls = {name: row.control for name, row in rows.items() if row.control}
    assert controls.pop("persona") == "neutral persona" and controls.pop("suffix 1") == "neutral suffix 1"
    assert {controls[f"{way}"] for way in ("temperature 0.5", "top-k 3")} == {"draws at temperature 1"}
    assert controls["layers 1 x 0.5"] == "other layers x 0.5" and len(rows["other layers x 0.5"].variants) == 2
    read = {name for name, row in rows.items() if row.perplexity is not None}
    assert read == {"plain request", "layers 1 x 0.5", "other layers x 0.5"}
    details = from_json(record.details, Details)
    assert [(each.attack, each.control, each.k) for each in details.tries] == [
        (attack, control, 2) for attack in ("prefill", "decoding") for control in (False, True)
    ]
    assert [each.opening for each in details.begun][::2] == ["Sure, here is", "Yes"]
    samples = read_samples(tmp_path / "out")
    assert len(samples) == results(config) * 7
    page = (tmp_path / "out/report.html").read_text()
    assert "fig-reached" in page and "Several tries at each prompt" in page
    again = run(config, model, roles_of(config), tmp_path / "out", Clock())
    assert again.results == record.results and again.details == record.details


@pytest.mark.slow
def test_the_ablated_variant_answers_as_the_model_whose_weights_lost_the_direction(tmp_path, monkeypatch):
    config = small_config("ablation")
    config.passages = 0
    model = tiny_chat_model(tmp_path / "model", context=600)
    vector = np.random.default_rng(2).standard_normal(model.config.embed).astype(np.float32)
    found = Direction(vector / np.linalg.norm(vector), 1, 0, -1.0, 2.0, 0.05)
    monkeypatch.setattr(jailbreak, "direction_of", lambda *asked: found)
    roles = roles_of(config)
    record = run(config, model, roles, tmp_path / "out", Clock())
    assert from_json(record.details, Details).direction == str(found)
    shape, params = orthogonalised(model.config, model.params, jnp.asarray(found.vector))
    baked = dataclasses.replace(model, config=shape, params=params)
    prompts = [prompt for sets in (*roles["evaluation"], *roles["harmless"]) for prompt in sets.prompts]
    texts = {}
    for sample in read_samples(tmp_path / "out"):
        texts.setdefault(sample.variant, []).append(sample.text)
    assert tuple(texts["refusal ablated"]) == baked.answers(prompts, Decoding(config.max_new_tokens)).texts
    assert texts["refusal ablated"] != texts["plain request"]
    assert {row.group: row.control for row in record.table}["refusal ablated"] == "random direction ablated"


WRONG = [
    ({"suffixes": "mine.txt"}, "give both or none"),
    ({"attacks": ("suffix",)}, "give both or none"),
    ({"raw": True}, "would do nothing"),
    ({"openings": ("Yes", "Yes")}, "has an entry twice"),
    ({"temperatures": (), "top_ks": ()}, "attack 'decoding' needs an entry of config.temperatures"),
    ({"scales": (1.0,)}, "a factor of 1 scales nothing"),
    ({"calibration": ("builtin:harmful/calibration#24",)}, "needs harmful and safe prompts"),
    ({"evaluation": ("builtin:plain/test#4",)}, "has no harmful prompt"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_cannot_be_is_refused_before_any_work(changes, message):
    config = small_config(*NAMES[:-1])
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        check(config)


@pytest.mark.parametrize("name", ["smollm2_135m", "llama2_7b_chat"])
def test_every_config_fits_the_fields(name):
    config = importlib.import_module(f"configs.jailbreak.{name}").get_config()
    fields.check(FIELDS, config)
    check_counts = {"smollm2_135m": 40, "llama2_7b_chat": 1 + 2 + 1 + 2 + 98 + 4 + 16}
    assert results(config) == check_counts[name]
