"""The arms that most suites have; sizes say `d_ffn` of a traditional expert, and all arms have its
total parameters.
"""

from aoe_jax.compare.suite import Arm

AUX_WEIGHT, BIAS_RATE = 0.01, 0.01
BALANCE = {
    "aux": ("L_aux", {"aux_weight": AUX_WEIGHT, "bias_rate": 0.0}),
    "free": ("loss-free", {"aux_weight": 0.0, "bias_rate": BIAS_RATE}),
    "none": ("no balancing", {"aux_weight": 0.0, "bias_rate": 0.0}),
}


ALL_TOKENS = {
    "aux_tokens": 1.0
}  # a router's scores cost no more for it; AoE has what the suite's base says


def moe(balance):
    """A dropless router MoE; `balance` is aux, free or none."""
    label, fields = BALANCE[balance]
    return Arm(f"MoE, {label}", {"experts": {"kind": "router"}, "balance": fields | ALL_TOKENS})


def capacity(factor):
    """The same with L_aux and experts of limited room, by the einsum of GShard and Switch: tokens
    are dropped.
    """
    label, fields = BALANCE["aux"]
    experts = {"kind": "capacity", "capacity_factor": factor}
    return Arm(
        f"MoE, {label}, capacity {factor:g} (not causal)",
        {"experts": experts, "balance": fields | ALL_TOKENS},
    )


def low_rank_moe(divisor, field):
    """The ablations of the paper's Table 2, with L_aux: `field` is factorised_gate or large_router."""
    label, fields = BALANCE["aux"]

    def changes(config):
        d_low = config.model.d_model // divisor
        return {
            "experts": {"kind": "router", "d_low": d_low, field: True},
            "balance": fields | ALL_TOKENS,
        }

    # The parameters of a large router come on top.
    return Arm(
        f"MoE, {label}, {field.replace('_', ' ')} r=d/{divisor}",
        changes,
        matched=field != "large_router",
    )


def gate_over_all(arm):
    """An arm whose weights are the softmax over all experts, as in Switch and in the code that
    AoE's authors released.
    """

    def changed(config):
        found = arm.changes_of(config)
        return found | {"experts": found["experts"] | {"gate": "all"}}

    return Arm(f"{arm.label}, gate=all", changed)


def other_selection(arm, selection):
    """An arm by top_p or expert_choice instead of top-k, balanced as in `configs/paper.py`."""
    fields = {
        "top_p": {"aux_weight": AUX_WEIGHT, "entropy_weight": 1e-4},
        "expert_choice": {"aux_weight": 0.0, "entropy_weight": 0.0},
    }[selection]

    def changed(config):
        found = arm.changes_of(config)
        return {
            "experts": found["experts"] | {"selection": selection},
            "balance": found["balance"] | {"bias_rate": 0.0} | fields,
        }

    # Which tokens an expert takes depends on later ones: its losses compare with no other arm's.
    label = {"top_p": "top-p", "expert_choice": "expert choice (not causal)"}[selection]
    return Arm(f"{arm.label.split(', ')[0]}, {label}", changed)


def aoe(divisor, balance):
    """AoE of low rank `d_model / divisor`, its width by Eq. 5; `balance` is aux, free or none."""
    label, fields = BALANCE[balance]

    def changes(config):
        return {
            "experts": {"kind": "aoe", "d_low": config.model.d_model // divisor},
            "balance": fields,
        }

    return Arm(f"AoE r=d/{divisor}, {label}", changes)


def _dense_changes(width):
    def changes(config):
        d_ffn = getattr(config.experts, width) * config.experts.d_ffn
        return {
            "experts": {"kind": "dense", "d_ffn": d_ffn},
            "balance": {"aux_weight": 0.0, "bias_rate": 0.0},
        }

    return changes


DENSE = Arm("dense", _dense_changes("n_experts"))
# With the active parameters of the MoE, and so about its FLOPs, but fewer parameters in total.
DENSE_ACTIVE = Arm("dense, active parameters of the MoE", _dense_changes("top_k"), matched=False)
