"""What every walk through the safety landscape starts from (arXiv 2405.17374)."""

from ml_collections import ConfigDict

from jaxsafe.configs.common import EXAM, MODEL
from jaxsafe.configs.fields import Count, Field, Fields, Natural, Positive, config_of, with_defaults
from jaxsafe.kernels.directions import PER

FIELDS: Fields = {
    **MODEL,
    "reach": Field(0.5, Positive, "random lines and planes go so far to either side, in norms of each tensor"),
    "steps": Field(20, Natural, "steps of a random line from end to end, even; 0: no such lines"),
    "draws": Field(3, Count, "random directions, each a line"),
    "per": Field("layer", str, "what of a random direction has the norm of the weights", PER),
    "plane_steps": Field(0, Natural, "steps of either side of a plane of two orthogonal directions, even; 0: no plane"),
    "other_model": Field("", str, "a model of the same shape to walk toward, as model is named; empty: none"),
    "toward": Field(
        (-0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
        tuple[float, ...],
        "offsets on the line to other_model, which is at 1",
    ),
    "controls": Field(3, Natural, "random lines as far as the one to other_model, tensor by tensor"),
    "together": Field(1, Count, "points that answer in one program, each with weights of its own", identifies=False),
    **with_defaults(EXAM, evaluation=("advbench#first80",), judge="wei2024_no_length"),
}


def base() -> ConfigDict:
    """The settings; the docstring of llama2_7b_chat.py says where they are not the paper's."""
    return config_of(FIELDS)
