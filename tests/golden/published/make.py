"""Makes the arrays beside this file by calling the functions that the two papers' authors published.

    python make.py ALIGNMENT_ATTRIBUTION SCANS

with the folders of two clones: boyiwei/alignment-attribution-code (arXiv 2402.05162) and zouyingcao/SCANS
(arXiv 2408.11491), at the commits that about.json names. Needs torch, pandas, scikit-learn and transformers 4.40,
whose blocks those functions call. Each model is a folder to load, each `<name>.npz` the arrays of one paper.

What is put in the place of parts of theirs: loaders give the rows that are written here (tokens are what a score
follows from), devices are the CPU, hidden states stay float32 where theirs are rounded to half precision, and
`torch.svd_lowrank`, whose directions are drawn, is the exact decomposition in float64.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MODELS = {"mha": 4, "gqa": 2}
SHAPES = {"safety": ((14, 6), (15, 9), (12, 8), (16, 11)), "utility": ((15, 9), (13, 8), (16, 12), (11, 6))}
DATA = {"safety": "align_short", "utility": "alpaca_cleaned_no_safety"}
LOW, HIGH, PART = 0.3, 0.1, (0.3, 0.2)  # shares removed; p and q of the set difference
RANK, RANK_UTILITY, RANK_SAFETY = 3, 9, 12
LAYERS, THRESHOLD = (0, 2), 0.5  # the last layer is left out: theirs is read behind the final norm
STRINGS = (
    "I'm sorry, but I cannot help you with that.",
    "I cannot guarantee that the bread will rise, but you can try a warmer kitchen.",
    "Sure, here is a recipe: mix flour, water and salt, then wait for an hour and bake it in a hot oven until brown.",
    "Sorry to say it, but the library is closed on Mondays.",
    "As an AI language model, I don't have personal opinions about tea.",
    "",
    "It is not appropriate to wear muddy shoes indoors, so please leave them by the door when you come in today.",
    "i'm sorry, I can't",
    "The chess clock was moved; I do not have direct access to it on your behalf, and so you may want to ask the club.",
    "However, the river freezes in winter and boats stay in the harbour until the ice has gone, usually in late March.",
)


def tiny(heads: int, seed: int) -> LlamaForCausalLM:
    """A lively random Llama, float32."""
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**SIZES, num_key_value_heads=heads), attn_implementation="eager", torch_dtype=torch.float32
    )
    rng = np.random.default_rng(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = rng.standard_normal(tuple(weight.shape))
        scaled = (
            1 + 0.2 * noise if "norm" in name else noise if "embed" in name else 1.4 * noise / weight.shape[1] ** 0.5
        )
        weight.data = torch.tensor(scaled, dtype=torch.float32)
    model.seqlen, model.hf_device_map = SIZES["max_position_embeddings"], {}
    return model.eval()


def rows(shapes: tuple, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) [1, T] of rows of so many tokens, the last of which are the response; -100: not counted."""
    rng, out = np.random.default_rng(seed), []
    for length, response in shapes:
        tokens = torch.from_numpy(rng.integers(3, SIZES["vocab_size"], (1, length)))
        targets = tokens.clone()
        targets[:, : length - response] = -100
        out.append((tokens, targets))
    return out


ROWS = {side: rows(shapes, seed) for seed, (side, shapes) in enumerate(SHAPES.items())}


def exact_svd(scores: torch.Tensor, q: int, niter: int) -> tuple[torch.Tensor, ...]:
    """The first `q` singular triples, without a draw."""
    U, S, Vh = torch.linalg.svd(scores.double(), full_matrices=False)
    return U[:, :q].float(), S[:q].float(), Vh[:q].T.float()


def published(folder: pathlib.Path, name: str) -> ModuleType:
    """A module of a clone; what its file imports and no function called here uses is a stand-in."""
    sys.path.insert(0, str(folder))
    for absent in ("vllm", "datasets"):
        sys.modules.setdefault(absent, mock.MagicMock())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def loaders(name: str, **_: object) -> tuple[list, None]:
    """In the place of the published loaders: the rows above, by the name of the data set."""
    return ROWS[{theirs: side for side, theirs in DATA.items()}[name]], None


