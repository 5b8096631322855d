"""Forward and generate against `transformers` on two CPU cores, and both against the bare matrix products.

    python -m benchmarks.forward_and_generate

One JSON line a measurement: median seconds of both sides in every dtype of `--dtypes`, `ratio` (their best dtype over
our best), and the floor, which is the time that JAX's matrix products of the same shapes take here with nothing around
them. Both sides run SmolLM2-135M-Instruct on the same tokens in one process, in turn, and make every token asked for.
Before anything is timed, the logits of both are compared with those of `transformers` in float64.
`--model=qwen3` and `--model=gemma3` take a random model of middle size of these families instead.

B batch, T query position, S key position, L layers, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab
"""

import copy
import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import Call, Contest, begin, compare, emit, seconds
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.io.hub import load_hf, resolve
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.products import product
from jaxsafe.model.transformer import forward
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.rows import Batch

TOLERANCE, SHARE = 1e-4, 1.25
"""Logits may be as far from those in float64 (root mean square), or so many times as far as those of `transformers`."""
SIZES = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 32_000}
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64},
    "gemma3_text": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 32,
    },
}
"""Shapes of random models by `model_type`; the window is shorter than the prompts."""
_forward = jax.jit(forward, static_argnames=("config", "last"))


@dataclasses.dataclass(frozen=True)
class Sides:
    """Both models and the tokens int [B, T] that they are given."""

    config: ModelConfig
    params: Any
    batch: Batch
    torch: Any
    model: Any
    ids: Any

    def our_logits(self) -> Any:
        """Logits [B, T, V] by this library."""
        return _forward(self.config, self.params, self.batch.tokens, self.batch.valid)

    def our_answer(self, n: int) -> Any:
        """`n` new tokens a row by this library."""
        return generate(self.config, self.params, self.batch, Decoding(n)).tokens

    def their_logits(self) -> Any:
        """Logits [B, T, V] by transformers."""
        with self.torch.inference_mode():
            return self.model(self.ids, use_cache=False).logits

    def their_answer(self, n: int) -> Any:
        """`n` new tokens a row by transformers."""
        options = {"attention_mask": self.torch.ones_like(self.ids), "do_sample": False, "pad_token_id": 0}
        with self.torch.inference_mode():
            return self.model.generate(self.ids, max_new_tokens=n, **options)[:, self.ids.shape[1] :]


