"""The first state of a run that starts from a trained model, `train.init_from`."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from aoe_jax.config.run import Config
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.distributed import all_agree
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import differing_fields, is_choice
from aoe_jax.formats.reading import load_params, read_config
from aoe_jax.model.decoder import initial_routing_state
from aoe_jax.training.optimizer import make_optimizer
from aoe_jax.training.step import TrainState

log = logging.getLogger(__name__)


def check_start(config: Config):
    """Checks the configuration of the model; writes nothing.

    Raises:
      UserError: the configuration can't be read, or the model has another architecture.
    """
    directory = Path(config.train.init_from)
    try:
        _check_architecture(directory, read_config(directory), config)
    except (UserError, OSError) as e:
        raise UserError(f"config.train.init_from={config.train.init_from!r}: {e}") from e


def state_from_model(config: Config, mesh, shardings: TrainState, tokenizer: Path) -> TrainState:
    """The state before the first step: parameters and routing state of a model, the rest new.

    Args:
      config: the run, after `check_start`; `train.init_from` is the model's directory.
      mesh: the mesh of the run.
      shardings: the shardings of its state.
      tokenizer: the tokenizer's file of its corpora.

    Returns:
      The `TrainState`; parameters are float32.

    Raises:
      UserError: in every process if in one: the model can't be read, has another tokenizer, or has
        a routing state that the run doesn't use.
    """
    problem = None
    try:
        params, routing_state = _loaded(config, mesh, tokenizer)
    except (UserError, OSError, ValueError) as e:  # raised below, in all processes together
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
                f"the model has a {name.replace('_', ' ')}, which this run cannot use; set "
                "routing.name and balance.bias_rate as in the model's own training"
            )
    return params, wanted | routing_state


def _check_architecture(directory, model, config):
    differing = {
        name: f"config.{name} is {there!r} there, {here!r} here"
        for name, there, here in differing_fields(model, config)
    }
    if others := [text for name, text in differing.items() if not is_choice(name)]:
        raise UserError(f"it is another model: {'; '.join(others)}")
    if differing:
        how = "; ".join(differing.values())
        log.warning(f"experts are chosen in another way than in {directory}: {how}")


def _check_tokenizer(its, ours):
    if not its.exists() or its.read_bytes() == ours.read_bytes():
        return
    if _vocabulary(its) != _vocabulary(ours):
        raise UserError(
            f"the model has another tokenizer than the corpora; set data.tokenizer={str(its)!r}"
        )


def _vocabulary(file):
    """The parts of a tokenizer's file that decide on the tokens of a text; not the special tokens
    that are added before and after it.
    """
    if file.suffix != ".json":
        return file.read_bytes()
    spec = json.loads(file.read_text())
    return [spec.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
