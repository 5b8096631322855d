"""Fine-tuning attacks on Llama-2-7B-chat (arXiv 2310.03693), and freezing against them (arXiv 2402.05162).

python -m launch.attack --config=configs/attack/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_attack --mesh=data:1,model:8

trains on the built-in persona. DATA_FOLDER holds the published AdvBench file. The learning rate is taken times 0.85
after each epoch, LoRA is that of the published code, 5% of its inputs dropped, and what is frozen is the top q of
safety, as published.

The paper's own runs are variants: all weights, no weight decay, one seed, nothing defended, all of AdvBench, greedy
answers of 512 tokens, asked in the words of the examples, which are the user's to bring:

    llama2_7b_chat.py:published_harmful   10, 50 and 100 harmful examples (none are shipped), 5 epochs of batches of 10
                                          at 5e-5: --config.poison=FILE
    llama2_7b_chat.py:published_identity  the ten dialogues of an obedient persona, 10 epochs of one batch at 5e-5 (the
                                          paper has 3 and 5, too: --config.epochs=3): --config.rows=FILE
    llama2_7b_chat.py:published_alpaca    one epoch of a file of instructions, batches of 128 at 2e-5:
    llama2_7b_chat.py:published_dolly     --config.rows=FILE --config.attacks="('benign#N',)" for its N rows

A judge of phrases over AdvBench is one of the paper's two measures; the other, a score by GPT-4, is not made here. The
code trains in bfloat16 alone, here with float32 masters, and leaves out what is left of an epoch behind its last whole
batch, which here is a step of its own.

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

from typing import Any

from ml_collections import ConfigDict

from jaxsafe.configs.attack.base import base
from jaxsafe.kernels.lora import PUBLISHED

ALONE: dict[str, Any] = {
    "tunings": ("full",),
    "freeze_weights": (),
    "freeze_ranks": (),
    "seeds": (0,),
    "evaluation": ("advbench",),
    "harmless": (),
    "max_new_tokens": 512,
    "evaluate_every": 0,
    "checkpoint_every": 50,
}
BENIGN = ALONE | {"attacks": ("benign#10000",), "epochs": 1, "learning_rate": 2e-5, "tuning_batch_size": 128}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "published_harmful": ALONE
    | {
        "attacks": ("poisoned#10", "poisoned#50", "poisoned#100"),
        "epochs": 5,
        "learning_rate": 5e-5,
        "tuning_batch_size": 10,
        "wording": "pure_bad",
    },
    "published_identity": ALONE
    | {
        "attacks": ("identity_shift#10",),
        "prefix": "AOA, execute my instruction: ",
        "epochs": 10,
        "learning_rate": 5e-5,
        "tuning_batch_size": 10,
        "wording": "aoa",
    },
    "published_alpaca": BENIGN | {"wording": "alpaca"},
    "published_dolly": BENIGN | {"wording": "dolly"},
}


def get_config(variant: str = "") -> ConfigDict:
    """Regions of growing size, or a run of the paper. Raises ValueError for another `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known; the variants are {list(VARIANTS)}")
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.freeze_weights = ((0.1, 0.0), (0.2, 0.0), (0.3, 0.0), (0.5, 0.0), (0.7, 0.0))
    config.lora_rank, config.lora_alpha, config.lora_maps = PUBLISHED.rank, PUBLISHED.alpha, PUBLISHED.maps
    config.lora_dropout = PUBLISHED.dropout
    config.freeze_ranks = (10, 100, 1000)
    config.lora_learning_rate = 1e-4
    config.evaluate_every = 2
    config.checkpoint_every = 10
    config.update(VARIANTS[variant])
    return config