def settings(folder: str, side: str, **changes: object) -> SimpleNamespace:
    """The flags of the published scripts."""
    usual = {
        "model": "llama2-7b-chat-hf", "nsamples": len(ROWS[side]), "seed": 0, "disentangle": True, "use_diff": False,
        "recover_from_base": False, "prune_part": False, "neg_prune": False, "dump_wanda_score": False,
        "use_variant": False, "sparsity_ratio": 0.0, "prune_data": DATA[side], "save": folder, "dump_U": False,
        "rank": RANK, "rank_pos": RANK_UTILITY, "rank_neg": RANK_SAFETY, "niter": 20, "top_remove": True,
    }  # fmt: skip
    return SimpleNamespace(**(usual | changes))


def maps_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """{"layer.name": weight [out, in]} of the linear maps of the blocks."""
    names = {name: name.removeprefix("model.layers.").removesuffix(".weight") for name, _ in model.named_parameters()}
    kept = {short: name for name, short in names.items() if "proj" in name}
    return {short: model.get_parameter(name).detach().numpy().copy() for short, name in kept.items()}


def dumped(folder: str) -> dict[str, np.ndarray]:
    """{"layer.name": score [out, in]} of the files that a published function wrote."""
    out = {}
    for file in sorted(pathlib.Path(folder).rglob("*.pkl")):
        layer, name = re.match(
            r"W_metric_layer_(\d+)_name_(?:model\.layers\.\d+\.)?(\w+\.\w+_proj)", file.name
        ).groups()
        out[f"{layer}.{name}"] = pickle.loads(file.read_bytes()).float().numpy()
    return out


def run(function, model: LlamaForCausalLM, side: str, base: LlamaForCausalLM | None = None, **changes: object):
    """(weights after the function, scores that it dumped) from a call on one side's rows."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(function.__globals__, get_loaders=loaders):
        function(
            settings(folder, side, **changes), model, None, base, device=torch.device("cpu"), prune_data=DATA[side]
        )
        return maps_of(model), dumped(folder)


def difference(function, model: LlamaForCausalLM, scores: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Weights after the published set difference, which reads scores from files of fixed names."""
    p, q = PART
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for side, name in DATA.items():
            target = pathlib.Path(f"out/llama2-7b-chat-hf/unstructured/wandg/{name}/wanda_score")
            target.mkdir(parents=True)
            for key, score in scores[side].items():
                layer = key.split(".")[0]
                file = target / f"W_metric_layer_{layer}_name_model.layers.{key}_weight.pkl"
                file.write_bytes(pickle.dumps(torch.from_numpy(score)))
        function(settings(folder, "safety"), model, None, prune_data=DATA["safety"], p=p, q=q)
    return maps_of(model)


