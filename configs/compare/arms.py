"""Arms that several suites share. Most functions return an `Arm`.

A size sets `d_ffn` of MoE experts. Arms with `matched=True` have the total parameters of the MoE.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Arm

AUX_WEIGHT, BIAS_RATE = 0.01, 0.01
BALANCE = {
    "aux": ("L_aux", {"aux_weight": AUX_WEIGHT, "bias_rate": 0.0}),
    "free": ("loss-free", {"aux_weight": 0.0, "bias_rate": BIAS_RATE}),
    "none": ("no balancing", {"aux_weight": 0.0, "bias_rate": 0.0}),
}
# The MoE's L_aux uses all tokens, which costs little. AoE keeps `aux_tokens` of the suite's base.
ALL_TOKENS = {"aux_tokens": 1.0}


def moe(balance):
    """Returns a dropless router MoE; `balance` is aux, free or none."""
    label, fields = BALANCE[balance]
    return Arm(f"MoE, {label}", {"experts": {"kind": "router"}, "balance": fields | ALL_TOKENS})


def capacity(factor):
    """Returns a router MoE with L_aux and token dropping above a capacity (GShard, Switch)."""
    label, fields = BALANCE["aux"]
    routing = {"name": "capacity", "capacity_factor": factor}
    balance = fields | ALL_TOKENS
    changes = {"experts": {"kind": "capacity"}, "routing": routing, "balance": balance}
    return Arm(f"MoE, {label}, capacity {factor:g} (not causal)", changes)


def low_rank_moe(divisor, field):
    """Returns an ablation of the paper's Table 2, with L_aux and rank `d_model / divisor`.

    `field` is factorised_gate or large_router. An arm with a large router has more parameters.
    """
    label, fields = BALANCE["aux"]

    def changes(config):
        d_low = config.model.d_model // divisor
        experts = {"kind": "router", "d_low": d_low, field: True}
        return {"experts": experts, "balance": fields | ALL_TOKENS}

    name = f"MoE, {label}, {field.replace('_', ' ')} r=d/{divisor}"
    return Arm(name, changes, matched=field != "large_router")


def aoe(divisor, balance):
    """Returns AoE of rank `d_model / divisor` and width by Eq. 5; `balance` is a key of BALANCE."""
    label, fields = BALANCE[balance]

    def changes(config):
        experts = {"kind": "aoe", "d_low": config.model.d_model // divisor}
        return {"experts": experts, "balance": fields}

    return Arm(f"AoE r=d/{divisor}, {label}", changes)


def whole_aoe(score_neurons, balance, score="norm"):
    """Returns AoE with whole gates, scored by the first `score_neurons` neurons of each gate."""
    label, fields = BALANCE[balance]
    experts = {"kind": "aoe", "score_neurons": score_neurons, "score": score}
    name = f"AoE of whole gates, {score} of {score_neurons}, {label}"
    return Arm(name, {"experts": experts, "balance": fields})


def varied(arm, **groups):
    """Returns `arm` with further changes `group={field: value}`, which are added to its label."""

    def changes(config):
        found = dict(arm.changes_of(config))
        for group, fields in groups.items():
            found[group] = found.get(group, {}) | fields
        return found

    fields = {name: value for fields in groups.values() for name, value in fields.items()}
    names = (f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
    return replace(arm, label=", ".join((arm.label, *names)), changes=changes)


def at_learning_rate(rate, arm):
    """Returns `arm` with the peak learning rate `rate`, which decays to `rate / 25`."""
    train = {"learning_rate": rate, "final_learning_rate": rate / 25}
    return replace(varied(arm, train=train), label=arm.label)


def weights_over_all(arm):
    """Returns `arm` with expert weights from the softmax over all experts, not over the top k.

    Switch and the code that AoE's authors released use these weights.
    """
    routing = {"name": "top_k", "norm_topk_prob": False}
    return replace(varied(arm, routing=routing), label=f"{arm.label}, weights over all")


def other_router(arm, name):
    """Returns `arm` with top_p or expert_choice, and the loss weights of `configs/paper.py`."""
    label, fields = {
        "top_p": ("top-p", {"aux_weight": AUX_WEIGHT, "entropy_weight": 1e-4}),
        # Routing depends on later tokens, so the loss is not comparable with that of causal arms.
        "expert_choice": (
            "expert choice (not causal)",
            {"aux_weight": 0.0, "entropy_weight": 0.0},
        ),
    }[name]

    def changes(config):
        found = arm.changes_of(config)
        balance = found["balance"] | {"bias_rate": 0.0} | fields
        return found | {"routing": {"name": name}, "balance": balance}

    return Arm(f"{arm.label.split(', ')[0]}, {label}", changes)


def _dense_changes(width):
    def changes(config):
        d_ffn = getattr(config.experts, width) * config.experts.d_ffn
        balance = {"aux_weight": 0.0, "bias_rate": 0.0}
        return {"experts": {"kind": "dense", "d_ffn": d_ffn}, "balance": balance}

    return changes


DENSE = Arm("dense", _dense_changes("n_experts"))
# This dense model has as many parameters as the MoE has active ones, so about as many FLOPs.
DENSE_ACTIVE = Arm("dense, active parameters of the MoE", _dense_changes("top_k"), matched=False)
