"""Models as safetensors and `config.json`: those of the Hugging Face hub, and a format for what
they can't express.

`architectures.py` says which architectures are known and what their configurations and tensors are
called; `reading.py` reads a directory, `writing.py` writes one.

**The format `aoe`.** `config.json` has `model_type: "aoe"` and two groups, `model` and `experts`,
whose fields are those of `aoe_jax.config.ModelConfig` and `ExpertsConfig` that decide what the
model computes, and that of its kind or selection where one has settings of its own, see
`aoe_jax.config.methods`. Tensors, L layers numbered from 0, V vocabulary, d model width, H heads of
queries and K of keys and values, of width h, n experts, r low rank, f or w width of an expert (f
where its gate is whole, w where it is Wdown Wup):

    model.embed_tokens.weight                       [V, d]
    lm_head.weight                                  [V, d]       unless the embedding table is shared
    lm_head.bias                                    [V]          with model.output_bias
    model.norm.weight, .bias                        [d]          .bias with model.norm="layer", here and below
    model.layers.N.input_layernorm.weight, .bias    [d]          before attention
    model.layers.N.self_attn.q_proj.weight          [H h, d]
    model.layers.N.self_attn.k_proj.weight, v_proj  [K h, d]
    model.layers.N.self_attn.o_proj.weight          [d, H h]
    model.layers.N.self_attn.q_proj.bias, k_, v_, o_             with model.attention_bias
    model.layers.N.self_attn.q_norm.weight, k_norm  [H h], [K h] with model.qk_norm
    model.layers.N.post_attention_layernorm.weight, .bias  [d]   before the experts
    model.layers.N.mlp.experts.w_down               [n, d, r]    the gate of expert i is SiLU(x w_down[i] w_up[i])
    model.layers.N.mlp.experts.w_up                 [n, r, w]
    model.layers.N.mlp.experts.w_g                  [n, d, f]    of whole gates, SiLU(x w_g[i])
    model.layers.N.mlp.experts.w_p                  [n, d, w]    times x w_p[i]
    model.layers.N.mlp.experts.w_o                  [n, w, d]
    model.layers.N.mlp.experts.w_g_route, w_p_route [n, d, s]    of experts.kind="uoe": s routing neurons; the others
    model.layers.N.mlp.experts.w_o_route            [n, s, d]    are in w_g, w_p [n, d, f - s] and w_o [n, f - s, d]
    model.layers.N.mlp.w_router                     [d, n]       of routers; of large ones [hidden, n]
    model.layers.N.mlp.w_router_hidden              [d, hidden]  of large routers
    model.layers.N.mlp.pooled_scale, pooled_bias    [d]          of experts.kind='smear': the norm of mean tokens
    model.layers.N.mlp.router_scale                 [d]          and the gain of the norm of its router's weights
    model.layers.N.mlp.expert_bias                  [n]          and what is added to their product
    model.layers.N.mlp.selection_bias               [n]          float32, of loss-free balancing
    model.layers.N.mlp.firing_threshold             [n]          of selection top_any
    model.layers.N.mlp.score_bias                   [n]          of selection routing_free

What other selection methods have beside parameters lies there too, by the names of
`layout.ROUTING_STATE`; `config.json` then has a group with the method's settings.

A dense layer has `mlp.experts.w_g`, `w_p`, `w_o` without the axis of experts.
"""
