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

    Fields of Mixtral keep their meaning; `intermediate_size` is the width of an expert. Rotary
    embeddings apply to the fraction `partial_rotary_factor` of the features of a head.

    Attributes:
      score_neurons: None: gate projections are factorised, and scores are computed from the outputs
        of the first factor. A number s: scores are computed from the first s outputs of the gate.
      gate_rank: the rank of a factorised gate projection.
      score: "norm": the score is the L2 norm of the outputs above; "max": their largest value.
      norm_topk_prob: True: weights are the softmax over the chosen scores; False: over all scores.
      selection_bias: whether a bias is added to the scores when experts are chosen.
      qk_norm: the RMSNorm of queries and keys: "none", "all" (over all heads together, as in OLMoE)
        or "head" (over each head by itself, as in Qwen3).
      attention_bias: whether the projections of attention have biases.
      qkv_bias: whether queries, keys and values have biases, and the output projection has none.
      shared_expert_intermediate_size: the width of an expert that every token uses; 0: none.
      shared_expert_gate: whether the output of that expert is multiplied by a learnt sigmoid gate.
      first_k_dense_replace: the number of first layers with a dense SwiGLU instead of experts;
        `num_hidden_layers` includes these layers.
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
        """Whether queries and keys have a norm; the attention of GLM-4.5 reads this field."""
        return self.qk_norm != "none"


__all__ = ["AoEConfig"]
