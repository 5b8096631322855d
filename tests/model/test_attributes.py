"""Attributes of other kinds, of every family: a configuration, or one line that names what is wrong."""

import pytest
from families import FAMILY_MODELS
from mutations import json_mutated

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.families import config_from_hf, config_to_hf


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_changed_attributes_are_read_or_named(name):
    made = 0
    for seed in range(300):
        attributes = json_mutated(FAMILY_MODELS[name], seed)
        if not isinstance(attributes, dict):
            continue  # a file of these is refused where it is read
        try:
            config = config_from_hf(attributes)
        except ValueError as error:
            assert str(error) and "\n" not in str(error), seed
            continue
        assert isinstance(config, ModelConfig) and len(config.windows) == len(config.layer_ropes) == config.layers
        assert config_from_hf(config_to_hf(config), config.dtype) == config, seed
        made += 1
    assert 0 < made < 300
