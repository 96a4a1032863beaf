"""Compares our training step with MaxText's, both compiled for a TPU slice that this machine lacks,
or computes the likely step time of a MaxText run, beside its published step time if it has one.

    python -m benchmarks.maxtext --python=VENV/bin/python --topology=v5e:4x4 [--json=FILE]
    python -m benchmarks.maxtext --python=VENV/bin/python --topology=v5e:4x4 --search
    python -m benchmarks.maxtext --python=VENV/bin/python --recipe=mixtral_8x7b_v5p [--json=FILE]

Compiling a program takes minutes. The first form needs `libtpu` (`make .venv/libtpu`,
`PYTHONPATH=.venv/libtpu`). MaxText needs Python 3.12 or later and other package versions than this
project, so it has its own virtual environment VENV:

    python3.13 -m venv VENV && VENV/bin/pip install --no-deps maxtext==0.2.5
    VENV/bin/pip install jax==0.11.1 libtpu==0.0.52 absl-py aqtp cloudpickle datasets drjax \\
        etils flax grain huggingface_hub jaxtyping jinja2 ml_collections numpy omegaconf optax \\
        orbax-checkpoint pathwaysutils pillow psutil pydantic qwix safetensors sentencepiece \\
        sympy tensorboardX tiktoken tokamax tqdm transformers

The first form compares models of equal size: `configs/paper.py:moe_aux` and `aoe_r256_aux` with
`SETTINGS`, and MaxText with `MODEL` and `BEST`. `--search` compiles MaxText alone, with `BEST` and
with one of `CHANGES` after the other. The last form compiles one of `RECIPES`.
`planning/costs.py` computes the HBM traffic and the time of all programs.
"""

import importlib.metadata
import json
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
from absl import flags

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model.counts import parameter_counts
from aoe_jax.planning.hardware import CHIPS, chip_part, slice_shape, topology_devices
from aoe_jax.planning.kernel_costs import KERNEL_COSTS, megablox_cost
from aoe_jax.planning.step_plan import plan, read_program
from aoe_jax.sharding import fill_mesh
from aoe_jax.training.step import init_state
from benchmarks.timing import run_benchmark, save
from configs import paper

VARIANTS = ("moe_aux", "aoe_r256_aux")
SEQUENCES = 8  # per chip
SETTINGS = {
    "balance.aux_tokens": 0.125,
    "experts.gradient_sums": "bfloat16",  # as in MaxText
    "data.seq_len": 2048,
    "model.remat": "layer",
    "train.accumulate": 1,
}
# MaxText settings for a model of the size of `moe_aux`.
MODEL = {
    "decoder_block": "mixtral",
    "base_emb_dim": 768,
    "base_num_query_heads": 12,
    "base_num_kv_heads": 12,
    "head_dim": 64,
    "base_mlp_dim": 3072,
    "base_moe_mlp_dim": 3072,
    "base_num_decoder_layers": 12,
    "vocab_size": 32_000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "logits_via_embedding": True,
    "enable_dropout": False,
    "normalization_layer_epsilon": 1e-6,
    "load_balance_loss_weight": 0.01,
    "max_target_length": 2048,
    "per_device_batch_size": SEQUENCES,
}


# Of the MaxText settings that docs/plans.md compares, these are the fastest.
BEST = {
    "attention": "flash",
    "moe_use_direct_token_gather": True,
    "num_vocab_tiling": 1,
    "remat_policy": "minimal_with_context",
    "sa_q_layout": "SEQ_MINOR",
    "sa_k_layout": "SEQ_MINOR",
    "sa_v_layout": "SEQ_MINOR",
    "scan_layers": False,
}
BEST_XLA_FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
# Changes to `BEST` that `--search` tries.
_HEAD_MINOR = {f"sa_{name}_layout": "HEAD_DIM_MINOR" for name in "qkv"}
CHANGES = (
    {"moe_use_direct_token_gather": False},
    {"num_vocab_tiling": 16},
    {"remat_policy": "full"},
    {"remat_policy": "minimal"},
    _HEAD_MINOR,
    {f"sa_block_{name}": 2048 for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "q_dq")},
    {"use_iota_embed": True},
    {"scan_layers": True},
    {"megablox": False},  # `jax.lax.ragged_dot`
    {"sparse_matmul": False, "megablox": False, "capacity_factor": 1.25},
)


