"""Compares the logits of imported models with those of `transformers`.

`python -m benchmarks.parity [--json=FILE]` needs `transformers` and `torch`. It makes a tiny random
model of every architecture that can be imported, saves it in every layout of its tensors in float32
and in bfloat16, and compares the logits that both libraries compute in float32. A table row has the
largest absolute logit and, for each layout and dtype, the largest absolute difference.
"""

import dataclasses
import itertools
import math
import tempfile
from pathlib import Path

import jax
import numpy as np
from tabulate import tabulate

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.formats.loading import load_params, read_config
from aoe_jax.model.decoder import Decoder
from aoe_jax.sharding import fill_mesh, make_mesh
from benchmarks.timing import report, run_benchmark

VOCABULARY, EXPERTS = 96, 4
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 32))
LAYOUTS = {"per expert": True, "fused": False}  # True: one tensor for each expert
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MOE = {**_SHAPE, "num_experts_per_tok": 2}
_ROPE = {"rope_type": "default", "rope_theta": 100.0}  # not the default, to test the import
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_OLMOE = {**_MOE, "num_experts": EXPERTS, "rms_norm_eps": 1e-3}
_QWEN3_MOE = {
    **_MOE,
    "num_experts": EXPERTS,
    "moe_intermediate_size": 20,
    "head_dim": 12,
    "rope_parameters": _ROPE,
}
_DEEPSEEK = {  # for architectures with the router of DeepSeek-V3
    **_SHAPE,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
}
MODELS = {
    "mixtral": {
        "model_type": "mixtral",
        **_MOE,
        "num_local_experts": EXPERTS,
        "rope_parameters": _ROPE,
    },
    "olmoe": {"model_type": "olmoe", **_OLMOE},
    "olmoe_norm_topk": {
        "model_type": "olmoe",
        **_OLMOE,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_MOE,
        "num_experts": EXPERTS,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "rope_parameters": _ROPE,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **_QWEN3_MOE},
    "qwen3_moe_norm_topk": {
        "model_type": "qwen3_moe",
        **_QWEN3_MOE,
        "norm_topk_prob": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "dots1": {
        "model_type": "dots1",
        **_DEEPSEEK,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "rope_parameters": _ROPE,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        **_DEEPSEEK,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "norm_topk_prob": False,
        "attention_bias": True,
        "use_qk_norm": True,
        "head_dim": 12,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
    },
    "llama": {
        "model_type": "llama",
        **_SHAPE,
        "attention_bias": True,
        "rope_parameters": _LLAMA3,
    },
    "qwen3": {
        "model_type": "qwen3",
        **_SHAPE,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE,
    },
}


def random_model(name, **changes):
    """Makes a model of `MODELS` with transformers. All parameters (also those of norms) and all
    selection biases are normal random numbers with the standard deviation 0.3.
    """
    import torch
    import transformers

    settings = MODELS[name] | changes
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model


def save(model, directory, layout):
    """Saves a model of transformers, in many shards if the layout is "per expert"."""
    size = "20KB" if layout == "per expert" else "5GB"
    model.save_pretrained(directory, save_original_format=LAYOUTS[layout], max_shard_size=size)


def logits_here(directory, tokens=TOKENS, **mesh):
    """Returns the float32 logits that our decoder computes for a saved model, on a mesh."""
    config = read_config(directory)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, dtype="float32"), mesh=MeshConfig(**mesh)
    )
    n_devices = math.prod(mesh.values())
    config = fill_mesh(config, n_devices)
    mesh = make_mesh(config, jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        params, routing_state = load_params(directory, config, mesh)
        decoder = Decoder.from_config(config)
        apply = jax.jit(
            lambda params, state: decoder.apply({"params": params}, tokens, routing_state=state)[0]
        )
        return np.asarray(apply(params, routing_state))


def load_there(directory, **settings):
    """Loads a model in float32 with transformers, which may run Python code in `directory`."""
    import torch
    import transformers

    settings = {"dtype": torch.float32, "trust_remote_code": True} | settings
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


def logits_there(directory, tokens=TOKENS, **settings):
    """Returns the logits that transformers computes for a saved model."""
    import torch

    with torch.no_grad():
        return load_there(directory, **settings)(torch.tensor(tokens)).logits.float().numpy()


def main():
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    figures = []
    for name in MODELS:
        figure = {"model": name}
        for layout, dtype in itertools.product(LAYOUTS, ("float32", "bfloat16")):
            with tempfile.TemporaryDirectory() as folder:
                save(random_model(name).to(getattr(torch, dtype)), folder, layout)
                there = logits_there(folder)
                difference = np.abs(logits_here(Path(folder)) - there).max()
            figure.setdefault("largest logit", float(np.abs(there).max()))
            figure[f"{layout}, {dtype}"] = float(difference)
        figures.append(figure)
    print(tabulate(figures, "keys", "github", floatfmt=("", ".1f", *(".1e",) * 4)))
    report(figures)


if __name__ == "__main__":
    run_benchmark(main)
