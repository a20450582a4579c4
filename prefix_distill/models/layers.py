"""A transformer block and its parts, described as Flax NNX modules."""

from collections.abc import Callable
from typing import TypeVar

from flax import nnx
import jax
import jax.numpy as jnp

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.embedding import Rotation

_Kept = TypeVar("_Kept")
# Up to here a product is bound by the weights' bytes; see `linear`.
_FEW_ROWS = 128


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)


def linear(
    x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Multiplies [..., D] by a weight [F..., D], stored as torch stores it.

  Weights lie with their inputs contiguous because decoding wants it so: for a
  few rows W x^T is up to twice as fast as x W on a CPU; for many there is no
  difference. The sums are kept, and returned, in `dtype` if it is given.
  """
  features = weight.shape[:-1]
  weight = weight.reshape(-1, weight.shape[-1])
  rows = x.reshape(-1, x.shape[-1])

  def plain(rows, weight):
    return jnp.einsum("td,fd->tf", rows, weight, preferred_element_type=dtype)

  def turned(rows, weight):
    out = jnp.einsum("fd,td->ft", weight, rows, preferred_element_type=dtype)
    # Or XLA would turn the product back.
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


class Attention(nnx.Module):
  """Projections of grouped-query attention, with Qwen's norms or biases."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    query, key = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
    self.query = _normal(rngs, (*query, c.dim), c.dim)
    self.key = _normal(rngs, (*key, c.dim), c.dim)
    self.value = _normal(rngs, (*key, c.dim), c.dim)
    self.out = _normal(rngs, (c.dim, *query), c.num_heads * c.head_dim)
    if c.qkv_bias:
      self.query_bias = nnx.Param(jnp.zeros(query))
      self.key_bias = nnx.Param(jnp.zeros(key))
      self.value_bias = nnx.Param(jnp.zeros(key))
    if c.qk_norm:
      self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
      self.key_norm = RMSNorm(c.head_dim, c.norm_eps)
    self.config = config

  def project(
      self, x: jax.Array, rotation: Rotation | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B, T, N, H] and keys, values [B, T, K, H].

    Args:
      x: [B, T, D].
      rotation: of each position; None for a layer that does not rotate.
    """
    query = linear(x, self.query[...])
    key = linear(x, self.key[...])
    value = linear(x, self.value[...])
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
    """Norms each head's queries and keys."""
    if query.shape[1] > 1:
      return self.query_norm(query), self.key_norm(key)
    # One token a row, where each of a GPU's kernels costs more than its work:
    # the squares of all heads in one kernel, and the rest in those that follow.
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
    weight = self.out[...]
    return linear(
        attended.reshape(batch, length, -1), weight.reshape(len(weight), -1)
    )


class MLP(nnx.Module):
  """SwiGLU (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    self.gate = _normal(rngs, (c.mlp_dim, c.dim), c.dim)
    self.up = _normal(rngs, (c.mlp_dim, c.dim), c.dim)
    self.down = _normal(rngs, (c.dim, c.mlp_dim), c.mlp_dim)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate = jax.nn.silu(linear(x, self.gate[...]))
    return linear(gate * linear(x, self.up[...]), self.down[...])


class Block(nnx.Module):
  """One pre-norm layer; the caller attends, and owns the keys and values."""

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
      rotation: of each position; None for a layer that does not rotate.
      attend: queries [B, T, N, H], keys and values [B, T, K, H] to what the
        heads read, [B, T, N, H], and to anything else.

    Returns:
      Hidden states [B, T, D], and what else `attend` returned.
    """
    projected = self.attention.project(self.attention_norm(x), rotation)
    attended, kept = attend(*projected)
    x = x + self.attention.merge(attended)
    return x + self.mlp(self.mlp_norm(x)), kept
