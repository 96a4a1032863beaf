"""Autonomy-of-Experts (AoE, arXiv 2501.13074) language models in PyTorch, for `transformers`.

There is no router: the score of an expert is computed from its own activations, and the K experts
with the largest scores process a token. Arguments and results are those of Mixtral. With
`output_router_logits=True` the results also contain the scores, named `router_logits`, and the
auxiliary loss. Attention and dense layers are those of GLM-4.5.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeMLP,
    Glm4MoeRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
)

from .configuration_aoe import AoEConfig

SCORES = {"norm": partial(torch.linalg.vector_norm, dim=-1), "max": partial(torch.amax, dim=-1)}


def grouped_mm(rows, weights, sizes):
    """Multiplies each group of rows by its own matrix; returns `[R, b]`. `rows [R, a]` are sorted
    by group, `weights` are `[n, a, b]`, and `sizes [n]` has the number of rows of each group.
    """
    groups = zip(rows.split(sizes.tolist()), weights.unbind(), strict=True)
    return torch.cat([group @ w for group, w in groups])


class AoEExperts(nn.Module):
    """The experts of a layer. All compute a score for a token; the top K experts process it."""

    def __init__(self, config: AoEConfig):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.score, self.score_neurons = config.score, config.score_neurons
        d, f, r = config.hidden_size, config.intermediate_size, config.gate_rank
        shapes = {"w_gate_down": (d, r), "w_gate_up": (r, f)}
        if self.score_neurons is not None:
            shapes = {"w_gate": (d, f)}
        for name, shape in (shapes | {"w_up": (d, f), "w_down": (f, d)}).items():
            weights = nn.Parameter(torch.empty(config.num_local_experts, *shape))
            self.register_parameter(name, weights)

    def forward(self, x, bias=None):
        """`x [T, d]`, `bias [n]` or None -> `(y [T, d], scores [T, n] float32)`."""
        code, scores = self.code_and_scores(x)
        ranked = scores.detach() if bias is None else scores.detach() + bias
        expert = ranked.topk(self.top_k).indices
        if self.norm_topk_prob:
            weight = scores.gather(1, expert).softmax(dim=1)
        else:
            weight = scores.softmax(dim=1).gather(1, expert)

        slot_expert, order = expert.flatten().sort(stable=True)
        token = order // self.top_k
        sizes = torch.bincount(slot_expert, minlength=scores.shape[1])
        rows = x.index_select(0, token)
        if self.score_neurons is None:  # x W_gate_down is already computed
            row_code = code.flatten(0, 1).index_select(0, token * scores.shape[1] + slot_expert)
            gate = grouped_mm(row_code, self.w_gate_up, sizes)
        else:
            gate = grouped_mm(rows, self.w_gate, sizes)
        up = grouped_mm(rows, self.w_up, sizes)
        hidden = F.silu(gate) * up * weight.flatten()[order, None].to(x.dtype)
        y = grouped_mm(hidden, self.w_down, sizes)
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype)), scores

    def code_and_scores(self, x):
        """Returns the scoring activations `[T, n, r]` and the scores `[T, n]` float32."""
        count = self.score_neurons
        w = self.w_gate_down if count is None else self.w_gate[..., :count]
        # Float32, because in a narrow dtype the maxima of two experts would often be equal.
        dtype = torch.float32 if self.score == "max" else x.dtype
        code = torch.einsum("td,ndr->tnr", x.to(dtype), w.to(dtype))
        return code.to(x.dtype), SCORES[self.score](code.float())


class AoEBlock(nn.Module):
    """The layer of experts, with an optional selection bias and an optional shared expert."""

    def __init__(self, config: AoEConfig):
        super().__init__()
        self.experts = AoEExperts(config)
        bias = torch.zeros(config.num_local_experts) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)
        d, u = config.hidden_size, config.shared_expert_intermediate_size
        self.has_shared, self.has_scale = u > 0, config.shared_expert_gate
        if self.has_shared:
            self.w_shared_gate = nn.Parameter(torch.empty(d, u))
            self.w_shared_up = nn.Parameter(torch.empty(d, u))
            self.w_shared_down = nn.Parameter(torch.empty(u, d))
        if self.has_shared and self.has_scale:
            self.w_shared_scale = nn.Parameter(torch.empty(d, 1))

    def forward(self, x):
        """`[..., d]` -> `[..., d]`."""
        y = self.experts(x.flatten(0, -2), self.selection_bias)[0].view_as(x)
        if not self.has_shared:
            return y
        shared = (F.silu(x @ self.w_shared_gate) * (x @ self.w_shared_up)) @ self.w_shared_down
        if self.has_scale:
            shared = torch.sigmoid(x.float() @ self.w_shared_scale.float()) * shared
        return y + shared.to(x.dtype)


class NormOverHeads(MixtralRMSNorm):
    """An RMSNorm over all heads together."""

    def forward(self, x):
        """`[B, S, H, h]` -> `[B, S, H, h]`."""
        return super().forward(x.flatten(-2)).view_as(x)


def make_attention(config: AoEConfig, layer_idx: int):
    """Makes the attention of a layer; rotary embeddings may apply to a part of each head."""
    attention = Glm4MoeAttention(config, layer_idx)
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    if config.qk_norm == "all":
        attention.q_norm = NormOverHeads(q.out_features, config.rms_norm_eps)
        attention.k_norm = NormOverHeads(k.out_features, config.rms_norm_eps)
    biased = [q, k, v] if config.qkv_bias else []
    if config.attention_bias:  # GLM's q, k and v already have biases
        biased.append(o)
    for projection in biased:
        projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    return attention


def make_norm(config: AoEConfig):
    """Makes the norm before attention, before experts or before the output projection."""
    return MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class AoEDecoderLayer(MixtralDecoderLayer):
    """Attention, then experts or a dense SwiGLU, each with a pre-norm and a residual connection."""

    def __init__(self, config: AoEConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # Mixtral's __init__ would make Mixtral's experts
        self.self_attn = make_attention(config, layer_idx)
        is_dense = layer_idx < config.first_k_dense_replace
        dense_size = config.dense_intermediate_size
        self.mlp = Glm4MoeMLP(config, dense_size) if is_dense else AoEBlock(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)


class AoEPreTrainedModel(MixtralPreTrainedModel):
    """Class attributes that `transformers` reads, and the initialisation of weights."""

    config_class = AoEConfig
    config: AoEConfig
    _no_split_modules = ["AoEDecoderLayer"]
    _can_compile_fullgraph = False  # shapes depend on the tokens per expert
    _keep_in_fp32_modules_strict = {"selection_bias"}
    _can_record_outputs = {
        "router_logits": AoEExperts,
        "hidden_states": AoEDecoderLayer,
        "attentions": Glm4MoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AoEExperts):
            for w in module.parameters():
                init.normal_(w, std=w.shape[1] ** -0.5)
        if isinstance(module, AoEBlock):
            for w in module.parameters(recurse=False):
                init.normal_(w, std=w.shape[0] ** -0.5)
            if module.selection_bias is not None:
                init.zeros_(module.selection_bias)


class AoEModel(AoEPreTrainedModel, MixtralModel):
    """The decoder without the output projection."""

    def __init__(self, config: AoEConfig):
        MixtralPreTrainedModel.__init__(self, config)  # MixtralModel's would make Mixtral's layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [AoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = make_norm(config)
        self.rotary_emb = Glm4MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class AoEForCausalLM(AoEPreTrainedModel, MixtralForCausalLM):
    """The decoder with the output projection."""

    def __init__(self, config: AoEConfig):
        MixtralPreTrainedModel.__init__(self, config)
        self.model = AoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vocab_size = config.vocab_size
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


__all__ = ["AoEForCausalLM", "AoEModel", "AoEPreTrainedModel"]
