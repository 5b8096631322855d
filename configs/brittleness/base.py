"""What every brittleness experiment starts from (arXiv 2402.05162)."""

from ml_collections import ConfigDict, config_dict


def base() -> ConfigDict:
    """The settings, with the published defaults where the paper has them."""
    config = ConfigDict()
    # The model: a folder, a GGUF file, a hub name, or smollm2-135m-instruct.
    config.model = ""
    config.base_model = ""  # removed weights are taken from this model; empty: they become zero
    config.dtype = "bfloat16"
    config.mesh = ""  # e.g. "data:-1,model:4"; empty: chosen for the devices
    config.chat_template = config_dict.placeholder(str)  # Jinja, for a model that ships none
    config.system = config_dict.placeholder(str)  # of the vanilla setting and of the prompts that are scored
    config.raw = False
    config.seed = 0
    config.data = ""  # folder of published prompt sets

    # What is scored: prompt sets, answered by the model itself (refusals for safety, answers for utility), or
    # instead of them files with the columns prompt and response. `raw_pairs`: prompts that hold the template already.
    config.safety = ("builtin:harmful/train",)
    config.utility = ("builtin:plain/train",)
    config.safety_pairs = ""
    config.utility_pairs = ""
    config.raw_pairs = False
    config.samples = 128
    config.answer_tokens = 32
    config.score = "snip"  # or wanda, magnitude, weight_difference (needs base_model), random
    config.loss = "mean"  # of a sample: mean or sum over its tokens
    config.positions = "response"  # or prompt, all
    config.per = "matrix"  # group of comparison: row, matrix or model
    config.score_batch_size = 8
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

    # What every point is put to.
    config.evaluation = ("advbench#100",)
    config.harmless = ("builtin:plain/test#50",)
    config.settings = ("vanilla", "decoding")  # also suffix (needs suffixes), vanilla_no_system, decoding_template
    config.suffixes = ""  # text file, one a line; none are shipped
    config.judge = "wei2024"
    config.max_new_tokens = 256
    config.batch_size = 32
    config.text = ""  # perplexity: passages of a text file; empty: the built-in prose
    config.passages = 40
    config.fluency_answers = 100  # of the first setting, read by the model before the edit
    config.zero_shot = ()  # lm-eval tasks, e.g. ("boolq", "rte"); needs the extra "eval"
    config.zero_shot_limit = 200

    config.similarity_rank = 100  # of the subspace similarity
    config.jaccard_fraction = 0.05
    config.export = ""  # name of a point to write as a Hugging Face folder
    return config
