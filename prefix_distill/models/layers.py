"""The transformer's layers: embedding, rotary positions, and a block.

The block and its parts are Flax NNX modules.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import TypeVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig

_PartitionSpec = jax.sharding.PartitionSpec
_Kept = TypeVar("_Kept")
# Up to this many rows, reading the weights limits a product; see `linear`.
_FEW_ROWS = 128


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
