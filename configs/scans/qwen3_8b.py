"""SCANS on Qwen3-8B.

python -m launch.scans --config=configs/scans/qwen3_8b.py --config.data=DATA_FOLDER --out=runs/qwen3_8b

calibrates threshold, layers and strength on prompts that no evaluation uses; no choices are published for this model.
DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA. Its template
closes an empty block of thoughts before each answer (template_args); answers are judged behind it.

Hardware, in bfloat16: 16.4 GB of weights (8.19e9 x 2 bytes) and 144 KiB of keys and values a token (2 x 36 layers x 8
key/value heads x 128 x 2 bytes), that is 1.5 GB for 32 rows of 320 slots, held twice while answers are decoded: 19
GB.

The state of a layer is the residual stream before the final norm, also for the last one.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import calibrated


def get_config(variant: str = "") -> ConfigDict:
    """The settings. Raises ValueError for a `variant`: there is only the calibrated one, ""."""
    config = calibrated("Qwen/Qwen3-8B", variant)
    config.template_args = ("enable_thinking=false",)
    return config
