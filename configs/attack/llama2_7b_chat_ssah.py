"""Fine-tuning of Llama-2-7B-chat with its units of safety frozen (SSAH, arXiv 2410.10862).

python -m launch.attack --config=configs/attack/llama2_7b_chat_ssah.py --config.data=DATA_FOLDER \
--config.rows=FILE --config.wording=dolly --config.attacks="('benign#N',)" \
--out=runs/llama2_7b_ssah --mesh=data:1,model:8

FILE holds N rows of Dolly, DATA_FOLDER the published AdvBench file. Frozen are the units of safety with 6% of all units
that are complex, or with all complex ones, as in the paper, which trains frozen models for twice the epochs
(--config.epochs, a run of its own). By what it ranks complex units is not known: here by their score on safety data.
Rates and batches are those of arXiv 2310.03693. Units are found on 128 refusals and 128 answers of the model itself.

Published attack success (AdvBench, phrases): 0.19 before, 11.92 after Dolly, 3.65 with safety units and 6% complex ones
frozen, 2.88 with all complex ones; Llama-3-8B-Instruct 1.54, 61.15, 51.38 and 40.58: a weak defence there.

Hardware: as llama2_7b_chat.py.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import base


def get_config() -> ConfigDict:
    """Benign fine-tuning with units frozen."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.attacks = ("benign#1000",)
    config.tunings = ("full",)
    config.freeze_weights = ()
    config.freeze_ranks = ()
    config.freeze_units = (0.06, 1.0)
    config.rewinds = False
    config.checkpoint_every = 50
    return config
