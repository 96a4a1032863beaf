"""Times whole training steps on one core: our AoE and router MoE, and Mixtral of the same shape in
`transformers` on torch.

`python -m benchmarks.mixtral [--repeats=5] [--json=FILE]` needs `torch` and `transformers`. All
models have 4 layers with d=256, 4 heads, top-2 of 8 experts of width 512 (for AoE by Eq. 5), and a
vocabulary of 4096. A step has 16 sequences of 256 random tokens, and uses float32, AdamW, clipping
and L_aux (unless a model's name says otherwise). Mixtral runs eagerly. The models' steps alternate.
Steps consist mostly of matrix products, so one product is also timed in torch and in JAX.
"""

import os

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.training.step_times import RepeatedStep
from benchmarks.timing import configuration, machine_in_words, medians, report, run_benchmark

CHANGES = {
    "model": {"d_model": 256},
    "experts": {"d_ffn": 512},
    "balance": {"aux_tokens": 1.0},
    "train": {"batch_size": 16},
}

_REPEATS = flags.DEFINE_integer("repeats", 5, "timed steps of each model", lower_bound=1)


def mixtral_step(config):
    """Returns a function that runs one training step of Mixtral in `transformers` with the shape of
    `config`, and a text with the versions of the packages.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    m, c, t = config.model, config.experts, config.train
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.d_model,
            intermediate_size=c.d_ffn,
            num_hidden_layers=m.n_layers,
            num_attention_heads=m.n_heads,
            num_key_value_heads=m.n_heads,
            num_local_experts=c.n_experts,
            num_experts_per_tok=c.top_k,
            max_position_embeddings=m.max_len,
            tie_word_embeddings=m.tie_embeddings,
            output_router_logits=True,
            router_aux_loss_coef=config.balance.aux_weight,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), t.learning_rate, (0.9, 0.95), weight_decay=t.weight_decay
    )
    tokens = torch.randint(m.vocab_size, (t.batch_size, config.data.seq_len))

    def run():
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip_norm)
        optimizer.step()
        return loss.item()

    return run, f"torch {torch.__version__}, transformers {transformers.__version__}"


def products(config):
    """Returns `{library: function}`; a function multiplies tokens by one weight matrix 20 times."""
    import torch

    d, f = config.model.d_model, config.experts.d_ffn
    x, w = torch.randn(4096, d), torch.randn(d, f)
    jax_x, jax_w, product = jnp.asarray(x.numpy()), jnp.asarray(w.numpy()), jax.jit(jnp.matmul)

    def in_torch():
        for _ in range(20):
            x @ w

    def in_jax():
        for _ in range(20):
            result = product(jax_x, jax_w)
        return result

    return {"torch": in_torch, "JAX": in_jax}


def main():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # set before JAX counts cores
    router = configuration("router", CHANGES)
    low = {"experts": {"d_low": 85}}
    configurations = {
        "router": router,
        "AoE, L_aux": configuration("aoe", CHANGES, low),
        "AoE, L_aux of 1/8": configuration("aoe", CHANGES, low, {"balance": {"aux_tokens": 0.125}}),
        "AoE, loss-free": configuration(
            "aoe", CHANGES, low, {"balance": {"aux_weight": 0.0, "bias_rate": 0.01}}
        ),
    }
    mixtral, versions = mixtral_step(router)
    steps = {"Mixtral, transformers": mixtral} | {
        name: RepeatedStep(c) for name, c in configurations.items()
    }
    seconds = medians(steps, _REPEATS.value)
    print(machine_in_words() + f", {versions}")
    rates = medians(products(router), 5 * _REPEATS.value)
    rate = rates["torch"] / rates["JAX"]
    print(f"product of tokens and one weight matrix: JAX at {rate:.2f}x torch's rate")
    tokens, figures = router.tokens_per_step, []
    for name in steps:
        ratio = seconds["Mixtral, transformers"] / seconds[name]
        flops = training_flops_per_token(
            configurations.get(name, router)
        ) / training_flops_per_token(router)
        figures.append(
            {
                "model": name,
                "tokens_per_second": tokens / seconds[name],
                "speed_ratio": ratio,
                "flops_ratio": flops,
            }
        )
        print(
            f"{name:>22}: {tokens / seconds[name]:7,.0f} tokens/s, {ratio:.2f}x, "
            f"with {flops:.2f}x the useful FLOPs"
        )
    figures.append({"model": "one product", "speed_ratio": rate})
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
