"""SCANS on Qwen2.5-7B-Instruct.

python -m launch.scans --config=configs/scans/qwen25_7b_instruct.py --config.data=DATA_FOLDER --out=runs/qwen25_7b

calibrates threshold, layers and strength on prompts that no evaluation uses; no choices are published for this model.
DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA. Without a system
prompt its template writes one of its own.

Hardware, in bfloat16: 15.2 GB of weights (7.62e9 x 2 bytes) and 56 KiB of keys and values a token (2 x 28 layers x 4
key/value heads x 128 x 2 bytes), that is 0.6 GB for 32 rows of 320 slots, held twice while answers are decoded: 16
GB.

The state of a layer is the residual stream before the final norm, also for the last one.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import calibrated


def get_config(variant: str = "") -> ConfigDict:
    """The settings. Raises ValueError for a `variant`: there is only the calibrated one, ""."""
    return calibrated("Qwen/Qwen2.5-7B-Instruct", variant)
