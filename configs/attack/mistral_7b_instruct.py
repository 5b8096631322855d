"""Fine-tuning attacks on Mistral-7B-Instruct v0.2; no numbers are published for freezing in it.

python -m launch.attack --config=configs/attack/mistral_7b_instruct.py --config.data=DATA_FOLDER \
--out=runs/mistral_7b_instruct_attack --mesh=data:1,model:8

See llama2_7b_chat.py for files of examples. DATA_FOLDER holds the published AdvBench file.

Hardware, in bfloat16 with float32 masters and moments: 14.5 GB of weights and 87 GB of training state: two 80 GB GPUs
or sixteen 16 GB chips; LoRA alone (--config.tunings="('lora',)") fits one 80 GB GPU.
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import of_model


def get_config() -> ConfigDict:
    """The regions of Llama-2-7B."""
    return of_model("mistralai/Mistral-7B-Instruct-v0.2")
