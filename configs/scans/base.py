"""What every SCANS experiment starts from. A `None` is chosen on the calibration prompts."""

from ml_collections import ConfigDict, config_dict


def base() -> ConfigDict:
    """The settings, with the defaults that suit most chat models."""
    config = ConfigDict()
    # The model: a folder, a GGUF file, a hub name, or smollm2-135m-instruct.
    config.model = ""
    config.dtype = "bfloat16"
    config.mesh = ""  # e.g. "data:-1,model:4"; empty: chosen for the devices
    config.chat_template = config_dict.placeholder(str)  # Jinja, for a model that ships none
    config.system = config_dict.placeholder(str)  # None: what the template does without one
    config.raw = False
    config.seed = 0

    # Prompt sets: "name", "name/split", a file "mine.csv", "mine.csv:safe" or ":harmful"; "#64" draws 64 by the
    # seed. `data` is a folder of published files.
    config.data = ""
    config.anchors = ("advbench#48", "malicious_instruct#16", "truthfulqa#32", "builtin:plain/anchor#32")
    config.calibration = (
        "advbench#48",
        "malicious_instruct#16",
        "truthfulqa#32",
        "builtin:plain/calibration#32",
        "builtin:lookalike/calibration#48",
    )
    config.evaluation = ("xstest", "oktest", "advbench", "malicious_instruct", "truthfulqa")
    config.judge = "scans"

    # SCANS. Layers are [first, end). Give alpha or alpha_rel, not both.
    config.vectors = ""  # vectors.safetensors of an earlier run: nothing is computed or calibrated anew
    config.scored = config_dict.placeholder(tuple)
    config.threshold = config_dict.placeholder(float)
    config.layers = config_dict.placeholder(tuple)
    config.alpha = config_dict.placeholder(float)
    config.alpha_rel = config_dict.placeholder(float)
    config.alpha_grid = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1)
    config.kl_limit = 0.1  # nats a token, on safe prompts that the model answers anyway
    config.max_drop = 0.05  # of the refusal rate of harmful calibration prompts
    config.threshold_by = "outcome"  # best refusals after steering; "roc": best verdicts of the classifier
    config.calibration_tokens = 24

    # Answers.
    config.batch_size = 32
    config.max_new_tokens = 256
    config.repetition_penalty = 1.0

    # Perplexity: passages of a text file; empty: the built-in prose.
    config.text = ""
    config.passages = 40
    return config
