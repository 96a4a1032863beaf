"""The configurations of the paper (arXiv 2501.13074): `--config=configs/paper.py:VARIANT`.

Table 2: `moe`, `moe_aux`, `moe_aux_factorised`, `moe_aux_large_router`, `aoe_r64`, `aoe_r64_aux`
... `aoe_r512_aux`. Table 3: `moe_top_p`, `aoe_top_p`, `moe_expert_choice`, `aoe_expert_choice` (AoE
with r = 256). Table 5: `moe_4b`, `aoe_4b`. This project adds `aoe_whole_aux`: its experts have
gates that are whole, not factorised. `VARIANT_muon` trains with Muon instead of AdamW.

Without it, optimiser and schedule are the paper's: 100B tokens in batches of 2048 sequences of 2048
tokens. The default corpus is the embedded one, with a tokenizer trained on it. To train on the
paper's corpus, RedPajama, set `--config.data.name`, and a tokenizer of 32,000 tokens
(`--config.data.tokenizer`).
"""

from aoe_jax.storage.config_files import default_config, require_variant, update_groups

RANKS = (64, 128, 256, 512)
LARGE_RANK = 400  # r of the 4B model
SCORE_NEURONS = 16  # the score of a whole gate is computed from its first 16 neurons
ABLATION_RANK = 256  # r in rows 3 and 4 of Table 2, and in Table 3

MOE = {"experts": {"kind": "router"}, "balance": {"aux_weight": 0.0}}
AUX = {"balance": {"aux_weight": 0.01}}
# With top-p routing, Huang et al. 2024 use L_aux and an entropy loss. Expert choice needs no loss,
# because every expert selects the same number of tokens.
TOP_P = {
    "routing": {"name": "top_p", "p": 0.6},
    "balance": {"aux_weight": 0.01, "entropy_weight": 1e-4},
}
EXPERT_CHOICE = {
    "routing": {"name": "expert_choice", "capacity_factor": 2.0},
    "balance": {"aux_weight": 0.0},
}
LARGE = {
    "model": {"n_layers": 24, "n_heads": 20, "d_model": 1280},
    "experts": {"d_ffn": 5120},
    "train": {"learning_rate": 3.2e-4},
}


def _aoe(rank):
    return {"experts": {"kind": "aoe", "d_low": rank}, "balance": {"aux_weight": 0.0}}


# Each variant is a list of changes, which are applied to the small model one after the other.
VARIANTS = {
    "moe": [MOE],
    "moe_aux": [MOE, AUX],
    "moe_aux_factorised": [
        MOE,
        AUX,
        {"experts": {"factorised_gate": True, "d_low": ABLATION_RANK}},
    ],
    "moe_aux_large_router": [MOE, AUX, {"experts": {"large_router": True, "d_low": ABLATION_RANK}}],
    **{f"aoe_r{rank}": [_aoe(rank)] for rank in RANKS},
    **{f"aoe_r{rank}_aux": [_aoe(rank), AUX] for rank in RANKS},
    "aoe_whole_aux": [{"experts": {"kind": "aoe", "score_neurons": SCORE_NEURONS}}, AUX],
    "moe_top_p": [MOE, TOP_P],
    "aoe_top_p": [_aoe(ABLATION_RANK), TOP_P],
    "moe_expert_choice": [MOE, EXPERT_CHOICE],
    "aoe_expert_choice": [_aoe(ABLATION_RANK), EXPERT_CHOICE],
    "moe_4b": [MOE, AUX, LARGE],
    "aoe_4b": [_aoe(LARGE_RANK), AUX, LARGE, {"experts": {"d_wide": 6470}}],  # Eq. 5 gives 6469.2
}


def get_config(variant=""):
    name = variant.removesuffix("_muon")
    require_variant("configs/paper.py", name, VARIANTS, "with or without _muon, ")
    config = default_config()
    config.model.update(
        n_layers=12,
        n_heads=12,
        d_model=768,
        vocab_size=32_000,
        max_len=2048,
        dtype="bfloat16",
        remat="layer",
    )
    config.experts.update(n_experts=8, top_k=2, d_ffn=3072)
    config.data.seq_len = 2048
    config.train.update(
        steps=23_800,
        batch_size=2048,
        learning_rate=2e-4,
        warmup=4800 / 23_800,
        final_learning_rate=1.28e-5,
        weight_decay=0.1,
        clip_norm=1.0,
        log_every=10,
        eval_every=1000,
    )
    config.checkpoint.update(every=1000, keep=3)
    for change in VARIANTS[name]:
        update_groups(config, change)
    config.train.optimizer = "adamw" if name == variant else "muon"
    return config
