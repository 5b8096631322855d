"""Prompts with answers that scores are made from: the model's own, or those of a file.

The safety set holds harmful prompts with refusals, the utility set harmless ones with answers.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxsafe.evaluation.judges import Judge
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import generate_rows
from jaxsafe.text.batches import Row
from jaxsafe.text.chat import check_context
from jaxsafe.text.prompt_files import read_rows


def own_answers(
    model: ChatModel,
    prompts: Sequence[str],
    judge: Judge,
    refused: bool,
    answer_tokens: int,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda n: None,
) -> list[Row]:
    """The prompts whose greedy answer refuses (`refused`) or does not, as rows with that answer.

    An answer has at most `answer_tokens` tokens and no end-of-text token, as published. Raises ValueError where no
    prompt is left.
    """
    rows = model.rows(prompts)
    out = generate_rows(
        model.config,
        model.params,
        rows,
        batch_size,
        answer_tokens,
        mesh=model.mesh,
        done=done,
        eos=model.tokenizer.eos_ids,
    )
    texts = model.tokenizer.decode(out.tokens, out.lengths)
    kept = [
        Row(row.ids + tuple(int(t) for t in tokens[:length]), row.instruction_end)
        for row, tokens, length, text in zip(rows, out.tokens, out.lengths, texts, strict=True)
        if length > 0 and judge.refused(text) is refused
    ]
    if not kept:
        kind = "refused" if refused else "answered"
        raise ValueError(f"none of the {len(prompts)} prompts is {kind} by {model.name}, judged by {judge.name}")
    return kept


def pairs_from_file(model: ChatModel, path: str | pathlib.Path, raw: bool = False) -> list[Row]:
    """Rows of a file with the columns prompt and response, in its order.

    `raw` takes prompts as they stand, for files that hold the template's markers. Raises FileNotFoundError, and
    ValueError for a missing column, an empty cell, and a row longer than the context.
    """
    rows = []
    for i, line in enumerate(read_rows(pathlib.Path(path)), 1):
        missing = [name for name in ("prompt", "response") if not str(line.get(name) or "").strip()]
        if missing:
            raise ValueError(f"{path}, row {i}: no {missing[0]}; pairs need the columns prompt and response")
        prompt, response = str(line["prompt"]), str(line["response"])
        if raw or model.raw:
            rows.append(model.tokenizer.raw_row(prompt, response))
        else:
            rows.append(model.tokenizer.chat_row(prompt, model.system, response))
    check_context(rows, model.config.context)
    return rows


def draw(rows: Sequence[Row], n: int, seed: int) -> list[Row]:
    """`n` of the rows (all, where there are fewer), drawn by `numpy.random.default_rng(seed)` as published."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]
