"""One decoder-only transformer for all of `FAMILIES`.

NNX modules describe a layer: embedding, rotary positions, and a block. `Model`
makes pure functions of them, whose parameters are nested dicts of arrays. The
layers are stacked along a leading axis, so that one `jax.lax.scan` compiles and
runs all of them.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any
from typing import TypeVar

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.models import attention
from prefix_distill.models import kv_cache
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig
from prefix_distill.models.kv_cache import KVCache
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
# Up to this many rows, reading the weights limits a product; see `linear`.
_FEW_ROWS = 128
_PartitionSpec = jax.sharding.PartitionSpec
_Kept = TypeVar("_Kept")


def look_up(
    table: jax.Array,
    tokens: jax.Array,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Looks tokens up in an embedding table.

  On a mesh each device has some columns of the table, and its own tokens to
  look up. A device looks up its columns for the tokens of all devices along
  `fsdp`, and then the devices exchange the results. The gradient takes the same
  way back. `tensor` splits the table's rows, so the results are summed over it.

  This sends activations, which are smaller than the table, and its float32
  gradient is as small as a device's part of the table. The partitioner by
  itself would send rows back and forth, and sum whole gradients.

  Args:
    table: [V, D].
    tokens: int32 [B, T].
    dtype: the dtype of the result and of the messages.
    mesh: the device mesh; None for one device.

  Returns:
    [B, T, D].
  """
  if mesh is None or mesh.size == 1:
    return table.astype(dtype)[tokens]
  rows, width = table.shape
  tensor = "tensor" if rows % mesh.shape["tensor"] == 0 else None
  fsdp = "fsdp" if width % mesh.shape["fsdp"] == 0 else None
  batch = _PartitionSpec(sharding.BATCH_AXES)
  split = _PartitionSpec(tensor, fsdp)

  def find(part, tokens):
    found = _take(part.astype(dtype), _every(tokens, fsdp), tensor)
    if fsdp:
      found = jax.lax.all_to_all(found, fsdp, 0, 2, tiled=True)
    return jax.lax.psum(found, tensor) if tensor else found

  def gradient(found, tokens):
    if fsdp:
      found = jax.lax.all_to_all(found, fsdp, 2, 0, tiled=True)
    part = _add(found, _every(tokens, fsdp), rows, tensor, mesh)
    # Without a split width, fsdp also has partial sums.
    return jax.lax.psum(part, "data" if fsdp else sharding.BATCH_AXES)

  def on_mesh(function, in_specs, out_specs):
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        # JAX does not always see that a sum over an axis is equal along it.
        check_vma=False,
    )

  @jax.custom_vjp
  def run(table, tokens):
    return on_mesh(find, (split, batch), batch)(table, tokens)

  def forward(table, tokens):
    return run(table, tokens), tokens

  def backward(tokens, found):
    grads = on_mesh(gradient, (batch, batch), split)(found, tokens)
    return grads.astype(table.dtype), None

  run.defvjp(forward, backward)
  return run(table, tokens)


def _every(tokens: jax.Array, fsdp: str | None) -> jax.Array:
  """Gathers the tokens of all devices along `fsdp`."""
  if not fsdp:
    return tokens
  return jax.lax.all_gather(tokens, fsdp, axis=0, tiled=True)


def _take(part: jax.Array, tokens: jax.Array, tensor: str | None) -> jax.Array:
  """Looks tokens up in a part of the table; 0 for tokens of other parts."""
  if not tensor:
    return part[tokens]
  here, mine = _here(tokens, part.shape[0])
  return jnp.where(mine[..., None], part[here], jnp.zeros((), part.dtype))


def _add(
    found: jax.Array,
    tokens: jax.Array,
    rows: int,
    tensor: str | None,
    mesh: jax.sharding.Mesh,
) -> jax.Array:
  """Sums gradients into a part of the table, in float32."""
  found, here = found.astype(jnp.float32), tokens
  if tensor:
    rows //= mesh.shape["tensor"]
    here, mine = _here(tokens, rows)
    found = jnp.where(mine[..., None], found, 0.0)
  part = jnp.zeros((rows, found.shape[-1]), jnp.float32)
  return part.at[here].add(found)


