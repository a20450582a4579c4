"""Grouped-query attention: over whole sequences, and over a cache.

Each platform has its own kernel for whole sequences. No kernel builds [T, T]
for a long sequence.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax.experimental.pallas.ops.tpu import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
import jax.numpy as jnp

from prefix_distill import sharding
from prefix_distill.models import decode_attention
from prefix_distill.models import kv_cache
from prefix_distill.models.kv_cache import LayerCache

# The queries in a block of `blocked`; memory holds the scores of one block.
_QUERY_BLOCK = 512
# A TPU's vector lanes: blocks and head widths of the kernel are multiples.
_LANES = 128
_SPLASH_BLOCK = 512
# CuDNN's kernel takes heads up to this width, in multiples of this unit.
_CUDNN_HEAD_DIM, _CUDNN_HEAD_UNIT = 128, 8
_CUDNN_BLOCK = 64
# The score of a masked position. It is finite, so that a query whose positions
# are all masked gives no NaN.
_MASKED = -1e30
# The columns of a page of a TPU's cache, and the pages in a step of the kernel.
_PAGE = 128
_SMALL_BLOCK = 4
_LARGE_BLOCK = 8


def causal(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Causal attention: a position attends to itself and the ones before.

  Padding belongs on the right, so that no real position attends to it.

  Args:
    queries: [B, T, N, H]; a length T from `aligned` is the fastest.
    keys: [B, T, K, H]; query head n reads head n // (N / K).
    values: [B, T, K, H].
    mesh: the device mesh; None for one device. Its batch axes split B, and its
      `tensor` axis splits the heads if it divides them.

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
      # The kernels do not declare how their results vary over the mesh.
      check_vma=False,
  )(queries, keys, values)


def aligned(length: int, mesh: jax.sharding.Mesh | None) -> int:
  """Returns the platform's best sequence length, at least `length`.

  Every layer would pad and cut a sequence of another length, and a TPU would
  also copy each [B, T, D]. CuDNN's kernel takes no odd lengths.
  """
  unit = _LANES if platform(mesh) == "tpu" else 1
  return _round_up(length, _CUDNN_BLOCK if _has_cudnn(mesh) else unit)


def platform(mesh: jax.sharding.Mesh | None) -> str:
  """Returns the mesh's platform, which may differ from this machine's."""
  if mesh is None:
    return jax.default_backend()
  return mesh.devices.flat[0].platform


def _has_cudnn(mesh: jax.sharding.Mesh | None) -> bool:
  # A program is the same on all its devices.
  if mesh is None:
    return sharding.has_cudnn_attention(jax.local_devices()[0])
  return sharding.first_without(sharding.has_cudnn_attention, mesh) is None


def _kernel(
    mesh: jax.sharding.Mesh | None, queries: jax.Array
) -> Callable[..., jax.Array]:
  """Returns the function that computes `causal` on one device."""
  if platform(mesh) == "tpu":
    return splash_kernel
  fits = _fits_cudnn(queries.dtype, queries.shape[-1])
  return cudnn if fits and _has_cudnn(mesh) else blocked


def _fits_cudnn(dtype: jnp.dtype, head_dim: int) -> bool:
  """Whether cuDNN's kernel takes this dtype and head width."""
  fits = head_dim <= _CUDNN_HEAD_DIM and head_dim % _CUDNN_HEAD_UNIT == 0
  return dtype == jnp.bfloat16 and fits


def splash_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False
) -> jax.Array:
  """JAX's kernel for TPU; `interpret` runs it slowly on any device."""
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
  kernel = splash.make_splash_mha(
      mask,
      block_sizes=splash.BlockSizes(
          block_q=block,
          block_kv=block,
          block_kv_compute=block,
          block_q_dkv=block,
          block_kv_dkv=block,
          block_kv_dkv_compute=block,
          block_q_dq=block,
          block_kv_dq=block,
      ),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
  )
  q = q * jnp.asarray(head_dim**-0.5, q.dtype)
  out = jax.vmap(kernel)(lay_out(q), lay_out(k), lay_out(v))
  return out[:, :, :length, :head_dim].transpose(0, 2, 1, 3)


