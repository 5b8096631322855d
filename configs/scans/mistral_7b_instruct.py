"""SCANS on Mistral-7B-Instruct v0.2, with grouped-query attention.

python -m launch.scans --config=configs/scans/mistral_7b_instruct.py --config.data=DATA_FOLDER --out=runs/mistral_7b

calibrates threshold, layers and strength on prompts that no evaluation uses; no choices are published for this model.
DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.

Hardware, in bfloat16: 14.5 GB of weights (7.24e9 x 2 bytes) and 128 KiB of keys and values a token
(2 x 32 layers x 8 key/value heads x 128 x 2 bytes), that is 1.3 GB for 32 rows of 320 slots, held twice while answers
are decoded: 17 GB. One 24 GB GPU, or two 16 GB chips with --mesh=data:-1,model:2.

The state of a layer is the residual stream before the final norm, also for the last one.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.scans.base import calibrated


def get_config(variant: str = "") -> ConfigDict:
    """The settings. Raises ValueError for a `variant`: there is only the calibrated one, ""."""
    return calibrated("mistralai/Mistral-7B-Instruct-v0.2", variant)
