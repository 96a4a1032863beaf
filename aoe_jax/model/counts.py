"""Parameters and floating-point operations of a configuration, counted without arrays."""

import logging
import math
from dataclasses import dataclass

import jax

from aoe_jax.config.run import Config
from aoe_jax.moe.layer import parameters_of
from aoe_jax.parameters import shared_expert
from aoe_jax.sharding import MESH_AXES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts by the paper's rule: an embedding table that input and output share counts
    once in the total (732M for the paper's small models) and twice in the active parameters (247M).
    """

    experts: int  # experts and routers of all layers, and the matrices of dense layers
    active_experts: int  # the part of `experts` that one token uses
    attention: int
    norms: int  # norms and biases
    embedding: int  # one embedding table
    n_tables: int  # number of embedding tables: 1 if input and output use the same

    @property
    def total(self):
        """All parameters; a shared table is counted once."""
        return self.experts + self.attention + self.norms + self.n_tables * self.embedding

    @property
    def active(self):
        """Parameters that a token uses; the table counts twice, as input and as output."""
        return self.active_non_embedding + 2 * self.embedding

    @property
    def active_non_embedding(self):
        """Parameters that a token uses, without embedding tables."""
        return self.active_experts + self.attention + self.norms

    def __str__(self):
        of_tables = self.n_tables * self.embedding
        tables = "one table for input and output" if self.n_tables == 1 else "two tables"
        return (
            f"{in_words(self.total)} parameters: {in_words(of_tables)} in embeddings ({tables}), "
            f"and {in_words(self.total - of_tables)} in layers, of which "
            f"{in_words(self.active_non_embedding)} are active per token"
        )


def in_words(count):
    """Returns a number of parameters such as 1.05M."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def experts_per_token(config: Config):
    """Mean number of experts of a token; None if it depends on the scores (top-p)."""
    choice = config.routing.choice(config.experts)
    return choice.per_token if choice else 1


def _layer_parameters(config, n_active):
    """`([(Parameter, its size)], size of the experts that a token uses)`, for one layer. AoE's
    W_gate_down belongs to the expert, so AoE and traditional experts have equal size (Eq. 5).
    """
    c = config.experts
    sizes = c.sizes(config.model.d_model)
    declared = parameters_of(c, config.routing).values()
    declared = [(parameter, math.prod(parameter.shape(sizes))) for parameter in declared]
    n_experts = 1 if c.kind == "dense" else c.n_experts
    expert = sum(size for parameter, size in declared if parameter.per_expert) // n_experts
    return declared, round(n_active * expert)


def parameter_counts(config: Config):
    """Counts the decoder's parameters; if the number of experts varies, `top_k` count as active."""
    m = config.model
    declared, active = _layer_parameters(config, experts_per_token(config) or config.experts.top_k)
    shared = sum(size for parameter, size in declared if not parameter.per_expert)
    of_queries, of_keys = m.n_heads * m.head_width, m.kv_heads * m.head_width
    features = of_queries + of_keys  # the width of q plus k, and of o plus v
    n_layers, of_dense = m.n_layers + m.n_dense_layers, _dense_layers(m)
    norms = (2 * n_layers + 1) * m.d_model
    of_qk_norm = {"none": 0, "all": features, "head": 2 * m.head_width}[m.qk_norm]
    biases = (m.attention_bias or m.qkv_bias) * (of_queries + 2 * of_keys)
    biases += m.attention_bias * m.d_model
    return ParameterCounts(
        experts=m.n_layers * sum(size for _, size in declared) + of_dense,
        active_experts=m.n_layers * (shared + active) + of_dense,
        attention=n_layers * 2 * m.d_model * features,
        norms=norms + n_layers * (of_qk_norm + biases),
        embedding=m.vocab_size * m.d_model,
        n_tables=1 if m.tie_embeddings else 2,
    )


def _dense_layers(model):
    """The number of parameters in the matrices of the dense layers."""
    return model.n_dense_layers * 3 * model.d_model * (model.d_dense or 0)


def layer_flops_per_token(config: Config, n_active=None):
    """Useful matmul FLOPs per token of one layer of experts, for one forward and one backward pass.

    The backward pass needs twice the FLOPs of the forward pass. With `experts.sparse_scoring`,
    AoE's scores of experts that are not chosen have a backward pass only for the fraction
    `balance.aux_tokens` of the tokens, and only if there is a balance loss. `n_active` is the mean
    number of experts of a token, by default `experts_per_token`, or `top_k` where that is None. For
    `kind="capacity"` these are the FLOPs of "router", without those of empty places, dispatch and
    combine.
    """
    c = config.experts
    if n_active is None:
        n_active = experts_per_token(config) or c.top_k
    declared, active = _layer_parameters(config, n_active)
    matrices = [(p, size) for p, size in declared if len(p.axes.split()) > 1]
    sizes = c.sizes(config.model.d_model)
    of_shared = sum(math.prod(p.shape(sizes)) for p in shared_expert(c).values())
    router = sum(size for p, size in matrices if not p.per_expert) - of_shared
    own = config.routing.flops(config)
    training = (6 * router if own is None else own) + 6 * (active + of_shared)
    if c.kind != "aoe" or config.routing.hooks.scores:
        return training
    idle = 2 * round((c.n_experts - n_active) * sizes["r"] * sizes["d"])
    with_gradient = config.balance.aux_tokens if config.balance.has_loss else 0.0
    if not c.sparse_scoring(config.routing):
        with_gradient = 1.0
    return training + round((1 + 2 * with_gradient) * idle)


def training_flops_per_token(config: Config, n_active=None):
    """Useful matmul FLOPs per token of a training step.

    `layer_flops_per_token` counts the layers of experts, with `n_active` experts per token. Of
    attention scores only the lower triangle is counted; norms, softmax and the embedding look-up
    are not counted.
    """
    m, counts = config.model, parameter_counts(config)
    # Each query attends to half the positions on average.
    of_scores = (m.n_layers + m.n_dense_layers) * m.n_heads * m.head_width * config.data.seq_len
    others = 6 * (counts.attention + counts.embedding + of_scores + _dense_layers(m))
    of_experts = m.n_layers * layer_flops_per_token(config, n_active)
    return config.routing.hooks.passes * (others + of_experts)


def log_run(config: Config):
    """Logs the mesh, parameters and FLOPs of a run, and warns if the method is not causal."""
    routing = config.routing
    if jax.device_count() > 1:
        axes = [f"{axis} {getattr(config.mesh, axis)}" for axis in MESH_AXES]
        log.info("mesh: %s", ", ".join(axes))
    if config.model.dtype == "float32" and jax.default_backend() != "cpu":
        log.warning("model.dtype=float32: bfloat16 is several times faster on this device")
    log.info("%s", parameter_counts(config))
    log.info("%.1f MFLOPs per token in a training step", training_flops_per_token(config) / 1e6)
    if experts_per_token(config) is None:
        log.info(
            f"parameters and FLOPs count experts.top_k={config.experts.top_k} experts per token; "
            f"with {routing.name} the number varies"
        )
    causality = routing.causality(config.experts)
    if causality.reason and causality.until_step is None:
        log.warning(
            f"{routing.name} is not causal: {causality.reason}, so the losses below cannot be "
            "compared with those of a causal language model"
        )
    elif causality.reason:
        log.warning(
            f"{routing.name} is not causal before step {causality.until_step}: "
            f"{causality.reason}, so the training losses of these steps depend on later tokens"
        )
