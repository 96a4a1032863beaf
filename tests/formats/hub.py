"""Random models of the hub's architectures, saved by transformers in both layouts, with the logits
it computes.
"""

import dataclasses
import math

import jax
import numpy as np

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.formats.reading import load_params, read_config
from aoe_jax.model.decoder import Decoder
from aoe_jax.sharding import fill_mesh, make_mesh
from tests.runs import scratch, shared

VOCABULARY, EXPERTS = 96, 4
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 32))
LAYOUTS = {"per_expert": True, "fused": False}
ARCHITECTURES = ("mixtral", "olmoe", "olmoe_norm_topk", "phimoe")

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 100.0}  # not what a configuration without has
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "short_mscale": 1.2,
    "long_mscale": 1.5,
    "original_max_position_embeddings": 32,
}


def _untrained():
    import transformers  # of the development extra, on Python 3.11 only

    of = transformers.AutoModelForCausalLM.from_config
    olmoe = {**_SHAPE, "num_experts": EXPERTS, "rms_norm_eps": 1e-3}
    return {
        "mixtral": of(
            transformers.MixtralConfig(**_SHAPE, num_local_experts=EXPERTS, rope_parameters=_ROPE)
        ),
        "olmoe": of(transformers.OlmoeConfig(**olmoe)),
        "olmoe_norm_topk": of(
            transformers.OlmoeConfig(**olmoe, norm_topk_prob=True, attention_bias=True)
        ),
        "phimoe": of(
            transformers.PhimoeConfig(
                **_SHAPE,
                num_local_experts=EXPERTS,
                attention_bias=True,
                lm_head_bias=True,
                router_jitter_noise=0.1,
                rope_parameters=_LONGROPE,
            )
        ),
    }


@shared
def hub_models():
    """`{architecture: ({layout: directory}, logits of TOKENS)}`; the tensors of an expert each lie
    in many shards.
    """
    import torch

    torch.manual_seed(0)
    found = {}
    for name, model in _untrained().items():
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # norms and biases too, which would start at one and zero
                parameter.normal_(std=0.3)
            logits = model.eval()(torch.tensor(TOKENS)).logits.numpy()
        folders = {layout: scratch("hub") / f"{name}_{layout}" for layout in LAYOUTS}
        for layout, original in LAYOUTS.items():
            size = "20KB" if original else "5GB"
            model.save_pretrained(
                folders[layout], save_original_format=original, max_shard_size=size
            )
        found[name] = folders, logits
    return found


def logits_here(directory, tokens=TOKENS, **mesh):
    """The logits of a model in a directory by our decoder, in float32, over a mesh."""
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
    """A model in a directory, as transformers loads it with the code beside it, in float32."""
    import torch
    import transformers

    settings = {"dtype": torch.float32, "trust_remote_code": True} | settings
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


def logits_there(directory, tokens=TOKENS, **settings):
    """Those of a model in a directory by transformers."""
    import torch

    with torch.no_grad():
        return load_there(directory, **settings)(torch.tensor(tokens)).logits.float().numpy()
