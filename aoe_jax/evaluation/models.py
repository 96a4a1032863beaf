"""Loads trained models with their tokenizers, and opens the corpora to evaluate them on."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from aoe_jax import sharding
from aoe_jax.config.checks import require_flag
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer
from aoe_jax.distributed import gathered, together
from aoe_jax.errors import DivergedError, UserError, naming, shown
from aoe_jax.formats import loading
from aoe_jax.formats.tokenizer_files import read_prefix
from aoe_jax.model.decoder import Decoder
from aoe_jax.model.decoding import unstacked
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.paths import local_copy
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.run_folder import check_data
from aoe_jax.training.step import train_step_on
from aoe_jax.training.validation import compile_eval_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A trained model with its tokenizer, on the devices of all processes."""

    config: Config  # `config.mesh` has the sizes of `mesh`
    decoder: Decoder
    mesh: Mesh
    params: dict  # stacked over layers; float32 from a run, else in the dtype of the model's files
    routing_state: dict[str, jax.Array]  # the arrays [L, ...] of the routing method, by name
    tokenizer: Tokenizer
    start: int  # the token in front of every text
    ends: list[int]  # the tokens that end a generated text
    prefix: list[int]  # tokens that `transformers` puts before a text; may be empty
    step: int | None  # training step; None: unknown

    @property
    def batch_size(self):
        """Sequences per batch: the size of a micro-batch of `config`."""
        return self.config.train.batch_size // self.config.train.accumulate

    def put(self, batch):
        """Puts a batch on the devices; in its `inputs`, `start` replaces end-of-text tokens."""
        is_end = batch["inputs"] == self.tokenizer.end_of_text
        inputs = np.where(is_end, np.int32(self.start), batch["inputs"])
        return sharding.put_batch(sharding.batch_sharding(self.mesh), batch | {"inputs": inputs})

    def eval_step(self, document_mask: bool):
        """Returns a compiled function that evaluates the model on a batch from `put`."""
        step = compile_eval_step(self.decoder, document_mask, self.mesh)
        return partial(step, self.params, self.routing_state)

    @functools.cached_property
    def by_layer(self):
        """A copy of the parameters for decoding with a cache, made by `decoding.unstacked`."""
        with jax.set_mesh(self.mesh):
            return unstacked(self.decoder, self.params, self.mesh)


