"""Adapters in PEFT's folders: merged as NumPy merges them, written and read again, and held against PEFT itself."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from folders import write_folder
from safetensors.numpy import load_file, save_file
from tiny import PROMPTS, tiny_config, tiny_params, tiny_tokenizer

from jaxsafe.chat.model import load_chat_model
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import Adapted, load_hf
from jaxsafe.io.peft import base_of, read_adapter, read_settings, save_peft
from jaxsafe.kernels import lora
from jaxsafe.kernels.lora import LoRA, merge_adapters
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten, hf_view
from jaxsafe.study.record import model_record

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(tokenizer)
    config = tiny_config()
    return save_hf(folder, config, tiny_params(config), like=tokenizer)


def factors(shapes, rank=2, seed=0):
    """Random factors of modules {name: (I, O)} by the names that PEFT gives them."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, (i, o) in shapes.items():
        out[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((rank, i)).astype(np.float32)
        out[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((o, rank)).astype(np.float32)
    return out


def write_adapter(folder, tensors=None, **attributes):
    folder.mkdir(exist_ok=True)
    tensors = factors({Q: (32, 32), DOWN: (48, 32)}) if tensors is None else tensors
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(usual | attributes))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def merged_by_hand(weights, tensors, scales):
    out = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    for module, scale in scales.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        out[f"{module}.weight"] = out[f"{module}.weight"] + scale * b @ a
    return out


def check_merged(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(np.asarray(found[name]), array, rtol=1e-6, atol=1e-6, err_msg=name)


CASES = {
    "plain": ({}, {Q: 3.0, DOWN: 3.0}),
    "rslora": ({"use_rslora": True}, {Q: 6 / 2**0.5, DOWN: 6 / 2**0.5}),
    "regex": ({"target_modules": r".*\.(1|2)\.(self_attn\.q|mlp\.down)_proj"}, {Q: 3.0, DOWN: 3.0}),
    "all linear": ({"target_modules": "All-Linear"}, {Q: 3.0, DOWN: 3.0}),
    "full names": ({"target_modules": [Q, DOWN]}, {Q: 3.0, DOWN: 3.0}),
    "flags": ({"target_modules": r"(?i).*(Q|DOWN)_PROJ"}, {Q: 3.0, DOWN: 3.0}),
    "excluded": ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, {Q: 3.0, DOWN: 3.0}),
    "layers": ({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, {Q: 3.0, DOWN: 3.0}),
    "layers anywhere": ({"layers_to_transform": [1, 2], "layers_pattern": ""}, {Q: 3.0, DOWN: 3.0}),
    "layers by groups": (
        {"layers_to_transform": [1, 2], "layers_pattern": ["h", "(lay|b)(er|lock)s"]},
        {Q: 3.0, DOWN: 3.0},
    ),
    "alpha pattern": ({"alpha_pattern": {"layers.2.mlp.down_proj": 5}}, {Q: 3.0, DOWN: 2.5}),
    "rank pattern": ({"r": 8, "rank_pattern": {r".*q_proj": 2, "down_proj": 2}}, {Q: 3.0, DOWN: 3.0}),
    "silent": (
        {"lora_dropout": 0.1, "inference_mode": True, "use_dora": False, "fan_in_fan_out": True},
        {Q: 3.0, DOWN: 3.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_added_as_it_was_trained(base, tmp_path, case):
    attributes, scales = CASES[case]
    tensors = factors({Q: (32, 32), DOWN: (48, 32)})
    adapter = write_adapter(tmp_path / "adapter", tensors, base_model_name_or_path=str(base), **attributes)
    config, params = load_hf(base)
    wanted = merged_by_hand(hf_view(config, params), tensors, scales)
    for name in (Adapted(base, adapter), adapter):
        check_merged(hf_view(config, load_hf(name)[1]), wanted)


def test_a_run_of_an_adapter_is_that_of_the_merged_folder(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    ours = load_chat_model(Adapted(base, adapter))
    folder = save_hf(tmp_path / "merged", ours.config, ours.params, like=base)
    theirs, plain = load_chat_model(folder), load_chat_model(base)
    assert ours.fingerprint() == theirs.fingerprint() != plain.fingerprint()
    assert ours.answers(PROMPTS[:2]).texts == theirs.answers(PROMPTS[:2]).texts
    assert model_record(ours).adapter_sha256 == read_adapter(adapter).sha256 and ours.name == f"{base} + {adapter}"
    assert model_record(theirs).adapter_sha256 is None
    other = write_adapter(tmp_path / "other", lora_alpha=7)
    assert read_adapter(other).sha256 != read_adapter(adapter).sha256


def test_adapters_are_merged_on_a_mesh_and_in_bfloat16(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for dtype in ("float32", "bfloat16"):
        one, many = (flatten(load_hf(Adapted(base, adapter), dtype, where)[1]) for where in (None, mesh))
        for path, leaf in one.items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(many[path]), err_msg=path)
        folder = save_hf(tmp_path / dtype, *load_hf(Adapted(base, adapter), dtype))
        for path, leaf in flatten(load_hf(folder, dtype)[1]).items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(one[path]), err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_adapters_come_back_from_their_folder(family, tmp_path):
    base = GOLDEN / family
    config, params = load_hf(base, "float32")
    settings = LoRA(rank=3, alpha=5.0)
    adapters = lora.init(config, settings, seed=1)
    adapters = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    save_peft(tmp_path / "adapter", config, adapters, settings.alpha, str(base))
    assert base_of(tmp_path / "adapter") == str(base)
    wanted = flatten(merge_adapters(config, params, adapters, settings.alpha))
    for path, leaf in flatten(load_hf(Adapted(base, tmp_path / "adapter"), "float32")[1]).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_some_of_the_maps_that_a_family_fuses(tmp_path):
    base = GOLDEN / "phi3"
    config, params = load_hf(base, "float32")
    adapters = lora.init(config, LoRA(2, 4.0, ("k", "gate", "o")), seed=1)
    adapters = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    save_peft(tmp_path / "adapter", config, adapters, 4.0)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"qkv_proj", "gate_up_proj", "o_proj"}
    wanted = flatten(merge_adapters(config, params, adapters, 4.0))
    for path, leaf in flatten(load_hf(Adapted(base, tmp_path / "adapter"), "float32")[1]).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_a_head_of_its_own_may_be_adapted_and_a_tied_one_not(tmp_path):
    head = factors({"lm_head": (32, 300)})
    adapter = write_adapter(tmp_path / "adapter", head, target_modules=["lm_head"])
    for tied in (False, True):
        config = ModelConfig(**vars(tiny_config()) | {"tied": tied})
        folder = write_folder(tmp_path / f"tied-{tied}", config)
        if tied:
            with pytest.raises(ValueError, match="adapter changes lm_head, which is no linear map of this model"):
                load_hf(Adapted(folder, adapter))
        else:
            wanted = merged_by_hand(hf_view(config, load_hf(folder)[1]), head, {"lm_head": 3.0})
            check_merged(hf_view(config, load_hf(Adapted(folder, adapter))[1]), wanted)


HOSTILE = r"(.*)*[A-Z]"
TOO_SLOW = "adapter_config.json cannot be read: its patterns take more than 1 second or 1024 MiB to match"
REFUSED = {
    "ia3": ({"peft_type": "IA3"}, "has peft_type 'IA3'; only adapters of the type 'LORA'"),
    "dora": ({"use_dora": True}, "has use_dora True, which is not read"),
    "biases": ({"bias": "all"}, "has bias 'all', which is not read"),
    "lora bias": ({"lora_bias": True}, "has lora_bias True"),
    "saved modules": ({"modules_to_save": ["embed_tokens"]}, r"has modules_to_save \['embed_tokens'\]"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4'"),
    "classifier": ({"task_type": "SEQ_CLS"}, "has task_type 'SEQ_CLS'"),
    "replicated": ({"layer_replication": [[0, 2], [1, 3]]}, "has layer_replication"),
    "unknown": ({"use_marvel": 3}, "has use_marvel 3"),
    "untargeted": ({"target_modules": ["q_proj"]}, f"holds {DOWN}, which target_modules .* does not name"),
    "excluded": ({"exclude_modules": ["down_proj"]}, f"holds {DOWN}"),
    "other layers": ({"layers_to_transform": [0, 2]}, f"holds {Q}"),
    "rank": ({"r": 4}, r"has factors \[2, 32\] and \[32, 2\]; adapter_config.json says rank 4"),
    "no rank": ({"r": 0}, "has r 0"),
    "no rank of one": ({"rank_pattern": {"q_proj": 0}}, "has rank_pattern {'q_proj': 0}"),
    "infinite": ({"lora_alpha": 1e300}, r"has lora_alpha 1e\+300"),
    "infinite of one": ({"alpha_pattern": {"q_proj": 1e300}}, "has alpha_pattern {'q_proj': 1e"),
    "head": ({"target_modules": r"(.*\.)?lm_head"}, f"holds {Q}, which target_modules"),
    "types": ({"r": "two"}, "adapter_config.json cannot be read: .*int"),
    "pattern": (
        {"rank_pattern": {"(": 2}},
        "adapter_config.json cannot be read: it holds what is no regular expression",
    ),
    "slow targets": ({"target_modules": HOSTILE}, TOO_SLOW),
    "slow ranks": ({"rank_pattern": {HOSTILE: 2}}, TOO_SLOW),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_honoured_are_refused_by_name(tmp_path, case):
    attributes, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as error:
        read_adapter(write_adapter(tmp_path / "adapter", **attributes))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


A = f"base_model.model.{Q}.lora_A.weight"
TENSORS = {
    "embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 3), np.float32)},
        "lora_embedding_A",
    ),
    "one factor": ({A: np.zeros((2, 32), np.float32)}, "one factor alone"),
    "not finite": (
        factors({Q: (32, 32)}) | {A: np.full((2, 32), np.nan, np.float32)},
        "finite",
    ),
    "other shape": (factors({Q: (31, 32)}), r"is of a map \[32, 31\]; this model's is \[32, 32\]"),
    "other layer": (
        factors({"model.layers.9.self_attn.q_proj": (32, 32)}),
        "layers.9.self_attn.q_proj, which is no",
    ),
    "image part": (
        factors({"model.vision_tower.q_proj": (32, 32)}),
        "model.vision_tower.q_proj, which is no linear map",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_honoured_are_refused_by_name(base, tmp_path, case):
    tensors, said = TENSORS[case]
    with pytest.raises(ValueError, match=said):
        load_hf(Adapted(base, write_adapter(tmp_path / "adapter", tensors)))


def test_folders_that_are_no_adapter_or_lack_their_base(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_hf(Adapted(base, base))
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path="meta-llama/nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"an adapter \(LoRA\) of the base 'meta-llama/nowhere', which is not here"
    ):
        load_chat_model(adapter)
    write_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"an adapter \(LoRA\) that names no base; give the base as model"):
        load_chat_model(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors .*pickled"):
        load_chat_model(Adapted(base, adapter))


def test_a_template_beside_the_adapter_is_its_own(base, tmp_path, monkeypatch):
    adapter, opened = write_adapter(tmp_path / "adapter"), []
    open_tokenizer = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda path, **k: opened.append(path) or open_tokenizer(path, **k),
    )
    tiny_tokenizer(adapter, template="{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>")
    chat = load_chat_model(Adapted(base, adapter))
    assert sorted(opened) == sorted([str(base), str(adapter)])  # a tokenizer takes seconds to open
    assert chat.template_sha256 != load_chat_model(base).template_sha256
    tiny_tokenizer(adapter, eos=5)
    with pytest.raises(ValueError, match=r"ends answers at \[2, 5\], the base .* at \[2\]"):
        load_chat_model(Adapted(base, adapter))


def test_a_folder_of_something_else_is_left_alone(base):
    config = tiny_config()
    with pytest.raises(FileExistsError):
        save_peft(base, config, lora.init(config, LoRA(), 0), 16.0)
    with pytest.raises(ValueError, match="do not fit the model"):
        save_peft(base, tiny_config(layers=2), lora.init(config, LoRA(), 0), 16.0)


# --- PEFT itself


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "ministral"])
def test_peft_gives_the_same_logits_both_ways(family, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, stored = GOLDEN / family, np.load(GOLDEN / f"{family}.npz")
    tokens, valid = stored["tokens"][:1], stored["valid"][:1]
    tokens = tokens[:, valid[0]]

    def theirs(model):
        with torch.no_grad():
            return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()

    def ours(name):
        config, params = load_hf(name, "float32")
        return np.asarray(forward(config, params, jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool)))

    config, _ = load_hf(base, "float32")
    adapters = lora.init(config, LoRA(rank=3, alpha=2.0), seed=1)
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    save_peft(tmp_path / "ours", config, adapters, 2.0, str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    plain = theirs(model)
    loaded = theirs(peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval())
    np.testing.assert_allclose(ours(Adapted(base, tmp_path / "ours")), loaded, atol=1e-5)
    assert np.abs(loaded - plain).max() > 1e-2

    fused = family == "phi3"
    maps = r".*\.(qkv_proj|down_proj)" if fused else r".*\.(q_proj|down_proj)"
    settings = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=maps, use_rslora=True, init_lora_weights=False,
        rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.0\.mlp\.down_proj": 5}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    trained = peft.get_peft_model(model, settings).eval()
    trained.save_pretrained(tmp_path / "theirs")
    wanted = theirs(trained)
    np.testing.assert_allclose(ours(tmp_path / "theirs"), wanted, atol=1e-5)
    assert np.abs(wanted - plain).max() > 1e-2
    assert re.search(str(base), str(read_settings(tmp_path / "theirs").base_model_name_or_path))
