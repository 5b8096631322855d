"""Remedies for over-refusal on Vicuna-13B v1.5.

python -m launch.overrefusal --config=configs/overrefusal/vicuna_13b.py --config.data=DATA_FOLDER \
--out=runs/vicuna_13b

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
The weights are pickled on the hub; configs/scans/vicuna_13b.py says how to convert them once: give the folder as
--config.model. SCANS takes the published choices, which were tuned on the test sets.

Hardware, in bfloat16: 26.0 GB of weights (13.02e9 x 2 bytes) and 800 KiB of keys and values a token
(2 x 40 layers x 40 heads x 128 x 2 bytes), that is 8.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 43 GB. One 80 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent (SCANS, arXiv 2408.11491, table 2; safe sets should be low, unsafe ones high):

                  XSTest safe  unsafe   OKTest  TruthfulQA  AdvBench  MaliciousInstruct
    default             16.80   98.00    19.33        4.38     99.78              93.00
    SCANS                9.20   93.50     3.33        0.27     99.78              98.00
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model
from jaxsafe.configs.scans.vicuna_7b import CHAT_TEMPLATE


def get_config() -> ConfigDict:
    """The settings."""
    config = of_model("lmsys/vicuna-13b-v1.5")
    config.dtype = "bfloat16"  # stored in float16
    config.scans_choice = ((10, 20), (10, 20), 0.7, 4.0)
    config.chat_template = CHAT_TEMPLATE
    return config