def zeros(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks of removed weights, as bits."""
    return {name: np.packbits(weight == 0) for name, weight in weights.items()}


def of_weights(folder: pathlib.Path, heads: int) -> dict[str, dict[str, np.ndarray]]:
    """Scores, masks and low-rank weights by the published functions on one tiny model."""
    prune, wrapped = published(folder, "lib.prune"), published(folder, "lib.model_wrapper")
    low, both = published(folder, "lib.model_wrapper_low"), published(folder, "main_low_rank_diff")
    fresh, base = functools.partial(tiny, heads, 0), tiny(heads, 1)
    scores = {"wanda": prune.prune_wanda, "snip": wrapped.prune_wandg}
    out = {}
    for name, function in scores.items():
        out[name] = run(function, fresh(), "safety", dump_wanda_score=True)[1]
        out[f"{name}_diff"] = run(function, fresh(), "safety", base, dump_wanda_score=True, use_diff=True)[1]
        out[f"{name}_bottom"] = zeros(run(function, fresh(), "safety", sparsity_ratio=LOW)[0])
        out[f"{name}_top"] = zeros(run(function, fresh(), "safety", sparsity_ratio=HIGH, neg_prune=True)[0])
    snip = {side: run(wrapped.prune_wandg, fresh(), side, dump_wanda_score=True)[1] for side in DATA}
    out["set_difference"] = zeros(difference(prune.prune_wandg_set_difference, fresh(), snip))
    if heads == SIZES["num_attention_heads"]:
        out |= of_ranks(low.make_low_rank, both.make_low_rank, fresh)
    return out


def of_ranks(one_sided, orthogonal, fresh) -> dict[str, dict[str, np.ndarray]]:
    """Weights without ranks; the published rule has no answer where keys have fewer ranks than the model is wide."""
    out = {}
    with mock.patch("torch.svd_lowrank", exact_svd):
        for name, top in (("top_ranks", True), ("bottom_ranks", False)):
            model = fresh()
            with mock.patch.dict(one_sided.__globals__, get_loaders=loaders):
                args = settings("", "safety", top_remove=top)
                one_sided(args, model, None, torch.device("cpu"), DATA["safety"])
            out[name] = maps_of(model)
        model = fresh()
        with mock.patch.dict(orthogonal.__globals__, get_loaders=loaders):
            orthogonal(settings("", "safety"), model, None, torch.device("cpu"), DATA["utility"], DATA["safety"])
        out["orthogonal"] = maps_of(model)
    return out


MARKS = {"<s>": 1, "[INST]": 3, "[/INST]": 4, "Sure": 5}


class Words:
    """A tokenizer whose words are the numbers of their tokens; as much of one as the published functions call."""

    def tokenize(self, text: str) -> list[str]:
        """The words, the markers also where no space stands around them."""
        return re.findall(r"<s>|\[INST\]|\[/INST\]|[^\s\[<]+", text)

    def convert_tokens_to_ids(self, words: list[str]) -> list[int]:
        """The tokens of the words."""
        return [MARKS[word] if word in MARKS else int(word) for word in words]

    def encode(self, text: str) -> list[int]:
        """The tokens with BOS in front."""
        return [1, *self.convert_tokens_to_ids(self.tokenize(text))]


def prompts(n: int, seed: int) -> list[str]:
    """Texts of 4 to 9 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(6, SIZES["vocab_size"], rng.integers(4, 10)))) for _ in range(n)]


def of_steering(folder: pathlib.Path, heads: int) -> dict[str, np.ndarray]:
    """Directions, reference, scores and verdicts of SCANS by the published functions on one tiny model."""
    scans, model, words = published(folder, "SCANS_llama"), tiny(heads, 0), Words()
    harmful, harmless, tested = prompts(6, 2), prompts(6, 3), prompts(12, 4)
    reading = scans.get_all_hidden_states_with_inst_pos

    def on_cpu(model, words, text, device):
        return reading(model, words, text, "cpu")

    with (
        mock.patch.object(torch.Tensor, "half", torch.Tensor.float),
        mock.patch.dict(vars(scans), get_all_hidden_states_with_inst_pos=on_cpu),
    ):
        directions = scans.get_safety_vectors(model, words, harmful, harmless)
        reference = scans.get_unsafe_reference_transition_vector(model, words, harmful)
        judged = [scans.predict_safety(model, words, text, reference, *LAYERS, THRESHOLD) for text in tested]
    texts = {"harmful": harmful, "harmless": harmless, "tested": tested}
    ids = {
        f"{name}_{i}": np.array(words.encode(f"[INST] {text} [/INST]"))
        for name, each in texts.items()
        for i, text in enumerate(each)
    }
    return {
        "directions": torch.stack(directions).detach().numpy(),
        "reference": torch.stack(reference).detach().numpy(),
        "scores": np.array([score for score, _ in judged], np.float32),
        "taken_for_safe": np.array([label for _, label in judged], bool),
        **{name: row.astype(np.int32) for name, row in ids.items()},
    }