def load(torch: Any, batch: int, length: int, dtype: str) -> Sides:
    """SmolLM2-135M-Instruct on both sides, and real text as [batch, length] tokens without padding."""
    import transformers

    path = resolve("smollm2-135m-instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    text = [i for row in Tokenizer(path).rows(load_prompts("builtin:plain").prompts) for i in row.ids]
    return beside(torch, *load_hf(path, dtype), model, np.resize(np.array(text, np.int32), (batch, length)))


def load_random(torch: Any, family: str, batch: int, length: int, dtype: str) -> Sides:
    """A random model of `family` on both sides, and random tokens [batch, length]."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **SIZES, **RANDOM[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = load_hf(folder, dtype)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (batch, length), dtype=np.int32)
    return beside(torch, *ours, model, tokens)


def beside(torch: Any, config: ModelConfig, params: Any, model: Any, tokens: np.ndarray) -> Sides:
    """Both models with the same `tokens` [B, T], none of them padding."""
    # Without an end-of-text token neither side stops early.
    model.generation_config.eos_token_id = None
    rows = Batch(tokens, np.ones(tokens.shape, bool), np.full(len(tokens), tokens.shape[1] - 1, np.int32))
    ids = torch.from_numpy(tokens.astype(np.int64))
    return Sides(config, params, jax.tree.map(jnp.asarray, rows), torch, model, ids)


def products(config: ModelConfig, B: int, T: int, S: int, unembedded: int) -> Call:
    """A call of the matrix products of T positions a row that see S, of which `unembedded` in all get logits.

    Nothing else is computed: no norms, softmax, rotation or cache update. Weights are random with unit gain, so
    that no value grows or vanishes; what a product gives goes into the next or into the carry, so that none is dropped.
    """
    L, D, N, K, H, F = config.layers, config.embed, config.heads, config.kv_heads, config.head_dim, config.mlp
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def weight(*shape: int) -> jax.Array:
        return (jax.random.normal(next(keys), shape) / math.sqrt(shape[-2])).astype(config.dtype)

    shapes: dict[str, tuple[int, ...]] = {"q": (D, N * H), "k": (D, K * H), "v": (D, K * H), "o": (N * H, D)}
    shapes |= {"gate": (D, F), "up": (D, F), "down": (F, D), "keys": (B, K, S, H), "values": (B, K, S, H)}

    def layer(carry: tuple, w: dict[str, jax.Array]) -> tuple:
        x = carry[0]
        q, k, v = product(x, w["q"]), product(x, w["k"]), product(x, w["v"])
        scores = jnp.einsum("bkth,bksh->bkts", q.reshape(B, K, -1, H), w["keys"])
        h = jnp.einsum("bkts,bksh->bkth", scores, w["values"]).reshape(B * T, N * H)
        h = product(h, w["o"])
        gate, up = product(h, w["gate"]), product(h, w["up"])
        return (product(up, w["down"]), k, v, gate), None

    @jax.jit
    def run(layers: dict[str, jax.Array], unembed: jax.Array, x: jax.Array) -> Any:
        unused = [jnp.zeros((B * T, width), config.dtype) for width in (K * H, K * H, F)]
        carry, _ = jax.lax.scan(layer, (x, *unused), layers)
        return carry, product(carry[0][:unembedded], unembed)

    layers = {name: weight(L, *shape) for name, shape in shapes.items()}
    return functools.partial(run, layers, weight(D, config.vocab), weight(B * T, D))


def flops(config: ModelConfig, B: int, T: int, S: int, unembedded: int) -> float:
    """Floating point operations of `products`."""
    c = config
    linear = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.embed * c.mlp
    attention = 2 * c.heads * c.head_dim * S
    return 2.0 * (B * T * c.layers * (linear + attention) + unembedded * c.embed * c.vocab)


def bandwidth(rounds: int, megabytes: int = 512) -> float:
    """Bytes a second of a large copy, those read and those written."""
    x = jnp.ones(megabytes * 2**18, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds(lambda: copy(x))
    return 2 * x.nbytes / min(seconds(lambda: copy(x))[0] for _ in range(rounds))


def check(sides: Sides, new: int) -> dict[str, Any]:
    """How far both sides are from float64, and how many answers are equal.

    Ends the program with one line where our logits are farther than they may be.
    """
    exact = copy.deepcopy(sides.model).double()
    with sides.torch.inference_mode():
        wanted = exact(sides.ids, use_cache=False).logits.numpy()
    logits = {"jaxsafe": np.asarray(sides.our_logits()), "transformers": sides.their_logits().float().numpy()}
    errors = {f"{side}_error": float(np.sqrt(np.square(found - wanted).mean())) for side, found in logits.items()}
    allowed = max(TOLERANCE, SHARE * errors["transformers_error"])
    if errors["jaxsafe_error"] > allowed:
        sys.exit(f"logits are {errors['jaxsafe_error']:.2g} off, more than {allowed:.2g}; nothing is timed")
    same = (np.asarray(sides.our_answer(new)) == sides.their_answer(new).numpy()).all(-1)
    return {**errors, "same_answers": int(same.sum())}


def forward_contest(sides: Sides, B: int, T: int) -> Contest:
    """Logits of every position."""
    whole = (B, T, T, B * T)
    return Contest(sides.our_logits, sides.their_logits, products(sides.config, *whole), flops(sides.config, *whole))


def answer_contest(sides: Sides, B: int, T: int, new: int) -> Contest:
    """`new` tokens of every row; a decode step sees on average the prompt and half of the answer."""
    prefill, step = (B, T, T, B), (B, 1, T + new // 2, B)
    first, next_ = products(sides.config, *prefill), products(sides.config, *step)
    ours, theirs = (functools.partial(side, new) for side in (sides.our_answer, sides.their_answer))
    operations = flops(sides.config, *prefill) + (new - 1) * flops(sides.config, *step)
    return Contest(ours, theirs, lambda: [first(), *(next_() for _ in range(new - 1))], operations)


def loaded(torch: Any, name: str, batch: int, length: int, dtype: str) -> Sides:
    """Both sides of `--model`."""
    families = {"qwen3": "qwen3", "gemma3": "gemma3_text"}
    if name in families:
        return load_random(torch, families[name], batch, length, dtype)
    return load(torch, batch, length, dtype)


def main(argv: list[str]) -> None:
    """Loads both models, checks that they agree, and measures."""
    del argv
    B, T, new, rounds = BATCH.value, PROMPT.value, NEW.value, ROUNDS.value
    torch = begin()
    both = {dtype: loaded(torch, MODEL.value, B, T, dtype) for dtype in DTYPES.value}
    fields: dict[str, Any] = {"model": MODEL.value, "batch": B, "prompt": T}
    for dtype, sides in both.items():
        fields |= {f"{name}_{dtype}": value for name, value in check(sides, new).items()}
    emit("copy_bandwidth", bytes_per_s=bandwidth(rounds))
    compare(
        "forward",
        "transformers",
        {dtype: forward_contest(sides, B, T) for dtype, sides in both.items()},
        rounds,
        **fields,
    )
    for n in (1, new):
        contests = {dtype: answer_contest(sides, B, T, n) for dtype, sides in both.items()}
        compare(f"generate_{n}", "transformers", contests, rounds, new=n, **fields)


if __name__ == "__main__":
    ROUNDS = flags.DEFINE_integer("rounds", 5, "timed rounds of each call", lower_bound=1)
    BATCH = flags.DEFINE_integer("batch", 32, "rows", lower_bound=1)
    PROMPT = flags.DEFINE_integer("prompt", 43, "prompt tokens a row", lower_bound=1)
    NEW = flags.DEFINE_integer("new", 32, "new tokens a row", lower_bound=2)
    MODEL = flags.DEFINE_enum("model", "smollm2", ["smollm2", "qwen3", "gemma3"], "what both sides run")
    DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of weights and activations")
    flags.register_validator("dtypes", lambda names: names and set(names) <= {"float32", "bfloat16"}, "not known")
    app.run(main)
