"""Compiles a train step of MaxText. `benchmarks/maxtext.py` runs this file in MaxText's Python.

    VENV/bin/python -P benchmarks/maxtext_compile.py FOLDER NAME=VALUE...

NAME is a field of MaxText's `base.yml`. The compiler's dump and `figures.json` are written into
FOLDER. XLA flags are read from the environment variable `LIBTPU_INIT_ARGS`.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import maxtext
from maxtext.trainers.pre_train import train_compile

# Key in `figures.json` -> field of `base.yml` that decides the size of the model or of its step.
FIELDS = {
    "layers": "num_decoder_layers",
    "width": "emb_dim",
    "heads": "num_query_heads",
    "head_width": "head_dim",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_width": "moe_mlp_dim",
    "vocabulary": "vocab_size",
    "computation_dtype": "dtype",
}


def main(folder, *arguments):
    folder = Path(folder)
    jit_and_compile = train_compile.jit_and_compile

    def measured(function, shapes, options, mesh, *others):
        config = others[-2]
        jax.config.update("jax_use_shardy_partitioner", config.shardy)  # as in MaxText's `train.py`
        compiled = jit_and_compile(function, shapes, options, mesh, *others)
        memory = compiled.memory_analysis()
        is_float = [a for a in jax.tree.leaves(shapes[0]) if "float" in str(a.dtype)]
        model = [a for a in jax.tree.leaves(shapes[0].model) if "float" in str(a.dtype)]
        figures = {
            "versions": {
                name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")
            },
            "devices": mesh.size,
            "temp_bytes": memory.temp_size_in_bytes,
            "size": {name: getattr(config, field) for name, field in FIELDS.items()}
            | {
                "parameters": sum(a.size for a in model),
                "state_dtypes": sorted({str(a.dtype) for a in is_float}),
                "state_numbers": sum(a.size for a in is_float),
                "tokens_per_step": config.global_batch_size_to_train_on * config.max_target_length,
            },
        }
        (folder / "figures.json").write_text(json.dumps(figures, default=str))
        return compiled

    train_compile.jit_and_compile = measured
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=True"
    fixed = [
        "run_name=compile",
        f"base_output_directory={folder}",
        "compile_topology_num_slices=1",
        "enable_checkpointing=false",
        "skip_jax_distributed_system=true",
        "dataset_type=synthetic",
        f"compile_xla_flags={dump}",
    ]
    train_compile.main(["train_compile", str(base), *fixed, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