def _here(tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens' rows in this device's part, and a mask of them."""
  here = tokens - rows * jax.lax.axis_index("tensor")
  mine = (here >= 0) & (here < rows)
  return jnp.where(mine, here, 0), mine


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Returns the angle by which each pair of channels turns per token.

  A scaling that knows the first training length keeps the short wavelengths,
  which that length covers many times. The scaling shrinks the frequencies of
  the long wavelengths by a factor. Between the two lies a linear blend: in
  llama3 over the turns that a pair makes in that length, in yarn over the
  pair's number.

  Sources: arXiv 2306.15595 (linear), arXiv 2407.21783 (llama3), arXiv
  2309.00071 (yarn); the numbers are those of transformers.

  Args:
    rope: the kind, and its numbers.
    head_dim: H.

  Returns:
    Radians, float32 [H / 2].
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  freqs = np.float32(1) / np.float32(rope.theta) ** exponent
  if rope.kind == "default":
    return freqs
  if rope.kind == "linear":
    kept = 0.0
  elif rope.kind == "llama3":
    turns = rope.original_length * freqs / (2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
  else:
    length, per_pair = rope.original_length, 2 * math.log(rope.theta) / head_dim
    # The numbers of the pairs that turn beta_fast and beta_slow times.
    first, last = (
        math.log(length / (2 * math.pi * beta)) / per_pair
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # A width of zero is a step instead of a blend.
    width = last - first or 1e-3
    pair = np.arange(head_dim // 2, dtype=np.float32)
    kept = 1 - np.clip((pair - first) / width, 0, 1)
  return (1 - kept) * (freqs / rope.factor) + kept * freqs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
  """The rotation of pairs of channels at each position.

  Attributes:
    cos, sin: float32 [B, T, H / 2], of the angles, times
      `RopeConfig.attention_factor`; B is 1 if all rows have the same positions.
  """

  cos: jax.Array
  sin: jax.Array

  @classmethod
  def of(
      cls, rope: RopeConfig, head_dim: int, positions: jax.Array
  ) -> "Rotation":
    """Returns the rotation of positions [B, T]."""
    angles = positions.astype(jnp.float32)[..., None]
    angles = angles * rope_frequencies(rope, head_dim)
    scale = rope.attention_factor
    return cls(jnp.cos(angles) * scale, jnp.sin(angles) * scale)

  def where(self, rotates: jax.Array | None) -> "Rotation":
    """Returns the rotation if the traced flag is true, or the identity.

    Args:
      rotates: bool []; None for true.
    """
    if rotates is None:
      return self
    return Rotation(
        jnp.where(rotates, self.cos, 1.0), jnp.where(rotates, self.sin, 0.0)
    )

  def apply(self, x: jax.Array) -> jax.Array:
    """Rotates the channel pairs (i, i + H / 2) of [B, T, N, H].

    Source: RoFormer (arXiv 2104.09864), in the half-split layout of Llama's
    Hugging Face weights.
    """
    cos, sin = self.cos[:, :, None], self.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)


def linear(
    x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Multiplies [..., D] by a weight [F..., D], stored as torch stores it.

  The weight's input axis is contiguous, which is best for decoding: on a CPU,
  W x^T is up to twice as fast as x W for few rows, and as fast for many. If
  `dtype` is given, the product is accumulated and returned in it.
  """
  features = weight.shape[:-1]
  weight = weight.reshape(-1, weight.shape[-1])
  rows = x.reshape(-1, x.shape[-1])

  def plain(rows, weight):
    return jnp.einsum("td,fd->tf", rows, weight, preferred_element_type=dtype)

  def turned(rows, weight):
    out = jnp.einsum("fd,td->ft", weight, rows, preferred_element_type=dtype)
    # Without the barrier XLA would transpose the product back.
    return jax.lax.optimization_barrier(out).T

  if rows.shape[0] <= _FEW_ROWS:
    out = jax.lax.platform_dependent(rows, weight, cpu=turned, default=plain)
  else:
    out = plain(rows, weight)
  return out.reshape(*x.shape[:-1], *features)


def mean_square(x: jax.Array) -> jax.Array:
  """Returns the float32 mean square of the last axis: [..., 1]."""
  return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)


