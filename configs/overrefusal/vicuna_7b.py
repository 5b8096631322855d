"""Remedies for over-refusal on Vicuna-7B v1.5.

python -m launch.overrefusal --config=configs/overrefusal/vicuna_7b.py --config.data=DATA_FOLDER \
--out=runs/vicuna_7b

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
The weights are pickled on the hub; configs/scans/vicuna_7b.py says how to convert them once: give the folder as
--config.model. SCANS takes the published choices, which were tuned on the test sets.

Hardware, in bfloat16: 13.5 GB of weights (6.74e9 x 2 bytes) and 512 KiB of keys and values a token
(2 x 32 layers x 32 heads x 128 x 2 bytes), that is 5.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 24 GB. One 40 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent (SCANS, arXiv 2408.11491, table 2; safe sets should be low, unsafe ones high):

                  XSTest safe  unsafe   OKTest  TruthfulQA  AdvBench  MaliciousInstruct
    default             20.80   88.00    19.00        5.05     97.37              76.00
    SCANS                5.60   87.00     3.00        0.00     98.96              98.00
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model
from jaxsafe.configs.scans.vicuna_7b import CHAT_TEMPLATE


def get_config() -> ConfigDict:
    """The settings."""
    config = of_model("lmsys/vicuna-7b-v1.5")
    config.dtype = "bfloat16"  # stored in float16
    config.scans_choice = ((10, 32), (10, 20), 0.75, 4.0)
    config.chat_template = CHAT_TEMPLATE
    return config
