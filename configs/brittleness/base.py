"""What every brittleness experiment starts from (arXiv 2402.05162)."""

from ml_collections import ConfigDict

from jaxsafe.configs.common import EXAM, EXPECTED, MODEL, SCORING, TASKS
from jaxsafe.configs.fields import Count, Field, Fields, Natural, Share, SomeTexts, Texts, config_of, with_defaults
from jaxsafe.methods.brittleness import CONTROLS, GROUPED, IN_BLOCKS

PAIRS = ((0.01, 0.01), (0.02, 0.01), (0.03, 0.02), (0.05, 0.05))

# What is removed is a point for every entry; ranks are counted out of the model's width.
FIELDS: Fields = {
    **MODEL,
    **SCORING,
    "use_diff": Field(False, bool, "snip and wanda count with |W - W of base_model| in place of |W|"),
    "layers_at_a_time": Field(
        None, Count | None, "layers that have sums, scores and bases at once; None: all", identifies=False
    ),
    "by_row": Field((), Texts, "methods that compare weights by row, whatever per is", GROUPED),
    "sequential": Field((), Texts, "methods that score each block on the model as changed below it", IN_BLOCKS),
    "set_difference": Field(PAIRS, tuple[tuple[Share, Share], ...], "(q, p): top q of safety and not top p of utility"),
    "top": Field((), tuple[Share, ...], "shares: the weights that matter most to safety"),
    "bottom": Field((), tuple[Share, ...], "shares: the weights that matter least to safety"),
    "n_of_m": Field((), tuple[tuple[Natural, Count], ...], "(n, m): the lowest n of each m weights of a row"),
    "heads": Field((), tuple[Count, ...], "numbers of attention heads, those that tell harmful prompts best"),
    "orthogonal": Field((), tuple[tuple[Count, Count], ...], "(r_s, r_u): ranks of safety outside those of utility"),
    "top_ranks": Field((), tuple[Count, ...], "numbers of ranks that safety data uses most"),
    "bottom_ranks": Field((), tuple[Count, ...], "numbers of ranks that safety data uses least"),
    "controls": Field(3, Natural, "random counterparts of every point, for each entry of controls_by"),
    "controls_by": Field(CONTROLS, SomeTexts, "what they have in common with it in every matrix", CONTROLS),
    **EXPECTED,
    **with_defaults(EXAM, settings=("vanilla", "decoding")),
    **TASKS,
    "similarity_rank": Field(100, Count, "of the subspace similarity"),
    "jaccard_fraction": Field(0.05, Share, "the share of weights whose overlap is reported"),
    "export": Field("", str, "name of a point to write as a Hugging Face folder", identifies=False),
}


def base() -> ConfigDict:
    """The settings; the docstring of llama2_7b_chat.py says where they are not the paper's."""
    return config_of(FIELDS)


def of_model(model: str, orthogonal: tuple[tuple[int, int], ...]) -> ConfigDict:
    """The grid of Llama-2-7B for another `model`, with pairs of ranks (r_s, r_u) of its own width."""
    config = base()
    config.model = model
    config.set_difference = ((0.01, 0.01), (0.01, 0.02), (0.02, 0.04), (0.03, 0.07), (0.05, 0.05))
    config.orthogonal = orthogonal
    return config
