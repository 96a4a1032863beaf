"""The state of a run that starts from the parameters of a model, `train.init_from`."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from aoe_jax.config import Config
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.distributed import all_agree
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import computed_fields, is_choice
from aoe_jax.formats.reading import load_params, read_config
from aoe_jax.model.decoder import initial_routing_state
from aoe_jax.training.optimizer import make_optimizer
from aoe_jax.training.step import TrainState

log = logging.getLogger(__name__)


def check_start(config: Config):
    """Checks `train.init_from` before anything else is done for the run.

    Raises:
      UserError: the model's configuration can't be read, or is of another architecture.
    """
    directory = Path(config.train.init_from)
    try:
        _check_architecture(directory, read_config(directory), config)
    except (UserError, OSError) as e:
        raise UserError(f"config.train.init_from={config.train.init_from!r}: {e}") from e


def state_from_model(config: Config, mesh, shardings: TrainState, tokenizer: Path) -> TrainState:
    """The state before the first step, with float32 parameters and the routing state of a model,
    the rest anew.

    Args:
      config: of the run, after `check_start`; `train.init_from` is the directory of the model, as
        `formats.reading` takes it.
      mesh: of the run.
      shardings: of its state.
      tokenizer: the file of the tokenizer of its corpora.

    Raises:
      UserError: in every process if in one: the model can't be read, is of another tokenizer, or
        has a routing state that the run has no use for.
    """
    problem = None
    try:
        params, routing_state = _loaded(config, mesh, tokenizer)
    except (
        UserError,
        OSError,
        ValueError,
    ) as e:  # whatever is wrong here, the others wait for this process below
        problem = e
    if not all_agree(problem is None):
        what = problem or "another process can't start from it"
        raise UserError(f"config.train.init_from={config.train.init_from!r}: {what}") from problem

    def state(params, routing_state):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            zero, zero, params, routing_state, make_optimizer(config.train).init(params)
        )

    return jax.jit(state, out_shardings=shardings, donate_argnums=(0, 1))(params, routing_state)


def _loaded(config, mesh, tokenizer):
    directory = Path(config.train.init_from)
    _check_tokenizer(saved_tokenizer(directory), tokenizer)
    params, routing_state = load_params(directory, config, mesh, jnp.float32)
    wanted = initial_routing_state(config)
    for name in routing_state:
        if name not in wanted:
            raise UserError(
                f"the model has a {name.replace('_', ' ')}, which the run has no use for; set experts.selection and "
                "balance.bias_rate as in its own training"
            )
    return params, wanted | routing_state


def _check_architecture(directory, model, config):
    there, here = computed_fields(model), computed_fields(config)
    differing = {
        name: f"config.{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    }
    if others := [text for name, text in differing.items() if not is_choice(name)]:
        raise UserError(f"it is another model: {'; '.join(others)}")
    if differing:
        log.warning(
            "experts are chosen in another way than in %s: %s",
            directory,
            "; ".join(differing.values()),
        )


def _check_tokenizer(its, ours):
    if (
        its.exists()
        and its.read_bytes() != ours.read_bytes()
        and _vocabulary(its) != _vocabulary(ours)
    ):
        raise UserError(
            f"the model is of another tokenizer than the corpora; set data.tokenizer={str(its)!r}"
        )


def _vocabulary(file):
    """What decides on the tokens of a text by itself: all of a `tokenizer.json` but what is added
    to texts.
    """
    if file.suffix != ".json":
        return file.read_bytes()
    spec = json.loads(file.read_text())
    return {
        name: spec.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")
    }
