"""Forward and backward pass of an exported AoE in torch, beside Mixtral of the same shape.

`python -m benchmarks.torch_model [--batch=16] [--repeats=9] [--json=FILE]`, with `torch` and
`transformers` installed. The AoE has the classes that `aoe_jax.export` writes beside a model. On
one core, in float32, all take sequences of 256 random tokens through 4 layers of d=256 with 4 heads
and 8 experts, 2 chosen, of width 512, with a vocabulary of 4096. Gates of the AoE are whole (16 of
their neurons score), or factorised, with the width of Eq. 5. No model has a balance loss. Steps are
in turn; the ratio is of medians.
"""

import os

from absl import flags

from aoe_jax.config.experts import matched_width
from benchmarks.timing import machine_in_words, medians, report, run_benchmark, torch_packages

LENGTH, WIDTH, RANK = 256, 512, 85
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "use_cache": False,
}

_BATCH = flags.DEFINE_integer("batch", 16, "sequences", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 9, "timed steps of each model", lower_bound=1)


def models():
    """The models by name."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from aoe_jax.formats.huggingface.modeling_aoe import AoEConfig, AoEForCausalLM

    whole = AoEConfig(**SHAPE, intermediate_size=WIDTH, score_neurons=16)
    width = matched_width(SHAPE["hidden_size"], WIDTH, RANK)
    factorised = AoEConfig(**SHAPE, intermediate_size=width, gate_rank=RANK)
    return {
        "Mixtral": MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=WIDTH)),
        "AoE, whole gates": AoEForCausalLM(whole),
        "AoE, r=d/3": AoEForCausalLM(factorised),
    }


def forward_and_backward(model, tokens):
    """A function that computes the loss of a batch and its gradients."""

    def run():
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.item()

    return run


def main():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch, _, versions = torch_packages()
    tokens = torch.randint(SHAPE["vocab_size"], (_BATCH.value, LENGTH))
    steps = {name: forward_and_backward(model, tokens) for name, model in models().items()}
    seconds, figures = medians(steps, _REPEATS.value), []
    print(f"{machine_in_words()}, {versions}")
    for name, time in seconds.items():
        rate, ratio = tokens.numel() / time, seconds["Mixtral"] / time
        figures.append({"model": name, "tokens_per_second": rate, "speed_ratio": ratio})
        print(f"{name:>16}: {rate:7,.0f} tokens/s, {ratio:.2f}x Mixtral's speed")
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
