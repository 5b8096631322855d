"""Where does a language model's safety live, how easily does it break, and where does it refuse too much?"""

import importlib
import pathlib
from typing import Any

__version__ = "0.1.0"

# An installation has launch/ and configs/ inside the package; in a clone they stand beside it.
if not (pathlib.Path(__file__).parent / "launch").is_dir():
    __path__.append(str(pathlib.Path(__file__).parents[1]))

# Public name -> where it lives; imported on first use, so that `import jaxsafe` costs little.
_WHERE = {
    "ModelConfig": "jaxsafe.model.config",
    "Transformer": "jaxsafe.model.transformer",
    "forward": "jaxsafe.model.transformer",
    "init": "jaxsafe.model.transformer",
    "hf_view": "jaxsafe.model.weights",
    "Edit": "jaxsafe.model.taps",
    "edit": "jaxsafe.model.taps",
    "at": "jaxsafe.model.taps",
    "At": "jaxsafe.model.taps",
    "SquareSum": "jaxsafe.model.taps",
    "load_hf": "jaxsafe.io.hub",
    "resolve": "jaxsafe.io.hub",
    "save_hf": "jaxsafe.io.hf",
    "ChatModel": "jaxsafe.chat.model",
    "load_chat_model": "jaxsafe.chat.model",
    "Answers": "jaxsafe.chat.answers",
    "Steered": "jaxsafe.chat.steered",
    "Tokenizer": "jaxsafe.chat.tokenizer",
    "Batch": "jaxsafe.rows",
    "Row": "jaxsafe.rows",
    "PromptSet": "jaxsafe.prompts.sets",
    "load_prompts": "jaxsafe.prompts.sets",
    "check_disjoint": "jaxsafe.prompts.sets",
    "parse_mesh": "jaxsafe.parallel",
    "capture": "jaxsafe.kernels.forward",
    "generate": "jaxsafe.kernels.generate",
    "Decoding": "jaxsafe.kernels.sampling",
    "Sampling": "jaxsafe.kernels.sampling",
    "Steering": "jaxsafe.kernels.steering",
    "gather": "jaxsafe.kernels.sums",
    "Scoring": "jaxsafe.kernels.sums",
    "Statistics": "jaxsafe.kernels.sums",
    "merge": "jaxsafe.kernels.sums",
    "wanda_scores": "jaxsafe.kernels.importance",
    "snip_scores": "jaxsafe.kernels.importance",
    "top": "jaxsafe.kernels.selection",
    "bottom": "jaxsafe.kernels.selection",
    "set_difference": "jaxsafe.kernels.selection",
    "apply_mask": "jaxsafe.kernels.selection",
    "jaccard": "jaxsafe.kernels.selection",
    "act_svd": "jaxsafe.kernels.lowrank",
    "remove_ranks": "jaxsafe.kernels.lowrank",
    "remove_orthogonal": "jaxsafe.kernels.lowrank",
    "subspace_similarity": "jaxsafe.kernels.lowrank",
    "save_mask": "jaxsafe.io.masks",
    "load_mask": "jaxsafe.io.masks",
    "save_scores": "jaxsafe.io.masks",
    "load_scores": "jaxsafe.io.masks",
    "Store": "jaxsafe.io.store",
    "sums_once": "jaxsafe.io.sums",
    "per_device": "jaxsafe.parallel",
    "judge": "jaxsafe.evaluation.judges.keyword",
    "rate": "jaxsafe.evaluation.stats",
    "mcnemar": "jaxsafe.evaluation.stats",
    "find_directions": "jaxsafe.methods.scans",
    "steering_of": "jaxsafe.methods.scans",
    "load_steering": "jaxsafe.io.vectors",
    "save_steering": "jaxsafe.io.vectors",
    "save_control_vector": "jaxsafe.io.vectors",
    "load_control_vector": "jaxsafe.io.vectors",
    "freeze": "jaxsafe.kernels.freezing",
    "outside": "jaxsafe.kernels.freezing",
    "rewind": "jaxsafe.kernels.freezing",
    "LoRA": "jaxsafe.kernels.lora",
    "merge_adapters": "jaxsafe.kernels.lora",
    "FineTuning": "jaxsafe.methods.trainer",
    "train": "jaxsafe.methods.trainer",
    "trained": "jaxsafe.methods.trainer",
    "Material": "jaxsafe.methods.brittleness",
    "ScoreSettings": "jaxsafe.methods.brittleness",
    "Point": "jaxsafe.methods.brittleness",
    "edited": "jaxsafe.methods.brittleness",
    "Keep": "jaxsafe.methods.defences",
    "LayerRange": "jaxsafe.model.layers",
    "layer_mask": "jaxsafe.kernels.units",
    "head_mask": "jaxsafe.kernels.units",
    "write_report": "jaxsafe.report.write",
    "Variant": "jaxsafe.records.run",
    "json_schema": "jaxsafe.records.run",
    "read_run": "jaxsafe.records.run",
    "read_samples": "jaxsafe.records.run",
    "setting": "jaxsafe.evaluation.settings",
    "Exam": "jaxsafe.study.exam",
    "Study": "jaxsafe.study.study",
    "record": "jaxsafe.study.record",
    "write_run": "jaxsafe.study.record",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'jaxsafe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
