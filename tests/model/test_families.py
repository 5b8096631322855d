"""Each family: the logits and greedy tokens of transformers, cached and not, and files that come back bit by bit."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import logits_of, new_cache, padded
from families import FAMILY_MODELS
from safetensors.numpy import load_file, save_file

from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.model.attention import Slots
from jaxsafe.model.config import Rope
from jaxsafe.model.families import FAMILIES, REFUSED, config_from_hf, config_to_hf
from jaxsafe.model.transformer import Transformer, rms_norm
from jaxsafe.model.weights import count_parameters
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import Row, check_context

LENGTHS = [56, 48, 9]


@pytest.fixture(params=FAMILY_MODELS)
def attributes(request):
    return FAMILY_MODELS[request.param]


@pytest.mark.slow
def test_parity_with_transformers(attributes, tmp_path):
    torch = pytest.importorskip("torch")
    from make import torch_logits, torch_model

    model = torch_model(attributes)
    model.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    assert count_parameters(params) == sum(p.numel() for p in model.parameters())
    tokens, valid = padded(config, LENGTHS)
    logits = np.asarray(logits_of(config, params, tokens, valid))
    theirs = torch_logits(model, tokens, valid)
    assert np.abs(theirs[valid]).max() > 0.3
    np.testing.assert_allclose(logits[valid], theirs[valid], atol=1e-5, rtol=0)
    decode_model = Transformer(config)

    @jax.jit
    def step(part, seen, cache, slot):
        return decode_model.apply({"params": params}, part, Slots(seen, slot), cache)

    new = 6
    seen = np.concatenate([valid, np.ones((3, new), bool)], 1)
    logits, cache = step(tokens, seen, new_cache(config, 3, 56 + new), 0)
    answer = [jnp.argmax(logits[:, -1], -1)]
    for i in range(new - 1):
        logits, cache = step(answer[-1][:, None].astype(jnp.int32), seen, cache, 56 + i)
        answer.append(jnp.argmax(logits[:, -1], -1))
    ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(valid).long()
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)[:, 56:]
    np.testing.assert_array_equal(np.stack(answer, 1), expected.numpy())


def test_there_and_back_is_byte_identical(attributes, tmp_path):
    torch = pytest.importorskip("torch")
    from make import torch_logits, torch_model
    from transformers import AutoModelForCausalLM

    torch_model(attributes).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    config, params = load_hf(tmp_path / "source", mesh=parse_mesh("data:-1,model:2"))
    assert config.dtype == "bfloat16"
    save_hf(tmp_path / "copied", config, params, like=tmp_path / "source")
    save_hf(tmp_path / "written", config, params)
    file = tmp_path / "written" / "config.json"  # token ids of a class's own defaults are beyond this vocabulary
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 0}))
    source = load_file(tmp_path / "source" / "model.safetensors")
    tokens, valid = padded(config, [50, 9])
    logits = []
    for name in ("source", "copied", "written"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert {k: (v.shape, v.tobytes()) for k, v in tensors.items()} == {
            k: (v.shape, v.tobytes()) for k, v in source.items()
        }
        model, about = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True, local_files_only=True
        )
        assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
        logits.append(torch_logits(model, tokens, valid)[valid])
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_written_and_read_again(name):
    from transformers import AutoConfig

    config = config_from_hf(FAMILY_MODELS[name])
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    theirs = AutoConfig.for_model(**config_to_hf(config))
    assert config_from_hf(theirs.to_dict()) == config
    assert config_from_hf(theirs.to_diff_dict()) == config


ABSENT = [family for family in FAMILIES if family not in ("llama", "mistral")]


@pytest.mark.parametrize("family", ABSENT)
def test_absent_attributes_mean_what_they_mean_in_transformers(family):
    from transformers import AutoConfig

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 7, "num_attention_heads": 32}
    assert config_from_hf(sizes | {"model_type": family}) == config_from_hf(
        AutoConfig.for_model(family, **sizes).to_dict()
    )


# Attributes that say nothing about the function, or nothing beside others that say it.
SILENT = {"architectures", "attention_dropout", "bos_token_id", "cache_implementation", "dtype", "eos_token_id"}
SILENT |= {"initializer_range", "pad_token_id", "transformers_version", "use_cache", "_sliding_window_pattern"}
SILENT |= {"no_rope_layer_interval", "max_window_layers"}  # beside no_rope_layers and layer_types


def changed(value):
    """Other values of the kind of `value`."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value * 2 + 1, value + 2]
        case str():
            return ["something else"]
        case [bool() | int(), *_] | [float(), *_]:
            return [[1 - value[0], *value[1:]]]
        case [str(), *_]:
            return [["full_attention" if value[0] != "full_attention" else "sliding_attention", *value[1:]]]
        case dict():
            # Long factors are those beyond the context, which the attribute outside says where there is one.
            outside = {"long_factor", "original_max_position_embeddings"} if "long_factor" in value else set()
            read = {key: inner for key, inner in value.items() if key not in outside}
            return [value | {key: other} for key, inner in read.items() for other in changed(inner)]
        case None:
            return [7]
    raise AssertionError(value)


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_an_attribute_that_changes_is_read_or_refused(family):
    attributes = FAMILY_MODELS[family]
    stored = pathlib.Path(__file__).parents[1] / "golden" / family / "config.json"
    attributes = json.loads(stored.read_text()) if stored.is_file() else attributes
    config = config_from_hf(attributes)
    full = set(attributes.get("layer_types") or ()) == {"full_attention"}
    unused = {"sliding_window", "use_sliding_window"} if full else set()
    for name in sorted(attributes.keys() - SILENT - unused):
        for value in changed(attributes[name]):
            try:
                other = config_from_hf(attributes | {name: value})
            except ValueError:
                continue
            assert other != config, f"{name}={value!r} is silently ignored"


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_families_are_named_with_a_reason(kind):
    with pytest.raises(ValueError, match=f"model_type '{kind}' is not supported: its .* not implemented") as error:
        config_from_hf({"model_type": kind})
    assert "\n" not in str(error.value)


