"""Models of published shapes, for meshes: `--config=configs/large.py:VARIANT`.

`moe_SHAPE` and `aoe_whole_SHAPE` have about the same total parameters; the gates of `aoe_whole` are
whole, and their first 16 neurons compute the score. The gates of `aoe_SHAPE` have rank d / 4; its
widths are rounded, so its parameters are between 3% fewer and 8% more. Shape `64` has the layers,
widths and experts of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060), `256` has more and narrower
experts, and `mixtral_8x7b` and `qwen3_30b` (30B-A3B) are named after their models. A bias, not a
loss, balances the load. A step has 4.2M tokens. Set corpus and tokenizer by flags.
"""

from aoe_jax.storage.config_files import default_config, require_variant

OLMOE = {"n_layers": 16, "n_heads": 16, "d_model": 2048, "vocab_size": 50_304}
MIXTRAL = {
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_model": 4096,
    "vocab_size": 32_000,
    "tie_embeddings": False,
}
QWEN3 = {
    "n_layers": 48,
    "n_heads": 32,
    "n_kv_heads": 4,
    "head_dim": 128,
    "qk_norm": "head",
    "d_model": 2048,
    "vocab_size": 151_936,
    "tie_embeddings": False,
}
SHAPES = {
    "64": (OLMOE, {"n_experts": 64, "top_k": 8, "d_ffn": 1024}),
    "256": (OLMOE, {"n_experts": 256, "top_k": 8, "d_ffn": 512}),
    "mixtral_8x7b": (MIXTRAL, {"n_experts": 8, "top_k": 2, "d_ffn": 14_336}),
    "qwen3_30b": (QWEN3, {"n_experts": 128, "top_k": 8, "d_ffn": 768}),
}
KINDS = {
    "aoe": {"kind": "aoe", "round_to": 128},
    "aoe_whole": {"kind": "aoe", "score_neurons": 16},
    "moe": {"kind": "router"},
}
VARIANTS = {f"{kind}_{shape}": (kind, shape) for shape in SHAPES for kind in KINDS}


def get_config(variant=None):
    require_variant("configs/large.py", variant, VARIANTS)
    kind, shape = VARIANTS[variant]
    model, experts = SHAPES[shape]
    config = default_config()
    config.model.update(model, max_len=4096, dtype="bfloat16", remat="layer")
    config.experts.update(experts, **KINDS[kind])
    if kind == "aoe":
        config.experts.d_low = config.model.d_model // 4
    config.balance.update(aux_weight=0.0, bias_rate=0.01)
    config.data.seq_len = 4096
    config.train.update(
        steps=100_000,
        batch_size=1024,
        learning_rate=4e-4,
        warmup=0.02,
        final_learning_rate=4e-5,
        log_every=10,
        eval_every=1000,
    )
    config.checkpoint.update(every=1000, keep=3)
    return config
