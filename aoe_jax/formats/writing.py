"""Writes models as safetensors and `config.json`, for `aoe_jax` and other programs."""

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from tqdm import tqdm

from aoe_jax.config.run import Config
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.architectures import find_layouts
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.model_card import training, write_card
from aoe_jax.formats.reading import RUN_FILE, is_of_run
from aoe_jax.formats.tensor_files import write_tensors
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.parameters import STACKS
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import sync, write_json
from aoe_jax.storage.paths import Mirror, is_remote
from aoe_jax.storage.retry import is_fault_of_write, patiently, reason

log = logging.getLogger(__name__)

_CLASSES = Path(__file__).with_name("huggingface")  # of transformers, for our own format


def export(workdir: Path, output: Path, step="newest", dtype="float32"):
    """Writes the model of a checkpoint to `output`, which appears only once it is complete.

    `step` is "newest", "best" or a number; `dtype` is that of the tensors. Raises `UserError` if
    the run cannot be read or has no such step, and as `new_directory` does.
    """
    config = read_run_config(workdir / "config.json")
    with new_directory(output) as partial_output:
        model = load_model(workdir, step)
        values = to_json(model.config, model.routing_state)
        values |= write_tokenizer(workdir, partial_output, config.model.max_len)
        write_arrays(partial_output, values, model.params, model.routing_state, dtype)
        write_run(partial_output, workdir, model.step, config)
        origin = training(config, workdir, model.step)
        write_card(partial_output, output.name, values, config, origin)
    log.info("wrote the model of step %d to %s, as %s", model.step, output, values["model_type"])


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to write, renamed to `output` at the end, and removed after an exception.

    SIGKILL leaves it, hidden beside `output`. For an object store it is a temporary one on a disk,
    whose files are copied at the end, `config.json` as the last. Raises `UserError` if `output`
    exists, is among checkpoints, or must not be written, and `MachineFault` if its disk fails.
    """
    if output.exists() if is_remote(output) else os.path.lexists(output):
        raise UserError(f"--output={output} exists already; name a new directory")
    for folder in (output if is_remote(output) else output.absolute()).parents:
        if folder.name == "checkpoints" and (folder.parent / "config.json").exists():
            wanted = "is among the checkpoints of a run; name a directory elsewhere"
            raise UserError(f"--output={output} {wanted}")
    if is_remote(output):
        with tempfile.TemporaryDirectory() as folder:
            mirror = Mirror(Path(folder), output)
            yield Path(folder)
            patiently(f"--output={output} cannot be written", lambda: mirror.upload("config.json"))
        return
    partial = output.absolute().with_name(f".{output.name}.partial.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, output)
        sync(partial.parent)
    except (OSError, SafetensorError) as e:
        where = f" ({e.filename})" if getattr(e, "filename", None) else ""
        kind = MachineFault if is_fault_of_write(e) else UserError
        raise kind(f"--output={output} cannot be written: {reason(e)}{where}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(directory: Path, values: dict, shapes: dict[str, Any], parameter: Callable):
    """Writes `config.json` and the tensors; memory holds one file and one parameter of a layer.

    The `model_type` of `values`, the content of `config.json`, decides the names of the tensors.
    The classes that its `auto_map` names are copied, too. `shapes` has every parameter by its path,
    with the axis of layers; arrays will do. `parameter(path, layer)` returns the whole parameter of
    a layer, by its number in its stack, or one outside the layers (None). The calls for a layer
    come together, in the order of `shapes`. Raises OSError or SafetensorError if a file cannot be
    written.
    """
    stored = find_layouts(values["model_type"], shapes)
    parts = [(None, None)]  # a stack of layers, and the number in it
    for stack in STACKS:
        n_layers = next((a.shape[0] for path, a in shapes.items() if _stack(path) == stack), 0)
        parts += [(stack, layer) for layer in range(n_layers)]

    def tensors():
        for stack, layer in tqdm(parts, "writing", unit="layer", delay=5, disable=None):
            bounds = {} if layer is None else {"L": (layer, layer + 1)}
            for path, layout in stored.items():
                if _stack(path) == stack:
                    part = parameter(path, layer)
                    part = part[None] if bounds else part
                    for name, index in layout.tensors(bounds):
                        yield name, layout.to_file(part[*index, ...])

    write_json(directory / "config.json", values)
    if "auto_map" in values:
        for file in _CLASSES.glob("*.py"):
            shutil.copyfile(file, directory / file.name)
    write_tensors(directory, tensors())


def _stack(path):
    """The stack of layers that a parameter is in, or None."""
    first = path.partition("/")[0]
    return first if first in STACKS else None


def write_arrays(
    directory: Path, values: dict, params: dict, routing_state: dict, dtype: str | None
):
    """Writes a model from arrays on devices, see `write_model`.

    `params` is the tree of the decoder's parameters, and `routing_state` has arrays `[L, ...]`
    float32 by name. `dtype` is that of the parameters in the files; None: their own.
    """
    arrays = flatten_dict(params, sep="/")
    dtypes = {path: dtype or a.dtype.name for path, a in arrays.items()}
    arrays |= {f"layers/{name}": a for name, a in routing_state.items()}

    def parameter(path, layer):
        whole = arrays[path] if layer is None else arrays[path][layer]
        return jax.device_get(whole.astype(dtypes.get(path, "float32")))

    values = values | {"torch_dtype": dtypes["embed/embedding"]}
    write_model(directory, values, arrays, parameter)


def write_run(directory: Path, source: Path, step: int | None, config: Config):
    """Writes the run and step of a model, and which data that run read, if `source` is of a run."""
    if not is_of_run(source):
        return
    write_json(directory / RUN_FILE, {"step": step, "config": config.to_dict()})
    if (source / "data.json").exists():
        (directory / "data.json").write_bytes((source / "data.json").read_bytes())
