"""Models with more experts than the paper's, for meshes with an expert axis:
`--config=configs/large.py:VARIANT`.

`aoe_64`, `aoe_whole_64`, `moe_64` have the shape of OLMoE (Muennighoff et al. 2024, arXiv
2409.02060): 16 layers, d=2048, 8 of 64 experts of width 1024. `aoe_256`, `aoe_whole_256`, `moe_256`
use 8 of 256 experts of width 512. AoE and MoE have about the same total parameters. The gates of
`aoe` have rank d / 4; those of `aoe_whole` are whole, and their first 16 neurons compute the score.
A bias, not a loss, balances the load. A step has 4.2M tokens. Set corpus and tokenizer by flags.
"""

from aoe_jax.storage.config_files import default_config, require_variant

SHAPES = {"64": {"n_experts": 64, "d_ffn": 1024}, "256": {"n_experts": 256, "d_ffn": 512}}
KINDS = {
    "aoe": {"kind": "aoe", "d_low": 512, "round_to": 128},
    "aoe_whole": {"kind": "aoe", "score_neurons": 16},
    "moe": {"kind": "router"},
}
VARIANTS = tuple(f"{kind}_{size}" for size in SHAPES for kind in KINDS)


def get_config(variant=None):
    require_variant("configs/large.py", variant, VARIANTS)
    kind, _, size = variant.rpartition("_")
    config = default_config()
    config.model.update(
        n_layers=16,
        n_heads=16,
        d_model=2048,
        vocab_size=50_304,
        max_len=4096,
        dtype="bfloat16",
        remat="layer",
    )
    config.experts.update(top_k=8, **SHAPES[size], **KINDS[kind])
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
