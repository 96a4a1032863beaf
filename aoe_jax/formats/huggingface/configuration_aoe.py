"""The configuration of an Autonomy-of-Experts model in `transformers`."""

from transformers import MixtralConfig

DEFAULTS = {
    "score_neurons": None,
    "gate_rank": 32,
    "score": "norm",
    "norm_topk_prob": True,
    "selection_bias": False,
    "qk_norm": "none",
    "attention_bias": False,
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
    "first_k_dense_replace": 0,
    "dense_intermediate_size": None,
}
CHOICES = {"score": ("norm", "max"), "qk_norm": ("none", "all", "head")}


class AoEConfig(MixtralConfig):
    """A decoder with the attention of Llama and Autonomy-of-Experts layers (arXiv 2501.13074).

    Fields that Mixtral also has mean the same; `intermediate_size` is the width of an expert. A
    `partial_rotary_factor` is the share of the features of a head that rotate.

    Attributes:
      score_neurons: None: gates are factorised, and their low-rank activations give the score. A
        number: gates are whole, and this many of their first pre-activations give the score.
      gate_rank: the rank of a factorised gate.
      score: "norm": an expert is scored by the L2 norm of its activations; "max": by the largest.
      norm_topk_prob: whether weights are the softmax over the chosen scores, or over all.
      selection_bias: whether a bias is added to the scores for the choice of experts.
      qk_norm: the RMSNorm of queries and keys: "none", "all" (over all heads together, as in OLMoE)
        or "head" (over each head by itself, as in Qwen3).
      attention_bias: whether the projections of attention have biases.
      qkv_bias: whether only the projections of queries, keys and values have biases.
      shared_expert_intermediate_size: the width of an expert that every token uses; 0: none.
      shared_expert_gate: whether the sigmoid of a projection scales this expert's output.
      first_k_dense_replace: how many layers at the front have a dense SwiGLU instead of experts;
        `num_hidden_layers` counts them, too.
      dense_intermediate_size: the width of the dense SwiGLU.
    """

    model_type = "aoe"
    base_model_tp_plan = None
    base_model_ep_plan = None

    def __init__(self, **settings):
        settings = DEFAULTS | settings
        for name, known in CHOICES.items():
            if settings[name] not in known:
                raise ValueError(f"{name}={settings[name]!r}: choose one of {', '.join(known)}")
        super().__init__(**settings)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @property
    def use_qk_norm(self):
        """Whether queries and keys have a norm, for the attention of GLM-4.5."""
        return self.qk_norm != "none"


__all__ = ["AoEConfig"]
