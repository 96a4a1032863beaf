"""Times incremental decoding of AoE and router MoE with few and many experts, and compares it with
decoding without a cache.

`python -m benchmarks.decoding [--length=512] [--batches=1,16] [--d_model=256] [--layers=4]
[--repeats=7] [--json=FILE]`. Models have random weights in float32, a vocabulary of 4096, and top-2
of 8 or top-8 of 64 experts. AoE has gates of rank r = d/3 or d/12, and as many parameters as the
router MoE. One dense model is as wide as all experts together, another as wide as all experts of
one token. All models are timed in turn. A step processes one token of each sequence and selects the
likeliest next token, after `--length` cached positions. In the file of `--json`, `bytes` is the
size of the weights that a token needs. `recomputing` is the time of a token without a cache,
divided by the time with a cache.
"""

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax import Decoder
from aoe_jax.config.checks import require_flag
from aoe_jax.evaluation.generation import next_logits
from aoe_jax.model.counts import parameter_counts
from aoe_jax.model.decoding import Cache, unstacked
from aoe_jax.sharding import make_mesh
from benchmarks.timing import configuration, machine_in_words, medians, report, run_benchmark

_LENGTH = flags.DEFINE_integer("length", 512, "cached positions before the token", lower_bound=1)
_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "numbers of sequences decoded together")
_D_MODEL = flags.DEFINE_integer(
    "d_model", 256, "width of the models, a multiple of 16", lower_bound=16
)
_LAYERS = flags.DEFINE_integer("layers", 4, "number of layers", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed calls of each function", lower_bound=1)

STEPS = 8  # tokens per timed call


def variants(d_model):
    """Returns `{name: (`experts.kind`, changes to the group `experts`)}`."""
    few = {"n_experts": 8, "top_k": 2, "d_ffn": 2 * d_model}
    many = {"n_experts": 64, "top_k": 8, "d_ffn": d_model // 2}
    return {
        "router, 2 of 8": ("router", few),
        "AoE, 2 of 8, r=d/3": ("aoe", few | {"d_low": d_model // 3}),
        "router, 8 of 64": ("router", many),
        "AoE, 8 of 64, r=d/3": ("aoe", many | {"d_low": d_model // 3}),
        "AoE, 8 of 64, r=d/12": ("aoe", many | {"d_low": d_model // 12}),
        "dense, as wide as all experts": ("dense", {"d_ffn": 16 * d_model}),
        "dense, as wide as those chosen": ("dense", {"d_ffn": 4 * d_model}),
    }


def model_of(kind, experts, d_model, n_layers):
    """Returns `(config, decoder, parameters stacked over layers, parameters for decoding)`."""
    model = {"d_model": d_model, "n_layers": n_layers, "dtype": "float32", "unroll": n_layers}
    config = configuration(kind, {"model": model, "mesh": {"data": 1}, "experts": experts})
    decoder = Decoder.from_config(config)
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return config, decoder, params, unstacked(decoder, params, make_mesh(config, jax.devices()[:1]))


def decoding(decoder, params, batch, length):
    """Returns a function without arguments that decodes STEPS tokens with a cache."""
    m = decoder.model
    shape = (batch, m.kv_heads, length + STEPS, m.head_width)
    layers = tuple(
        tuple(jax.random.normal(jax.random.key(i), shape) for i in range(2))
        for _ in range(m.n_layers)
    )
    cache = Cache(layers, jnp.full(batch, length, jnp.int32))
    state = (jnp.zeros(batch, jnp.int32), (cache,))

    @jax.jit
    def run(params, state):
        def one(_, carry):
            logits, caches = next_logits((decoder,), None, params, None, *carry)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), caches

        return jax.lax.fori_loop(0, STEPS, one, state)[0]

    return lambda: run(params, state)


def recomputing(decoder, params, batch, length):
    """Returns a function without arguments that computes one next token, without a cache."""
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, decoder.model.vocab_size)

    @jax.jit
    def run(params, tokens):
        hidden, _ = decoder.apply({"params": params}, tokens, method="features")
        return jnp.argmax(hidden[:, -1] @ params["embed"]["embedding"].T, axis=-1)

    return lambda: run(params, tokens)


def token_bytes(config):
    """Counts the bytes of the float32 weights that a token needs: the active ones, the W_gate_down
    of all AoE experts, and the embedding table.
    """
    c, counts = config.experts, parameter_counts(config)
    sizes = c.sizes(config.model.d_model)
    idle = (c.n_experts - c.top_k) * sizes["r"] * sizes["d"] if c.kind == "aoe" else 0
    return 4 * (counts.active_non_embedding + counts.embedding + config.model.n_layers * idle)


def main():
    are_counts = all(batch.isdecimal() and int(batch) for batch in _BATCHES.value)
    wanted = "must be whole numbers greater than 0"
    require_flag(are_counts, "batches", ",".join(_BATCHES.value), wanted)
    length, d_model, figures = _LENGTH.value, _D_MODEL.value, []
    require_flag(d_model % 16 == 0, "d_model", d_model, "must be a multiple of 16")
    models = {
        name: model_of(*settings, d_model, _LAYERS.value)
        for name, settings in variants(d_model).items()
    }
    print(machine_in_words())
    for batch in map(int, _BATCHES.value):
        seconds = medians(
            {
                name: decoding(decoder, params, batch, length)
                for name, (_, decoder, _, params) in models.items()
            },
            _REPEATS.value,
        )
        both = {}
        for name in list(models)[:2]:
            _, decoder, stacked, params = models[name]
            both |= {(name, "cached"): decoding(decoder, params, batch, length)}
            both |= {(name, "recomputing"): recomputing(decoder, stacked, batch, length)}
        paired = medians(both, _REPEATS.value)
        print(f"batch {batch}, {length} positions")
        for name, (config, *_) in models.items():
            cached = paired.get((name, "cached"))
            router = seconds[f"router, {name.split(', ')[1]}"] if name.startswith("AoE") else None
            figure = {
                "model": name,
                "batch": batch,
                "length": length,
                "step_seconds": seconds[name] / STEPS,
                "to_all": seconds[name] / seconds["dense, as wide as all experts"],
                "to_router": router and seconds[name] / router,
                "bytes": token_bytes(config),
                "recomputing": cached and paired[name, "recomputing"] / (cached / STEPS),
            }
            figures.append(figure)
            print(
                f"  {name:<32} {1e3 * figure['step_seconds']:7.2f} ms a step, "
                f"{figure['to_all']:5.2f}x dense, as wide as all experts"
                + (f", {figure['to_router']:.2f}x router" if router else "")
                + (f"; without a cache {figure['recomputing']:.0f}x" if cached else "")
                + f"; a token needs {figure['bytes'] / 1e6:.1f} MB of weights"
            )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)
