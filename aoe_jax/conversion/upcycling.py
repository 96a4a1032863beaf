"""Turns a dense model into an MoE or an AoE whose experts are copies or pieces of its feed-forward
layer (Sparse Upcycling, arXiv 2212.05055; fine-grained experts: arXiv 2410.07524).

Notation: N experts, K per token; granularity G; C = N / G copies; model width d, dense width f.

**Experts.** The f neurons of a layer are divided into G pieces of f / G neurons, and each piece is
copied C times: expert `c G + g` is copy c of piece g. A dense layer computes the sum of the pieces,
an MoE layer a weighted mean, so `w_down` is multiplied by G (the second paper scales all matrices).

**Router of an MoE.** The G experts of a copy (a virtual group of the second paper) have the same
router column, random with variance 1 / d. G divides K, so a token chooses all G of them or none.

**Scores of an AoE.** Gates are not factorised, and the score of an expert is computed from its
first S neurons. Neurons are sorted by the norm of their gate column and assigned to the pieces in
turn. The first C S neurons of a piece are its scoring neurons, and are assigned to its copies in
turn. So all experts have scoring neurons of similar norms, and no two experts share one.
With G > 1, a token may be routed to only some pieces of a copy.

**Noise.** Gaussian noise is added to every matrix of every expert. Its standard deviation is
`noise` times that of the dense matrix; the noise of `w_down` is multiplied by G, like `w_down`.

Without noise, the MoE computes exactly the outputs of the dense model; so does the AoE if G = 1.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from aoe_jax.config.checks import require, require_flag
from aoe_jax.config.experts import BalanceConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.conversion.exporting import in_words, write_figures, write_result
from aoe_jax.conversion.observations import evaluation_on
from aoe_jax.conversion.scoring_neurons import in_front
from aoe_jax.evaluation.models import (
    corpus_of,
    first_batches,
    load_model,
    local_model,
    mesh_for,
    source_config,
)
from aoe_jax.formats.loading import is_model
from aoe_jax.formats.writing import new_directory, parameters_of
from aoe_jax.moe.routing import TopK

_EXPERTS = "layers/experts/"
_NEURONS = {"w_gate": 1, "w_up": 1, "w_down": 0}  # the axis of neurons in a dense layer


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """Settings of upcycling, explained in the module's docstring."""

    kind: str  # moe | aoe
    n_experts: int
    top_k: int
    granularity: int = 1
    score_neurons: int | None = None  # AoE only
    score: str = "norm"  # AoE only
    noise: float = 0.0  # standard deviation, relative to that of the matrix
    seed: int = 0  # for the router and the noise

    def config(self, dense: Config) -> Config:
        """Returns the configuration of the result, with the default balance losses. Raises
        `UserError` if the model is not dense, or settings do not fit it or each other.
        """
        width, kind = dense.experts.d_ffn, dense.experts.kind
        require(kind == "dense", "experts.kind", kind, "only a dense model can be upcycled")
        n, g, k = self.n_experts, self.granularity, self.top_k
        require_flag(k <= n, "top_k", k, f"must be at most --experts={n}")
        fits = n % g == 0 and width % g == 0
        wanted = f"must divide --experts={n} and the width {width} of the dense layer"
        require_flag(fits, "granularity", g, wanted)
        experts = {"n_experts": n, "top_k": k, "d_ffn": width // g}
        if self.kind == "aoe":
            experts |= {"score_neurons": self.score_neurons, "score": self.score}
            most = width // n
            wanted = f"must be at most {most}, because {n} experts divide a layer of width {width}"
            fits = self.score_neurons is not None and self.score_neurons <= most
            require_flag(fits, "score_neurons", self.score_neurons, wanted)
        else:
            wanted = f"must be a multiple of --granularity={g}: a token needs all pieces of a copy"
            require_flag(k % g == 0, "top_k", k, wanted)
        kind = "aoe" if self.kind == "aoe" else "router"
        return dataclasses.replace(
            dense,
            experts=dataclasses.replace(dense.experts, kind=kind, **experts),
            routing=TopK(),
            balance=BalanceConfig(),
            mesh=MeshConfig(),
        )

    def experts(self, layer: int, dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the parameters of a layer of experts by name, in the dtypes of `dense`, which has
        `w_gate [d, f]`, `w_up [d, f]` and `w_down [f, d]`. `layer` seeds the noise and the router.
        """
        order = self._order(dense["w_gate"])
        found = {}
        for number, (name, axis) in enumerate(_NEURONS.items()):
            whole = dense[name].astype(np.float32)
            matrices = np.stack([np.take(whole, own, axis) for own in order])
            if self.noise:
                normal = np.random.default_rng([self.seed, layer, number]).standard_normal
                matrices += self.noise * whole.std() * normal(matrices.shape, np.float32)
            if name == "w_down":
                matrices *= self.granularity
            found[name] = matrices.astype(dense[name].dtype)
        if self.kind == "moe":
            n_copies, d = self.n_experts // self.granularity, dense["w_gate"].shape[0]
            normal = np.random.default_rng([self.seed, layer, len(_NEURONS)]).standard_normal
            router = normal((d, n_copies), np.float32) * d**-0.5
            router = np.repeat(router, self.granularity, axis=1)
            found["w_router"] = router.astype(dense["w_gate"].dtype)
        return found

    def _order(self, w_gate):
        """Returns the indices of the dense neurons of each expert, `[N, f / G]`."""
        n_copies, g = self.n_experts // self.granularity, self.granularity
        ranked = np.argsort(-np.square(w_gate.astype(np.float32)).sum(axis=0), kind="stable")
        in_pieces = [ranked[piece::g] for piece in range(g)]
        n_scoring = n_copies * (self.score_neurons or 0)
        own = [np.arange(c, n_scoring, n_copies) for c in range(n_copies)]
        return np.stack([of[in_front(first, len(of))] for first in own for of in in_pieces])


def upcycle(
    checkpoint: Path,
    output: Path,
    form: Upcycling,
    data: str | None = None,
    n_tokens: int = 8192,
    mesh: str | None = None,
):
    """Writes the upcycled model to `output`, which does not exist before all files are complete.

    `checkpoint` is the directory of a model or of a run, whose newest checkpoint is loaded. Dtypes
    do not change. Prints a summary. Returns the content of `convert.json` in `output`: the fields
    of `form`, and, if `data` is given or `checkpoint` is a run, `nll` `before` and `after`, on
    `n_tokens` validation tokens of each corpus. Raises `UserError` if a file cannot be read or
    `form` does not fit.
    """
    checkpoint = local_model(checkpoint)
    config = form.config(source_config(checkpoint))
    is_measured = data is not None or not is_model(checkpoint)
    report = {name: value for name, value in dataclasses.asdict(form).items() if value is not None}
    experts = f"{form.top_k} of {form.n_experts} experts of granularity {form.granularity}"
    result = f"dense layers became experts; {form.kind}: {experts}"
    with new_directory(output) as directory:
        model = load_model(checkpoint, mesh=mesh)
        if is_measured:
            mesh = mesh_for(config, model)
            corpus = corpus_of(model, checkpoint, data)
            held_out = first_batches(model, corpus.validation.values(), n_tokens)
            before = evaluation_on(model, held_out).nll
        step, parameter = model.step, _upcycled(parameters_of(model.params)[1], form)
        write_result(directory, checkpoint, step, config, parameter)
        del model, parameter  # frees memory for the next model
        if is_measured:
            after = evaluation_on(load_model(directory, mesh=mesh), held_out).nll
            report["nll"] = {"before": before, "after": after}
            result += f"; {in_words(report['nll'])}"
        write_figures(directory, checkpoint, step, config, "convert", report, result)
    print(f"{result}; wrote {output}")
    return report


def _upcycled(read, form):
    """Returns a function for `write_model`; it caches the experts of one layer."""

    @functools.lru_cache(maxsize=1)
    def experts(layer):
        return form.experts(layer, {name: read(_EXPERTS + name, layer) for name in _NEURONS})

    def parameter(path, layer):
        if path.startswith(_EXPERTS):
            return experts(layer)[path.removeprefix(_EXPERTS)]
        return read(path, layer)

    return parameter
