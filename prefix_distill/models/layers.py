"""The parts of a transformer block, described as Flax NNX modules."""

from flax import nnx
import jax
import jax.numpy as jnp

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig

# Up to here a product is bound by the weights' bytes; see `linear`.
_FEW_ROWS = 128


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
  """Returns the angle per position of each pair of channels: [H / 2]."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  freqs = 1.0 / rope.theta**exponent
  if rope.kind == "linear":
    return freqs / rope.factor
  if rope.kind == "llama3":
    # Wavelengths that the first training length covers many times stay; those
    # it covers hardly once shrink; between the two a linear blend.
    turns = rope.original_length * freqs / (2 * jnp.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * freqs / rope.factor + blend * freqs
  return freqs


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates channel pairs (i, i + H/2) of [B, T, N, H] by angles [B, T, H/2].

  Source: RoFormer (arXiv 2104.09864), in the half-split layout of Llama's
  Hugging Face weights.
  """
  cos = jnp.cos(angles)[:, :, None]
  sin = jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


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


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis (arXiv 1910.07467)."""

  def __init__(self, size: int, eps: float):
    self.scale = nnx.Param(jnp.ones((size,)))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
    return normed * self.scale[...].astype(x.dtype)


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
      self, x: jax.Array, angles: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B, T, N, H] and keys, values [B, T, K, H]."""
    query = linear(x, self.query[...])
    key = linear(x, self.key[...])
    value = linear(x, self.value[...])
    if self.config.qkv_bias:
      query = query + self.query_bias[...]
      key = key + self.key_bias[...]
      value = value + self.value_bias[...]
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    return apply_rope(query, angles), apply_rope(key, angles), value

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
  """One pre-norm layer; the caller owns the keys and values."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.dim, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
    self.mlp = MLP(config, rngs)