def multiple(number, divisor):
    """Rounds `number` up to a multiple of `divisor`."""
    return -(-number // divisor) * divisor


def source_config(directory: Path) -> Config:
    """Reads the configuration of a run or of a model; its mesh may not fit this machine."""
    if loading.is_model(directory):
        return loading.read_config(directory)
    path = directory / "config.json"
    if not path.exists():
        wanted = "name the directory of a training run or of a model"
        raise UserError(f"{path} cannot be read (no such file); {wanted}")
    return read_run_config(path)


def local_model(directory: Path):
    """Returns a copy on a disk of a model that is in a store; all other directories unchanged."""
    return local_copy(directory) if loading.is_model(directory) else directory


def load_model(directory: Path, step="newest", mesh=None):
    """Loads a `Model` from the workdir of a run or from the directory of a model.

    `step` names a checkpoint of a run: "newest", "best" or a number of steps. `mesh` is a text such
    as "fsdp=4"; None means the mesh of training, changed if it does not fit. Raises `UserError` if
    the model or the step does not exist or cannot be read, or if `mesh` does not fit, and
    `DivergedError` if a parameter is not finite.
    """
    directory = local_model(directory)
    config = on_devices_here(source_config(directory), mesh_axes(mesh))
    devices, has_run = sharding.make_mesh(config, jax.devices()), not loading.is_model(directory)
    setting = f"the tokenizer of the {'run' if has_run else 'model'}"
    tokenizer = load_tokenizer(saved_tokenizer(directory), setting=setting)
    if tokenizer.token_count > config.model.vocab_size:
        log.warning(
            "the tokenizer of %s has %d tokens, the model %d: results are wrong for texts with a "
            "token that the model lacks",
            *(directory, tokenizer.token_count, config.model.vocab_size),
        )
    start, ends, prefix = tokenizer.end_of_text, [tokenizer.end_of_text], []
    if has_run:
        checkpoints = Checkpoints(directory)
        with together():
            step = checkpoints.find(step)
        step = gathered(step)[0]  # of a run that still trains, others may see another list
        with jax.set_mesh(devices):
            _, state = train_step_on(devices, config)
            params, routing_state = checkpoints.restore_model(step, state)
    else:
        there = loading.read_step(directory)
        if step not in ("newest", str(there) if there is not None else None):
            of_step = "" if there is None else f", of step {there}"
            raise UserError(f"--step={step}: {directory} has a single model{of_step}")
        step = there
        params, routing_state = loading.load_params(directory, config, devices)
        begin = loading.read_begin_token(directory, config.model.vocab_size)
        start = start if begin is None else begin
        named = loading.read_end_tokens(directory)
        ends = [token for token in named if token < config.model.vocab_size] or ends
        prefix = read_prefix(directory, tokenizer, begin)
    are_finite = partial(jax.tree.map, lambda a: jnp.isfinite(a).all())
    with jax.set_mesh(devices):
        finite = jax.jit(are_finite, out_shardings=sharding.replicated(devices))(params)
    for path, is_finite in flatten_dict(jax.device_get(finite), sep="/").items():
        if not is_finite:
            raise DivergedError(
                f"{directory}: the parameter {path} has values that are not finite; the model has "
                "diverged or is damaged. Use another model or another --step"
            )
    decoder, texts = Decoder.from_config(config), (tokenizer, start, ends, prefix)
    return Model(config, decoder, devices, params, routing_state, *texts, step)


def corpus_of(model: Model, directory: Path, named: str | None = None):
    """Opens the `TokenisedCorpus` for a model: the corpora `named`, else those of its training run.

    `named` has the syntax of `data.name`. The files of a model may come from a stranger. So without
    `named`, they can select only the bundled corpus. Raises `UserError` if a model selects another
    corpus or has no training run, and if a corpus is unreadable or has changed.
    """
    data, vocab_size = model.config.data, model.config.model.vocab_size
    if named is not None:
        with naming(f"--data={named}"):
            own = {"path": None, "tokenizer": str(saved_tokenizer(directory))}
            return open_corpus(dataclasses.replace(data, name=named, **own), vocab_size)
    of_run = loading.is_of_run(directory)
    if loading.is_model(directory) and (not of_run or (data.name, data.path) != ("sotu", None)):
        sources = ", ".join(f"{s.name}@{s.path}" if s.path else s.name for s in data.sources)
        read = f"its run read {shown(sources)}" if of_run else "it has no training run"
        raise UserError(
            f"{directory} is a model, which cannot choose what is read here; {read}. Name corpora "
            "with --data, such as --data=prepared@FOLDER or --data=sotu"
        )
    corpus = open_corpus(data, vocab_size)
    check_data(directory, corpus)
    return corpus


def first_batches(model: Model, stores, n_tokens):
    """Returns host batches with the first `n_tokens` of each store, rounded up to whole batches."""
    size, seq_len = model.batch_size, model.config.data.seq_len
    n = -(-n_tokens // (size * seq_len))
    of_stores = [itertools.islice(eval_batches(store, seq_len, size), n) for store in stores]
    return list(itertools.chain.from_iterable(of_stores))


def on_devices_here(config, axes=None):
    """Returns the configuration with a mesh of all devices that JAX finds.

    `axes` has the sizes of some axes, such as `{"fsdp": 4}`; `data` gets the other devices. None
    means the mesh of training. If that mesh does not fit, only the size of `data` changes; if this
    does not help, `data` gets all devices. A batch size that the mesh cannot split is increased.
    Raises `UserError` if `axes` do not fit.
    """
    n = jax.device_count()
    balance = dataclasses.replace(config.balance, aux_tokens=1.0)  # allows all numbers of devices
    config = dataclasses.replace(config, balance=balance)
    if axes is None:
        with contextlib.suppress(UserError):
            return sharding.fill_mesh(config, n)
        axes = {name: getattr(config.mesh, name) for name in ("fsdp", "expert", "tensor")}
        if n % math.prod(axes.values()):
            log.warning(
                "the mesh of training does not fit %d devices, so each device holds the whole "
                "model; --mesh splits it",
                n,
            )
            axes = {}
    rows = max(n // axes.get("tensor", 1), axes.get("fsdp", 1) * axes.get("expert", 1))
    batch_size = multiple(config.train.batch_size // config.train.accumulate, rows)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unroll=1),  # unrolled layers cannot use fsdp
        mesh=MeshConfig(**axes),
        train=dataclasses.replace(config.train, batch_size=batch_size, accumulate=1),
    )
    return sharding.fill_mesh(config, n)


def mesh_for(config, model):
    """Returns the mesh of `model` as a text for `load_model`, to load a model that was made from
    `model` on the same mesh. Raises `UserError` if the mesh does not fit the new model's `config`.
    """
    text = ",".join(f"{name}={size}" for name, size in model.mesh.shape.items())
    on_devices_here(config, mesh_axes(text))
    return text


def mesh_axes(text):
    """Parses `--mesh`, such as `fsdp=4,expert=2` or None. Raises `UserError` for other texts."""
    if text is None:
        return None
    form = re.compile(rf"({'|'.join(sharding.MESH_AXES)})=([1-9][0-9]{{0,8}})")
    parts = [form.fullmatch(part) for part in text.split(",")]
    axes = {part[1]: int(part[2]) for part in parts if part}
    wanted = f"write it as fsdp=4,expert=2; the axes are {', '.join(sharding.MESH_AXES)}"
    require_flag(len(axes) == len(parts), "mesh", text, wanted)
    return axes
