"""One decoder-only transformer for all of `families`.

NNX modules describe a layer. `Model` makes pure functions of them, whose
parameters are nested dicts of arrays. The layers are stacked along a leading
axis, so that one `jax.lax.scan` compiles and runs all of them.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from prefix_distill import sharding
from prefix_distill.models import attention
from prefix_distill.models import kv_cache
from prefix_distill.models import layers
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.kv_cache import KVCache
from prefix_distill.models.layers import Rotation
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

Params = dict[str, Any]
# The input of a layer, which its backward pass needs.
_LAYER_INPUT = "layer_input"
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Model:
  """Pure functions of one architecture; hashable, so jit takes it as static.

  Attributes:
    config: the architecture.
    compute_dtype: the dtype of activations and the cache; parameters are cast
      when they are used.
    remat: what the backward pass recomputes and does not keep, see `ModelSpec`.
    mesh: the device mesh; None for one device.
  """

  config: ModelConfig
  compute_dtype: str = "float32"
  remat: str = "none"
  mesh: jax.sharding.Mesh | None = None

  @property
  def dtype(self) -> jnp.dtype:
    return jnp.dtype(self.compute_dtype)

  @property
  def base(self) -> "Model":
    """The same model without adapters."""
    config = dataclasses.replace(self.config, lora=None)
    return dataclasses.replace(self, config=config)

  def init(self, key: jax.Array) -> Params:
    """Returns random float32 parameters; those of `base`, and adapters."""
    c = self.config
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def table(table_key: jax.Array) -> Params:
      normal = jax.random.normal(table_key, (c.vocab_size, c.dim))
      return {"weight": normal * c.dim**-0.5}

    def block(block_key: jax.Array) -> Params:
      lora_key = jax.random.fold_in(block_key, 1)
      rngs = nnx.Rngs(params=block_key, lora=lora_key)
      module = layers.Block(c, rngs)
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
      self, params: Params, tokens: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """Runs the layers over whole sequences.

    Args:
      params: as `init` returns them.
      tokens: int32 [B, T].
      mask: bool [B, T], false on padding, which may be anywhere. A token's
        position is the number of real tokens before it.

    Returns:
      The hidden states after the final norm, [B, T, D], from which `logits`
      predicts the *next* token.
    """
    packed, _, _ = self._scan(params, _pack(tokens, mask), keep=False)
    place = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jnp.take_along_axis(packed, place[..., None], axis=1)

  def prefill(
      self,
      params: Params,
      tokens: jax.Array,
      mask: jax.Array,
      columns: int,
      cache_dtype: str = "",
  ) -> tuple[jax.Array, KVCache]:
    """Runs the layers over prompts and keeps their keys and values.

    Args:
      params: as `init` returns them.
      tokens: int32 [B, S], padded on the left.
      mask: bool [B, S].
      columns: the cache's columns, at least S.
      cache_dtype: the cache's dtype, "float32", "bfloat16" or "int8"; empty for
        the compute dtype.

    Returns:
      The hidden states [B, D] that predict each prompt's next token, and the
      cache.
    """
    packed, keys, values = self._scan(params, _pack(tokens, mask), keep=True)
    lengths = mask.sum(axis=1)
    last = jnp.maximum(lengths - 1, 0)
    hidden = jnp.take_along_axis(packed, last[:, None, None], axis=1)[:, 0]
    dtype = jnp.dtype(cache_dtype or self.dtype)
    layout = self.cache_kernel(dtype).layout
    return hidden, kv_cache.from_prefill(
        keys, values, lengths, columns, dtype, layout
    )

  def cache_kernel(self, dtype: jnp.dtype) -> attention.CacheKernel:
    """Returns the kernel that attends over a cache of this dtype."""
    return attention.cache_kernel(self.mesh, dtype, self.config.head_dim)

  def cache_shardings(self, cache: KVCache) -> KVCache:
    """Returns a cache's shardings: rows over the batch, heads over `tensor`.

    Args:
      cache: its arrays, or their shapes.
    """
    split = self.config.num_kv_heads % self.mesh.shape["tensor"] == 0
    heads = "tensor" if split else None
    specs = dataclasses.replace(
        cache,
        layers=tuple(
            attention.cache_specs(cache.layout, layer, heads)
            for layer in cache.layers
        ),
        lengths=jax.sharding.PartitionSpec(sharding.BATCH_AXES),
    )
    return jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(self.mesh, spec), specs
    )

  def _scan(
      self, params: Params, tokens: jax.Array, keep: bool
  ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Runs the stacked layers over rows whose padding is on the right.

    Returns:
      Hidden states [B, T, D]; with `keep`, keys and values [L, B, T, K, H].
    """
    c, length = self.config, tokens.shape[1]
    more = attention.aligned(length, self.mesh) - length
    tokens = jnp.pad(tokens, ((0, 0), (0, more)))
    rotation = Rotation.of(
        c.rope, c.head_dim, jnp.arange(length + more)[None]
    )

    def attend(queries, keys, values):
      attended = attention.causal(queries, keys, values, self.mesh)
      return attended, (keys, values) if keep else (None, None)

    def body(x, inputs):
      layer, rotates = inputs
      if self.remat == "offload":
        x = ad_checkpoint.checkpoint_name(x, _LAYER_INPUT)
      layer = jax.tree.map(lambda p: p.astype(self.dtype), layer)
      block = self._block(sharding.gather_layer(layer, self.mesh))
      return block(x, rotation.where(rotates), attend)

    if self.remat != "none":
      body = jax.checkpoint(body, policy=_POLICIES[self.remat])
    table = params["embed"]["weight"]
    x = layers.look_up(table, tokens, self.dtype, self.mesh)
    # None takes no part in the scan.
    rotates = jnp.array(c.rotary) if c.rotary else None
    x, kept = jax.lax.scan(body, x, (params["layers"], rotates))
    keys, values = jax.tree.map(lambda kv: kv[:, :, :length], kept)
    return self._final_norm(params, x[:, :length]), keys, values

  def cast(self, params: Params) -> Params:
    """Returns weights in the compute dtype."""
    return jax.tree.map(lambda x: x.astype(self.dtype), params)

  def decode_layout(self, params: Params) -> Params:
    """Returns the weights for decoding, in the compute dtype.

    The layers are a tuple instead of a stack. In a loop over tokens, XLA would
    slice a stack and copy its layers for every token.
    """
    c = self.config
    params = self.cast(params)
    apart = tuple(
        jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(c.num_layers)
    )
    return params | {"layers": apart}

  def decode(
      self,
      params: Params,
      tokens: jax.Array,
      live: jax.Array,
      cache: KVCache,
  ) -> tuple[jax.Array, KVCache]:
    """Runs the layers over the token that follows those in the cache.

    Args:
      params: as `decode_layout` returns them.
      tokens: int32 [B].
      live: bool [B], false for finished rows; the cache does not keep their
        token, and their hidden states are meaningless.
      cache: the keys and values of the tokens before.

    Returns:
      The hidden states [B, D] after the final norm, and the cache with the
      token in it.
    """
    c, kernel = self.config, self.cache_kernel(cache.layers[0].keys.dtype)
    rotation = Rotation.of(c.rope, c.head_dim, cache.lengths[:, None])
    x = params["embed"]["weight"].astype(self.dtype)[tokens][:, None]
    rotary, kept = c.rotary or (True,) * c.num_layers, []
    for layer, rotates, cached in zip(
        params["layers"], rotary, cache.layers, strict=True
    ):

      def attend(*projected, cached=cached):
        one = tuple(y[:, 0] for y in projected)
        attended, cached = attention.over_cache(
            kernel, cached, one, cache.lengths, self.mesh
        )
        return attended[:, None], cached

      block = self._block(layer)
      x, cached = block(x, rotation if rotates else None, attend)
      kept.append(cached)
    cache = KVCache(tuple(kept), cache.lengths + live, cache.layout)
    return self._final_norm(params, x[:, 0]), cache

  def _block(self, params: Params) -> layers.Block:
    """Returns a layer with these parameters in the compute dtype."""
    fill = _module(lambda: layers.Block(self.config, nnx.Rngs(0)))
    return fill(jax.tree.map(lambda p: p.astype(self.dtype), params))

  def _final_norm(self, params: Params, x: jax.Array) -> jax.Array:
    c = self.config
    fill = _module(lambda: layers.RMSNorm(c.dim, c.norm_eps))
    return fill(params["final_norm"])(x)

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

    The state at the last prompt position predicts the first prefix token. The
    last prefix token predicts nothing, so the model never reads it.
    """
    tokens = jnp.concatenate([batch.tokens, rollout.tokens[:, :-1]], axis=1)
    mask = jnp.concatenate([batch.mask, rollout.mask[:, :-1]], axis=1)
    hidden = self.apply(params, tokens, mask)
    return hidden[:, batch.tokens.shape[1] - 1 :]


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Multiplies hidden states [..., D] by a head [V, D] into float32 logits."""
  return layers.linear(hidden, head.astype(hidden.dtype), jnp.float32)


def _pack(tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """Moves each row's padding to the right, where the causal mask hides it."""
  order = jnp.argsort(~mask, axis=1, stable=True)
  return jnp.take_along_axis(tokens, order, axis=1)


def _module(make: Callable[[], nnx.Module]) -> Callable[[Params], nnx.Module]:
  """Returns a function that makes the module with given parameters."""
  graph, _ = nnx.split(nnx.eval_shape(make))
  return lambda params: nnx.merge(graph, nnx.State(params))
