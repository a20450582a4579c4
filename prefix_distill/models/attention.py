"""Grouped-query attention: over whole sequences, and over a cache.

Whole sequences take the kernel of the platform that the program is compiled
for; none of the ways builds [T, T] for a long sequence.
"""

from collections.abc import Callable
import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
import jax.numpy as jnp

from prefix_distill import devices
from prefix_distill import sharding

# Queries whose scores exist at a time, where no kernel does it.
_QUERY_BLOCK = 512
# A TPU's vector lanes: the kernel's blocks and head widths are multiples.
_LANES = 128
_SPLASH_BLOCK = 512
# The widest head of cuDNN's kernel on every GPU that has it, and what divides
# the width.
_CUDNN_HEAD_DIM, _CUDNN_HEAD_UNIT = 128, 8
_CUDNN_BLOCK = 64


def causal(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Lets every position look at itself and at what came before.

  Padding belongs on the right, where no real position looks.

  Args:
    queries: [B, T, N, H]; T best as `aligned` says.
    keys: [B, T, K, H]; query head n reads head n // (N / K).
    values: [B, T, K, H].
    mesh: whose batch axes split B and whose `tensor` splits the heads, if it
      divides them; None on one device.

  Returns:
    [B, T, N, H].
  """
  kernel = _kernel(mesh, queries)
  if mesh is None or mesh.size == 1:
    return kernel(queries, keys, values)
  split = mesh.shape["tensor"]
  heads = "tensor" if keys.shape[2] % split == 0 else None
  spec = jax.sharding.PartitionSpec(sharding.BATCH_AXES, None, heads)
  return jax.shard_map(
      kernel,
      mesh=mesh,
      in_specs=(spec,) * 3,
      out_specs=spec,
      # The kernels do not say how their results vary over the mesh.
      check_vma=False,
  )(queries, keys, values)


def aligned(length: int, mesh: jax.sharding.Mesh | None) -> int:
  """Returns the length that the platform's kernel wants, at least `length`.

  A sequence of another one would be padded and cut in every layer, and on a TPU
  each [B, T, D] moved to be a matrix. CuDNN's kernel takes no odd lengths.
  """
  unit = _LANES if _platform(mesh) == "tpu" else 1
  return _round_up(length, _CUDNN_BLOCK if _has_cudnn(mesh) else unit)


def _platform(mesh: jax.sharding.Mesh | None) -> str:
  # That of the mesh, which may be compiled for from afar.
  if mesh is None:
    return jax.default_backend()
  return mesh.devices.flat[0].platform


def _has_cudnn(mesh: jax.sharding.Mesh | None) -> bool:
  # A program is the same on all its devices.
  if mesh is None:
    return devices.has_cudnn_attention(jax.local_devices()[0])
  return devices.first_without(devices.has_cudnn_attention, mesh) is None


def _kernel(
    mesh: jax.sharding.Mesh | None, queries: jax.Array
) -> Callable[..., jax.Array]:
  """Returns the devices' way to compute `causal` on one of them."""
  if _platform(mesh) == "tpu":
    return splash_kernel
  width = queries.shape[-1]
  fits = width <= _CUDNN_HEAD_DIM and width % _CUDNN_HEAD_UNIT == 0
  if queries.dtype == jnp.bfloat16 and fits and _has_cudnn(mesh):
    return _cudnn
  return blocked


def splash_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False
) -> jax.Array:
  """JAX's own kernel for TPU; `interpret` runs it anywhere, slowly."""
  length, num_heads, head_dim = q.shape[1:]
  padded = _round_up(length)
  block = max(
      size
      for size in range(_LANES, _SPLASH_BLOCK + 1, _LANES)
      if padded % size == 0
  )

  def lay_out(x):
    x = x.transpose(0, 2, 1, 3)
    return jnp.pad(x, (
        (0, 0),
        (0, 0),
        (0, padded - length),
        (0, _round_up(head_dim) - head_dim),
    ))

  mask = splash_mask.MultiHeadMask(
      [splash_mask.CausalMask((padded, padded))] * num_heads
  )
  sizes = dict.fromkeys(
      ("block_q", "block_kv", "block_kv_compute", "block_q_dkv",
       "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
      block,
  )  # fmt: skip
  kernel = splash.make_splash_mha(
      mask,
      block_sizes=splash.BlockSizes(**sizes),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
  )
  q = q * jnp.asarray(head_dim**-0.5, q.dtype)
  out = jax.vmap(kernel)(lay_out(q), lay_out(k), lay_out(v))
  return out[:, :, :length, :head_dim].transpose(0, 2, 1, 3)


def _round_up(size: int, unit: int = _LANES) -> int:
  return math.ceil(size / unit) * unit


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """CuDNN's fused attention."""
  length = q.shape[1]
  # What is added on the right, no position looks at.
  padded = _round_up(length, _CUDNN_BLOCK)
  q, k, v = (
      jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
      for x in (q, k, v)
  )
  out = jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation="cudnn"
  )
  return out[:, :length]


def blocked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Plain XLA, a block of queries at a time; see `causal`."""
  length = q.shape[1]
  keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  columns = jnp.arange(length)

  def rows(q, first):
    look = columns <= first + jnp.arange(q.shape[1])[:, None]
    return cached(q, keys, values, look[None])

  if length <= _QUERY_BLOCK:
    return rows(q, 0)
  count = math.ceil(length / _QUERY_BLOCK)
  q = jnp.pad(q, ((0, 0), (0, count * _QUERY_BLOCK - length), (0, 0), (0, 0)))
  q = q.reshape(q.shape[0], count, _QUERY_BLOCK, *q.shape[2:])
  firsts = jnp.arange(count) * _QUERY_BLOCK
  # Scores are formed again in the backward pass, or all would be kept.
  out = jax.lax.map(
      jax.checkpoint(lambda block: rows(*block)),
      (jnp.moveaxis(q, 1, 0), firsts),
  )
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def cached(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
  """Attends over a cache, with a float32 softmax.

  The cache's layout makes both products plain matrix products over contiguous
  memory: on a CPU it takes a fifth of the time that it does with keys and
  values as they are projected.

  Args:
    queries: [B, T, N, H].
    keys: [B, K, H, M]; query head n reads head n // (N / K).
    values: [B, K, M, H].
    mask: bool [B or 1, T, M], true where a query may look.

  Returns:
    [B, T, N, H], as the queries. A query that may look nowhere (padding) gets
    a mean of the values; nothing reads it.
  """
  batch, length, num_heads, head_dim = queries.shape
  num_kv_heads, dtype = keys.shape[1], queries.dtype
  queries = queries.astype(keys.dtype)
  groups = num_heads // num_kv_heads
  # One matrix product for each key/value head, its G queries stacked.
  queries = queries.reshape(batch, length, num_kv_heads, groups, head_dim)
  queries = queries.transpose(0, 2, 3, 1, 4).reshape(
      batch, num_kv_heads, groups * length, head_dim
  )
  scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, num_kv_heads, groups, length, -1)
  scores = jnp.where(
      mask[:, None, None], scores * head_dim**-0.5, jnp.float32(-1e30)
  )
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  weights = weights.reshape(batch, num_kv_heads, groups * length, -1)
  out = jnp.matmul(weights, values)
  out = out.reshape(batch, num_kv_heads, groups, length, head_dim)
  out = out.transpose(0, 3, 1, 2, 4)
  return out.reshape(batch, length, num_heads, head_dim).astype(dtype)
