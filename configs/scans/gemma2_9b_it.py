"""SCANS on Gemma-2-9B-it.

python -m launch.scans --config=configs/scans/gemma2_9b_it.py --config.data=DATA_FOLDER --out=runs/gemma2_9b_it

calibrates threshold, layers and strength on prompts that no evaluation uses; no choices are published for this model.
DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA. Its template
knows no system prompt and refuses one.

Hardware, in bfloat16: 18.5 GB of weights (9.24e9 x 2 bytes) and 336 KiB of keys and values a token (2 x 42 layers x 8
key/value heads x 256 x 2 bytes), that is 3.5 GB for 32 rows of 320 slots, held twice while answers are decoded: 26
GB.

The state of a layer is the residual stream before the final norm, also for the last one.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import calibrated


def get_config(variant: str = "") -> ConfigDict:
    """The settings. Raises ValueError for a `variant`: there is only the calibrated one, ""."""
    return calibrated("google/gemma-2-9b-it", variant)
