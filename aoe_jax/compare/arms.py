"""The arms that most suites have; sizes say `d_ffn` of a traditional expert, and all arms have its total parameters."""

from aoe_jax.compare.suite import Arm

AUX_WEIGHT, BIAS_RATE = 0.01, 0.01
BALANCE = {
    "aux": ("L_aux", {"aux_weight": AUX_WEIGHT, "bias_rate": 0.0}),
    "free": ("loss-free", {"aux_weight": 0.0, "bias_rate": BIAS_RATE}),
    "none": ("no balancing", {"aux_weight": 0.0, "bias_rate": 0.0}),
}


def moe(balance):
    """A dropless router MoE; `balance` is aux, free or none."""
    label, fields = BALANCE[balance]
    return Arm(f"MoE, {label}", {"experts": {"kind": "router"}, "balance": fields})


def aoe(divisor, balance):
    """AoE of low rank `d_model / divisor`, its width by Eq. 5; `balance` is aux, free or none."""
    label, fields = BALANCE[balance]

    def changes(config):
        return {"experts": {"kind": "aoe", "d_low": config.model.d_model // divisor}, "balance": fields}

    return Arm(f"AoE r=d/{divisor}, {label}", changes)


def _dense_changes(width):
    def changes(config):
        d_ffn = getattr(config.experts, width) * config.experts.d_ffn
        return {"experts": {"kind": "dense", "d_ffn": d_ffn}, "balance": {"aux_weight": 0.0, "bias_rate": 0.0}}

    return changes


DENSE = Arm("dense", _dense_changes("n_experts"))
# With the active parameters of the MoE, and so about its FLOPs, but fewer parameters in total.
DENSE_ACTIVE = Arm("dense, active parameters of the MoE", _dense_changes("top_k"), matched=False)
