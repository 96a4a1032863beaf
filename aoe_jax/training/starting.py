"""Starts runs from a trained model (`train.init_from`) or from a checkpoint of another run."""

import logging
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import differences
from aoe_jax.config.run import Config
from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.distributed import together
from aoe_jax.errors import UserError, naming
from aoe_jax.formats.configs import computed_fields
from aoe_jax.formats.loading import load_params, read_config
from aoe_jax.model.decoder import initial_routing_state
from aoe_jax.storage.files import write_json, write_or_refuse, write_whole
from aoe_jax.storage.paths import local_copy, parsed_path
from aoe_jax.storage.retry import refusing
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.run_folder import check_config, read_heartbeat
from aoe_jax.training.step import TrainState, first_state

log = logging.getLogger(__name__)


def state_from_model(config: Config, mesh, like: TrainState, tokenizer: Path) -> TrainState:
    """Loads float32 parameters and the routing state from a model; the optimiser state is new.

    `like` has the shapes, dtypes and shardings of the state. `tokenizer` is the tokenizer file of
    the corpora. Raises `UserError` if the model cannot be read, has another architecture or
    tokenizer, or has a routing state that the run does not use.
    """
    source = config.train.init_from
    with together():
        path = parsed_path(source, "config.train.init_from", in_store=True)
        cannot = refusing("it cannot be read", kinds=(OSError, ValueError))
        with naming(f"config.train.init_from={source!r}"), cannot:
            directory = local_copy(path)
            _check_architecture(config, directory)
            _check_tokenizer(saved_tokenizer(directory), tokenizer)
            params, routing_state = load_params(directory, config, mesh, jnp.float32)
            first = initial_routing_state(config)
            if unused := sorted(routing_state.keys() - first.keys()):
                wanted = "set routing.name and balance.bias_rate as in the model's own training"
                what = unused[0].replace("_", " ")
                raise UserError(f"the model has a {what}, which this run cannot use; {wanted}")
    shardings = jax.tree.map(lambda a: a.sharding, like)
    state = jax.jit(partial(first_state, config), out_shardings=shardings, donate_argnums=(0, 1))
    return state(params, first | routing_state)


def begin_branch(workdir: Path, config: Config, source: Path, step: int):
    """Copies the checkpoint of a step, and the files that belong to it, from the run in `source`.
    Does nothing if `workdir` has a run. Raises `UserError` if there is no such checkpoint, or if
    the run has another configuration than `config`.
    """
    if (workdir / "config.json").exists():
        log.info(f"{workdir} has a run, which goes on; --branch has no effect")
        return
    steps, checkpoint = Checkpoints(source).steps(), source / "checkpoints" / str(step)
    if step not in steps or step >= config.train.steps:
        there = f"{source} has checkpoints of steps {', '.join(map(str, steps)) or 'none'}"
        wanted = f"{there}; give one of these steps, below config.train.steps={config.train.steps}"
        raise UserError(f"--branch={source}@{step}: {wanted}")
    if set(Checkpoints(workdir).steps()) - {step}:
        raise UserError(f"--workdir={workdir} has other checkpoints; use another --workdir")
    check_config(source, config)
    files = source / "metrics.jsonl", source / "data.json"
    for file in files:
        if not file.is_file():
            raise UserError(f"--branch={source}@{step}: {file} is missing; bring it back")

    def copy():
        for path in (checkpoint, *checkpoint.rglob("*"), *files):  # without the source's modes
            target = workdir / path.relative_to(source)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                shutil.copyfile(path, target)
        write_json(
            workdir / "heartbeat.json", read_heartbeat(source) | {"saved": step, "status": None}
        )
        # The last file, which completes the branch.
        write_whole(workdir / "config.json", (source / "config.json").read_bytes())

    write_or_refuse(workdir, "workdir", copy)
    log.info(f"begins with step {step} of {source}")


def _check_architecture(config, directory):
    there, here = computed_fields(read_config(directory)), computed_fields(config)
    differing = differences(there, here)
    # Fields that only change how experts are selected and weighted may differ from the model's.
    free = [name for name in differing if name == "experts.top_k" or name.startswith("routing.")]
    if others := [f"config.{text}" for name, text in differing.items() if name not in free]:
        raise UserError(f"it is another model: {'; '.join(others)}")
    if differing:
        how = "; ".join(f"config.{text}" for text in differing.values())
        log.warning(f"this run chooses experts in another way than {directory}: {how}")


def _check_tokenizer(of_model, of_corpora):
    files = (of_model, of_corpora) if of_model.exists() else ()
    if len({load_tokenizer(file, setting="tokenizer").identity for file in files}) > 1:
        wanted = f"set data.tokenizer={str(of_model)!r}"
        raise UserError(f"the model has another tokenizer than the corpora; {wanted}")
