"""The leaderboard of routing methods, in 60 core-hours: `--suite=configs/compare/leaderboard.py`.

Rules. At 149k active parameters (without embeddings) all arms but `dense_active` have the same
total parameters within 1%. Active ones are the same within 1.1%, except for `dense`, UoE (8% more)
and DA-MoE (at most 37% more). All have 3.03M tokens in the same order and the same schedule. An
arm may change scores, routing, balancing and the optimiser. Learning rates are not tuned for each
arm: an arm takes the rates of its family of scores and its optimiser. For Muon,
`leaderboard_rates.py` tunes them with the same grid for all families. For AdamW they are from
`rates.py` and `screen.py`. A gain that is found for AoE is offered to the MoE too. Methods that use
one expert per token (Switch, SMEAR, THOR) or look at later tokens (expert choice, capacity) are in
`methods.py` and `variants.py`.

A new method enters as a class in a file, as those of `scores.py` do, and as one line of `ARMS`.
`--arms=NAME` trains it with 12 seeds, and the MoE with as many: an hour on two cores.
"""

from dataclasses import replace

from aoe_jax.compare.suite import Size, Suite
from aoe_jax.configs import methods
from aoe_jax.configs.compare.arms import (
    DENSE,
    DENSE_ACTIVE,
    aoe,
    at_learning_rate,
    low_rank_moe,
    moe,
    varied,
    whole_aoe,
)
from aoe_jax.configs.compare.screen import routing_neurons
from aoe_jax.configs.compare.small import LARGEST, MIDDLE, base_config, size_of

# (optimiser, family of scores) -> (learning rate, its factor for the parameters that score)
RATES = {
    ("muon", "logits"): (3e-2, 0.3),
    ("muon", "whole"): (3e-2, 0.1),
    ("muon", "published"): (3e-2, 0.3),
    ("adamw", "logits"): (1.5e-2, 0.3),
    ("adamw", "whole"): (1.5e-2, 0.3),
    ("adamw", "published"): (1.5e-2, 0.1),
}


NAMES = {"da moe": "DA-MoE", "dynmoe": "DynMoE", "erc": "ERC", "gshard": "GShard"}


def entry(arm, family, optimizer="muon", **train):
    """Returns an arm with its optimiser and the rates of its family."""
    rate, scoring_rate = RATES[optimizer, family]
    rates = {"optimizer": optimizer, "scoring_rate": scoring_rate} | train
    label = f"{arm.label}, {'Muon' if optimizer == 'muon' else 'AdamW'}"
    return replace(varied(at_learning_rate(rate, arm), train=rates), label=label)


def method(variant, family):
    """Returns a method of `configs/methods.py` on logits or on norms of whole gates."""
    experts, routing, balance = methods.VARIANTS[variant]
    experts = experts | ({"score_neurons": 16} if family == "whole" else {})
    name = variant.removesuffix("_router").replace("_", " ")
    name = NAMES.get(name, name)
    label = f"{'AoE of whole gates' if family == 'whole' else 'MoE'}, {name}"
    changes = {"experts": experts, "routing": routing, "balance": balance}
    return entry(replace(moe("none"), label=label, changes=changes), family)


def on_both(variant):
    """Returns a method on logits and on norms, `{arm: Arm}`."""
    return {
        f"moe_{variant}": method(f"{variant}_router", "logits"),
        f"whole_{variant}": method(variant, "whole"),
    }


def in_file(arm, family, routing, label):
    """Returns `arm` with a router from a file: `routing` has `name="FILE.py:CLASS"`, settings."""
    return entry(replace(varied(arm, routing=routing), label=label), family)


def scores(name, label, **settings):
    """Returns a class of `scores.py` on an MoE and on AoE of whole gates, `{arm: Arm}`."""
    routing = {"name": f"configs/compare/scores.py:{name}"} | settings
    on_aoe = f"AoE of whole gates, {label}"
    return {
        f"moe_{name.lower()}": in_file(moe("aux"), "logits", routing, f"MoE, {label}"),
        f"whole_{name.lower()}": in_file(whole_aoe(16, "aux"), "whole", routing, on_aoe),
    }


def hash_choice(arm, family, name):
    """Returns an arm whose experts are chosen by a hash, and weighted by their scores."""
    routing = {"name": "configs/compare/scores.py:HashChoice"}
    return in_file(arm, family, routing, f"{name}, hash, weights by scores")


