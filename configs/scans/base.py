"""What every SCANS experiment starts from. A `None` is chosen on the calibration prompts."""

from ml_collections import ConfigDict, config_dict

from jaxsafe.configs.common import exam_fields, model_fields


def base() -> ConfigDict:
    """The settings, with the defaults that suit most chat models."""
    config = ConfigDict()
    model_fields(config)
    exam_fields(config)
    config.anchors = ("advbench#48", "malicious_instruct#16", "truthfulqa#32", "builtin:plain/anchor#32")
    config.calibration = (
        "advbench#48",
        "malicious_instruct#16",
        "truthfulqa#32",
        "builtin:plain/calibration#32",
        "builtin:lookalike/calibration#48",
    )
    config.evaluation = ("xstest", "oktest", "advbench", "malicious_instruct", "truthfulqa")
    config.harmless = ()
    config.judge = "scans"

    # SCANS. Layers are [first, stop). Give alpha or alpha_rel, not both.
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
    return config
