"""SCANS on Gemma-3-4B-it.

python -m launch.scans --config=configs/scans/gemma3_4b_it.py --config.data=DATA_FOLDER --out=runs/gemma3_4b_it

calibrates threshold, layers and strength on prompts that no evaluation uses; no choices are published for this model.
DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA. The text model
alone is read, and written where a model is exported.

Hardware, in bfloat16: 7.8 GB of weights (3.88e9 x 2 bytes) and 136 KiB of keys and values a token (2 x 34 layers x 4
key/value heads x 256 x 2 bytes), that is 1.4 GB for 32 rows of 320 slots, held twice while answers are decoded: 11
GB.

The state of a layer is the residual stream before the final norm, also for the last one.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import calibrated


def get_config(variant: str = "") -> ConfigDict:
    """The settings. Raises ValueError for a `variant`: there is only the calibrated one, ""."""
    return calibrated("google/gemma-3-4b-it", variant)
