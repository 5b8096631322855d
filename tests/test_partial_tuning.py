"""The range of layers that is not trained: how it is found, and what of it is named."""

import jax
import numpy as np
import pytest
from tiny import PROMPTS, tiny_chat_model, tiny_config, tiny_params

from jaxsafe.evaluation.judges import Judge
from jaxsafe.methods.partial_tuning import layer_mask, safety_layers, scaled, scan_layers
from jaxsafe.model.weights import flatten, linear_maps

CONFIG = tiny_config(layers=4)


def test_only_the_maps_of_the_range_are_scaled():
    params = tiny_params(CONFIG)
    ours = flatten(scaled(CONFIG, params, 1, 3, 1.5))
    for path, weight in flatten(params).items():
        factor = np.where(np.isin(np.arange(4), [1, 2]), 1.5, 1.0) if path in linear_maps(CONFIG) else np.ones(1)
        wanted = np.asarray(weight) * factor.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float32)
        np.testing.assert_array_equal(ours[path], wanted)
    before = scaled._cache_size()
    scaled(CONFIG, params, 0, 2, 0.7)
    assert scaled._cache_size() == before


def test_the_scan_moves_the_upper_end_and_then_the_lower():
    tried = []
    counts = {(2, 3): 1, (2, 4): 5, (2, 5): 5, (2, 6): 4, (0, 4): 2, (1, 4): 7, (3, 4): 7}

    def refused(first, stop):
        tried.append((first, stop))
        return counts.get((first, stop), 0)

    found = scan_layers(refused, 6, 2, 4)
    assert (found.first, found.stop) == (1, 4)
    assert [p["stop"] for p in found.upper] == [3, 4, 5, 6] and [p["first"] for p in found.lower] == [0, 1, 2, 3]
    assert [p["refused"] for p in found.lower] == [2, 7, 5, 7]
    assert tried[0] == (0, 0) and len(set(tried)) == len(tried)
    with pytest.raises(ValueError, match="layers 4 to 4 are no range of the 6 layers"):
        scan_layers(refused, 6, 4, 4)


def test_refusals_are_counted_on_the_scaled_model(tmp_path):
    model = tiny_chat_model(tmp_path)
    odd = Judge("odd", "1", lambda text: len(text) % 2 == 1)
    heard = []
    found = safety_layers(model, PROMPTS, odd, 1.4, 1, 2, 5, 8, heard.append)
    assert [p["stop"] for p in found.upper] == [2, 3]
    assert sum(heard) == len(PROMPTS) * (1 + len(found.upper) + len(found.lower) - 1)
    dense = safety_layers(model, PROMPTS, odd, 1.0 + 1e-7, 1, 2, 5, 8)
    assert {p["refused"] for p in (*dense.upper, *dense.lower)} == {dense.dense}
    assert found.dense == dense.dense and {p["refused"] for p in found.upper} != {found.dense}
    for alpha in (0.0, 1.0, -2.0):
        with pytest.raises(ValueError, match="scales nothing"):
            safety_layers(model, PROMPTS, odd, alpha, 1, 2)


def test_the_mask_names_maps_alone():
    mask = flatten(layer_mask(CONFIG, 1, 3))
    assert mask.keys() == linear_maps(CONFIG).keys()
    for path, part in mask.items():
        assert part.shape == flatten(tiny_params(CONFIG))[path].shape
        assert [bool(layer.all()) for layer in part] == [False, True, True, False]
        assert not part[0].any() and not part[3].any()
    with pytest.raises(ValueError, match="no range of the 4 layers"):
        layer_mask(CONFIG, 2, 5)
    assert jax.tree.leaves(layer_mask(CONFIG, 0, 4))[0].all()