def _round_up(size: int, unit: int = _LANES) -> int:
  return math.ceil(size / unit) * unit


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """CuDNN's fused attention."""
  length = q.shape[1]
  # No position attends to the padding on the right.
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
  """Plain XLA over one block of queries at a time; see `causal`."""
  length, head_dim = q.shape[1], q.shape[3]
  num_kv_heads = k.shape[2]
  groups = q.shape[2] // num_kv_heads
  keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
  columns = jnp.arange(length)

  def rows(q: jax.Array, first: jax.Array | int) -> jax.Array:
    batch, size = q.shape[:2]
    look = columns <= first + jnp.arange(size)[:, None]
    # One matrix product per key/value head, with its G queries stacked.
    q = q.reshape(batch, size, num_kv_heads, groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)
    scores = jnp.matmul(q, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, num_kv_heads, groups, size, -1)
    scores = jnp.where(look, scores * head_dim**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, num_kv_heads, groups * size, -1)
    out = jnp.matmul(weights, values)
    out = out.reshape(batch, num_kv_heads, groups, size, head_dim)
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, size, -1, head_dim)

  if length <= _QUERY_BLOCK:
    return rows(q, 0)
  count = math.ceil(length / _QUERY_BLOCK)
  q = jnp.pad(q, ((0, 0), (0, count * _QUERY_BLOCK - length), (0, 0), (0, 0)))
  q = q.reshape(q.shape[0], count, _QUERY_BLOCK, *q.shape[2:])
  firsts = jnp.arange(count) * _QUERY_BLOCK
  # The backward pass recomputes the scores; keeping them would take [T, T].
  out = jax.lax.map(
      jax.checkpoint(lambda block: rows(*block)),
      (jnp.moveaxis(q, 1, 0), firsts),
  )
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


@dataclasses.dataclass(frozen=True)
class CacheKernel:
  """How a platform attends over a cache; hashable.

  Attributes:
    name: the name in `_OVER_CACHE`; "plain" for plain XLA.
    layout: the kernel's layout of the cache.
    reads_lengths: whether the kernel reads only the columns up to a row's
      length; otherwise it reads all columns.
    unit: the cache's columns are a multiple of this.
  """

  name: str
  layout: kv_cache.Layout
  reads_lengths: bool = False
  unit: int = 1


# With this layout both products are matrix products over contiguous memory. A
# CPU then needs a fifth of its time with the projections' layout.
CPU = CacheKernel("plain", kv_cache.Layout("bkhm", "bkmh"))
_PLAIN = CacheKernel("plain", kv_cache.Layout("bkmh", "bkmh"))
_CUDNN = CacheKernel(
    "cudnn", kv_cache.Layout("bmkh", "bmkh"), True, _CUDNN_BLOCK
)
_FLASH = CacheKernel("flash", kv_cache.Layout("bkmh", "bkmh"), True)
_PAGED = CacheKernel(
    "paged", kv_cache.Layout("kbmh", "kbmh"), True, _PAGE * _SMALL_BLOCK
)


def cache_kernel(
    mesh: jax.sharding.Mesh | None, dtype: jnp.dtype, head_dim: int
) -> CacheKernel:
  """Returns the platform's kernel for attention over a cache.

  Args:
    mesh: the device mesh; None for the default device.
    dtype: the cache's dtype.
    head_dim: H.
  """
  kind = platform(mesh)
  if kind == "cpu":
    return CPU
  if kind == "tpu" and dtype == jnp.bfloat16 and head_dim == _LANES:
    return _PAGED
  if not _has_cudnn(mesh):
    return _PLAIN
  if _fits_cudnn(dtype, head_dim):
    return _CUDNN
  return _FLASH if dtype == jnp.int8 else _PLAIN


def over_cache(
    kernel: CacheKernel,
    layer: LayerCache,
    projected: tuple[jax.Array, jax.Array, jax.Array],
    lengths: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, LayerCache]:
  """Writes one token's keys and values, and attends from it to the cache.

  Args:
    kernel: see `cache_kernel`.
    layer: a layer of the cache, in the kernel's layout.
    projected: queries [B, N, H], keys and values [B, K, H], one token per row;
      query head n reads key/value head n // (N / K).
    lengths: int32 [B], the tokens of each row before this token.
    mesh: the device mesh; None for one device. Its batch axes split B, and its
      `tensor` axis splits the heads if it divides them.

  Returns:
    [B, N, H], and the layer with the token in it.
  """
  # Only plain XLA works with several layouts.
  attend = _OVER_CACHE.get(
      kernel.name, functools.partial(_plain, kernel.layout)
  )

  def local(layer, queries, keys, values, lengths):
    layer = kv_cache.write(kernel.layout, layer, keys, values, lengths)
    # A finished row may be full.
    columns = layer.keys.shape[kernel.layout.keys.index("m")]
    seen = jnp.minimum(lengths + 1, columns)
    return attend(queries, layer, seen), layer

  if mesh is None or (mesh.size == 1 and kernel.name == "plain"):
    return local(layer, *projected, lengths)
  # Also over one device: the mesh tells a kernel its target device.
  split = mesh.shape["tensor"]
  heads = "tensor" if projected[1].shape[1] % split == 0 else None
  rows = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  row = jax.sharding.PartitionSpec(sharding.BATCH_AXES, heads)
  specs = cache_specs(kernel.layout, layer, heads)
  return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(specs, row, row, row, rows),
      out_specs=(row, specs),
      # The kernels do not declare how their results vary over the mesh.
      check_vma=False,
  )(layer, *projected, lengths)