@dataclass(frozen=True)
class Recipe:
    """A MaxText run, with its published step time if there is one."""

    source: str  # repository and path of the recipe on GitHub
    seconds: float | None  # published step time
    topology: str
    fields: dict  # changes to MaxText's `base.yml`
    xla_flags: str


# The sources are in repositories of github.com/AI-Hypercomputer. MaxText's table of models is
# maxtext/docs/reference/models/tiering.md. Fields and XLA flags are copied from the source, except
# those that only matter at run time, and except `xla_tpu_enable_async_collective_fusion`, which
# this compiler accepts for v5e only.
_OVERLAP = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
)
_MOE_VMEM = "--xla_tpu_scoped_vmem_limit_kib=81920"
RECIPES = {
    # The step time is computed from 2,909 tokens per second and chip in the table of models.
    "mixtral_8x7b_v5p": Recipe(
        "tpu-recipes/training/v5p/Mixtral-8X7B-Maxtext",
        50.7,
        "v5p:4x4x8",
        {
            "compile_topology": "v5p-256",
            "model_name": "mixtral-8x7b",
            "per_device_batch_size": 36,
            "max_target_length": 4096,
            "weight_dtype": "bfloat16",
            "attention": "flash",
        },
        "--xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
        f"--xla_tpu_enable_ag_backward_pipelining=true {_OVERLAP} {_MOE_VMEM}",
    ),
    # This recipe of October 2024 is also in the table of models. It has 8 sequences per chip and no
    # offloading. With this compiler, the later recipe with 12 sequences does not fit in memory.
    "mixtral_8x7b_v6e": Recipe(
        "tpu-recipes/training/trillium/Mixtral-8x7B-MaxText",
        8.409,
        "v6e:16x16",
        {
            "compile_topology": "v6e-256",
            "model_name": "mixtral-8x7b",
            "per_device_batch_size": 8,
            "max_target_length": 4096,
            "attention": "flash",
            "use_iota_embed": True,
            "sa_block_q": 2048,
            "sa_block_q_dkv": 2048,
            "sa_block_q_dq": 2048,
            "megablox": False,
            "sparse_matmul": False,
            "capacity_factor": 1.25,
        },
        f"{_OVERLAP} {_MOE_VMEM}",
    ),
    # It has no published step time. The policy of `BEST` does not fit in memory; "full" is slower.
    "qwen3_30b_v5p": Recipe(
        "maxtext/src/maxtext/configs/models/qwen3-30b-a3b.yml",
        None,
        "v5p:4x4x4",
        {
            "internal_compile": True,
            "internal_compile_num_devices": 64,
            "compile_topology": "v5p:4x4x4",
            "model_name": "qwen3-30b-a3b",
            "per_device_batch_size": 8,
            "max_target_length": 4096,
            "attention": "flash",
            "moe_use_direct_token_gather": True,
            "remat_policy": "save_dot_with_context_except_mlp",
        },
        BEST_XLA_FLAGS,
    ),
    # The source names it `llama2_70b_v5p_128`. The step time is computed from 692 tokens per second
    # and chip in the table of models.
    "llama2_70b_v5p": Recipe(
        "maxtext/benchmarks/maxtext_v5p_model_configs.py",
        23.7,
        "v5p:8x8x8",
        {
            "compile_topology": "v5p-1024",
            "model_name": "llama2-70b",
            "per_device_batch_size": 4,
            "max_target_length": 4096,
            "remat_policy": "save_dot_except_mlpwi",
            "use_iota_embed": True,
            "attention": "flash",
        },
        _OVERLAP,
    ),
    # The published log says 2 sequences per chip, as here; the recipe's fields say 3.
    "llama2_70b_v6e": Recipe(
        "tpu-recipes/training/trillium/Llama2-70B-MaxText",
        9.052,
        "v6e:16x16",
        {
            "compile_topology": "v6e-256",
            "model_name": "llama2-70b",
            "per_device_batch_size": 2,
            "max_target_length": 4096,
            "ici_fsdp_parallelism": 1,
            "ici_fsdp_transpose_parallelism": -1,
            "remat_policy": "qkv_proj_offloaded",
            "use_iota_embed": True,
            "attention": "flash",
            "sa_block_q": 1024,
            "sa_block_q_dkv": 2048,
            "sa_block_q_dq": 2048,
        },
        "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_overlap_compute_collective_tc=true "
        "--xla_enable_async_all_gather=true "
        "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false "
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
        "--xla_tpu_enable_all_reduce_offload_tracing=true "
        "--xla_tpu_use_tc_device_shape_on_sc=true --xla_sc_enable_instruction_fusion=false "
        "--xla_sc_disjoint_spmem=false --xla_sc_disable_megacore_partitioning=true",
    ),
}
# With the token gather of `BEST`, whose `remat_policy` does not fit in memory.
RECIPES["mixtral_8x7b_v5p_fast"] = replace(
    RECIPES["mixtral_8x7b_v5p"],
    seconds=None,
    fields=RECIPES["mixtral_8x7b_v5p"].fields | {"moe_use_direct_token_gather": True},
)

