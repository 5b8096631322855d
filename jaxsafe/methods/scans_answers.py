"""A log of answers that a long evaluation is resumed from."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsafe.evaluation.comparison import Answered
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.io.journal import add_entry, read_journal
from jaxsafe.kernels.steering import Steering
from jaxsafe.methods.scans import Answers, Decoding, Progress, answer_both, silent
from jaxsafe.parallel import fetch


def run_key(model: ChatModel, steering: Steering, decoding: Decoding) -> str:
    """Digest of everything that an answer depends on besides its prompt."""
    arrays = [np.asarray(a).tobytes() for a in (steering.directions, steering.reference, steering.scored)]
    arrays += [np.asarray(a).tobytes() for a in (steering.threshold, steering.strength)]
    sampling = [np.asarray(v).tolist() for v in dataclasses.astuple(decoding.sampling)]
    text = json.dumps([model.fingerprint(), sampling, decoding.max_new_tokens, decoding.seed])
    return hashlib.sha256(text.encode() + b"".join(arrays)).hexdigest()[:16]


def read_log(path: pathlib.Path, key: str) -> dict[str, Answered]:
    """The answers that `path` holds under `key`, by prompt."""
    entries = [entry for entry in read_journal(path) if entry["key"] == key]
    return {entry["prompt"]: Answered(entry["score"], entry["before"], entry["after"]) for entry in entries}


def answer_prompts(
    model: ChatModel,
    steering: Steering,
    prompts: Sequence[str],
    decoding: Decoding,
    log: str | os.PathLike,
    done: Progress = silent,
) -> tuple[list[Answered], int]:
    """The answers to `prompts` before and after steering, and how many tokens were generated for them.

    Answers that `log` already holds are not made again; every finished batch is appended to it at once. Equal
    prompts get equal answers.
    """
    path = pathlib.Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    key = run_key(model, steering, decoding)
    found = read_log(path, key)
    left = [p for p in dict.fromkeys(prompts) if p not in found]
    done(len(prompts) - len(left))
    tokens = 0

    def keep(indices: np.ndarray, answers: Answers) -> None:
        nonlocal tokens
        n, answers = int((indices >= 0).sum()), fetch(answers)
        tokens += int(answers.before.lengths[:n].sum() + answers.after.lengths[:n].sum())
        texts = {
            name: model.tokenizer.decode(out.tokens[:n], out.lengths[:n])
            for name, out in (("before", answers.before), ("after", answers.after))
        }
        for row in range(n):
            entry: dict[str, Any] = {
                "key": key,
                "prompt": left[indices[row]],
                "score": float(answers.scores[row]),
                "before": texts["before"][row],
                "after": texts["after"][row],
            }
            add_entry(path, entry)
            found[entry["prompt"]] = Answered(entry["score"], entry["before"], entry["after"])
        done(n)

    if left:
        answer_both(model, steering, model.rows(left), decoding, keep)
    return [found[p] for p in prompts], tokens
