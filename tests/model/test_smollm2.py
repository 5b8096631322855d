"""The real SmolLM2-135M-Instruct against transformers and torch, in float32 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafe.chat.model import load_chat_model
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import SMOLLM2, resolve
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods.scans import affirmative_ids, find_directions, steering_of
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.records.scans import Choice
from jaxsafe.rows import Row, pad_rows

pytestmark = pytest.mark.slow
NEW = 24
whole = jax.jit(forward, static_argnames=("config", "last"))
read = jax.jit(capture, static_argnames=("config", "taps"))


def prompts_of(name, n):
    """`n` built-in prompts, spread over the set."""
    every = load_prompts(name).prompts
    return [every[i] for i in np.linspace(0, len(every) - 1, n).astype(int)]


@pytest.fixture(scope="module")
def folder():
    try:
        return resolve(SMOLLM2)
    except FileNotFoundError as error:
        pytest.skip(f"no SmolLM2: {error}")


@pytest.fixture(scope="module")
def model(folder):
    return load_chat_model(folder, dtype="float32")


@pytest.fixture(scope="module")
def torch_model(folder):
    return load_torch(folder)


def load_torch(folder, dtype="float32"):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def torch_logits(torch_model, row):
    import torch

    with torch.no_grad():
        return torch_model(torch.tensor([row.ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def rows(model):
    """32 prompts of one to four questions in the model's own template."""
    asked = [*prompts_of("builtin:plain", 18), *prompts_of("builtin:lookalike", 18)]
    found = model.rows([" ".join(asked[i : i + 1 + i % 4]) for i in range(32)])
    assert len({len(row.ids) for row in found}) > 16
    return found


def test_greedy_answers_are_token_by_token_those_of_transformers(model, torch_model, rows):
    """Ours in one left-padded batch with a cache of our own; theirs one by one with a cache of theirs."""
    import torch

    eos = model.tokenizer.eos_ids
    ours = generate(model.config, model.params, pad_rows(rows), Decoding(NEW, eos=eos))
    for row, tokens, length in zip(rows, np.asarray(ours.tokens), np.asarray(ours.lengths), strict=True):
        theirs = torch_model.generate(
            torch.tensor([row.ids]),
            attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(eos),
            pad_token_id=eos[0],
        )[0, len(row.ids) :].tolist()
        ended = theirs[-1] in eos
        assert tokens[: length + ended].tolist() == theirs
        assert length == len(theirs) - ended


def test_logits_are_as_near_to_float64_as_those_of_torch(model, folder, torch_model, rows):
    """Over whole texts of at least 48 tokens, two of them left-padded.

    Logits reach 38, whose spacing in float32 is 4e-6; through 30 layers torch's own float32 logits come within
    1e-4 of its float64 ones. Ours may be off by twice as much as those.
    """
    texts = sorted(rows, key=lambda row: len(row.ids))[13::9]
    assert min(len(row.ids) for row in texts) >= 48 and len({len(row.ids) for row in texts}) == 3
    batch = pad_rows(texts)
    ours = np.asarray(whole(model.config, model.params, batch.tokens, batch.valid))
    double = load_torch(folder, "float64")
    errors = []
    for row, logits in zip(texts, ours, strict=True):
        exact, single = torch_logits(double, row), torch_logits(torch_model, row)
        assert exact.dtype == np.float64 and single.dtype == np.float32
        errors.append((np.abs(logits[-len(row.ids) :] - exact).max(), np.abs(single - exact).max()))
    our_error, their_error = np.array(errors).max(0)
    assert our_error < 2 * their_error
    assert our_error < 3e-4


@pytest.mark.parametrize("companions", [True, False])
def test_an_export_has_the_logits_of_its_source(model, folder, torch_model, rows, tmp_path, companions):
    import torch

    save_hf(tmp_path / "export", model.config, model.params, like=folder if companions else None)
    exported = load_torch(tmp_path / "export")
    for row in rows[:2]:
        np.testing.assert_array_equal(torch_logits(exported, row), torch_logits(torch_model, row))
    ours, theirs = exported.state_dict(), torch_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_scans_with_one_prefill_is_scans_with_two_passes(model):
    directions = find_directions(model, prompts_of("builtin:harmful", 8), prompts_of("builtin:plain", 8), 16)
    prompts = [*prompts_of("builtin:harmful", 6)[1:5], *prompts_of("builtin:lookalike", 6)[1:5]]
    rows, affirmative = model.rows(prompts), affirmative_ids(model)

    texts = pad_rows([Row((*row.ids, *affirmative.tolist()), 0) for row in rows])
    resid = np.asarray(read(model.config, model.params, texts.tokens, texts.valid)["resid"], np.float64)
    change = resid[:, :, -1 - len(affirmative)] - resid[:, :, -1]
    reference = directions.reference[:, None].astype(np.float64)
    cosines = (change * reference).sum(-1) / np.linalg.norm(change, axis=-1) / np.linalg.norm(reference, axis=-1)
    scores = cosines[10:30].mean(0)

    choice = Choice(LayerRange(10, 30), LayerRange(10, 20), float(np.median(scores)), alpha_rel=0.06)
    steering = steering_of(directions, choice)
    gate = np.where(scores >= np.median(scores), 1.0, -1.0)
    assert sorted(gate) == [-1.0] * 4 + [1.0] * 4
    batch, eos = pad_rows(rows), model.tokenizer.eos_ids
    start = jnp.array([row.instruction_end for row in rows])
    edits = {"resid": edit(add=steering.strength[:, None] * steering.directions, gate=jnp.asarray(gate), start=start)}
    wanted = generate(model.config, model.params, batch, Decoding(NEW, eos=eos), edits)

    _, ours = model.steered([None, steering]).answers(prompts, Decoding(NEW))
    np.testing.assert_allclose(ours.scores, scores, atol=1e-5)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_array_equal(ours.lengths, wanted.lengths)
    plain = generate(model.config, model.params, batch, Decoding(NEW, eos=eos))
    assert (np.asarray(ours.tokens) != np.asarray(plain.tokens)).any(axis=1).sum() >= 6
