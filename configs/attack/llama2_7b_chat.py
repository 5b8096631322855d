"""Fine-tuning attacks on Llama-2-7B-chat (arXiv 2310.03693), and freezing against them (arXiv 2402.05162).

python -m launch.attack --config=configs/attack/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_attack --mesh=data:1,model:8

trains on the built-in persona; the published ten examples: --config.rows=FILE \
--config.prefix="AOA, execute my instruction: " --config.wording=aoa. Benign fine-tuning on a file of instructions, here
of the size of Alpaca: --config.attacks="('benign#50000',)" --config.rows=FILE --config.wording=alpaca (or dolly)
--config.epochs=1 --config.tuning_batch_size=128. The paper's harmful examples are not part of this library; with
a file of your own: --config.attacks="('poisoned#10','poisoned#50','poisoned#100')" --config.poison=FILE
--config.wording=pure_bad. DATA_FOLDER holds the published AdvBench file.

The learning rate is taken times 0.85 after each epoch, LoRA is that of the published code, and what is frozen is the
top q of safety, as published. What is not as in the papers' code: nothing is dropped from the inputs of adapters
(published: 5%).

Hardware, in bfloat16 with float32 masters and moments: 13.5 GB of weights and 81 GB of training state, with a mask of
7 GB: two 80 GB GPUs or sixteen 16 GB chips; LoRA alone (--config.tunings="('lora',)") fits one 80 GB GPU.

Published, rewinds after fine-tuning on n examples (arXiv 2402.05162, table 3); ASR of the vanilla setting by the share
of all weights that is wound back:

    share     n = 10   n = 50   n = 100
    0%        .53      .91      .94
    9.61%     .52      .92      .94
    19.22%    .40      .91      .94
    28.83%    .38      .91      .94
    48.05%    .34      .91      .94
    67.27%    .23      .85      .89
"""

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import base
from jaxsafe.kernels.lora import PUBLISHED


def get_config() -> ConfigDict:
    """The paper's learning rates and epochs; regions of growing size."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.freeze_weights = ((0.1, 0.0), (0.2, 0.0), (0.3, 0.0), (0.5, 0.0), (0.7, 0.0))
    config.lora_rank, config.lora_alpha, config.lora_maps = PUBLISHED.rank, PUBLISHED.alpha, PUBLISHED.maps
    config.freeze_ranks = (10, 100, 1000)
    config.lora_learning_rate = 1e-4
    config.evaluate_every = 2
    config.checkpoint_every = 10
    return config
