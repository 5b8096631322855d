"""The range of layers that is not trained: how it is found, and what of it is named."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import PROMPTS, tiny_chat_model, tiny_config, tiny_params

from jaxsafe.evaluation.judges.keyword import KeywordJudge
from jaxsafe.io.store import Store
from jaxsafe.kernels.units import layer_mask
from jaxsafe.methods import layer_scan
from jaxsafe.methods.layer_scan import ScanSettings, safety_layers, safety_layers_once, scaled, scan_layers, times
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, linear_maps

CONFIG = tiny_config(layers=4)


def test_only_the_maps_of_the_range_are_scaled():
    params = tiny_params(CONFIG)
    ours = flatten(scaled(CONFIG, params, LayerRange(1, 3), 1.5))
    for path, weight in flatten(params).items():
        factor = np.where(np.isin(np.arange(4), [1, 2]), 1.5, 1.0) if path in linear_maps(CONFIG) else np.ones(1)
        wanted = np.asarray(weight) * factor.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float32)
        np.testing.assert_array_equal(ours[path], wanted)
    before = times._cache_size()
    scaled(CONFIG, params, LayerRange(0, 2), 0.7)
    assert times._cache_size() == before


def test_the_scan_moves_the_upper_end_and_then_the_lower():
    tried = []
    counts = {(2, 3): 1, (2, 4): 5, (2, 5): 5, (2, 6): 4, (0, 4): 2, (1, 4): 7, (3, 4): 7}

    def refused(layers):
        tried.append(layers and (layers.first, layers.stop))
        return counts.get(tried[-1], 0)

    found = scan_layers(refused, 6, LayerRange(2, 4))
    assert (found.first, found.stop) == (1, 4)
    assert [p.stop for p in found.upper] == [3, 4, 5, 6] and [p.first for p in found.lower] == [0, 1, 2, 3]
    assert [p.refused for p in found.lower] == [2, 7, 5, 7]
    assert tried[0] is None and len(set(tried)) == len(tried)
    with pytest.raises(ValueError, match="layers 4 to 6 are no range of this model, which has layers 0 to 5"):
        scan_layers(refused, 6, LayerRange(4, 7))


def test_refusals_are_counted_on_the_scaled_model(tmp_path):
    model = tiny_chat_model(tmp_path)
    odd = KeywordJudge("odd", "1", lambda text: len(text) % 2 == 1)
    heard = []
    found = safety_layers(model, PROMPTS, odd, ScanSettings(LayerRange(1, 2), 1.4, 5, 8), heard.append)
    assert [p.stop for p in found.upper] == [2, 3]
    assert sum(heard) == len(PROMPTS) * (1 + len(found.upper) + len(found.lower) - 1)
    dense = safety_layers(model, PROMPTS, odd, ScanSettings(LayerRange(1, 2), 1.0 + 1e-7, 5, 8))
    assert {p.refused for p in (*dense.upper, *dense.lower)} == {dense.dense}
    assert found.dense == dense.dense and {p.refused for p in found.upper} != {found.dense}
    for alpha in (0.0, 1.0, -2.0):
        with pytest.raises(ValueError, match="scales nothing"):
            ScanSettings(LayerRange(1, 2), alpha)


def test_scans_are_made_once(tmp_path, monkeypatch):
    model, store = tiny_chat_model(tmp_path), Store(tmp_path)
    odd, how = KeywordJudge("odd", "1", lambda text: len(text) % 2 == 1), ScanSettings(LayerRange(1, 2), 1.4, 5, 8)
    wanted, made = safety_layers(model, PROMPTS, odd, how), []
    assert safety_layers_once(store, model, PROMPTS, odd, how) == wanted

    def noted(*given):
        made.append(given)
        return wanted

    monkeypatch.setattr(layer_scan, "safety_layers", noted)
    assert safety_layers_once(store, model, PROMPTS, odd, how) == wanted and not made
    changes = [{"start": LayerRange(0, 2)}, {"alpha": 1.3}, {"max_new_tokens": 4}]
    others = [
        (model.with_params(tiny_params(model.config, 1)), PROMPTS, odd, how),
        (model.with_prompt("Be short."), PROMPTS, odd, how),
        (model, PROMPTS[1:], odd, how),
        (model, PROMPTS, dataclasses.replace(odd, version="2"), how),
        (model, PROMPTS, dataclasses.replace(odd, name="other"), how),
        *((model, PROMPTS, odd, dataclasses.replace(how, **change)) for change in changes),
    ]
    for other in others:
        safety_layers_once(store, *other)
    assert len(made) == len(others)


def test_an_interrupted_scan_goes_on_from_its_ranges(tmp_path):
    model, store = tiny_chat_model(tmp_path), Store(tmp_path)
    odd, how = KeywordJudge("odd", "1", lambda text: len(text) % 2 == 1), ScanSettings(LayerRange(1, 2), 1.4, 5, 8)
    log = store.log("layers", 0)

    def stopped(n):
        if len(log.entries()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        safety_layers(model, PROMPTS, odd, how, stopped, log)
    before = log.entries()
    assert len(before) == 2  # the one in hand is lost
    assert safety_layers(model, PROMPTS, odd, how, log=log) == safety_layers(model, PROMPTS, odd, how)
    assert log.entries()[:2] == before and len({tuple(entry[:2]) for entry in log.entries()}) == len(log.entries())


def test_the_mask_names_maps_alone():
    mask = flatten(layer_mask(CONFIG, LayerRange(1, 3)))
    assert mask.keys() == linear_maps(CONFIG).keys()
    for path, part in mask.items():
        assert part.shape == flatten(tiny_params(CONFIG))[path].shape
        assert [bool(layer.all()) for layer in part] == [False, True, True, False]
        assert not part[0].any() and not part[3].any()
    with pytest.raises(ValueError, match="layers 2 to 4 are no range of this model, which has layers 0 to 3"):
        layer_mask(CONFIG, LayerRange(2, 5))
    assert jax.tree.leaves(layer_mask(CONFIG, LayerRange(0, 4)))[0].all()
