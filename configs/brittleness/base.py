"""What every brittleness experiment starts from (arXiv 2402.05162)."""

from ml_collections import ConfigDict

from jaxsafe.configs.common import exam_fields, model_fields, score_fields, task_fields


def base() -> ConfigDict:
    """The settings, with the published defaults where the paper has them."""
    config = ConfigDict()
    model_fields(config)
    score_fields(config)
    config.sequential = False  # one-sided points: score each block on the model as changed below it

    # What is removed: (q, p) shares; r_s, r_u and ranks out of the model's width; one point each.
    config.set_difference = ((0.01, 0.01), (0.02, 0.01), (0.03, 0.02), (0.05, 0.05))
    config.top = ()
    config.bottom = ()
    config.n_of_m = ()
    config.heads = ()
    config.orthogonal = ()
    config.top_ranks = ()
    config.bottom_ranks = ()
    config.controls = 1  # random counterparts of every point

    exam_fields(config)
    task_fields(config)
    config.settings = ("vanilla", "decoding")
    config.similarity_rank = 100  # of the subspace similarity
    config.jaccard_fraction = 0.05
    config.export = ""  # name of a point to write as a Hugging Face folder
    return config