def cache_specs(
    layout: kv_cache.Layout, layer: LayerCache, heads: str | None
) -> LayerCache:
  """Returns a layer's partition on a mesh: rows over the batch axes.

  Args:
    layout: the cache's layout.
    layer: the layer, which may have scales.
    heads: the mesh axis that splits the heads; None for none.
  """
  places = {"b": sharding.BATCH_AXES, "k": heads}
  return layer.map(
      layout,
      lambda axes, _: jax.sharding.PartitionSpec(*map(places.get, axes)),
  )


def _plain(
    layout: kv_cache.Layout,
    queries: jax.Array,
    layer: LayerCache,
    lengths: jax.Array,
) -> jax.Array:
  """Plain XLA, with a float32 softmax; reads all columns."""
  batch, num_heads, head_dim = queries.shape
  num_kv_heads = layer.keys.shape[layout.keys.index("k")]
  # int8 is widened for the product.
  narrow = layer.keys.dtype == jnp.int8
  dtype = queries.dtype if narrow else layer.keys.dtype
  keys, values = (x.astype(dtype) for x in (layer.keys, layer.values))
  q = queries.astype(dtype).reshape(batch, num_kv_heads, -1, head_dim)
  product = f"bkgh,{layout.keys}->bkgm"
  scores = jnp.einsum(product, q, keys, preferred_element_type=jnp.float32)
  if narrow:
    scores = scores * layer.key_scales[:, :, None]
  look = jnp.arange(scores.shape[-1]) < lengths[:, None]
  scores = jnp.where(look[:, None, None], scores * head_dim**-0.5, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1)
  if narrow:
    weights = weights * layer.value_scales[:, :, None]
  out = jnp.einsum(
      f"bkgm,{layout.values}->bkgh", weights.astype(dtype), values
  )
  return out.reshape(queries.shape).astype(queries.dtype)


def _cudnn_over_cache(
    queries: jax.Array, layer: LayerCache, lengths: jax.Array
) -> jax.Array:
  """CuDNN's fused attention, one kernel."""
  out = jax.nn.dot_product_attention(
      queries[:, None].astype(layer.keys.dtype),
      layer.keys,
      layer.values,
      query_seq_lengths=jnp.ones_like(lengths),
      key_value_seq_lengths=lengths,
      implementation="cudnn",
  )
  return out[:, 0].astype(queries.dtype)


def _paged_over_cache(
    queries: jax.Array, layer: LayerCache, lengths: jax.Array
) -> jax.Array:
  """JAX's kernel for TPU; the cache is a sequence of pages in order."""
  heads, rows, columns, head_dim = layer.keys.shape
  count = columns // _PAGE
  keys, values = (
      x.reshape(heads, rows * count, _PAGE, head_dim)
      for x in (layer.keys, layer.values)
  )
  pages = jnp.arange(rows * count, dtype=jnp.int32).reshape(rows, count)
  large = count % _LARGE_BLOCK == 0
  queries = queries * jnp.asarray(head_dim**-0.5, queries.dtype)
  return paged_attention.paged_attention(
      queries,
      keys,
      values,
      lengths,
      pages,
      pages_per_compute_block=_LARGE_BLOCK if large else _SMALL_BLOCK,
  )


def _flash_over_cache(
    queries: jax.Array, layer: LayerCache, lengths: jax.Array
) -> jax.Array:
  """This package's kernel, which widens int8 in registers."""
  scales = layer.key_scales, layer.value_scales
  return decode_attention.attend(
      queries, layer.keys, layer.values, lengths, *scales
  )


_OVER_CACHE = {
    "flash": _flash_over_cache,
    "cudnn": _cudnn_over_cache,
    "paged": _paged_over_cache,
}