_INSTALL = "the docstring of benchmarks/maxtext.py says how to install MaxText"


def compile_maxtext(python, fields, xla_flags):
    """Compiles a training step of MaxText; `fields` override its `base.yml`. `python` is the Python
    of an environment with MaxText. Returns the figures that `maxtext_compile.py` writes, and the
    optimised HLO. Raises `UserError` if `python` or MaxText does not exist, or if MaxText fails.
    """
    script = Path(__file__).with_name("maxtext_compile.py")
    of_tpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    settings = {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE", "LIBTPU_INIT_ARGS": xla_flags}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | of_tpu | settings
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"{name}={value}" for name, value in fields.items()]
        # Without -P, `import maxtext` would find this file, because it is next to the script.
        command = [python, "-P", str(script), folder, *arguments]
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True
            )
        except OSError as e:
            raise UserError(f"--python={python}: {e.strerror}; {_INSTALL}") from e
        if done.returncode:
            errors = re.findall(r"^[\w.]+(?:Error|Exception): .*", done.stderr, re.MULTILINE)
            last = (errors or [done.stderr.strip() or "no message"])[-1][:400]
            hint = f"; {_INSTALL}" if last.startswith("ModuleNotFoundError") else ""
            raise UserError(f"--python={python}: MaxText did not compile: {last}{hint}")
        dumps = list(Path(folder).glob("*jit_train_step*.after_codegen.txt"))
        if not dumps:
            raise UserError(f"--python={python}: the compiler of MaxText wrote no program")
        text = dumps[0].read_text()
        return json.loads((Path(folder) / "figures.json").read_text()), text


def our_configuration(variant, n_devices):
    """Returns the `Config` of a variant of `configs/paper.py`, with all devices along `fsdp`."""
    config = paper.get_config(variant)
    changes = {"mesh.fsdp": n_devices, "train.batch_size": SEQUENCES * n_devices}
    config.update_from_flattened_dict(SETTINGS | changes)
    return fill_mesh(Config.from_config_dict(config), n_devices)


