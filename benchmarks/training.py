"""Steps of full fine-tuning, in this library and in a plain PyTorch loop on `transformers`.

    python -m benchmarks.training

SmolLM2-135M-Instruct in float32 on two CPU cores: batches of 8 rows of 64 tokens, of which the last 32 are answers,
AdamW with weight decay. Both sides take the same batches from the same weights, and their losses are compared before
anything is timed. The floor is the time of the matrix products, forward once and backward twice, at the rate of bare
products measured in the same run, and of reading and writing what AdamW touches at the bandwidth of a copy.

B rows, T tokens, R answer tokens of a row, L layers, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from benchmarks.forward_and_generate import bandwidth, flops, products
from benchmarks.measure import alternate, begin, emit, seconds
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.io.hub import load_hf, resolve
from jaxsafe.kernels.training import Recipe, masters, one_step
from jaxsafe.model.config import ModelConfig
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.rows import Batch

RATE, DECAY = 1e-5, 0.01
_step = jax.jit(one_step, static_argnames="recipe", donate_argnames="tree")
TOLERANCE = 2e-3
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


def torch_step(torch: Any, model: Any, optimizer: Any, ids: Any, labels: Any) -> float:
    """One step of a plain loop; returns the loss."""
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
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


def check(mine: Ours, theirs: Any, steps: int = 3) -> list[float]:
    """Losses of some steps on our side. Ends the program with one line where the other's differ."""
    losses = [float(mine()) for _ in range(steps)]
    other = [theirs() for _ in range(steps)]
    if not np.allclose(losses, other, atol=TOLERANCE):
        sys.exit(f"losses {losses} and {other} differ by more than {TOLERANCE}; nothing is timed")
    return losses


def main(argv: list[str]) -> None:
    """Loads both models, checks that they learn alike, and measures."""
    del argv
    torch = begin()
    import transformers

    B, T, R = BATCH.value, LENGTH.value, ANSWER.value
    path = resolve("smollm2-135m-instruct")
    config, params = load_hf(path, "float32")
    text = [i for row in Tokenizer(path).rows(load_prompts("builtin:plain").prompts) for i in row.ids]
    tokens = np.resize(np.array(text, np.int32), (B, T))
    batch = Batch(tokens, np.ones((B, T), bool), np.full(B, T - R - 1, np.int32))
    ours = Ours(config, masters(params), batch, R, optax.adamw(RATE, weight_decay=DECAY))
    memory = ours.memory()

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    labels = ids.clone()
    labels[:, : T - R] = -100
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    theirs = functools.partial(torch_step, torch, model, adamw, ids, labels)
    losses = check(ours, theirs)

    jax.clear_caches()
    first = seconds(ours)[0]
    whole = (B, T, T, B * R)
    bare = products(config, *whole)
    seconds(bare)
    times = alternate({"jaxsafe": ours, "torch": theirs, "products": bare}, ROUNDS.value)
    mine = times["jaxsafe_median_s"]
    needed = needed_bytes(config, B, T, R)
    moved = needed["state_bytes"] / 16 * TOUCHED / bandwidth(3)
    least = 3 * times["products_median_s"] + moved
    emit(
        "training_step",
        median_s=mine,
        steps_per_s=1 / mine,
        ratio=times["torch_median_s"] / mine,
        floor_s=least,
        floor_traffic_s=moved,
        jaxsafe_over_floor=mine / least,
        torch_over_floor=times["torch_median_s"] / least,
        compile_s=first - mine,
        flops=3 * flops(config, *whole),
        memory_over_needed=sum(memory.values()) / sum(needed.values()),
        losses=losses,
        batch=B,
        length=T,
        answer=R,
        rounds=ROUNDS.value,
        **memory,
        **needed,
        **times,
    )


if __name__ == "__main__":
    ROUNDS = flags.DEFINE_integer("rounds", 5, "timed steps of each side", lower_bound=1)
    BATCH = flags.DEFINE_integer("batch", 8, "rows", lower_bound=1)
    LENGTH = flags.DEFINE_integer("length", 64, "tokens a row", lower_bound=2)
    ANSWER = flags.DEFINE_integer("answer", 32, "answer tokens a row", lower_bound=1)
    app.run(main)