def rms_norm(
    x: jax.Array, square: jax.Array, scale: jax.Array, eps: float
) -> jax.Array:
  """Divides by the root of the mean square, and multiplies by a scale.

  Source: arXiv 1910.07467.

  Args:
    x: [..., D].
    square: `mean_square(x)`.
    scale: [D], learned.
    eps: added to the mean square.
  """
  normed = (x.astype(jnp.float32) * jax.lax.rsqrt(square + eps)).astype(x.dtype)
  return normed * scale.astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis; see `rms_norm`."""

  def __init__(self, size: int, eps: float):
    self.scale = nnx.Param(jnp.ones((size,)))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    return rms_norm(x, mean_square(x), self.scale[...], self.eps)


class _Products(nnx.Module):
  """Products with weights, each with its low-rank adapter if it has one."""

  def __init__(self, config: ModelConfig):
    self.config = config

  def _add(
      self,
      name: str,
      outputs: tuple[int, ...],
      inputs: tuple[int, ...],
      rngs: nnx.Rngs,
  ) -> None:
    """Adds a weight [outputs, inputs], and adapters that change nothing yet.

    A, [rank, inputs], is drawn as PEFT draws it, and B, [outputs, rank], is
    zero.
    """
    fan_in, lora = math.prod(inputs), self.config.lora
    setattr(self, name, _normal(rngs, (*outputs, *inputs), fan_in))
    if lora is not None and name in lora.targets:
      most = fan_in**-0.5
      drawn = jax.random.uniform(
          rngs.lora(), (lora.rank, *inputs), minval=-most, maxval=most
      )
      setattr(self, f"{name}_a", nnx.Param(drawn))
      setattr(self, f"{name}_b", nnx.Param(jnp.zeros((*outputs, lora.rank))))

  def _product(self, name: str, x: jax.Array, axes: int = 1) -> jax.Array:
    """Multiplies [..., inputs] by a weight with so many axes of inputs."""

    def flat(weight: nnx.Param) -> jax.Array:
      weight = weight[...]
      return weight.reshape(*weight.shape[:-axes], x.shape[-1])

    out, lora = linear(x, flat(getattr(self, name))), self.config.lora
    if lora is None or name not in lora.targets:
      return out
    low = linear(x, flat(getattr(self, f"{name}_a")))
    return out + lora.scale * linear(low, getattr(self, f"{name}_b")[...])


class Attention(_Products):
  """Projections of grouped-query attention, with Qwen's norms or biases."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    super().__init__(config)
    c = config
    query, key = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
    self._add("query", query, (c.dim,), rngs)
    self._add("key", key, (c.dim,), rngs)
    self._add("value", key, (c.dim,), rngs)
    self._add("out", (c.dim,), query, rngs)
    if c.qkv_bias:
      self.query_bias = nnx.Param(jnp.zeros(query))
      self.key_bias = nnx.Param(jnp.zeros(key))
      self.value_bias = nnx.Param(jnp.zeros(key))
    if c.qk_norm:
      self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
      self.key_norm = RMSNorm(c.head_dim, c.norm_eps)

  def project(
      self, x: jax.Array, rotation: Rotation | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B, T, N, H] and keys, values [B, T, K, H].

    Args:
      x: [B, T, D].
      rotation: the rotation at each position; None for a layer without one.
    """
    query = self._product("query", x)
    key = self._product("key", x)
    value = self._product("value", x)
    if self.config.qkv_bias:
      query = query + self.query_bias[...]
      key = key + self.key_bias[...]
      value = value + self.value_bias[...]
    if self.config.qk_norm:
      query, key = self._norms(query, key)
    if rotation is not None:
      query, key = rotation.apply(query), rotation.apply(key)
    return query, key, value

  def _norms(
      self, query: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Normalizes each head's queries and keys."""
    if query.shape[1] > 1:
      return self.query_norm(query), self.key_norm(key)
    # With one token per row, launching a GPU kernel costs more than its work.
    # So one kernel squares all heads, and the next kernels fuse the rest.
    both = jnp.concatenate([query, key], axis=2).astype(jnp.float32)
    square = jnp.sum(jnp.square(both), axis=-1, keepdims=True)
    square = jax.lax.optimization_barrier(square) / both.shape[-1]
    count = query.shape[2]
    scales = self.query_norm.scale[...], self.key_norm.scale[...]
    eps = self.config.norm_eps
    return (
        rms_norm(query, square[:, :, :count], scales[0], eps),
        rms_norm(key, square[:, :, count:], scales[1], eps),
    )

  def merge(self, attended: jax.Array) -> jax.Array:
    """Mixes the heads: [B, T, N, H] to [B, T, D]."""
    batch, length = attended.shape[:2]
    return self._product("out", attended.reshape(batch, length, -1), axes=2)


