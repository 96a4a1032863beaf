"""The decoder one piece of a sequence after another, with a cache of keys and values.

Layers are unrolled, and each has weights of its own, not a slice of stacked ones: a step of a scan
would copy the weights of all experts, where few tokens need few of them.

B sequences, S positions, L layers, G heads of keys and values, M places of a cache, h head width, d
model width, V vocabulary, n experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.parallel import embed
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.model.decoder import Decoder, logits, make_norm, output_projection
from aoe_jax.sharding import state_shardings

# Weights that are cast to the dtype of computation wherever they are used. Router weights and norm
# scales are not.
_CAST = ("q", "k", "v", "o", "w_down", "w_up", "w_g", "w_p", "w_o", "embedding")
_CAST += ("w_g_route", "w_p_route", "w_o_route")


class Cache(NamedTuple):
    """Keys and values of the positions so far."""

    layers: tuple  # of each layer `(keys, values)`, `[B, G, M, h]`
    length: jax.Array  # [B] int32, positions that count


def goes_by_token(decoder: Decoder):
    """Whether a text can go through the model piece by piece, with a cache."""
    return not LAYERS[decoder.experts.kind].not_by_token


def check_decodes(decoder: Decoder, by_token=True):
    """Checks that a token doesn't depend on later ones, nor on those of other sequences, nor on
    padding.

    Args:
      decoder: the model.
      by_token: whether texts are to go through it piece by piece too.

    Raises:
      UserError: it does, or they can't.
    """
    name = decoder.experts.selection
    method = SELECTIONS[name]
    kind = LAYERS[decoder.experts.kind]
    what = "go token by token" if by_token else "score a text by itself"
    if not method.causal and kind.selects:
        raise UserError(
            f"config.experts.selection={name!r}: can't {what}, for {method.not_causal_because}; use a model of a "
            "token-choice selection, such as top_k"
        )
    if kind.padding_counts or (by_token and not goes_by_token(decoder)):
        raise UserError(
            f"config.experts.kind={decoder.experts.kind!r}: can't {what}, for {kind.not_by_token}; use a model "
            "of another kind, such as aoe or router"
        )


def unstacked(decoder: Decoder, params, mesh):
    """A copy of the parameters for decoding: `layer_0`, `layer_1`, ... for "layers", in the dtype
    of computation.
    """
    dtype = jnp.dtype(decoder.model.dtype)

    def cast(path, a):
        return a.astype(dtype) if path[-1].key in _CAST else a

    def split(params):
        params = dict(jax.tree_util.tree_map_with_path(cast, params))
        layers = params.pop("layers")
        return params | {
            f"layer_{i}": jax.tree.map(lambda a: a[i], layers)
            for i in range(decoder.model.n_layers)
        }

    return jax.jit(split, out_shardings=state_shardings(mesh, jax.eval_shape(split, params)))(
        params
    )


def prefill(decoder: Decoder, params, routing_state, tokens, length, places):
    """Reads the beginnings of sequences.

    Args:
      decoder: the model.
      params: `unstacked`.
      routing_state: of the selection method, arrays `[L, ...]` by name; None: nothing.
      tokens: `[B, S]` int32; what is past a sequence's length counts for nothing.
      length: `[B]` int32, from 1 to S.
      places: M of the cache, at least S.

    Returns:
      `(logits, cache)`: `[B, V]` float32 after the last token of each sequence, and a `Cache`.
    """
    x, layers = _embed(decoder, params, tokens), []
    for layer in _layers(decoder, params, routing_state):
        x, cache = layer(x, method="prefill")
        layers.append(tuple(_with_places(a, places) for a in cache))
    last = jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)
    return output_logits(params, _normed(decoder, params, last))[:, 0], Cache(tuple(layers), length)


def extend(decoder: Decoder, params, routing_state, tokens, cache):
    """Reads more of sequences whose beginnings are in a cache.

    Args:
      tokens: `[B, S]` int32; there must be S free places in the cache.
      cache: a `Cache`; others as in `prefill`.

    Returns:
      `(hidden, cache)`: `[B, S, d]` after the last norm, for `output_logits`, and the cache with
        these positions in it.
    """
    n_tokens = tokens.shape[1]
    x, layers = _embed(decoder, params, tokens), []
    for layer, kept in zip(_layers(decoder, params, routing_state), cache.layers, strict=True):
        x, kept = layer(x, kept, cache.length, method="extend")
        layers.append(kept)
    return _normed(decoder, params, x)[:, :n_tokens], Cache(tuple(layers), cache.length + n_tokens)


def output_logits(params, hidden):
    """`hidden [B, S, d]` -> `[B, S, V]` float32."""
    return logits(hidden, *output_projection(params))


def _embed(decoder, params, tokens):
    """`[B, S]` -> `[B, S', d]`: with positions at the end that make S divisible by the devices that
    share it.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % devices)))
    return embed(params["embed"]["embedding"], tokens, jnp.dtype(decoder.model.dtype))


def _layers(decoder, params, routing_state):
    """Of each layer a function: its arguments but the last two, routing state and number, and the
    method.
    """
    layer = decoder.Layer(
        decoder.model,
        decoder.experts,
        decoder.balance,
        decoder.transport,
        decoder.settings,
        training=False,
    )
    for i in range(decoder.model.n_layers):
        state = jax.tree.map(lambda a, i=i: a[i], routing_state)
        yield lambda *args, method, i=i, state=state: layer.apply(
            {"params": params[f"layer_{i}"]}, *args, state, i, method=method
        )


def _with_places(a, places):
    """`[B, G, S, h]` -> `[B, G, M, h]`, filled up or cut at the end."""
    return jnp.pad(a[:, :, :places], ((0, 0), (0, 0), (0, max(0, places - a.shape[2])), (0, 0)))


def _normed(decoder, params, x):
    return make_norm(decoder.model).apply({"params": params["final_norm"]}, x)
