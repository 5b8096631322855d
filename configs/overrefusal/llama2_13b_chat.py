"""Remedies for over-refusal on Llama-2-13B-chat.

python -m launch.overrefusal --config=configs/overrefusal/llama2_13b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_13b_chat

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
The weights are gated: accept their licence on the hub and log in first. SCANS takes the
published choices, which were tuned on the test sets.

Hardware, in bfloat16: 26.0 GB of weights (13.02e9 x 2 bytes) and 800 KiB of keys and values a token
(2 x 40 layers x 40 heads x 128 x 2 bytes), that is 8.4 GB for 32 rows of 320 slots, held twice while answers are
decoded: 43 GB. One 80 GB GPU, or four 16 GB chips with --mesh=data:-1,model:4.

Refusals in percent (SCANS, arXiv 2408.11491, table 2; safe sets should be low, unsafe ones high):

                  XSTest safe  unsafe   OKTest  TruthfulQA  AdvBench  MaliciousInstruct
    default             34.40   99.50    20.33       11.69     99.78             100.00
    SCANS                7.20   97.50     0.33        1.20     98.90              97.00
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model


def get_config() -> ConfigDict:
    """The settings."""
    config = of_model("meta-llama/Llama-2-13b-chat-hf")
    config.dtype = "bfloat16"  # stored in float16
    config.scans_choice = ((10, 19), (10, 20), 0.75, 3.5)
    return config