def narrow(variant, family, p):
    """Returns top p with a `p` at which trained models take about 2 experts per token."""
    arm = method(variant, family)
    return replace(varied(arm, routing={"p": p}), label=arm.label.replace("p, ", f"p {p}, "))


ONE_RATE = {"scoring_rate": 1.0}  # dense models do not score, UoE has no matrices only for scores
ARMS = {
    "moe": entry(moe("aux"), "logits"),
    "whole": entry(whole_aoe(16, "aux"), "whole"),
    "published": entry(aoe(3, "aux"), "published"),
    "moe_adamw": entry(moe("aux"), "logits", "adamw"),
    "whole_adamw": entry(whole_aoe(16, "aux"), "whole", "adamw"),
    "published_adamw": entry(aoe(3, "aux"), "published", "adamw"),
    **on_both("quantile"),
    "moe_free": entry(moe("free"), "logits"),
    "whole_free": entry(whole_aoe(16, "free"), "whole"),
    "moe_none": entry(moe("none"), "logits"),
    "whole_none": entry(whole_aoe(16, "none"), "whole"),
    "frozen": replace(
        entry(moe("aux"), "logits", scoring_rate=0.0), label="MoE, frozen random router, Muon"
    ),
    "dense": entry(DENSE, "logits", **ONE_RATE),
    "dense_active": entry(DENSE_ACTIVE, "logits", **ONE_RATE),
    "whole_one": entry(whole_aoe(1, "aux", "max"), "whole"),
    "whole4_max": entry(whole_aoe(4, "aux", "max"), "whole"),
    "moe_factorised": entry(low_rank_moe(3, "factorised_gate"), "logits"),
    **on_both("threshold"),
    **on_both("top_p"),
    "moe_top_p_of_2": narrow("top_p_router", "logits", 0.5),
    "whole_top_p_of_2": narrow("top_p", "whole", 0.46),
    **on_both("dynmoe"),
    **on_both("routing_free"),
    **on_both("z_loss"),
    **on_both("sequence_balance"),
    **on_both("gshard"),
    **on_both("da_moe"),
    "uoe": entry(routing_neurons(4), "whole", **ONE_RATE),
    "moe_erc": method("erc_router", "logits"),
    "moe_sigmoid_top_k": method("sigmoid_top_k_router", "logits"),
    **scores("MPI", "MPI"),
    **scores("Centred", "centred scores"),
    **scores("DefaultVectors", "default vectors"),
    **scores("Tempered", "temperature 0.5"),
    "self_routing": scores("SelfRouting", "Self-Routing")["moe_selfrouting"],
    "hash": scores("Hash", "hash of the token")["moe_hash"],
    "moe_hash_choice": hash_choice(moe("none"), "logits", "MoE"),
    "whole_hash_choice": hash_choice(whole_aoe(16, "none"), "whole", "AoE of whole gates"),
}
LEADING = (
    "moe",
    "frozen",
    "whole",
    "whole_sequence_balance",
    "whole_quantile",
    "whole_one",
    "whole_tempered",
    "whole_defaultvectors",
)
# Their first seeds are about 0.1 or more behind, so a few seeds are enough.
FAR_BEHIND = (
    "published_adamw",
    "moe_threshold",
    "whole_threshold",
    "moe_dynmoe",
    "whole_dynmoe",
    "moe_routing_free",
    "whole_routing_free",
)
SEEDS_OF = dict.fromkeys(LEADING, 40) | dict.fromkeys(FAR_BEHIND, 5)
AT_LARGER_SIZES = ("moe", "whole_tempered", "published", "whole", "hash")
AT_LARGER_SIZES += ("moe_adamw", "whole_adamw")


def get_suite():
    base = base_config()
    base.train.update(rate_width=MIDDLE["model"]["d_model"])
    small, large, largest = (
        size | {"train": size["train"] | {"eval_every": 0}, "checkpoint": {"every": 500, "keep": 1}}
        for size in (MIDDLE, LARGEST, size_of(96, 7, 4, batch_size=16, steps=5040))
    )
    return Suite(
        name="leaderboard",
        base=base,
        arms=ARMS,
        sizes={
            "149k": Size(small, seeds=12, seeds_of=SEEDS_OF),
            "419k": Size(large, seeds=8, arms=AT_LARGER_SIZES),
            "1M": Size(largest, seeds=4, arms=AT_LARGER_SIZES[:2]),
        },
        baseline="moe",
    )
