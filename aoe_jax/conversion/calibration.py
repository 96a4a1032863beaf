"""Text on which trained experts are observed, and held-out text on which results are compared."""

import itertools
from functools import partial
from pathlib import Path

import jax
from tqdm import tqdm

from aoe_jax.data.pipeline import eval_batches, train_batches
from aoe_jax.evaluation.models import Model, corpus_of
from aoe_jax.training.validation import compile_eval_step, evaluate_batches


def calibration_batches(model: Model, directory: Path, data: str | None, n_tokens: int, seed: int):
    """Lists of host batches: random ones of the train split, the first of each validation split.

    Each split has `n_tokens`, rounded up to whole batches. `data` names corpora like `data.name`;
    None: those of the run of `model` in `directory`. Raises `UserError` if they cannot be read.
    """
    corpus = corpus_of(model, directory, data)
    size, seq_len = model.config.train.batch_size, model.config.data.seq_len
    n = -(-n_tokens // (size * seq_len))
    train = train_batches(corpus.train, corpus.weights, seq_len, size, seed)
    validation = [eval_batches(store, seq_len, size) for store in corpus.validation.values()]
    firsts = (itertools.islice(batches, n) for batches in validation)
    return list(itertools.islice(train, n)), list(itertools.chain.from_iterable(firsts))


def mean_nll(model: Model, batches) -> float:
    """The negative log-likelihood of a model on host batches, nats per token."""
    return evaluator(model, model.decoder, batches)(model.params, model.routing_state).nll


def evaluator(model: Model, decoder, batches):
    """A function `(params, routing state) -> Evaluation` of a decoder on host batches, compiled
    once; mesh and settings are those of `model`.
    """
    step = compile_eval_step(decoder, model.config.data.document_mask, model.mesh)

    def evaluate(params, routing_state):
        score = partial(step, params, routing_state)
        with jax.set_mesh(model.mesh):
            return evaluate_batches(score, tqdm(batches, "validation", unit="batch"), model.put)

    return evaluate
