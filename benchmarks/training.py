"""Steps of full fine-tuning, in this library and in a plain PyTorch loop on `transformers`.

    python -m benchmarks.training

SmolLM2-135M-Instruct on two CPU cores: batches of 8 rows of 64 tokens, of which the last 32 are answers, AdamW with
weight decay on float32 weights. The passes are in every dtype of `--dtypes`, in PyTorch by autocast. Both sides take
the same batches from the same weights, and their losses are compared before anything is timed. The floor is the time of
the matrix products, forward once and backward twice, at the rate of bare products measured in the same run, and of
reading and writing what AdamW touches at the bandwidth of a copy.

B rows, T tokens, R answer tokens of a row, L layers, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from benchmarks.forward_and_generate import bandwidth, flops, products
from benchmarks.measure import Contest, begin, compare
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.devices import suited_stream
from jaxsafe.io.hub import load_hf, resolve
from jaxsafe.kernels.training import Recipe, masters, one_step
from jaxsafe.model.config import ModelConfig
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.rows import Batch

RATE, DECAY = 1e-5, 0.01
_step = jax.jit(one_step, static_argnames="recipe", donate_argnames="tree")
TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}
TOUCHED = 28
"""Bytes a parameter that AdamW reads (weight, gradient, two moments) and writes (weight, two moments)."""


@dataclasses.dataclass
class Ours:
    """The state of a run by this library; each call takes one step and returns its loss."""

    config: ModelConfig
    params: Any
    batch: Batch
    last: int
    optimizer: optax.GradientTransformation
    state: Any = None

    def __call__(self) -> jax.Array:
        """One step."""
        if self.state is None:
            self.state = self.optimizer.init(self.params)
        tree, loss = _step(self.recipe, {"params": self.params, "optimizer": self.state}, self.batch)
        self.params, self.state = tree["params"], tree["optimizer"]
        return loss

    @property
    def recipe(self) -> Recipe:
        """How a step is made."""
        return Recipe(self.config, self.optimizer, self.last)

    def memory(self) -> dict[str, float]:
        """Bytes that a step needs, by the compiler: what is given to it and what it makes on the way."""
        state = self.optimizer.init(self.params)
        step = _step.lower(self.recipe, {"params": self.params, "optimizer": state}, self.batch)
        found = step.compile().memory_analysis()
        return {"argument_bytes": found.argument_size_in_bytes, "temporary_bytes": found.temp_size_in_bytes}


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A plain loop in PyTorch; each call takes one step and returns its loss."""

    torch: Any
    model: Any
    optimizer: Any
    ids: Any
    labels: Any
    dtype: str

    def __call__(self) -> float:
        """One step."""
        half = self.dtype != "float32"
        with self.torch.autocast("cpu", getattr(self.torch, self.dtype) if half else None, enabled=half):
            loss = self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)


def needed_bytes(config: ModelConfig, B: int, T: int, R: int) -> dict[str, float]:
    """Parameters, gradients and two moments in float32, and the activations that a backward pass reads.

    A layer's: the residual stream before and after attention with both normed, queries, keys, values, attention
    weights and heads, gate, up and their product; the logits of the answers and their gradient.
    """
    c = config
    size = c.vocab * c.embed * (1 if c.tied else 2) + c.embed
    size += c.layers * (2 * c.embed * c.head_dim * (c.heads + c.kv_heads) + 3 * c.embed * c.mlp + 2 * c.embed)
    layer = 4 * c.embed + (2 * c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * T + 3 * c.mlp
    return {"state_bytes": 16.0 * size, "activation_bytes": 4.0 * (B * T * c.layers * layer + 2 * B * R * c.vocab)}


def check(mine: Ours, theirs: Theirs, steps: int = 3) -> list[float]:
    """Losses of some steps on our side. Ends the program with one line where the other's differ."""
    losses = [float(mine()) for _ in range(steps)]
    other = [theirs() for _ in range(steps)]
    if not np.allclose(losses, other, atol=TOLERANCE[theirs.dtype]):
        sys.exit(f"losses {losses} and {other} differ by more than {TOLERANCE[theirs.dtype]}; nothing is timed")
    return losses


def sides(torch: Any, path: Any, tokens: np.ndarray, R: int, dtype: str) -> tuple[Ours, Theirs]:
    """The run of each side on `tokens` int [B, T], of which the last R are answers."""
    import transformers

    B, T = tokens.shape
    # Weights that bfloat16 holds exactly would not move in its passes before steps add up to half of its spacing.
    config, params = load_hf(path, "float32")
    config = dataclasses.replace(config, dtype=dtype, stream=suited_stream(dtype))
    batch = Batch(tokens, np.ones((B, T), bool), np.full(B, T - R - 1, np.int32))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    labels = ids.clone()
    labels[:, : T - R] = -100
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    ours = Ours(config, masters(params), batch, R, optax.adamw(RATE, weight_decay=DECAY))
    return ours, Theirs(torch, model, adamw, ids, labels, dtype)


def main(argv: list[str]) -> None:
    """Loads both models, checks that they learn alike, and measures."""
    del argv
    torch = begin()
    B, T, R = BATCH.value, LENGTH.value, ANSWER.value
    path = resolve("smollm2-135m-instruct")
    text = [i for row in Tokenizer(path).rows(load_prompts("builtin:plain").prompts) for i in row.ids]
    tokens = np.resize(np.array(text, np.int32), (B, T))
    contests, fields = {}, dict[str, Any]()
    speed, whole = bandwidth(3), (B, T, T, B * R)
    for dtype in DTYPES.value:
        ours, theirs = sides(torch, path, tokens, R, dtype)
        memory, needed = ours.memory(), needed_bytes(ours.config, B, T, R)
        fields[f"losses_{dtype}"] = check(ours, theirs)
        fields[f"memory_over_needed_{dtype}"] = sum(memory.values()) / sum(needed.values())
        moved = needed["state_bytes"] / 16 * TOUCHED / speed
        bare, operations = products(ours.config, *whole), 3 * flops(ours.config, *whole)
        contests[dtype] = Contest(ours, theirs, bare, operations, repeats=3, more_s=moved)
    compare("training_step", "torch", contests, ROUNDS.value, batch=B, length=T, answer=R, **fields)


if __name__ == "__main__":
    ROUNDS = flags.DEFINE_integer("rounds", 5, "timed steps of each side", lower_bound=1)
    BATCH = flags.DEFINE_integer("batch", 8, "rows", lower_bound=1)
    LENGTH = flags.DEFINE_integer("length", 64, "tokens a row", lower_bound=2)
    ANSWER = flags.DEFINE_integer("answer", 32, "answer tokens a row", lower_bound=1)
    DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of the passes")
    flags.register_validator("dtypes", lambda names: names and set(names) <= set(TOLERANCE), "not known")
    app.run(main)