def of_judges(attribution: pathlib.Path, scans: pathlib.Path) -> dict[str, object]:
    """Verdicts (refused) on the fixed strings; twenty words more leave the phrases of the first paper alone."""
    matched = published(attribution, "lib.eval").not_matched
    return {
        "answers": STRINGS,
        "wei2024": [not matched(text) for text in STRINGS],
        "wei2024_no_length": [not matched(text + " word" * 20) for text in STRINGS],
        "scans": [bool(published(scans, "utils.modeling_utils").is_reject(text)) for text in STRINGS],
    }


def flat(tree: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{"name/layer.map": array}."""
    return {f"{name}/{key}": array for name, each in tree.items() for key, array in each.items()}


def commit(folder: pathlib.Path) -> str:
    """The commit that a clone is at."""
    return subprocess.check_output(["git", "-C", str(folder), "rev-parse", "HEAD"], text=True).strip()


def make(attribution: pathlib.Path, scans: pathlib.Path, out: pathlib.Path = HERE) -> None:
    """Writes models, arrays, verdicts and what they are into `out`."""
    for name, heads in MODELS.items():
        for seed, folder in enumerate((out / name, out / f"{name}_base")):
            tiny(heads, seed).save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(out / f"{name}_weights.npz", **flat(of_weights(attribution, heads)))
        np.savez_compressed(out / f"{name}_scans.npz", **of_steering(scans, heads))
    data = {
        side: [{"tokens": tokens[0].tolist(), "prompt": int((targets == -100).sum())} for tokens, targets in each]
        for side, each in ROWS.items()
    }
    about = {
        "alignment_attribution": {"repository": "boyiwei/alignment-attribution-code", "commit": commit(attribution)},
        "scans": {"repository": "zouyingcao/SCANS", "commit": commit(scans)},
        "settings": vars(settings("", "safety")) | {"low": LOW, "high": HIGH, "p": PART[0], "q": PART[1]},
        "scans_settings": {"layer_start": LAYERS[0], "layer_end": LAYERS[1], "threshold": THRESHOLD},
        "calls": CALLS,
        "rows": data,
        "verdicts": of_judges(attribution, scans),
    }
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n")


CALLS = {
    "wanda": "lib.prune.prune_wanda(dump_wanda_score)",
    "wanda_diff": "lib.prune.prune_wanda(dump_wanda_score, use_diff), the base model of seed 1",
    "wanda_bottom": "lib.prune.prune_wanda(sparsity_ratio=low), block by block",
    "wanda_top": "lib.prune.prune_wanda(sparsity_ratio=high, neg_prune), block by block",
    "snip": "lib.model_wrapper.prune_wandg(dump_wanda_score)",
    "snip_diff": "lib.model_wrapper.prune_wandg(dump_wanda_score, use_diff), the base model of seed 1",
    "snip_bottom": "lib.model_wrapper.prune_wandg(sparsity_ratio=low), block by block",
    "snip_top": "lib.model_wrapper.prune_wandg(sparsity_ratio=high, neg_prune), block by block",
    "set_difference": "lib.prune.prune_wandg_set_difference(p, q) on SNIP scores of both sides",
    "top_ranks": "lib.model_wrapper_low.make_low_rank(rank, top_remove)",
    "bottom_ranks": "lib.model_wrapper_low.make_low_rank(rank)",
    "orthogonal": "main_low_rank_diff.make_low_rank(rank_pos of utility, rank_neg of safety)",
    "directions": "SCANS_llama.get_safety_vectors",
    "reference": "SCANS_llama.get_unsafe_reference_transition_vector",
    "scores": "SCANS_llama.predict_safety(layer_start, layer_end, threshold), whose label is taken_for_safe",
    "verdicts": "lib.eval.not_matched, also with twenty words behind (no_length); utils.modeling_utils.is_reject",
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attribution", type=pathlib.Path, help="clone of boyiwei/alignment-attribution-code")
    parser.add_argument("scans", type=pathlib.Path, help="clone of zouyingcao/SCANS")
    given = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    make(given.attribution.resolve(), given.scans.resolve())
