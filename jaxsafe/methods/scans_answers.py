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
    """The answers that `path` holds under `key`, by prompt; a last line cut short is passed over."""
    found: dict[str, Answered] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["key"] == key:
            found[entry["prompt"]] = Answered(entry["score"], entry["before"], entry["after"])
    return found


def end_last_line(path: pathlib.Path) -> None:
    """Ends a line that was cut short, so that what is appended stands on lines of its own."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


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
    end_last_line(path)
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
        with path.open("a", encoding="utf-8") as file:
            for row in range(n):
                entry: dict[str, Any] = {
                    "key": key,
                    "prompt": left[indices[row]],
                    "score": float(answers.scores[row]),
                    "before": texts["before"][row],
                    "after": texts["after"][row],
                }
                file.write(json.dumps(entry) + "\n")
                found[entry["prompt"]] = Answered(entry["score"], entry["before"], entry["after"])
        done(n)

    if left:
        answer_both(model, steering, model.rows(left), decoding, keep)
    return [found[p] for p in prompts], tokens
