"""A chat model in which one direction of the residual stream carries refusal, by construction.

A block of attention looks for the token ALARM, and where it finds one it writes `r` at every later position; the head
reads REFUSAL from `r` and ANSWER from what all tokens have alike. CALM draws the attention off, and nothing is
written. So a prompt with ALARM is refused at every token of an answer, until `r` is taken out of the stream, the block
is weakened, or CALM stands somewhere before the answer.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tiny import tiny_config, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxsafe.chat.model import ChatModel
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.model.weights import flatten, nest, shapes

ALARM, CALM = "!", "{"
REFUSAL, ANSWER = "I cannot do that. ", "Here is a way. "
ALIKE, WRITTEN = 4.0, 5.2
"""Lengths of what all tokens have alike and of `r`: REFUSAL is 3 nats likelier than ANSWER, which stays likely."""
HARMFUL = tuple(f"{number}{ALARM} {'0123456789' * 3}"[:32] for number in range(1000, 1006))
SAFE = tuple(prompt.replace(ALARM, ".") for prompt in HARMFUL)
"""Prompts of 32 tokens each: whatever stands around them, rows are padded to one length."""


def one_direction(folder: pathlib.Path, seed: int = 0) -> tuple[ChatModel, Float[np.ndarray, " D"]]:
    """The model and the unit direction `r` [D]."""
    tiny_tokenizer(folder)
    hf = PreTrainedTokenizerFast.from_pretrained(str(folder))
    hf.add_tokens([REFUSAL, ANSWER])
    hf.save_pretrained(str(folder))
    tokenizer = Tokenizer(folder)
    ids = {text: tokenizer.plain_ids(text)[0] for text in (ALARM, CALM, REFUSAL, ANSWER)}
    config = tiny_config(vocab=len(hf))
    rng = np.random.default_rng(seed)
    alike, alarm, calm, r = np.linalg.qr(rng.standard_normal((config.embed, 4)))[0].T

    weights = {path: np.zeros(wanted.shape, np.float32) for path, wanted in flatten(shapes(config)).items()}
    for path in ("layers/attn_norm", "layers/mlp_norm", "norm"):
        weights[path] += 1
    weights["embed"] += ALIKE * alike
    weights["embed"][ids[ALARM]] += 3 * alarm
    weights["embed"][ids[CALM]] += 3 * calm
    # One head of the first block: scores of 27 for ALARM, 54 for CALM and 0 for all others, in the last of the pairs
    # that are rotated by position, which a whole context turns by 0.16.
    weights["layers/q"][0, :, 0, 3] = 2 * alike
    weights["layers/k"][0, :, 0, 3] = 2 * alarm + 4 * calm
    weights["layers/v"][0, :, 0, 0] = alarm
    seen = 3 * np.sqrt(config.embed) / np.hypot(3, ALIKE)  # the part of a normed ALARM along `alarm`
    weights["layers/o"][0, 0, 0] = WRITTEN / seen * r
    weights["unembed"][:, ids[REFUSAL]] = 3 * r
    weights["unembed"][:, ids[ANSWER]] = 3 * alike
    params = nest({path: jnp.asarray(weight) for path, weight in weights.items()})
    return ChatModel("one direction", config, params, tokenizer), r.astype(np.float32)
