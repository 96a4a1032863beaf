"""Parameters and floating-point operations of a configuration, counted without allocating anything.

L layers, d model width, n experts, V vocabulary, S sequence length.
"""

import math
from dataclasses import dataclass

from aoe_jax.config import Config
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.experts.selection.expert_choice import expert_capacity


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
            f"{_millions(self.total)} parameters (shared table counted once), {_millions(self.active)} active per token "
            f"(table counted as input and as output), {_millions(self.active_non_embedding)} active without embeddings"
        )


def _millions(count):
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def experts_per_token(config: Config):
    """Mean number of experts that process a token, or None where the scores decide it (such as
    top-p).
    """
    return LAYERS[config.experts.kind].experts_per_token(config.experts)


def method_parameters(config: Config):
    """Parameters of one layer that belong to the selection method, such as thresholds; all tokens
    use them.
    """
    parameters = SELECTIONS[config.experts.selection].parameters(
        config.experts, config.method_settings
    )
    return sum(math.prod(shape) for _, shape in parameters.values())


def expert_parameters(config: Config):
    """`(shared, expert)`: parameters of one layer that all tokens use, such as a router, and those
    of one expert alone.

    AoE's Wdown belongs to the expert: it is what makes experts of both kinds equal in size (Eq. 5).
    """
    c = config.experts
    layer = LAYERS[c.kind](c, settings=config.method_settings)
    sizes = {
        name: math.prod(shape) for name, (_, shape) in layer.weights(config.model.d_model).items()
    }
    shared = sum(size for name, size in sizes.items() if name in layer.for_all_tokens)
    return shared, (sum(sizes.values()) - shared) // (1 if c.kind == "dense" else c.n_experts)


def parameter_counts(config: Config):
    """Counts the parameters of the decoder; under top-p, active parameters are those of `top_k`
    experts.
    """
    m, c = config.model, config.experts
    shared, expert = expert_parameters(config)
    n_experts = 1 if c.kind == "dense" else c.n_experts
    active = experts_per_token(config) or c.top_k
    used_by_all = shared + method_parameters(config)
    return ParameterCounts(
        experts=m.n_layers * (used_by_all + n_experts * expert),
        active_experts=m.n_layers * (used_by_all + round(active * expert)),
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
    those of the router; see `capacity_flops_per_token` for what it computes beside them.
    """
    c = config.experts
    shared, expert = expert_parameters(config)
    per_token = experts_per_token(config) or c.top_k
    active = LAYERS[c.kind].flops_beside_experts(config, shared) + 2 * round(per_token * expert)
    if c.kind != "aoe":
        return active, 3 * active
    idle = 2 * round((c.n_experts - per_token) * c.d_low * config.model.d_model)
    with_gradient = config.balance.aux_tokens if config.balance.has_loss else 0.0
    if not c.sparse_scoring:
        with_gradient = 1.0
    return active + idle, 3 * active + round((1 + 2 * with_gradient) * idle)


def capacity_flops_per_token(config: Config):
    """`(forward, training)`: what a layer of `kind="capacity"` computes beyond the useful FLOPs,
    per token.

    Experts compute all their places, taken or not; dispatch and combine are products over all
    tokens, experts and places of a sequence, forward one each, backward one more of dispatch and
    two of combine.
    """
    c, length = config.experts, config.data.seq_len
    places = c.n_experts * expert_capacity(length, c.n_experts, c.capacity_factor * c.top_k)
    _, expert = expert_parameters(config)
    empty, product = 2 * (places / length - c.top_k) * expert, 2 * places * config.model.d_model
    return empty + 2 * product, 3 * empty + 5 * product


def forward_flops_per_token(config: Config):
    """Useful matmul FLOPs per token of a forward pass.

    Causal attention counts the lower triangle only; norms, softmax and the embedding look-up count
    nothing.
    """
    m = config.model
    return _other_flops(config) + m.n_layers * layer_flops_per_token(config)[0]


def training_flops_per_token(config: Config):
    """Useful matmul FLOPs per token of a training step, forward and backward; see
    `layer_flops_per_token`.

    The coupling loss of a router counts too, spread over the tokens of a micro-batch: it is
    computed once for each.
    """
    of_layer = layer_flops_per_token(config)[1]
    if config.balance.coupling_weight:
        of_layer += 3 * coupling_flops_per_token(config)
    return LAYERS[config.experts.kind].passes * (
        3 * _other_flops(config) + config.model.n_layers * of_layer
    )


def coupling_flops_per_token(config: Config):
    """Forward FLOPs of the coupling loss of a layer, `2 n^2 d f` a micro-batch, per token."""
    c, train = config.experts, config.train
    tokens = train.batch_size // train.accumulate * config.data.seq_len
    return 2 * c.n_experts**2 * config.model.d_model * c.d_ffn / tokens


def _other_flops(config):
    """Forward FLOPs per token of attention and output projection."""
    m, counts = config.model, parameter_counts(config)
    # Scores and values over half the positions on average.
    return 2 * (counts.attention + counts.embedding + m.n_layers * m.d_model * config.data.seq_len)
