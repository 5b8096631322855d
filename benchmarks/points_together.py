"""Seconds for points of a random line that answer in one program, and for the same points one after the other.

    python -m benchmarks.points_together --model=FOLDER --points=1,2,4

Both answer the same prompts greedily with weights that are moved before; programs are compiled before, too. Prints
Markdown: wall-clock medians of rounds in turn, seconds of the processor in brackets, and how many answers are equal.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

from benchmarks.measure import alternate
from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.chat.stacked import Stacked
from jaxsafe.kernels.directions import moved_stack, random_direction
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.prompts.sets import load_prompts

Texts = list[tuple[str, ...]]


def one_by_one(models: Sequence[ChatModel], prompts: Sequence[str], decoding: Decoding) -> Texts:
    """The answers of each model by itself."""
    return [model.answers(prompts, decoding, len(prompts)).texts for model in models]


def together(stacked: Stacked, prompts: Sequence[str], decoding: Decoding) -> Texts:
    """The answers of all models from one program."""
    ((indices, answers),) = stacked.answer_batches(prompts, decoding, len(prompts))
    return [tuple(each.texts[place] for place in np.argsort(indices)) for each in answers]


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    model = load_chat_model(MODEL.value, "float32")
    direction = random_direction(model.config, model.params, 0)
    prompts, decoding = load_prompts("builtin:harmful", split="test").prompts[: PROMPTS.value], Decoding(TOKENS.value)
    print(f"{jax.devices()[0].device_kind}, {len(prompts)} prompts, {TOKENS.value} new tokens, float32\n")
    print("| points | one by one | in one program | equal answers |\n|---:|---:|---:|---:|")
    for points in map(int, POINTS.value):
        stack = moved_stack(model.params, (direction,), np.linspace(-0.02, 0.02, points)[:, None])
        models = [model.with_params(jax.tree.map(lambda a, i=i: a[i], stack)) for i in range(points)]
        calls = {
            "alone": functools.partial(one_by_one, models, prompts, decoding),
            "stacked": functools.partial(together, Stacked(model, stack), prompts, decoding),
        }
        texts = np.array([call() for call in calls.values()])
        times = alternate(calls, ROUNDS.value)
        cells = [f"{times[f'{name}_median_s']:.1f} s ({times[f'{name}_processor_s']:.1f})" for name in calls]
        print(f"| {points} | {' | '.join(cells)} | {np.mean(texts[0] == texts[1]):.0%} |", flush=True)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "smollm2-135m-instruct", "a folder, a hub name, or smollm2-135m-instruct")
    POINTS = flags.DEFINE_list("points", ["1", "2", "4"], "numbers of points")
    PROMPTS = flags.DEFINE_integer("prompts", 8, "how many prompts")
    TOKENS = flags.DEFINE_integer("tokens", 16, "new tokens")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "of both in turn")
    app.run(main)
