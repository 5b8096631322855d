"""Where does a language model's safety live, how easily does it break, and where does it refuse too much?"""

import importlib
from typing import Any

__version__ = "0.1.0"

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
    "WeightedSum": "jaxsafe.model.taps",
    "load_hf": "jaxsafe.io.hub",
    "resolve": "jaxsafe.io.hub",
    "save_hf": "jaxsafe.io.hf",
    "ChatModel": "jaxsafe.io.chat_model",
    "load_chat_model": "jaxsafe.io.chat_model",
    "Tokenizer": "jaxsafe.text.chat",
    "Batch": "jaxsafe.text.batches",
    "PromptSet": "jaxsafe.text.datasets",
    "load_prompts": "jaxsafe.text.datasets",
    "check_disjoint": "jaxsafe.text.datasets",
    "parse_mesh": "jaxsafe.parallel",
    "capture": "jaxsafe.kernels.capture",
    "generate": "jaxsafe.kernels.generate",
    "generate_rows": "jaxsafe.kernels.generate",
    "Steering": "jaxsafe.kernels.steering",
    "scans_generate": "jaxsafe.kernels.steering",
    "fine_tune": "jaxsafe.kernels.training",
    "gather": "jaxsafe.methods.statistics",
    "merge": "jaxsafe.methods.statistics",
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
    "per_device": "jaxsafe.parallel",
    "judge": "jaxsafe.evaluation.judges",
    "rate": "jaxsafe.evaluation.metrics",
    "mcnemar": "jaxsafe.evaluation.metrics",
    "find_directions": "jaxsafe.methods.scans",
    "steering_of": "jaxsafe.methods.scans",
    "load_steering": "jaxsafe.methods.vectors",
    "save_steering": "jaxsafe.methods.vectors",
    "save_control_vector": "jaxsafe.methods.vectors",
    "write_report": "jaxsafe.report.html",
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
