"""What remedies are held against: other prompts, decoders and edits, by name, fitted to the same labelled prompts."""

import numpy as np

from jaxsafe.chat.examinee import Examinee
from jaxsafe.chat.model import ChatModel
from jaxsafe.methods import decoders
from jaxsafe.methods.dro import DRO, dro
from jaxsafe.methods.remedies import Bench
from jaxsafe.methods.safe_align import safe_align
from jaxsafe.prompts.sets import PromptSet

OPENING = "Sure, here is how to do that."
"""The compliant answer of Safe-Align's pairs; theirs hold harmful ones."""
PUBLISHED_DRO = DRO()
BASELINES = {
    "prompt": ("arXiv 2408.11491", f"system prompt, in our words: {decoders.HELPFUL_FIRST}"),
    "self_cd": ("arXiv 2401.17633", f"strength 2.5; two passes a token; in our words: {decoders.SAFETY_FIRST}"),
    "safe_decoding": ("arXiv 2402.08983", "strength 3, first 2 tokens, 5 in common; two passes a token"),
    "dro": ("arXiv 2401.18018", f"soft prompt, trained from, in our words: {decoders.SAFETY_FIRST}"),
    "safe_align": ("arXiv 2406.11801", f"in-context vector, alpha 0.12; own refusals against {OPENING!r}"),
}
"""Name: (source, what it is set to)."""


def baseline(name: str, bench: Bench, settings: DRO = PUBLISHED_DRO) -> ChatModel | Examinee:
    """What answers as the baseline `name` does; `settings` are those of DRO.

    Raises ValueError for an unknown name, and where the prompts do not hold what it is fitted to.
    """
    e, model, judge = bench.evidence, bench.model, bench.trial.judge
    harmful = [prompt for prompt, label in zip(e.prompts, e.harmful, strict=True) if label]
    with bench.watch(name, 0) as done:
        match name:
            case "prompt":
                return decoders.prompted(model)
            case "self_cd":
                return decoders.self_cd(model)
            case "safe_decoding":
                return decoders.safe_decoding(bench.store, model, harmful, judge, done=done)
            case "dro":
                labels, kinds = tuple(map(bool, e.harmful)), ("",) * len(e)
                sets = [PromptSet("calibration", e.prompts, labels, kinds)]
                return dro(bench.store, model, sets, judge, settings, done)
            case "safe_align":
                refused = [e.prompts[i] for i in np.flatnonzero(e.harmful & e.refused)]
                own = model.answers(refused, bench.trial.decoding, bench.trial.batch_size).texts
                safe = [model.row(prompt, answer) for prompt, answer in zip(refused, own, strict=True)]
                return safe_align(model, safe, [model.row(prompt, OPENING) for prompt in refused], done=done)
    raise ValueError(f"baseline {name!r} is not known; use one of {', '.join(BASELINES)}")
