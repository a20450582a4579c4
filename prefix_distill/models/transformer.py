"""One decoder-only transformer for the Qwen3, Qwen2 and Llama families.

NNX modules describe a layer; `build` turns the description into pure functions
over nested dicts of arrays, with the layers stacked along a leading axis so
that one `jax.lax.scan` runs (and compiles) them all.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from prefix_distill.models import layers
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.kv_cache import KVCache
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
  """Pure functions of one architecture; hashable, so jit takes it as static.

  Attributes:
    config: the architecture.
    compute_dtype: what activations and the cache are kept in; parameters are
      cast as they are used.
    remat: whether the backward pass recomputes each layer instead of keeping
      its activations.
  """

  config: ModelConfig
  compute_dtype: str = "float32"
  remat: bool = False

  @property
  def dtype(self) -> jnp.dtype:
    return jnp.dtype(self.compute_dtype)

  def init(self, key: jax.Array) -> Params:
    """Returns random float32 parameters."""
    c = self.config
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def table(table_key: jax.Array) -> Params:
      normal = jax.random.normal(table_key, (c.vocab_size, c.dim))
      return {"weight": normal * c.dim**-0.5}

    def block(block_key: jax.Array) -> Params:
      module = layers.Block(c, nnx.Rngs(params=block_key))
      return nnx.to_pure_dict(nnx.state(module))

    params = {
        "embed": table(embed_key),
        "layers": jax.vmap(block)(jax.random.split(layer_key, c.num_layers)),
        "final_norm": {"scale": jnp.ones((c.dim,))},
    }
    if not c.tied:
      params["head"] = table(head_key)
    return params

  def abstract_params(self) -> Params:
    """Returns the shapes and dtypes of `init`, without computing anything."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def apply(
      self,
      params: Params,
      tokens: jax.Array,
      mask: jax.Array,
      cache: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs the layers over tokens, after those in the cache if there is one.

    Args:
      params: as `init` returns them.
      tokens: int32 [B, T].
      mask: bool [B, T], false on padding, on whichever side it is. A token's
        position is the number of real tokens before it.
      cache: what came before, with at least T free columns.

    Returns:
      The hidden states after the final norm, [B, T, D], from which `logits`
      predicts the *next* token; and the cache with the T new columns.
    """
    c = self.config
    length = tokens.shape[1]
    if cache is None:
      start, key_mask = 0, mask
    else:
      start = cache.length
      key_mask = jax.lax.dynamic_update_slice(cache.mask, mask, (0, start))
    before = jnp.cumsum(key_mask, axis=1)
    positions = jax.lax.dynamic_slice_in_dim(before, start, length, axis=1) - 1
    freqs = layers.rope_frequencies(c.rope, c.head_dim)
    angles = positions[:, :, None].astype(jnp.float32) * freqs
    columns = jnp.arange(key_mask.shape[1])
    causal = columns <= start + jnp.arange(length)[:, None]
    look = causal & key_mask[:, None]

    x = params["embed"]["weight"].astype(self.dtype)[tokens]
    body = functools.partial(self._layer, angles=angles, look=look, start=start)
    if self.remat:
      body = jax.checkpoint(body)
    carry = (x, None, None) if cache is None else (x, cache.keys, cache.values)
    xs = (params["layers"], jnp.arange(c.num_layers))
    (x, keys, values), _ = jax.lax.scan(body, carry, xs)
    norm = _module(lambda: layers.RMSNorm(c.dim, c.norm_eps))
    hidden = norm(params["final_norm"])(x)
    if cache is None:
      return hidden, None
    return hidden, KVCache(keys, values, key_mask, start + length)

  def _layer(self, carry, scanned, *, angles, look, start):
    """One layer, as the body of a scan; reads and writes its cache slice."""
    x, all_keys, all_values = carry
    params, layer = scanned
    block = _module(lambda: layers.Block(self.config, nnx.Rngs(0)))(
        jax.tree.map(lambda p: p.astype(self.dtype), params)
    )
    queries, keys, values = block.attention.project(
        block.attention_norm(x), angles
    )
    if all_keys is not None:
      # The caches stay in the carry: XLA then updates them in place.
      place = (layer, 0, start, 0, 0)
      all_keys = jax.lax.dynamic_update_slice(all_keys, keys[None], place)
      all_values = jax.lax.dynamic_update_slice(
          all_values, values[None], place
      )
      keys, values = all_keys[layer], all_values[layer]
    x = x + block.attention.merge(layers.attend(queries, keys, values, look))
    x = x + block.mlp(block.mlp_norm(x))
    return (x, all_keys, all_values), None

  def head(self, params: Params) -> jax.Array:
    """Returns the output matrix [V, D]; the embedding table if tied."""
    return params["embed" if self.config.tied else "head"]["weight"]

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """Returns float32 next-token logits [..., V] of hidden states [..., D]."""
    return head_logits(hidden, self.head(params))

  def prefix_hidden(
      self, params: Params, batch: PromptBatch, rollout: Rollout
  ) -> jax.Array:
    """Returns the hidden states that predict each rollout token: [B, P, D].

    The state at the last prompt position predicts the first prefix token, and
    nothing is predicted from the last one, so that is never fed.
    """
    tokens = jnp.concatenate([batch.tokens, rollout.tokens[:, :-1]], axis=1)
    mask = jnp.concatenate([batch.mask, rollout.mask[:, :-1]], axis=1)
    hidden, _ = self.apply(params, tokens, mask)
    return hidden[:, batch.tokens.shape[1] - 1 :]


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Multiplies hidden states [..., D] by a head [V, D] into float32 logits."""
  return jnp.einsum(
      "...d,vd->...v", hidden, head.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
  )  # fmt: skip


def _module(make: Callable[[], nnx.Module]) -> Callable[[Params], nnx.Module]:
  """Returns a function that fills the described module with parameters."""
  graph, _ = nnx.split(nnx.eval_shape(make))
  return lambda params: nnx.merge(graph, nnx.State(params))
