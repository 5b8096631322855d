"""SCANS on the 450 prompts of XSTest: batches that are run once, against the published procedure.

    python -m benchmarks.scans_xstest --data=DATA_FOLDER

The published procedure (arXiv 2408.11491) is written here plainly in PyTorch on `transformers`, prompt by prompt:
a forward over the prompt and the affirmative with all hidden states for the score, then a generation with a hook on
every steered layer. Both sides take SmolLM2-135M-Instruct on two CPU cores in every dtype of `--dtypes`, the same
directions, threshold and tokens, greedy decoding with repetition penalty 1.1, and make equally many tokens; with
--early_stop an answer ends at its end-of-text token on both sides. Scores and answers are compared before anything is
timed. The published procedure is timed on the first --baseline_prompts and extrapolated to all, which the measurement
says. `ratio` is its best dtype over our best.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.measure import Call, alternate, begin, emit, seconds
from jaxsafe.chat.answers import Answers
from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.kernels.steering import Steering
from jaxsafe.methods.scans import affirmative_ids, find_directions, read_prompts, steering_of
from jaxsafe.model.layers import LayerRange
from jaxsafe.prompts.sets import load_prompts
from jaxsafe.records.scans import Choice
from jaxsafe.rows import Row

COUNT = 450
PENALTY = 1.1
STRENGTH = 0.03
TOLERANCE = {"float32": (1e-3, 0.5), "bfloat16": (2e-2, 0.0)}
"""How far scores may be apart, and the least share of equal answers: rounding to bfloat16 turns many a close choice."""


def prompts(data: str) -> list[str]:
    """450 prompts: XSTest from the folder `data`, or the built-in sets in turn, repeated."""
    if data:
        return list(load_prompts("xstest", path=data).prompts)
    sets = [load_prompts(f"builtin:{kind}", split="test").prompts for kind in ("lookalike", "harmful", "plain")]
    return list(itertools.islice(itertools.cycle([p for three in zip(*sets, strict=False) for p in three]), COUNT))


def steering_from_anchors(model: ChatModel) -> Steering:
    """A steering over the middle layers whose threshold parts the anchors in two halves.

    The last layer is not scored: the published procedure reads it after the final norm.
    """
    harmful, benign = (load_prompts(f"builtin:{kind}", split="anchor").prompts for kind in ("harmful", "plain"))
    directions = find_directions(model, harmful, benign)
    L = model.config.layers
    scored, steered = LayerRange(L // 3, L - 1), LayerRange(L // 3, 2 * L // 3)
    cosines = read_prompts(model, directions, [*harmful, *benign]).cosines
    threshold = float(np.median(cosines[:, scored.slice].mean(1)))
    return steering_of(directions, Choice(scored, steered, threshold, alpha_rel=STRENGTH))


def published_score(torch: Any, model: Any, row: Row, affirmative: list[int], steering: dict[str, Any]) -> float:
    """First pass: the mean over scored layers of cos(h(instruction end) - h(affirmative), reference)."""
    ids = torch.tensor([[*row.ids[: row.instruction_end + 1], *affirmative]])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    cosines = []
    for layer in steering["scored"]:
        change = states[layer + 1][0, row.instruction_end] - states[layer + 1][0, -1]
        cosines.append(torch.nn.functional.cosine_similarity(change, steering["reference"][layer], dim=0).item())
    return sum(cosines) / len(cosines)


def published_answer(
    torch: Any, model: Any, row: Row, added: dict[int, Any], new: int, eos: Sequence[int]
) -> list[int]:
    """Second pass: a generation that adds `added` {layer: [D]} from the instruction end on."""

    def hook(add: Any, module: Any, inputs: Any, output: Any) -> Any:
        start = row.instruction_end if output.shape[1] > 1 else 0
        output[:, start:] += add
        return output

    layers = model.model.layers
    hooks = [layers[i].register_forward_hook(functools.partial(hook, add)) for i, add in added.items()]
    ids = torch.tensor([row.ids])
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": PENALTY, "max_new_tokens": new}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    for h in hooks:
        h.remove()
    answer = out[0, len(row.ids) :].tolist()
    return answer[:-1] if answer[-1] in eos else answer


def published(
    torch: Any,
    model: Any,
    rows: Sequence[Row],
    affirmative: list[int],
    steering: Steering,
    new: int,
    eos: Sequence[int],
) -> tuple[list[list[int]], list[float]]:
    """Answers and scores by the published procedure, a prompt at a time."""
    reference, directions, strength = (
        torch.from_numpy(np.array(a)) for a in (steering.reference, steering.directions, steering.strength)
    )
    directions, reference = directions.to(model.dtype), reference.to(model.dtype)
    choices = {"reference": reference, "scored": np.flatnonzero(np.asarray(steering.scored)).tolist()}
    vectors = {int(i): (strength[i] * directions[i]).to(model.dtype) for i in strength.nonzero()[:, 0]}
    answers, scores = [], []
    for row in rows:
        scores.append(published_score(torch, model, row, affirmative, choices))
        sign = 1 if scores[-1] >= float(steering.threshold) else -1
        added = {i: sign * v for i, v in vectors.items()}
        answers.append(published_answer(torch, model, row, added, new, eos))
    return answers, scores


def agreement(ours: Answers, theirs: tuple[list[list[int]], list[float]]) -> tuple[float, int]:
    """Largest difference of the scores, and how many of the answers are equal token for token."""
    n = len(theirs[1])
    assert ours.scores is not None
    same = sum(ours.tokens[i, : ours.lengths[i]].tolist() == theirs[0][i] for i in range(n))
    return float(np.abs(ours.scores[:n] - np.array(theirs[1])).max()), same


@dataclasses.dataclass(frozen=True)
class Sides:
    """What both answer: ours all prompts, the published procedure the first of them."""

    ours: Callable[[], Answers]
    theirs: Callable[[], tuple[list[list[int]], list[float]]]


def load(torch: Any, dtype: str) -> Sides:
    """Both models in `dtype`, with one steering."""
    import transformers

    model = load_chat_model("smollm2-135m-instruct", dtype=dtype)
    path = model.tokenizer.path
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    eos = model.tokenizer.eos_ids if EARLY_STOP.value else ()
    torch_model.generation_config.eos_token_id = list(eos) or None
    rows, steering, new = model.rows(prompts(DATA.value)), steering_from_anchors(model), NEW.value
    affirmative = affirmative_ids(model).tolist()
    decoding = Decoding(new, Sampling(repetition_penalty=PENALTY), eos=eos or (-1,))
    first = rows[: BASELINE_PROMPTS.value]

    def ours() -> Answers:
        return model.steered([steering]).answers(rows, decoding, BATCH.value)[0]

    return Sides(ours, lambda: published(torch, torch_model, first, affirmative, steering, new, eos))


def main(argv: list[str]) -> None:
    """Runs both once to compare them, then in turn to time them."""
    del argv
    torch = begin()
    both = {dtype: load(torch, dtype) for dtype in DTYPES.value}
    fields, calls, n, count = dict[str, Any](), dict[str, Call](), 0, 0
    for dtype, sides in both.items():
        compiled = seconds(sides.ours)[0]
        result = sides.ours()
        count = len(result.texts)
        n = min(BASELINE_PROMPTS.value, count)
        difference, same = agreement(result, sides.theirs())
        most, least = TOLERANCE[dtype]
        if difference > most or same < least * n:
            sys.exit(f"{dtype}: scores differ by {difference:.2g}, {same} of {n} answers are equal; nothing is timed")
        calls |= {f"jaxsafe_{dtype}": sides.ours, f"published_{dtype}": sides.theirs}
        fields |= {f"max_abs_score_diff_{dtype}": difference, f"same_answers_{dtype}": same}
        fields |= {f"first_call_{dtype}_s": compiled, f"new_tokens_{dtype}": result.written}
    times = alternate(calls, ROUNDS.value)
    mine, whole = (min(times[f"{side}_{dtype}_median_s"] for dtype in both) for side in ("jaxsafe", "published"))
    emit(
        "scans_xstest",
        median_s=mine,
        ratio=whole * count / n / mine,
        published_extrapolated_s=whole * count / n,
        extrapolated_from=n,
        prompts=count,
        data="xstest" if DATA.value else "built-in",
        new=NEW.value,
        early_stop=EARLY_STOP.value,
        batch=BATCH.value,
        rounds=ROUNDS.value,
        **fields,
        **times,
    )


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", "", "folder with the published XSTest file; empty: the built-in prompts")
    BATCH = flags.DEFINE_integer("batch", 32, "rows of a batch on our side", lower_bound=1)
    NEW = flags.DEFINE_integer("new", 32, "new tokens an answer", lower_bound=1)
    BASELINE_PROMPTS = flags.DEFINE_integer("baseline_prompts", 24, "prompts that the published procedure is timed on")
    EARLY_STOP = flags.DEFINE_bool("early_stop", False, "an answer ends at its end-of-text token, on both sides")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "timed rounds of each side", lower_bound=1)
    DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of weights and activations")
    flags.register_validator("dtypes", lambda names: names and set(names) <= set(TOLERANCE), "not known")
    app.run(main)
