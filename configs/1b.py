"""A model of 1B parameters, 0.2B of them active for a token: AoE with whole gates, 2 of 16 experts.

`configs/1b.py:moe` is the MoE with a router, with as many parameters. `configs/1b.py:mini` is a
miniature of the same recipe, for a trial of every step on a laptop. A step has 0.5M tokens, and
40,000 steps have 20B tokens. docs/start_run.md leads from texts to a published model.
"""

from aoe_jax.storage.config_files import default_config, require_variant

VARIANTS = ("aoe", "moe", "mini")


def get_config(variant="aoe"):
    require_variant("configs/1b.py", variant, VARIANTS)
    config = default_config()
    config.model.update(
        n_layers=16,
        n_heads=8,
        d_model=1024,
        vocab_size=32_000,
        max_len=2048,
        dtype="bfloat16",
        remat="layer",
    )
    config.experts.update(kind="aoe", n_experts=16, top_k=2, d_ffn=1152, score_neurons=16)
    config.balance.update(aux_weight=0.01, aux_tokens=0.125)
    config.data.update(name="prepared", path="tokens", seq_len=2048)
    config.train.update(
        steps=40_000,
        batch_size=256,
        learning_rate=6e-4,
        final_learning_rate=6e-5,
        warmup=0.02,
        log_every=10,
        eval_every=1000,
    )
    config.checkpoint.update(every=1000, keep=2)
    if variant == "moe":
        config.experts.update(kind="router", score_neurons=None)
    if variant == "mini":
        config.model.update(
            n_layers=2, n_heads=2, d_model=32, vocab_size=512, max_len=256, dtype="float32"
        )
        config.experts.update(n_experts=4, d_ffn=32, score_neurons=8)
        config.data.seq_len = 128
        config.train.update(steps=40, batch_size=16, learning_rate=1e-2, eval_every=20)
        config.checkpoint.update(every=20)
    return config