def test_the_text_model_of_a_model_with_images(tmp_path):
    """Both spellings of its names; the text model alone is exported."""
    pytest.importorskip("torch")
    from make import torch_logits, torch_model
    from transformers import AutoModelForCausalLM

    attributes = FAMILY_MODELS["gemma3"]
    model = torch_model(attributes)
    model.save_pretrained(tmp_path / "text")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    other = {"vision_tower.layer.weight": np.zeros((2, 2), np.float32)}
    for spelling in ("language_model.model.", "model.language_model."):
        folder = tmp_path / spelling
        folder.mkdir()
        renamed = {spelling + name.removeprefix("model."): array for name, array in tensors.items()}
        save_file(renamed | other, folder / "model.safetensors")
        outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
        outer |= {"text_config": attributes, "torch_dtype": "float32", "image_token_index": 7, "eos_token_id": [1, 5]}
        (folder / "config.json").write_text(json.dumps(outer))
        config, params = load_hf(folder)
        assert config == load_hf(tmp_path / "text")[0]
        out = save_hf(tmp_path / f"{spelling}out", config, params, like=folder)
        written = json.loads((out / "config.json").read_text())
        assert (written["model_type"], written["eos_token_id"]) == ("gemma3_text", [1, 5])
        tokens, valid = padded(config, [50, 9])
        again = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        ours, theirs = (torch_logits(m, tokens, valid)[valid] for m in (again, model))
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_a_sparse_text_config_has_the_defaults_of_its_class():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config = config_from_hf(outer)
    assert (config.vocab, config.heads, config.kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert config.rope == Rope(1e6, "linear", 8.0) and config.local_rope == Rope()
    assert config.windows[:6] == (1024,) * 5 + (None,) and config.tied


def test_long_contexts_of_phi_are_refused():
    config = config_from_hf(FAMILY_MODELS["phi3"])
    assert config.context == 64 and config.rope.divisors == (1.0, 1.5, 2.5)
    with pytest.raises(ValueError, match="65 tokens; the model's context is 64 tokens"):
        check_context([Row(tuple(range(65)), 64)], config.context)


@pytest.mark.parametrize(("norm", "weight"), [("rounded", 1.0), ("float32", 1.0), ("plus_one", 0.0)])
def test_norms_round_where_their_family_rounds(norm, weight):
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    scale = (weight + jax.random.normal(jax.random.key(1), (64,)) / 4).astype(jnp.bfloat16)
    wide, s = np.asarray(x, np.float32), np.asarray(scale, np.float32)
    y = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6)
    by_form = {
        "rounded": (y.astype(jnp.bfloat16).astype(np.float32) * s).astype(jnp.bfloat16),
        "float32": (y * s).astype(jnp.bfloat16),
        "plus_one": (y * (1 + s)).astype(jnp.bfloat16),
    }
    ours = np.asarray(rms_norm(x, scale, 1e-6, norm), np.float32)
    differ = {form: np.mean(ours != np.asarray(theirs, np.float32)) for form, theirs in by_form.items()}
    assert differ[norm] < 0.02 and min(share for form, share in differ.items() if form != norm) > 0.05
