"""Remedies for over-refusal on Qwen2.5-7B-Instruct.

python -m launch.overrefusal --config=configs/overrefusal/qwen25_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/qwen25_7b_instruct

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
AdaSteer and AlphaSteer take the coefficients, blocks and shares that their authors publish for this model.

Hardware, in bfloat16: 15.2 GB of weights (7.62e9 x 2 bytes) and 56 KiB of keys and values a token (2 x 28 layers x 4
key/value heads x 128 x 2 bytes), that is 0.6 GB for 32 rows of 320 slots, held twice while answers are decoded: 16
GB.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model


def get_config() -> ConfigDict:
    """The settings."""
    return of_model("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b")
