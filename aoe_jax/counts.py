"""Parameters and floating-point operations of a configuration, counted without allocating anything.

L layers, d model width, n experts, V vocabulary, S sequence length.
"""

import math
from dataclasses import dataclass

from aoe_jax.config.run import Config
from aoe_jax.moe.layer import ExpertsLayer


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by the conventions of the paper and of the field.

    The paper counts a shared embedding table once in the total (732M for its small models) and
    twice, as input table and as output projection, among the active parameters (247M).
    """

    experts: int  # experts and routers of all layers
    active_experts: int  # those that one token uses
    attention: int
    norms: int  # and biases
    embedding: int  # one table
    n_tables: int  # tables held: 1 where input and output share one

    @property
    def total(self):
        """All parameters held; a shared table is counted once."""
        return self.experts + self.attention + self.norms + self.n_tables * self.embedding

    @property
    def active(self):
        """Parameters that a token uses, the paper's convention: the table counts as input and as
        output.
        """
        return self.active_non_embedding + 2 * self.embedding

    @property
    def active_non_embedding(self):
        """Parameters that a token uses, without embedding tables."""
        return self.active_experts + self.attention + self.norms

    def __str__(self):
        return (
            f"{_millions(self.total)} parameters (shared table counted once), "
            f"{_millions(self.active)} active per token (table counted as input and as output), "
            f"{_millions(self.active_non_embedding)} active without embeddings"
        )


def _millions(count):
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def experts_per_token(config: Config):
    """Mean number of experts that process a token; None where the scores decide it (top-p)."""
    return config.routing.experts_per_token(config.experts)


def expert_parameters(config: Config):
    """`(shared, expert)`: parameters of a layer that all tokens use, such as a router, and those of
    one expert.

    AoE's W_gate_down belongs to the expert: with it, experts of both kinds are equal in size
    (Eq. 5).
    """
    declared = _declared(config)
    in_experts = sum(size for parameter, size in declared if parameter.per_expert)
    total = sum(size for _, size in declared)
    return total - in_experts, in_experts // n_experts(config)


def _declared(config):
    """`[(Parameter, its size)]` of a layer of experts."""
    sizes = config.experts.sizes(config.model.d_model)
    declared = ExpertsLayer(config.experts, config.routing).parameters.values()
    return [(parameter, math.prod(parameter.shape(sizes))) for parameter in declared]


def n_experts(config: Config):
    """Experts of a layer; 1 for a dense layer."""
    return 1 if config.experts.kind == "dense" else config.experts.n_experts


def parameter_counts(config: Config):
    """Counts the parameters of the decoder; under top-p, active parameters are those of `top_k`
    experts.
    """
    m, c = config.model, config.experts
    shared, expert = expert_parameters(config)
    active = experts_per_token(config) or c.top_k
    return ParameterCounts(
        experts=m.n_layers * (shared + n_experts(config) * expert),
        active_experts=m.n_layers * (shared + round(active * expert)),
        attention=m.n_layers * _attention_matrices(m),
        norms=_norms_and_biases(m),
        embedding=m.vocab_size * m.d_model,
        n_tables=1 if m.tie_embeddings else 2,
    )


def _attention_matrices(m):
    return 2 * m.d_model**2 * (m.n_heads + m.kv_heads) // m.n_heads


def _norms_and_biases(m):
    norms = (2 * m.n_layers + 1) * m.d_model * (2 if m.norm == "layer" else 1)
    q_and_k = m.d_model * (m.n_heads + m.kv_heads) // m.n_heads
    v_and_o = m.d_model * (m.kv_heads + m.n_heads) // m.n_heads
    per_layer = m.qk_norm * q_and_k + m.attention_bias * (q_and_k + v_and_o)
    return norms + m.n_layers * per_layer + m.output_bias * m.vocab_size


def layer_flops_per_token(config: Config):
    """`(forward, training)`: useful matmul FLOPs per token of one layer of experts, in one pass.

    The backward pass takes twice the forward pass, but scoring an expert that is not chosen has one
    only where the method sends a gradient there: for every token with `score_gradient="dense"`, for
    the fraction `balance.aux_tokens` where a balance loss asks for it, for none otherwise. AoE
    scoring counts all n experts; under top-p, `top_k` are chosen. With `kind="capacity"` it is
    those of the router; see `Capacity.wasted_flops` for what it computes beside them.
    """
    c = config.experts
    _, expert = expert_parameters(config)
    per_token = experts_per_token(config) or c.top_k
    matrices = [(p, size) for p, size in _declared(config) if len(p.axes.split()) > 1]
    shared = sum(size for parameter, size in matrices if not parameter.per_expert)
    forward, training = config.routing.flops(config) or (2 * shared, 6 * shared)
    of_experts = 2 * round(per_token * expert)
    forward, training = forward + of_experts, training + 3 * of_experts
    if c.kind != "aoe":
        return forward, training
    idle = 2 * round((c.n_experts - per_token) * c.d_low * config.model.d_model)
    with_gradient = config.balance.aux_tokens if config.balance.has_loss else 0.0
    if not c.sparse_scoring(config.routing):
        with_gradient = 1.0
    return forward + idle, training + round((1 + 2 * with_gradient) * idle)


def forward_flops_per_token(config: Config):
    """Useful matmul FLOPs per token of a forward pass.

    Causal attention counts the lower triangle only; norms, softmax and the embedding look-up count
    nothing.
    """
    m = config.model
    return _other_flops(config) + m.n_layers * layer_flops_per_token(config)[0]


def training_flops_per_token(config: Config):
    """Useful matmul FLOPs per token of a training step; see `layer_flops_per_token`."""
    of_layer = layer_flops_per_token(config)[1]
    return config.routing.passes * (3 * _other_flops(config) + config.model.n_layers * of_layer)


def _other_flops(config):
    """Forward FLOPs per token of attention and output projection."""
    m, counts = config.model, parameter_counts(config)
    # Scores and values over half the positions on average.
    return 2 * (counts.attention + counts.embedding + m.n_layers * m.d_model * config.data.seq_len)
