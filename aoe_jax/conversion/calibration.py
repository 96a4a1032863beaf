"""Batches on which trained experts are observed, and held-out ones that compare results."""

import itertools
from pathlib import Path

import jax
from tqdm import tqdm

from aoe_jax.data.pipeline import eval_batches, train_batches
from aoe_jax.evaluation.models import Model, corpus_of
from aoe_jax.training.validation import evaluate_batches


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


def evaluation_on(model: Model, batches):
    """The `Evaluation` of a model on host batches."""
    step = model.eval_step(model.config.data.document_mask)
    with jax.set_mesh(model.mesh):
        return evaluate_batches(step, tqdm(batches, "validation", unit="batch"), model.put)
