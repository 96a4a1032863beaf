"""Shows that methods can be removed: `python -m tests.removable [METHOD ...]`, by default all.

For each method it copies the repository without the method's file, its registry line, its variants
in `configs/methods.py` and its tests. Then it imports every module that is not a command, checks
every other variant, and runs training steps of AoE and of a router MoE.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from aoe_jax.methods import all_methods
from tests.test_imports import CODE

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("aoe_jax", "configs", "tests", "pyproject.toml")
NEEDED = ("dense",)  # not removable, because shipped configurations use it
METHODS = {
    name: method.__module__.rpartition(".")[2]
    for name, method in all_methods().items()
    if method.__module__.startswith("aoe_jax.methods.") and name not in NEEDED
}
STEPS = """
import jax, jax.numpy as jnp
from aoe_jax.moe import grouped_matmul
from aoe_jax.training.step import init_state, make_train_step
from aoe_jax.training.step_times import random_batch

grouped_matmul._default_backend = lambda device: "ragged"
for variant in ("published", "moe"):
    config = tiny.get_config(variant)
    config.model.update(n_layers=1, d_model=32, n_heads=2, vocab_size=64, unroll=1)
    config.experts.update(d_ffn=32, d_low=8)
    config.data.seq_len = 16
    config.train.optimizer = "adamw"
    config = Config.from_config_dict(config)
    step = jax.jit(make_train_step(config))
    state, metrics = step(jax.jit(lambda: init_state(config, 0))(), random_batch(config))
    assert jnp.isfinite(metrics["loss"])
print("works")
"""


def remove(root: Path, name):
    """Removes a method from a copy of the repository."""
    module = METHODS[name]
    (root / f"aoe_jax/methods/{module}.py").unlink()
    registry = root / "aoe_jax/methods/__init__.py"
    registry.write_text(re.sub(rf" *\"{name}\": .*\n", "", registry.read_text()))
    variants = root / "configs/methods.py"
    lines = variants.read_text().splitlines(keepends=True)
    variants.write_text("".join(line for line in lines if not _is_variant(line, name)))
    for test in (root / "tests/methods").glob(f"test_{module}.py"):
        test.unlink()


def _is_variant(line, name):
    """Whether a line of `configs/methods.py` is one of the method's variants."""
    return re.match(rf' {{4}}(\*\*)?.*"{name}(_router)?"', line) is not None


def check(name):
    """Removes a method in a copy of the repository, and checks that the other code still works."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, root / part, symlinks=True)
            else:
                shutil.copy(ROOT / part, root / part)
        remove(root, name)
        command = [sys.executable, "-c", CODE + STEPS]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert result.stdout == "works\n", result.stderr


if __name__ == "__main__":
    for name in sys.argv[1:] or METHODS:
        check(name)
        print(f"{name}: everything else works without it", flush=True)