def our_size(config):
    """Returns the sizes of our model and its step, by the keys that `maxtext_compile.py` uses."""
    state = [a for a in jax.tree.leaves(jax.eval_shape(lambda: init_state(config, 0))) if a.ndim]
    return {
        "layers": config.model.n_layers,
        "width": config.model.d_model,
        "heads": config.model.n_heads,
        "head_width": config.model.d_model // config.model.n_heads,
        "experts": config.experts.n_experts,
        "top_k": config.experts.top_k,
        "expert_width": config.experts.d_ffn,
        "vocabulary": config.model.vocab_size,
        "computation_dtype": config.model.dtype,
        "parameters": parameter_counts(config).total,
        "state_dtypes": sorted({str(a.dtype) for a in state}),
        "state_numbers": sum(a.size for a in state),
        "tokens_per_step": config.tokens_per_step,
    }


def check_sizes(name, size, reference):
    """Returns a text with both numbers of parameters. Raises `UserError` if the parameters or the
    numbers in the state differ by 0.1% or more, or if any other size differs.
    """
    close = ("parameters", "state_numbers")
    for field, value in size.items():
        other = reference[field]
        same = abs(value / other - 1) < 1e-3 if field in close else value == other
        if not same:
            raise UserError(f"{name} has {field} {value}, MaxText {other}; make them equal")
    return f"{name}: {size['parameters']:,} parameters, MaxText {reference['parameters']:,}"


def _tiles(m, k, n, n_experts, itemsize):
    """Returns MaxText's default tiles: 512 rows and at most 1,024 of each width."""
    tile = 512, min(k, 1024), min(n, 1024)
    return {"forward": tile, "d_weights": tile}


def _read(text, chip, shape):
    """Returns the result of `read_program` for a program of MaxText, with the tiles of MaxText."""
    grouped = partial(megablox_cost, tiles=_tiles)
    others = [cost for cost in KERNEL_COSTS if cost is not megablox_cost]
    return read_program(text, chip, shape, [grouped, *others])


def row(name, temp_bytes, report):
    """Returns the figures of a program; `report` is from `read_program` or `plan`."""
    return {
        "program": name,
        "temp_bytes": temp_bytes,
        "hbm_traffic_bytes": report["hbm_traffic_bytes"],
        "likely_step_seconds": report["likely_step_seconds"],
        "network_seconds": report["seconds_by_scope"].get("network", 0.0),
        "seconds_at_peaks": report["seconds_at_peaks"],
        "seconds_by_cycles": report["seconds_by_cycles"],
    }


def table(figures):
    """Formats the figures as lines of text, with ratios to the first program."""
    base, lines = figures[0], []
    for f in figures:
        names = "hbm_traffic_bytes", "likely_step_seconds", "seconds_at_peaks", "seconds_by_cycles"
        traffic, step, at_peaks, by_cycles = (f[name] / base[name] for name in names)
        lines.append(
            f"{f['program']:>14}: temporary {f['temp_bytes'] / 1e9:5.2f} GB, HBM traffic "
            f"{f['hbm_traffic_bytes'] / 1e9:6.1f} GB ({traffic:.2f}x), likely step "
            f"{1e3 * f['likely_step_seconds']:6.1f} ms ({step:.2f}x) with network time "
            f"{1e3 * f['network_seconds']:5.1f} ms; at the peaks "
            f"{1e3 * f['seconds_at_peaks']:6.1f} ms ({at_peaks:.2f}x); by cycles "
            f"{1e3 * f['seconds_by_cycles']:6.1f} ms ({by_cycles:.2f}x)"
        )
    return "\n".join(lines)


def in_words(versions):
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _compile_for(python, topology, n_devices, changes=()):
    target = {
        "internal_compile": True,
        "compile_topology": topology,
        "internal_compile_num_devices": n_devices,
    }
    return compile_maxtext(python, MODEL | BEST | dict(changes) | target, BEST_XLA_FLAGS)


