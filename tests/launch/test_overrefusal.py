"""`launch.overrefusal` from a config to a report, on tiny models that were taught to refuse some prompts."""

import dataclasses
import importlib

import jax
import pytest
from families import FAMILY_MODELS
from launches import ROOT
from tiny import tiny_chat_model, tiny_config, tiny_params

from configs.overrefusal.smollm2_135m import get_config
from jaxsafe.chat.model import ChatModel
from jaxsafe.configs import fields
from jaxsafe.configs.overrefusal.base import FIELDS, NAMES
from jaxsafe.methods.baselines import BASELINES
from jaxsafe.methods.trainer import FineTuning, train
from jaxsafe.model.families import config_from_hf
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.records.overrefusal import Details
from jaxsafe.records.run import from_json, read_run, read_samples
from jaxsafe.rows import Row
from jaxsafe.study.study import Study
from launch.overrefusal import check, roles_of, run
from launch.progress import Clock


@pytest.fixture(autouse=True)
def _forget_programs_of_a_test():
    """A run of every remedy compiles hundreds of programs."""
    yield
    jax.clear_caches()


TRIED = tuple(name for name in NAMES if name != "dro")
"""DRO samples answers for minutes; `methods/test_dro.py` trains it."""


def taught(folder, config) -> ChatModel:
    """A tiny model that answers "Sorry" to most harmful and some safe calibration prompts, and else "the red"."""
    model = dataclasses.replace(tiny_chat_model(folder), config=config, params=tiny_params(config))
    end = (model.tokenizer.hf.eos_token_id,)
    rows = []
    for name in ("harmful", "lookalike"):
        for i, prompt in enumerate(load_prompts(f"builtin:{name}", split="calibration").prompts[:24]):
            refused = (name == "harmful") == (i % 4 != 0)
            row = model.row(prompt, "Sorry" if refused else "the red")
            rows.append(Row(row.ids + end, row.instruction_end))
    plan = FineTuning(steps=120, batch_size=16, learning_rate=1e-2, warmup=5, schedule="cosine")
    *_, last = train(model.config, model.params, rows, plan)
    return model.with_params(last.weights())


def small_config(remedies):
    c = get_config()
    c.model, c.batch_size, c.max_new_tokens, c.calibration_tokens, c.passages = "tiny", 16, 6, 6, 2
    c.anchors = ("builtin:harmful/calibration#12", "builtin:lookalike/calibration#12")
    c.calibration = ("builtin:harmful/calibration#24", "builtin:lookalike/calibration#24")
    c.evaluation = ("builtin:lookalike/test#6", "builtin:harmful/test#6")
    c.remedies, c.missed, c.dro_samples, c.dro_steps = remedies, 0.6, 2, 2
    return c


@pytest.mark.slow
def test_every_remedy_stands_beside_its_control(tmp_path):
    config = small_config(TRIED)
    model = taught(tmp_path / "model", tiny_config(context=600, layers=6))
    check(config)
    record = run(config, model, roles_of(config), tmp_path / "out", Clock())
    assert read_run(tmp_path / "out") == record
    variants = [row.group for row in record.table]
    steered = [name for name in TRIED if name not in BASELINES]
    assert variants == [
        "as it is",
        *(v for name in steered for v in (name, f"{name}, random direction")),
        *TRIED[len(steered) :],
    ]
    assert all(row.control == f"{row.group}, random direction" for row in record.table if row.group in steered)
    details = from_json(record.details, Details)
    assert [remedy.name for remedy in details.remedies] == list(TRIED)
    samples = read_samples(tmp_path / "out")
    by_variant = {name: [s for s in samples if s.variant == name] for name in variants}
    for cost in details.costs:
        mine = by_variant[cost.variant]
        assert cost.passes == sum(s.passes for s in mine) / len(mine)
        if not cost.variant.startswith("mend"):
            assert cost.passes == (2 if cost.variant in ("self_cd", "safe_decoding") else 1)
    for before, after in zip(by_variant["as it is"], by_variant["mend"], strict=True):
        if after.steered_as_harmful or not before.refused:
            assert after.text == before.text and after.passes == 1
        else:
            assert after.passes > 1
    page = (tmp_path / "out/report.html").read_text()
    assert "fig-tradeoff" in page and "fig-candidates" in page and "logistic regression" in page


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_results(tmp_path, monkeypatch):
    config = small_config(("mend",))
    model = taught(tmp_path / "model", tiny_config(context=600))
    whole = run(config, model, roles_of(config), tmp_path / "whole", Clock())

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Study, "examine_together", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, model, roles_of(config), tmp_path / "parts", Clock())
    again = run(config, model, roles_of(config), tmp_path / "parts", Clock())
    assert again.results == whole.results and again.details == whole.details


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2"])
def test_remedies_run_on_other_families(name, tmp_path):
    attributes = next(a for a in FAMILY_MODELS.values() if a["model_type"] == name)
    config = config_from_hf(attributes | {"vocab_size": 300, "max_position_embeddings": 600})
    remedies = ("mend", "ablation", "alphasteer", "cap")
    record = run(
        small_config(remedies), taught(tmp_path / "model", config), roles_of(small_config(remedies)), tmp_path, Clock()
    )
    assert {row.group for row in record.table} >= set(remedies)


def test_calibration_needs_both_kinds():
    config = small_config(("mend",))
    config.calibration = ("builtin:harmful/calibration#24",)
    with pytest.raises(ValueError, match="calibration needs harmful and safe prompts"):
        check(config)


CONFIGS = sorted(p.stem for p in (ROOT / "configs/overrefusal").glob("*.py") if p.stem not in ("__init__", "base"))
PAPERS = {  # SCANS's scored and steered layers, threshold and alpha by the paper
    "llama2_7b_chat": ((10, 32), (10, 20), 0.75, 3.5),
    "llama2_13b_chat": ((10, 19), (10, 20), 0.75, 3.5),
    "vicuna_7b": ((10, 32), (10, 20), 0.75, 4.0),
    "vicuna_13b": ((10, 20), (10, 20), 0.70, 4.0),
}
RIVALS = {"llama31_8b_instruct": "llama3.1-8b", "qwen25_7b_instruct": "qwen2.5-7b", "gemma2_9b_it": "gemma2-9b"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_holds_what_is_published_for_its_model(name):
    config = importlib.import_module(f"configs.overrefusal.{name}").get_config()
    fields.check(FIELDS, config)
    assert config.scans_choice == PAPERS.get(name)
    assert config.published == RIVALS.get(name, "")
    assert name == "smollm2_135m" or (config.model.count("/") == 1 and config.remedies == NAMES)


def test_the_variant_all_has_every_remedy():
    assert get_config("all").remedies == NAMES and get_config().remedies == ("mend",)
    with pytest.raises(ValueError, match="variant 'some' is not known"):
        get_config("some")
