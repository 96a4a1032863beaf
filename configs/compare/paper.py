"""Repeats Tables 2, 3 and 5 of the paper on a TPU pod, with one seed as in the paper:
`--suite=configs/compare/paper.py`.

Arms are the variants of `configs/paper.py`. These commands estimate whether an arm fits on a slice:

    python -m aoe_jax.plan --config=configs/paper.py:aoe_r256_aux --topology=v5e:4x4 \
        --config.mesh.fsdp=16 --config.train.accumulate=32
    python -m aoe_jax.plan --config=configs/paper.py:aoe_4b --topology=v5e:16x16 \
        --config.mesh.fsdp=16 --config.train.accumulate=4

A run keeps its newest three checkpoints and, for the analysis of routing, those of every 2000th
step. At the end it has 13 checkpoints of 9 GB each (48 GB each at 4B).

Set the corpus and the mesh: `--set=data.name=... --set=data.tokenizer=... --set=mesh.fsdp=16`. To
use several hosts, start the command of the suite and stop it when the training begins. By then
it has written `RUN.config.json` for each run; RUN is `DIR/runs/SIZE/ARM/seed_0`. Train a run with
`train.py --config=RUN.config.json --workdir=RUN --distributed`. Then start the command of the suite
again: it analyses the runs and writes the report.
"""

from aoe_jax.compare.suite import Arm, Size, Suite
from aoe_jax.configs import paper

# The large router adds n_experts * d_low * d_model parameters, which are 2.6% of all parameters.
UNMATCHED = ("moe_aux_large_router",)

# AoE without L_aux is compared to the MoE without L_aux, and AoE with top-p to the MoE with top-p.
REFERENCES = {"aoe_top_p": "moe_top_p"} | {f"aoe_r{rank}": "moe" for rank in paper.RANKS}


def _changes(variant):
    merged = {}  # excludes `LARGE`, which the size "4B" sets
    for change in paper.VARIANTS[variant]:
        if change is not paper.LARGE:
            for group, values in change.items():
                merged[group] = merged.get(group, {}) | values
    return merged


def _aoe_of_both_sizes(config):
    is_large = config.model.d_model == paper.LARGE["model"]["d_model"]
    return _changes("aoe_4b" if is_large else "aoe_r256_aux")


def _arm(variant):
    label = variant.replace("_", " ")
    return Arm(
        label,
        _changes(variant),
        matched=variant not in UNMATCHED,
        reference=REFERENCES.get(variant),
    )


def get_suite():
    variants = [variant for variant in paper.VARIANTS if variant != "aoe_whole_aux"]
    small = tuple(variant for variant in variants if not variant.endswith("_4b"))
    base = paper.get_config("moe")
    base.checkpoint.keep_every = 2000
    return Suite(
        name="paper",
        base=base,
        arms={variant: _arm(variant) for variant in small}
        | {"aoe_r256_aux": Arm("aoe r256 aux (4B: r400)", _aoe_of_both_sizes)},
        sizes={
            "732M": Size({}, seeds=1, arms=small),
            "4B": Size(paper.LARGE, seeds=1, arms=("moe_aux", "aoe_r256_aux")),
        },
        baseline="moe_aux",
    )
