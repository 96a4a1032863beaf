"""Routing methods of other papers: `--config=configs/methods.py:NAME` applies a method to AoE, and
`--config=configs/methods.py:NAME_router` to an MoE with a router, if the method supports both.

Sizes and data are those of `tiny.py`. docs/methods.md describes each method.
"""

from aoe_jax.configs import tiny
from aoe_jax.storage.config_files import require_variant, update_groups

AUX = {"aux_weight": 0.01, "aux_tokens": 1.0}  # L_aux of all tokens, as published
NO_LOSS = {"aux_weight": 0.0, "aux_tokens": 1.0}


def _variants(name, routing, balance, aoe=None, router=None, **experts):
    """Returns `{variant: (experts, routing, balance)}`; `aoe` or `router` overrides `routing`."""
    return {
        name: ({"kind": "aoe"} | experts, routing | (aoe or {}), balance),
        f"{name}_router": ({"kind": "router"} | experts, routing | (router or {}), balance),
    }


def _layer_variants(kind, **settings):
    """Returns the variants of a layer kind, with factorised experts and with MoE experts."""
    routing, factorised = {"name": kind} | settings, {"kind": kind, "factorised_gate": True}
    return {
        kind: (factorised, routing, NO_LOSS),
        f"{kind}_router": ({"kind": kind}, routing, NO_LOSS),
    }


_TOP_K = {"name": "top_k"}
_THRESHOLD = {"name": "threshold", "decay": 0.99, "warmup_steps": 100}
_DYNMOE = {"name": "dynmoe", "period_steps": 90, "idle_steps": 30, "record_steps": 30}
_ROUTING_FREE = {"name": "routing_free", "rate": 0.1, "multiplier": 1e-5}
_SIGMOID = {"name": "sigmoid_top_k", "scale": 2.5, "n_groups": 2}
_SWITCH = _TOP_K | {"norm_topk_prob": False}  # unlike Switch, drops no token

VARIANTS = {
    **_variants("top_k", _TOP_K, AUX),
    "whole_gate": ({"kind": "aoe", "score_neurons": 16}, _TOP_K, AUX),
    **_variants("top_p", {"name": "top_p"}, AUX | {"entropy_weight": 1e-4}),
    **_variants("expert_choice", {"name": "expert_choice"}, NO_LOSS),
    **_variants("threshold", _THRESHOLD, NO_LOSS, aoe={"weights": "relative"}),
    **_variants("quantile", {"name": "quantile"}, NO_LOSS),
    "erc_router": ({"kind": "router"}, {"name": "erc"}, AUX),
    "uoe": ({"kind": "uoe"}, {"name": "uoe"}, NO_LOSS),
    **_variants("dynmoe", _DYNMOE, NO_LOSS),
    # Logits start near 0. Bias -2 activates most experts, as inactive experts get no gradient.
    **_variants("routing_free", _ROUTING_FREE, NO_LOSS, router={"bias": -2.0}),
    **_variants("switch", _SWITCH, AUX, top_k=1),
    **_variants("gshard", {"name": "gshard"}, NO_LOSS),
    **_variants("z_loss", _TOP_K, AUX | {"z_weight": 1e-3}),
    **_variants("sequence_balance", _TOP_K, AUX | {"aux_batch": "sequence"}),
    **_variants("loss_free", _TOP_K, NO_LOSS | {"bias_rate": 0.01}),
    **_layer_variants("smear", segment=32),
    **_layer_variants("thor", inference="token"),
    **_variants("da_moe", {"name": "da_moe"}, AUX, top_k=3),
    "sigmoid_top_k_router": ({"kind": "router"}, _SIGMOID, NO_LOSS | {"bias_rate": 1e-3}),
}


def changes(variant):
    """Returns the changes of a variant to `tiny.py`, `{group: {field: value}}`."""
    experts, routing, balance = VARIANTS[variant]
    return {"experts": experts, "routing": routing, "balance": balance}


def get_config(variant="top_k"):
    require_variant("configs/methods.py", variant, VARIANTS)
    config = tiny.get_config("published")
    update_groups(config, changes(variant))
    return config
