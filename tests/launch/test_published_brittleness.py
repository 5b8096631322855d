"""The variants of brittleness that follow the published code (arXiv 2402.05162): what is asked and scored."""

import dataclasses
import hashlib
import importlib
import json
import pathlib

import pytest
from tiny import tiny_chat_model

from jaxsafe.chat.model import KEEP
from jaxsafe.methods.brittleness import METHODS, Protocol, points
from jaxsafe.prompts.roles import assign_roles, check_unseen
from launch import common
from launch.brittleness import grid_of

DATA = pathlib.Path(__file__).parents[2] / "../shared/data"
PAIRS = DATA / "alignment_attribution/SFT_aligned_llama2-7b-chat-hf_train_short.csv"
NAMES = ("llama2_7b_chat", "llama2_13b_chat")
TEMPLATE = """\
{{ bos_token }}[INST] \
{% if messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}\
{{ messages[-1].content | trim }} [/INST]"""
VANILLA = "9bc1bd1fad64c87383b3e0092b2a417d92df656d510e9696938c0edde119c463"
"""Of the lines that the published template makes of the published 100 prompts, joined by line breaks, without BOS."""


def config_of(name, variant="published"):
    return importlib.import_module(f"configs.brittleness.{name}").get_config(variant)


@pytest.fixture(scope="module")
def data():
    if not PAIRS.is_file():
        pytest.skip(f"no file {PAIRS}")
    return str(DATA)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = tiny_chat_model(tmp_path_factory.mktemp("model"))
    return dataclasses.replace(model, tokenizer=model.tokenizer.with_template(TEMPLATE))


@pytest.mark.parametrize("name", NAMES)
def test_the_hundred_vanilla_prompts_are_the_published_ones(name, data, model):
    config = config_of(name)
    config.data, config.safety_pairs, config.utility_pairs = data, str(PAIRS), str(PAIRS)
    roles = common.scored_roles(config)
    (evaluated,) = common.evaluated(roles)
    vanilla, no_system, decoding = common.settings(config)
    assert vanilla.system is KEEP and (no_system.system, decoding.template) == (None, False)
    asked = model.with_prompt(system=config.system)
    texts = [asked.tokenizer.hf.decode(asked.row(prompt).ids) for prompt in evaluated.prompts]
    bos = asked.tokenizer.hf.bos_token or ""
    assert len(texts) == 100 and all(text.startswith(f"{bos}[INST] <<SYS>>\n") for text in texts)
    assert hashlib.sha256("\n".join(text.removeprefix(bos) for text in texts).encode()).hexdigest() == VANILLA


def test_no_evaluated_prompt_is_scored(data):
    config = config_of("llama2_7b_chat")
    config.data, config.safety_pairs = data, str(PAIRS)
    common.scored_roles(config)
    config.evaluation = ("advbench#100",)
    with pytest.raises(ValueError, match=r"train_short.csv and advbench share 68 prompts, .*must not be evaluated"):
        common.scored_roles(config)


def test_a_template_around_a_prompt_hides_nothing():
    (prompts,) = assign_roles({}, {"evaluation": ("builtin:harmful/test#first3",)})["evaluation"]
    (again,) = assign_roles({}, {"evaluation": ("builtin:harmful/test#first3",)}, seed=5)["evaluation"]
    (whole,) = assign_roles({}, {"evaluation": ("builtin:harmful/test",)})["evaluation"]
    assert prompts.prompts == again.prompts == whole.prompts[:3]
    marked = [f"[INST] {prompts.prompts[1].upper()} [/INST]"]
    check_unseen("pairs", marked, [prompts])
    with pytest.raises(ValueError, match="pairs and builtin:harmful share 1 prompts"):
        check_unseen("pairs", marked, [prompts], within=True)
    check_unseen("pairs", [f"x{prompts.prompts[1]}x"], [prompts], within=True)
    with pytest.raises(ValueError, match="has 1 prompts left to draw from; 4"):
        assign_roles({"scored": ("builtin:harmful/test#first3",)}, {"evaluation": ("builtin:harmful/test#first4",)})


def test_a_system_prompt_of_the_exam_is_none_of_scored_prompts(model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "why?", "response": " no."}) + "\n")
    config = config_of("llama2_7b_chat", "")
    config.safety_pairs, config.system = str(path), "Be brief."
    asked = model.with_prompt(system=config.system)
    for config.score_system, system in ((True, "Be brief."), (False, None)):
        (row,) = common.scored_rows(config, asked, "safety", (), None, None)
        assert row == model.row("why?", " no.", system)


@pytest.mark.parametrize("name", NAMES)
def test_each_point_has_the_order_and_group_of_the_code(name):
    config = config_of(name)
    config.bottom, config.bottom_ranks, config.heads = (0.1,), (5,), (3,)
    found = {p.method: (p.per, p.sequential) for p in grid_of(config) if p.control is None}
    assert found == {
        "dense": (None, False),
        "set_difference": (None, False),
        "top": ("row", True),
        "bottom": ("row", True),
        "heads": (None, False),
        "orthogonal": (None, True),
        "top_ranks": (None, True),
        "bottom_ranks": (None, True),
    }
    score = common.score_settings(config)
    assert (score.per, score.score, score.loss, score.positions) == ("matrix", "snip", "mean", "response")
    assert (config.judge, config.max_new_tokens, config.dtype, config.samples) == ("wei2024", 256, "bfloat16", 128)
    plain = config_of(name, "")
    methods = {method: tuple(plain[method]) for method in METHODS}
    assert len(grid_of(plain)) == len(points(methods, 3, Protocol(controls_by=("number", "norm"))))
    with pytest.raises(ValueError, match="variant 'paper' is not known; the variants are"):
        config_of(name, "paper")
