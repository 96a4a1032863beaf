"""Methods of expert selection from the literature around AoE, each on AoE's norms and on a router's
logits.

`configs/methods.py:NAME` with AoE, `configs/methods.py:NAME_router` with a router, each where there
is such a thing; sizes and data are those of `tiny.py`. What each method does, and how faithful it
is, is in `docs/methods.md`.
"""

from aoe_jax.errors import UserError
from configs import tiny

AUX_WEIGHT = 0.01
NO_LOSS = {"aux_weight": 0.0}
AOE_EXPERTS = {"experts": {"factorised_gate": True}}  # of kinds of layer that have either

# name -> the changes for both kinds, those for AoE and those for a router; None: there is no such
# variant.
METHODS = {
    "top_k": ({"balance": {"aux_weight": AUX_WEIGHT}}, {}, {}),
    "top_p": (
        {
            "experts": {"selection": "top_p"},
            "balance": {"aux_weight": AUX_WEIGHT, "entropy_weight": 1e-4},
        },
        {},
        {},
    ),
    "expert_choice": ({"experts": {"selection": "expert_choice"}, "balance": NO_LOSS}, {}, {}),
    "threshold": (
        {
            "experts": {"selection": "threshold"},
            "balance": NO_LOSS,
            "threshold": {"decay": 0.99, "warmup_steps": 100},
        },
        {"threshold": {"weights": "relative"}},
        {},
    ),
    "coupling": ({"balance": {"aux_weight": AUX_WEIGHT, "coupling_weight": 1.0}}, None, {}),
    "uoe": ({"experts": {"kind": "uoe"}, "balance": NO_LOSS}, {}, None),
    "top_any": (
        {
            "experts": {"selection": "top_any"},
            "balance": NO_LOSS,
            "top_any": {"period_steps": 90, "idle_steps": 30, "record_steps": 30},
        },
        {},
        {},
    ),
    "routing_free": (
        {
            "experts": {"selection": "routing_free"},
            "balance": NO_LOSS,
            "routing_free": {"rate": 0.1, "multiplier": 1e-5},
        },
        {},
        # Logits lie around 0. Nothing brings an expert back that no token goes to, so most pairs
        # are active at first.
        {"routing_free": {"bias": -2.0}},
    ),
    # Switch without its capacity, which experts.kind="capacity" has: p_i E_i(x), and L_aux of one
    # expert per token.
    "switch": (
        {"experts": {"top_k": 1, "gate": "all"}, "balance": {"aux_weight": AUX_WEIGHT}},
        {},
        {},
    ),
    "gshard": ({"experts": {"selection": "gshard"}, "balance": NO_LOSS}, {}, {}),
    "z_loss": ({"balance": {"aux_weight": AUX_WEIGHT, "z_weight": 1e-3}}, {}, {}),
    "sequence_balance": ({"balance": {"aux_weight": AUX_WEIGHT, "aux_batch": "sequence"}}, {}, {}),
    "loss_free": ({"balance": NO_LOSS | {"bias_rate": 0.01}}, {}, {}),
    # These merge or draw one expert a token, whose gate is that of an AoE expert, or of a
    # traditional one.
    "smear": (
        {"experts": {"kind": "smear"}, "balance": NO_LOSS, "smear": {"segment": 32}},
        AOE_EXPERTS,
        {},
    ),
    "thor": (
        {"experts": {"kind": "thor"}, "balance": NO_LOSS, "thor": {"inference": "token"}},
        AOE_EXPERTS,
        {},
    ),
    "by_attention": (
        {
            "experts": {"selection": "by_attention", "top_k": 3},
            "balance": {"aux_weight": AUX_WEIGHT},
        },
        {},
        {},
    ),
}
VARIANTS = (
    *(name for name, (_, of_aoe, _) in METHODS.items() if of_aoe is not None),
    *(f"{name}_router" for name, (*_, of_router) in METHODS.items() if of_router is not None),
)


def changes(variant):
    """group -> field -> value, of a variant."""
    name = variant.removesuffix("_router")
    both, of_aoe, of_router = METHODS[name]
    kind = "aoe" if variant == name else "router"
    found = {
        "experts": {"kind": kind},
        "balance": {"aux_tokens": 1.0},
    }  # as the authors have their losses
    for one in (both, of_router if variant != name else of_aoe):
        for group, values in one.items():
            found[group] = found.get(group, {}) | values
    return found


def get_config(variant="top_k"):
    if variant not in VARIANTS:
        raise UserError(
            f"configs/methods.py:{variant} is no variant; choose one of {', '.join(VARIANTS)}"
        )
    config = tiny.get_config()
    for group, values in changes(variant).items():
        config[group].update(values)
    return config
