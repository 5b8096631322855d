"""Fine-tuning attacks on Gemma-3-4B-it; no numbers are published for freezing in it.

python -m launch.attack --config=configs/attack/gemma3_4b_it.py --config.data=DATA_FOLDER \
--out=runs/gemma3_4b_it_attack --mesh=data:1,model:8

See llama2_7b_chat.py for files of examples. DATA_FOLDER holds the published AdvBench file. The text model alone is
read, and written where a model is exported.

Hardware, in bfloat16 with float32 masters and moments: 7.8 GB of weights and 47 GB of training state; LoRA alone
(--config.tunings="('lora',)") needs little more than the weights.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import of_model


def get_config() -> ConfigDict:
    """The regions of Llama-2-7B."""
    return of_model("google/gemma-3-4b-it")
