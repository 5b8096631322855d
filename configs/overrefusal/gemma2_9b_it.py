"""Remedies for over-refusal on Gemma-2-9B-it.

python -m launch.overrefusal --config=configs/overrefusal/gemma2_9b_it.py --config.data=DATA_FOLDER \
--out=runs/gemma2_9b_it

DATA_FOLDER holds the published files of XSTest, OKTest, AdvBench, MaliciousInstruct and TruthfulQA.
AdaSteer and AlphaSteer take the coefficients, blocks and shares that their authors publish for this model.

Hardware, in bfloat16: 18.5 GB of weights (9.24e9 x 2 bytes) and 336 KiB of keys and values a token (2 x 42 layers x 8
key/value heads x 256 x 2 bytes), that is 3.5 GB for 32 rows of 320 slots, held twice while answers are decoded: 26
GB.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.overrefusal.base import of_model


def get_config() -> ConfigDict:
    """The settings."""
    return of_model("google/gemma-2-9b-it", "gemma2-9b")
