"""Presets: the published numbers of parameters, and the configuration files that transformers itself understands."""

import pytest

from jaxsafe.model.families import config_from_hf, config_to_hf
from jaxsafe.model.presets import PRESETS, preset
from jaxsafe.model.weights import count_parameters, shapes

# As the published checkpoints hold them.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-4b": 3_880_263_168,  # of the text model
    "olmo-3-7b": 7_298_011_136,
}


@pytest.mark.parametrize("name", PRESETS)
def test_as_many_parameters_as_published(name):
    assert count_parameters(shapes(preset(name))) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_configuration_file_says(name):
    config = preset(name)
    assert config_from_hf(config_to_hf(config), "bfloat16") == config


def test_what_the_families_differ_in():
    assert preset("llama3.1-8b").rope.theta == 500_000 and preset("llama3.1-8b").rope.factor == 8
    assert preset("mistral-7b-v0.1").window == 4096 and preset("mistral-7b-v0.1").rope.theta == 10_000
    assert preset("mistral-7b-v0.2").window is None and preset("mistral-7b-v0.2").rope.theta == 1_000_000
    assert preset("llama2-13b").rope.theta == 10_000 and preset("llama2-13b").context == 4096
    assert preset("smollm2-135m").rope.theta == 100_000 and preset("smollm2-135m").tied


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"'llama-2-7b' is no preset; did you mean 'llama2-7b'"):
        preset("llama-2-7b")
