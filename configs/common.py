"""Settings that several tasks share, each with its default and what it means, once."""

from ml_collections import ConfigDict, config_dict


def model_fields(config: ConfigDict) -> None:
    """Adds which model it is, how it is asked, and where prompt sets lie."""
    config.model = ""  # a folder, a GGUF file, a hub name, or smollm2-135m-instruct
    config.dtype = "bfloat16"
    config.mesh = ""  # e.g. "data:-1,model:4"; empty: chosen for the devices
    config.chat_template = config_dict.placeholder(str)  # Jinja, for a model that ships none
    config.system = config_dict.placeholder(str)  # the system prompt; None: what the template does without one
    config.raw = False  # prompts without any template
    config.seed = 0  # of draws of prompts and of everything random
    config.data = ""  # folder of published prompt sets


def exam_fields(config: ConfigDict) -> None:
    """Adds what every variant is put to.

    Prompt sets: "name", "name/split", a file "mine.csv", "mine.csv:safe" or ":harmful"; "#64" draws 64 by the seed.
    """
    config.evaluation = ("advbench#100",)
    config.harmless = ("builtin:plain/test#50",)  # asked under the first setting; prompts without a label are safe
    config.settings = ("vanilla",)  # also vanilla_no_system, suffix (needs suffixes), decoding, decoding_template
    config.suffixes = ""  # text file, one a line; none are shipped
    config.judge = "wei2024"
    config.batch_size = 32
    config.max_new_tokens = 256
    config.repetition_penalty = 1.0
    config.text = ""  # perplexity: passages of a text file; empty: the built-in prose
    config.passages = 40


def task_fields(config: ConfigDict) -> None:
    """Adds lm-eval's tasks, for variants without a steering rule."""
    config.zero_shot = ()  # e.g. ("boolq", "rte"); needs the extra "eval"
    config.zero_shot_limit = 200


def score_fields(config: ConfigDict) -> None:
    """Adds what importance scores and directions are made from.

    Prompt sets are answered by the model itself (refusals for safety, answers for utility); files with the columns
    prompt and response take their place.
    """
    config.base_model = ""  # removed weights are taken from this model; empty: they become zero
    config.safety = ("builtin:harmful/train",)
    config.utility = ("builtin:plain/train",)
    config.safety_pairs = ""
    config.utility_pairs = ""
    config.raw_pairs = False  # prompts that hold the template already
    config.samples = 128
    config.answer_tokens = 32
    config.score = "snip"  # or wanda, magnitude, weight_difference (needs base_model), random
    config.loss = "mean"  # of a sample: mean or sum over its tokens
    config.positions = "response"  # or prompt, all
    config.per = "matrix"  # group of comparison: row, matrix or model
    config.score_batch_size = 8
