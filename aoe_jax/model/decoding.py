"""Incremental decoding with a cache of keys and values.

Each layer has arrays of its own instead of slices of stacked weights, and no scan is used: a step
of a scan would copy the weights of all experts of a layer, although a token uses only a few.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from aoe_jax.errors import UserError
from aoe_jax.model.declared import declared, state_shardings
from aoe_jax.model.decoder import Decoder, DecoderLayer, dense_layer, make_norm, output_projection
from aoe_jax.model.vocabulary import embed, logits


class Cache(NamedTuple):
    """Keys and values of the positions so far."""

    layers: tuple  # `(keys, values)` of each layer, `[B, G, c, h]`
    length: jax.Array  # [B] int32, the number of filled positions


def check_decodes(decoder: Decoder, by_token=True):
    """Raises `UserError` if a token depends on later tokens, on other sequences or on padding, and
    with `by_token` also if the method does not support incremental decoding.
    """
    causality = decoder.routing.causality(decoder.experts)
    padding_counts = causality.padding_counts
    reason = causality.reason if causality.until_step is None or padding_counts else ""
    if by_token or padding_counts:
        reason = reason or causality.no_decoding
    if reason:
        what = "decode token by token" if by_token else "score a text by itself"
        raise UserError(
            f"config.routing.name={decoder.routing.name!r}: cannot {what}: {reason}; use a model "
            "with another router, such as top_k"
        )


def unstacked(decoder: Decoder, params, mesh):
    """A copy of the parameters for decoding, with `layer_0`, `layer_1`, ... instead of "layers" and
    `dense_layer_0`, ... instead of "dense_layers".

    Parameters that are always cast before use are stored in the dtype of computation.
    """
    dtype = jnp.dtype(decoder.model.dtype)

    def split(params):
        flat = flatten_dict(params, sep="/")
        flat = {path: a.astype(dtype) if declared(path).cast else a for path, a in flat.items()}
        params = unflatten_dict(flat, sep="/")
        for name, n_layers in _stacks(decoder.model):
            layers = params.pop(f"{name}s")
            of_layer = [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(n_layers)]
            params |= {f"{name}_{i}": of_layer[i] for i in range(n_layers)}
        return params

    shardings = state_shardings(mesh, jax.eval_shape(split, params))
    return jax.jit(split, out_shardings=shardings)(params)


def _stacks(model):
    """`(name, number of layers)` of each stack of equal layers, in the order of computation."""
    dense = [("dense_layer", model.n_dense_layers)] if model.n_dense_layers else []
    return [*dense, ("layer", model.n_layers)]


def prefill(decoder: Decoder, params, routing_state, tokens, length, n_positions):
    """Runs the model on the beginnings of sequences and fills a cache.

    Args:
      params: the result of `unstacked`.
      routing_state: `Method.state` of all layers, `[L, ...]` by name, or None without state.
      tokens: `[B, S]` int32; tokens past the length of their sequence have no effect.
      length: `[B]` int32, from 1 to S.
      n_positions: c, the number of positions of the cache, at least S.

    Returns:
      `(logits, cache)`: `[B, V]` float32 after the last token of each sequence, and a `Cache`.
    """

    def resized(a):
        """`[B, G, S, h]` -> `[B, G, c, h]`, padded with zeros or cut at the end."""
        return jnp.pad(
            a[:, :, :n_positions], ((0, 0), (0, 0), (0, max(0, n_positions - a.shape[2])), (0, 0))
        )

    x, layers = _through_layers(decoder, params, routing_state, tokens, None)
    last = jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)
    return output_logits(params, last)[:, 0], Cache(jax.tree.map(resized, layers), length)


def extend(decoder: Decoder, params, routing_state, tokens, cache):
    """Runs the model on the next S tokens of sequences; the `Cache` must have S free positions.

    `tokens [B, S]` int32 -> `(hidden [B, S, d], cache)`: the output of the last norm, for
    `output_logits`, and the cache with the new positions. For other arguments see `prefill`.
    """
    n_tokens = tokens.shape[1]
    x, layers = _through_layers(decoder, params, routing_state, tokens, cache)
    return x[:, :n_tokens], Cache(layers, cache.length + n_tokens)


def output_logits(params, hidden):
    """`hidden [B, S, d]` -> `[B, S, V]` float32."""
    return logits(hidden, output_projection(params))


def _through_layers(d, params, routing_state, tokens, cache):
    """`[B, S, d]` after the last norm, and the cache's `layers` with the new positions."""
    # Padded so that the number of devices along `tensor` divides S.
    devices = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % devices)))
    x, layers = embed(params["embed"]["embedding"], tokens, jnp.dtype(d.model.dtype)), []
    kinds = {"layer": (d.experts, d.routing, d.balance)}
    if d.model.n_dense_layers:
        kinds["dense_layer"] = dense_layer(d.model)
    for name, n_layers in _stacks(d.model):
        layer = DecoderLayer(d.model, *kinds[name], d.transport, training=False)
        for i in range(n_layers):
            state = jax.tree.map(lambda a: a[i], routing_state if name == "layer" else {})
            past = None if cache is None else (cache.layers[len(layers)], cache.length)
            variables = {"params": params[f"{name}_{i}"]}
            x, kept = layer.apply(variables, x, tokens, past, state, i, method="decode")
            layers.append(kept)
    return make_norm(d.model).apply({"params": params["final_norm"]}, x), tuple(layers)