def search(python, topology):
    """Compiles MaxText with each of `CHANGES`; prints and returns the figures, `BEST` first."""
    generation, devices = topology_devices(topology)
    chip, figures = chip_part(generation, devices), []
    for changes in ({}, *CHANGES):
        name = ", ".join(f"{field}={value}" for field, value in changes.items()) or "BEST"
        try:
            compiled, text = _compile_for(python, topology, len(devices), changes)
        except UserError as e:
            print(f"{name}: {e}", flush=True)
            continue
        found = row(name, compiled["temp_bytes"], _read(text, chip, slice_shape(devices)))
        figures.append(found)
        print(table([figures[0], found]).splitlines()[-1], flush=True)
    return {"topology": topology, "figures": figures}


def compare(python, topology):
    """Compiles MaxText's and our step for a topology, prints the table, and returns its figures."""
    generation, devices = topology_devices(topology)
    chip = chip_part(generation, devices)
    compiled, text = _compile_for(python, topology, len(devices))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(f"{topology}, {SEQUENCES} x {SETTINGS['data.seq_len']:,} tokens per device")
    print(f"{in_words(compiled['versions'])}; ours: {in_words(versions)}", flush=True)
    report = _read(text, chip, slice_shape(devices))
    figures = [row("MaxText", compiled["temp_bytes"], report)]
    for variant in VARIANTS:
        config = our_configuration(variant, len(devices))
        print(check_sizes(variant, our_size(config), compiled["size"]), flush=True)
        ours = plan(config, generation, devices)
        figures.append(row(variant, ours["memory_bytes"]["temp"], ours))
    print(table(figures))
    return {"topology": topology, "versions": compiled["versions"], "figures": figures}


def calibrate(python, name):
    """Compiles a recipe; prints and returns its likely and, if any, its published step time."""
    recipe = RECIPES[name]
    compiled, text = compile_maxtext(python, recipe.fields, recipe.xla_flags)
    generation, _, shape = recipe.topology.partition(":")
    shape = tuple(map(int, shape.split("x")))
    chip = CHIPS[generation].part(math.prod(shape) / compiled["devices"])
    report = _read(text, chip, shape)
    likely = report["likely_step_seconds"]
    error = recipe.seconds and likely / recipe.seconds - 1
    print(in_words(compiled["versions"]))
    others = ", ".join(
        f"{words} {report[key]:.2f} s"
        for key, words in (("seconds_at_peaks", "at the peaks"), ("seconds_by_cycles", "by cycles"))
    )
    published = recipe.seconds and f"; published {recipe.seconds:.2f} s ({100 * error:+.1f}%)"
    print(f"{name}: likely {likely:.2f} s, {others}{published or ''}")
    figure = row(name, compiled["temp_bytes"], report)
    figure |= {"published_seconds": recipe.seconds, "error": error}
    return {"topology": recipe.topology, "versions": compiled["versions"], "figures": [figure]}


def main():
    given = flags.FLAGS
    python = cli.required(given["python"])
    if given.recipe:
        other = "is given by --recipe; leave it out"
        require_flag(not given.topology, "topology", given.topology, other)
        require_flag(not given.search, "search", True, "is for a --topology; leave it out")
        known = f"is unknown; choose one of {', '.join(RECIPES)}"
        require_flag(given.recipe in RECIPES, "recipe", given.recipe, known)
        report = calibrate(python, given.recipe)
    else:
        run = search if given.search else compare
        report = run(python, cli.required(given["topology"]))
    save(report)


if __name__ == "__main__":  # defined here, because tests import this file
    flags.DEFINE_string("python", None, "the Python of an environment with MaxText")
    flags.DEFINE_string("topology", None, "GENERATION:SHAPE, such as v5e:4x4")
    flags.DEFINE_bool("search", False, "compile MaxText with one change of `BEST` after the other")
    flags.DEFINE_string("recipe", None, f"one of {', '.join(RECIPES)}")
    run_benchmark(main)
