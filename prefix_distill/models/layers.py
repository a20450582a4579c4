"""The parts of a transformer block, described as Flax NNX modules."""

from flax import nnx
import jax
import jax.numpy as jnp

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig


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


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
  """Grouped-query attention with a float32 softmax.

  Args:
    queries: [B, T, N, H].
    keys: [B, M, K, H]; query head n reads head n // (N / K).
    values: [B, M, K, H].
    mask: bool [B, T, M], true where a query may look.

  Returns:
    [B, T, N, H]. A query that may look nowhere (padding) gets a mean of the
    values; nothing reads it.
  """
  batch, length, num_heads, head_dim = queries.shape
  num_kv_heads = keys.shape[2]
  groups = num_heads // num_kv_heads
  # One matrix product for each key/value head, its G queries stacked: with
  # contiguous operands it takes half the time of the einsum on a CPU.
  queries = queries.reshape(batch, length, num_kv_heads, groups, head_dim)
  queries = queries.transpose(0, 2, 3, 1, 4).reshape(
      batch, num_kv_heads, groups * length, head_dim
  )
  scores = jnp.matmul(
      queries, keys.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32
  )
  scores = scores.reshape(batch, num_kv_heads, groups, length, -1)
  scores = jnp.where(
      mask[:, None, None], scores * head_dim**-0.5, jnp.float32(-1e30)
  )
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  weights = weights.reshape(batch, num_kv_heads, groups * length, -1)
  out = jnp.matmul(weights, values.transpose(0, 2, 1, 3))
  out = out.reshape(batch, num_kv_heads, groups, length, head_dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(
      batch, length, num_heads, head_dim
  )


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
    self.query = _normal(rngs, (c.dim, *query), c.dim)
    self.key = _normal(rngs, (c.dim, *key), c.dim)
    self.value = _normal(rngs, (c.dim, *key), c.dim)
    self.out = _normal(rngs, (*query, c.dim), c.num_heads * c.head_dim)
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
    query = jnp.einsum("btd,dnh->btnh", x, self.query[...])
    key = jnp.einsum("btd,dkh->btkh", x, self.key[...])
    value = jnp.einsum("btd,dkh->btkh", x, self.value[...])
    if self.config.qkv_bias:
      query = query + self.query_bias[...]
      key = key + self.key_bias[...]
      value = value + self.value_bias[...]
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    return apply_rope(query, angles), apply_rope(key, angles), value

  def merge(self, attended: jax.Array) -> jax.Array:
    """Mixes the heads: [B, T, N, H] to [B, T, D]."""
    return jnp.einsum("btnh,nhd->btd", attended, self.out[...])


class MLP(nnx.Module):
  """SwiGLU (arXiv 2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    self.gate = _normal(rngs, (c.dim, c.mlp_dim), c.dim)
    self.up = _normal(rngs, (c.dim, c.mlp_dim), c.dim)
    self.down = _normal(rngs, (c.mlp_dim, c.dim), c.mlp_dim)

  def __call__(self, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[
        ...
    ]


class Block(nnx.Module):
  """One pre-norm layer; the caller owns the keys and values."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.dim, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
    self.mlp = MLP(config, rngs)
