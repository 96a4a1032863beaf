"""Analyses which experts the layers of a run choose, checkpoint by checkpoint.

Every kept checkpoint of the run routes the same tokens, the beginning of the validation split.
`RUN/routing.json` has the load, entropies, dead experts, mean scores, and the overlap with the
choices of the last checkpoint.

Shapes have L layers, T tokens and n experts.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import corpus_of, first_batches, load_model
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.load_balance import layer_statistics
from aoe_jax.storage.files import COUNT, TEXT, read_json, write_json
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.validation import compile_eval_step

LAYER_MEANS = ["load_entropy", "confidence_entropy", "max_violation"]
LAYER_COLUMNS = [*LAYER_MEANS, "dead_experts", "overlap_with_final"]
_MOST_BYTES = 2**28  # limit of routing.json; 100 layers of 256 experts need less


def observing(decoder: Decoder):
    """Returns a decoder whose statistics also record the choices of each layer, `[T, n]` bool."""

    def observe(scores, slots, weights, ctx):
        n_tokens, n = scores.shape
        chosen = jnp.zeros((n_tokens, n + 1), bool).at[slots.token, slots.expert].set(True)[:, :n]
        return ctx.devices.all_tokens(chosen)

    return decoder.clone(observe=observe)


def overlap(chosen, final):
    """Returns `[L]`, the mean fraction of a token's experts in `final` that are also in `chosen`.

    Both are `[L, T, n]` bool. The mean is over tokens with experts in `final`; 1 if none has any.
    """
    wanted, in_common = final.sum(axis=-1), (chosen & final).sum(axis=-1)
    shares = in_common / np.maximum(wanted, 1)  # 0 for tokens without experts
    n_tokens = (wanted > 0).sum(axis=-1)
    return np.where(n_tokens > 0, shares.sum(axis=-1) / np.maximum(n_tokens, 1), 1)


def analyse(folder: Path, n_tokens: int):
    """Writes a run's `routing.json`, from the first `n_tokens` validation tokens of each corpus,
    rounded up to whole batches. Raises `UserError` if the run cannot be read or its data differ.
    """
    steps, model = Checkpoints(folder).steps(), load_model(folder, "newest")
    config = model.config
    decoder = observing(model.decoder)
    eval_step = compile_eval_step(decoder, config.data.document_mask, model.mesh)
    on_host = first_batches(model, corpus_of(model, folder).validation.values(), n_tokens)
    is_real = np.concatenate([batch["weights"].reshape(-1) > 0 for batch in on_host])
    sizes = [batch["weights"].sum() for batch in on_host]
    batches = [model.put(batch) for batch in on_host]
    with jax.set_mesh(model.mesh):
        found = {}
        for step in steps:
            of_step = model if step == model.step else load_model(folder, str(step))
            run = partial(eval_step, of_step.params, of_step.routing_state)
            stats = [jax.device_get(run(batch))[2] for batch in batches]
            chosen = np.concatenate([one.records["observed"] for one in stats], axis=1)
            means = [one._replace(records=None) for one in stats]
            mean = jax.tree.map(lambda *a: np.average(a, axis=0, weights=sizes), *means)
            found[step] = mean, chosen[:, is_real]
    final = found[steps[-1]][1]
    checkpoints = [{"step": step} | _summary(*of_step, final) for step, of_step in found.items()]
    choices = {"tokens": final.shape[1], "kind": config.experts.kind, "checkpoints": checkpoints}
    write_json(folder / "routing.json", choices, indent=None)


def read_choices(file: Path):
    """Returns the content of a `routing.json`; lists become float64 arrays, with NaN for null."""
    wanted = "remove it, and run the command again"
    schema = {"tokens": COUNT, "kind": TEXT, "checkpoints": [{"step": COUNT}]}
    choices = read_json(file, wanted, schema, _MOST_BYTES)
    try:
        choices["checkpoints"][-1]  # there is one
        for checkpoint in choices["checkpoints"]:
            for name in ("load", "mean_score", *LAYER_COLUMNS):
                checkpoint[name] = np.array(checkpoint[name], np.float64)
    except (LookupError, TypeError, ValueError) as e:
        raise UserError(f"{file} cannot be read: {type(e).__name__}: {e}; {wanted}") from e
    return choices


def _summary(stats, chosen, final):
    """Returns the statistics of a checkpoint by name; choices are `[L, T, n]`, without padding."""
    load = chosen.mean(axis=1)  # [L, n]
    of_load = layer_statistics(load, stats.live)
    by_name = {
        "load": load,
        "load_entropy": of_load["load_entropy"],
        "confidence_entropy": stats.confidence_entropy,
        "max_violation": np.maximum(of_load["load_max_over_mean"] - 1, 0),
        "dead_experts": of_load["dead_experts"],
        "mean_score": stats.mean_score,
        "overlap_with_final": overlap(chosen, final),
    }
    return {name: np.asarray(value).tolist() for name, value in by_name.items()}