class MLP(_Products):
  """SwiGLU (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    super().__init__(config)
    c = config
    self._add("gate", (c.mlp_dim,), (c.dim,), rngs)
    self._add("up", (c.mlp_dim,), (c.dim,), rngs)
    self._add("down", (c.dim,), (c.mlp_dim,), rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate = jax.nn.silu(self._product("gate", x))
    return self._product("down", gate * self._product("up", x))


class Block(nnx.Module):
  """One pre-norm layer; the caller attends and keeps the keys and values."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.dim, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
    self.mlp = MLP(config, rngs)

  def __call__(
      self,
      x: jax.Array,
      rotation: Rotation | None,
      attend: Callable[
          [jax.Array, jax.Array, jax.Array], tuple[jax.Array, _Kept]
      ],
  ) -> tuple[jax.Array, _Kept]:
    """Runs the layer.

    Args:
      x: hidden states [B, T, D].
      rotation: the rotation at each position; None for a layer without one.
      attend: maps queries [B, T, N, H], keys and values [B, T, K, H] to the
        heads' outputs [B, T, N, H] and any second result.

    Returns:
      Hidden states [B, T, D], and the second result of `attend`.
    """
    projected = self.attention.project(self.attention_norm(x), rotation)
    attended, kept = attend(*projected)
    x = x + self.attention.merge(attended)
    return x + self.mlp(self.mlp_norm(x)), kept


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
      module = Block(c, rngs)
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
        lengths=_PartitionSpec(sharding.BATCH_AXES),
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
    x = look_up(table, tokens, self.dtype, self.mesh)
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

  def _block(self, params: Params) -> Block:
    """Returns a layer with these parameters in the compute dtype."""
    fill = _module(lambda: Block(self.config, nnx.Rngs(0)))
    return fill(jax.tree.map(lambda p: p.astype(self.dtype), params))

  def _final_norm(self, params: Params, x: jax.Array) -> jax.Array:
    c = self.config
    fill = _module(lambda: RMSNorm(c.dim, c.norm_eps))
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
  return linear(hidden, head.astype(hidden.dtype), jnp.float32)


def _pack(tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """Moves each row's padding to the right, where the causal mask hides it."""
  order = jnp.argsort(~mask, axis=1, stable=True)
  return jnp.take_along_axis(tokens, order, axis=1)


def _module(make: Callable[[], nnx.Module]) -> Callable[[Params], nnx.Module]:
  """Returns a function that makes the module with given parameters."""
  graph, _ = nnx.split(nnx.eval_shape(make))
  return lambda params: nnx.merge(graph, nnx.State(params))
