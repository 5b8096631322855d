"""Brittleness of Llama-2-7B-chat, the main model of the paper (arXiv 2402.05162).

python -m launch.brittleness --config=configs/brittleness/llama2_7b_chat.py --config.data=DATA_FOLDER \
--out=runs/llama2_7b_brittleness

scores the model on its own refusals and answers; set --config.safety_pairs=FILE --config.utility_pairs=FILE
(columns prompt and response; --config.raw_pairs where prompts hold [INST] already) to score given pairs, as published.
DATA_FOLDER holds the published AdvBench file, whose first 100 lines the paper evaluates; draws of 100 here are by the
seed. Adversarial suffixes are the user's: --config.settings="('vanilla','suffix','decoding')" --config.suffixes=FILE.
The six zero-shot tasks: pip install "jaxsafe[eval]" and --config.zero_shot="('boolq','rte','hellaswag',
'winogrande','arc_challenge','openbookqa')".

What is not as in the paper's code: prompts are asked without its system prompt (--config.system="..." gives one, to
scored prompts as well); pairs of a file may hold prompts that are evaluated; one-sided points are made from scores of
the dense model, matrix by matrix, unless --config.sequential (published: block by block, by row), orthogonal ones from
bases of the dense model always. Broken answers are no success; the published rate, which counts them, is "unrefused" in
the tables.

Hardware, in bfloat16: 13.5 GB of weights; SNIP adds two trees of float32 scores, 26 GB each: one 80 GB GPU, or eight
16 GB chips with --mesh=data:1,model:8. Grams of ActSVD take 22 GB (4 bytes x 32 x (3 x 4096^2 + 11008^2)).

Published, SNIP set difference with p and q in percent (table 6a), and orthogonal projection (table 7a); ASR of the
settings vanilla / suffix / decoding_mean, zero-shot accuracy (dense: 0.00 / 0.09 / 0.27 in a reproduction, 0.58):

    p, q   sparsity   ASR                accuracy     r_u, r_s      ASR                accuracy
    1, 1   0.63%      .10 / .97 / .86    .54          3450, 4000    .67 / 1.00 / .88   .59
    2, 1   0.46%      .06 / .94 / .84    .55          3550, 4000    .68 /  .99 / .90   .59
    4, 2   0.78%      .09 / .97 / .88    .56          3950, 4090    .71 /  .97 / .91   .59
    7, 3   0.86%      .06 / .97 / .89    .58          4000, 4090    .71 /  .97 / .92   .58
    3, 2   0.94%      .21 / .97 / .89    .55          4080, 4090    .65 /  .98 / .94   .57
    4, 4   2.03%      .81 / .97 / .92    .51
    5, 5   2.41%      .92 / .97 / .95    .51
    6, 5   2.10%      .70 / .99 / .91    .53
    6, 6   2.75%      .87 / .97 / .93    .51
    9, 8   2.99%      .87 / .98 / .93    .52
"""

from ml_collections import ConfigDict

from jaxsafe.configs.brittleness.base import base


def get_config() -> ConfigDict:
    """The paper's grids."""
    config = base()
    config.model = "meta-llama/Llama-2-7b-chat-hf"
    config.dtype = "bfloat16"  # stored in float16
    config.set_difference = (
        (0.01, 0.01),
        (0.01, 0.02),
        (0.02, 0.04),
        (0.03, 0.07),
        (0.02, 0.03),
        (0.04, 0.04),
        (0.05, 0.05),
        (0.05, 0.06),
        (0.06, 0.06),
        (0.08, 0.09),
    )
    config.top = (0.01,)
    config.orthogonal = ((4000, 3450), (4000, 3550), (4090, 3950), (4090, 4000), (4090, 4080))
    config.top_ranks = (1,)
    return config
