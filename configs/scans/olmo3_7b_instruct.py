"""SCANS on OLMo-3-7B-Instruct.

python -m launch.scans --config=configs/scans/olmo3_7b_instruct.py --config.data=DATA_FOLDER --out=runs/olmo3_7b

calibrates threshold, layers and strength on prompts that no evaluation uses; no choices are published for this model.
DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA. Its norms stand
behind attention and MLP.

Hardware, in bfloat16: 14.6 GB of weights (7.30e9 x 2 bytes) and 512 KiB of keys and values a token (2 x 32 layers x
32 key/value heads x 128 x 2 bytes), that is 5.4 GB for 32 rows of 320 slots, held twice while answers are decoded: 25
GB.

The state of a layer is the residual stream before the final norm, also for the last one.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import calibrated


def get_config(variant: str = "") -> ConfigDict:
    """The settings. Raises ValueError for a `variant`: there is only the calibrated one, ""."""
    return calibrated("allenai/Olmo-3-7B-Instruct", variant)
