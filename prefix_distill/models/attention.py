"""Grouped-query attention: over whole sequences, and over a cache.

Each platform has its own kernel for whole sequences, and its own for one query
per row over a cache. No kernel builds [T, T] for a long sequence.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.experimental.pallas.ops.tpu import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
import jax.numpy as jnp

from prefix_distill import sharding
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
# The rest is of `decode_attention`. The fewest rows of a tensor core's product;
# a kv head's queries are padded.
_MIN_ROWS = 16
# The bytes of a block of keys, or of values, in the product; int8 is widened
# before. Three stages keep two pairs of blocks in shared memory, which leaves
# room for two more programs on an H100's multiprocessor.
_BLOCK_BYTES = 16 * 1024
_MIN_BLOCK, _MAX_BLOCK = 32, 128
_NUM_STAGES = 3
_NUM_WARPS = 4
# An H100 has 132 multiprocessors. With 256 programs, each multiprocessor runs
# one while another waits. With fewer programs, rows are split into up to 512.
_ENOUGH_PROGRAMS, _MANY_PROGRAMS = 256, 512
_MIN_SPLIT_COLUMNS = 256
# `_combine` keeps the sums of all splits in registers.
_MAX_SPLITS = 64


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


def decode_attention(
    queries: jax.Array,
    layer: LayerCache,
    lengths: jax.Array,
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
  """This package's kernel for GPUs, which widens int8 in registers.

  It reads a row's columns only up to the row's length, so a step's memory
  traffic depends on the text and not on the cache's size. The columns beyond a
  row's length may hold anything, even NaN.

  Args:
    queries: [B, N, H].
    layer: keys and values [B, K, M, H], floats or int8; query head n reads head
      n // (N / K).
    lengths: int32 [B], 1 to M.
    splits: the programs that share a row's columns; None for `num_splits`.
    interpret: runs the kernel slowly on any device.

  Returns:
    [B, N, H], in the queries' dtype; the softmax is float32.

  Raises:
    ValueError: scales are missing for int8 or given for floats, or the cache
      has a size that the kernel cannot index.
  """
  keys, scaled = layer.keys, layer.keys.dtype == jnp.int8
  if any(
      scaled != (x is not None) for x in (layer.key_scales, layer.value_scales)
  ):
    raise ValueError(
        f"The cache is {keys.dtype}; give scales for int8 and nothing else."
    )
  batch, num_heads, head_dim = queries.shape
  kv_heads, columns = keys.shape[1:3]
  if scaled and 2**31 <= keys.size <= 2**32:
    # Pallas indexes up to 2**32 bytes with 32 bits, which Triton reads as
    # signed: half of them for int8, all of them for wider numbers.
    raise ValueError(
        f"A layer's int8 cache takes {keys.size / 2**30:.1f} GiB on a device,"
        " and the kernel cannot index 2 to 4 GiB; sample fewer rows at a time."
    )
  group = num_heads // kv_heads
  block = _block_columns(head_dim, keys.dtype)
  if splits is None:
    splits = num_splits(batch, kv_heads, columns)
  # Blocks may be larger than the arrays; the kernels mask the excess.
  rows, width = _padded(group), _padded(head_dim)
  padded_columns = pl.cdiv(columns, block) * block

  def per_head(*tail):
    return pl.BlockSpec(
        (None, None, *tail), lambda b, k, s: (b, k) + (0,) * len(tail)
    )

  grouped = (batch, kv_heads, group)
  queries_of_heads = queries.reshape(*grouped, head_dim)
  operands = [lengths, queries_of_heads, keys, layer.values]
  specs = [pl.BlockSpec((batch,), lambda b, k, s: (0,))]
  specs += [per_head(rows, width)] + [per_head(padded_columns, width)] * 2
  if scaled:
    operands += [layer.key_scales, layer.value_scales]
    specs += [per_head(padded_columns)] * 2
  if splits == 1:
    out_shape = jax.ShapeDtypeStruct((*grouped, head_dim), queries.dtype)
    out_specs = per_head(rows, width)
  else:
    # Sums of weighted values, sums of weights, and the highest scores.
    out_shape = [
        jax.ShapeDtypeStruct((*grouped, splits, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((*grouped, splits), jnp.float32),
        jax.ShapeDtypeStruct((*grouped, splits), jnp.float32),
    ]
    stats = pl.BlockSpec(
        (None, None, rows, None), lambda b, k, s: (b, k, 0, s)
    )
    sums = pl.BlockSpec(
        (None, None, rows, None, width), lambda b, k, s: (b, k, 0, s, 0)
    )
    out_specs = [sums, stats, stats]
  out = pl.pallas_call(
      functools.partial(
          _decode_kernel,
          group=group,
          head_dim=head_dim,
          block=block,
          splits=splits,
          scaled=scaled,
      ),
      grid=(batch, kv_heads, splits),
      in_specs=specs,
      out_specs=out_specs,
      out_shape=out_shape,
      compiler_params=plgpu.CompilerParams(
          num_warps=_NUM_WARPS, num_stages=_NUM_STAGES
      ),
      interpret=interpret,
      name="decode_attention",
  )(*operands)
  if splits > 1:
    out = _combine(*out, queries.dtype, interpret)
  return out.reshape(queries.shape)


def num_splits(batch: int, kv_heads: int, columns: int) -> int:
  """Returns how many programs share a row's columns, to fill a GPU.

  Args:
    batch: B on a device.
    kv_heads: K on a device.
    columns: M.
  """
  programs = batch * kv_heads
  if programs >= _ENOUGH_PROGRAMS:
    return 1
  wanted = math.ceil(_MANY_PROGRAMS / programs)
  return max(1, min(wanted, columns // _MIN_SPLIT_COLUMNS, _MAX_SPLITS))


def _block_columns(head_dim: int, dtype: jnp.dtype) -> int:
  width = max(jnp.dtype(dtype).itemsize, 2)
  fit = _BLOCK_BYTES // (_padded(head_dim) * width)
  return min(max(fit, _MIN_BLOCK), _MAX_BLOCK)


def _padded(size: int) -> int:
  # Triton's arrays have powers of two as sizes; products need at least 16.
  return max(_MIN_ROWS, pl.next_power_of_2(size))


def _decode_kernel(
    lengths_ref,
    queries_ref,
    keys_ref,
    values_ref,
    *refs,
    group,
    head_dim,
    block,
    splits,
    scaled,
):
  """Attends from one kv head's queries to one split of a row's columns."""
  scale_refs, out_refs = (refs[:2], refs[2:]) if scaled else ((), refs)
  rows, width = queries_ref.shape
  head_rows = jnp.arange(rows) < group
  head_lanes = (jnp.arange(width) < head_dim)[None]
  head_mask = head_rows[:, None] & head_lanes
  length = lengths_ref[pl.program_id(0)]
  # The splits share the blocks of the row's length, not of the whole cache.
  blocks = pl.cdiv(length, block)
  split = pl.program_id(2)
  first, last = split * blocks // splits, (split + 1) * blocks // splits

  queries = plgpu.load(queries_ref, mask=head_mask, other=0)
  # Integers up to 127 are exact in bfloat16.
  exact = queries.dtype == jnp.float32 or keys_ref.dtype == jnp.float32
  key_dtype = jnp.float32 if exact else queries.dtype
  value_dtype = jnp.float32 if exact else values_ref.dtype
  if value_dtype == jnp.int8:
    value_dtype = jnp.bfloat16
  queries = queries.astype(key_dtype)
  precision = jax.lax.Precision.HIGHEST if exact else None

  def product(x, y, contracted):
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (contracted,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )

  def step(index, carry):
    out, total, highest = carry
    begin = index * block
    here = pl.ds(begin, block)
    live = begin + jnp.arange(block) < length
    mask = live[:, None] & head_lanes if width > head_dim else live[:, None]

    # Masked entries read as 0, since their weight of 0 times NaN would be NaN.
    def load(ref):
      return plgpu.load(ref.at[here, :], mask=mask, other=0)

    def load_scales(ref):
      return plgpu.load(ref.at[here], mask=live, other=0)[None]

    scores = product(queries, load(keys_ref).astype(key_dtype), 1)
    scores *= head_dim**-0.5
    if scaled:
      scores *= load_scales(scale_refs[0])
    scores = jnp.where(live[None], scores, -jnp.inf)
    # Every block of the loop has a live column, so this is finite.
    new_highest = jnp.maximum(highest, scores.max(1))
    weights = jnp.exp(scores - new_highest[:, None])
    shrink = jnp.exp(highest - new_highest)
    total = total * shrink + weights.sum(1)
    if scaled:
      weights *= load_scales(scale_refs[1])
    widened = load(values_ref).astype(value_dtype)
    if scaled:
      # This changes no value, but makes Triton widen the integers first.
      # Otherwise Triton loads them in the product's layout, byte by byte.
      widened = jnp.where(live[:, None], widened, 0)
    out = out * shrink[:, None] + product(
        weights.astype(value_dtype), widened, 0
    )
    return out, total, new_highest

  nothing = (
      jnp.zeros((rows, width), jnp.float32),
      jnp.zeros((rows,), jnp.float32),
      jnp.full((rows,), -jnp.inf, jnp.float32),
  )
  out, total, highest = jax.lax.fori_loop(first, last, step, nothing)
  if splits == 1:
    out /= total[:, None]
  out_ref, *stats = out_refs
  plgpu.store(out_ref, out.astype(out_ref.dtype), mask=head_mask)
  for ref, x in zip(stats, (total, highest), strict=False):
    plgpu.store(ref, x, mask=head_rows)


def _combine(sums, totals, highest, dtype, interpret):
  """Combines the splits of each row: returns [B, K, G, H].

  XLA would take one to three kernels for it, depending on the number of splits.

  Args:
    sums: [B, K, G, S, H], the sums of weighted values.
    totals: [B, K, G, S], the sums of weights.
    highest: [B, K, G, S], the score whose weight is 1; -inf for no columns.
    dtype: the dtype of the result.
    interpret: see `decode_attention`.
  """
  batch, kv_heads, group, splits, head_dim = sums.shape
  width, padded = _padded(head_dim), pl.next_power_of_2(splits)

  def kernel(sums_ref, totals_ref, highest_ref, out_ref):
    live = jnp.arange(padded) < splits
    lanes = jnp.arange(width) < head_dim
    tops = plgpu.load(highest_ref, mask=live, other=-jnp.inf)
    parts = jnp.exp(tops - tops.max(0, keepdims=True))
    total = (plgpu.load(totals_ref, mask=live, other=0) * parts).sum(0)
    here = plgpu.load(sums_ref, mask=live[:, None] & lanes[None], other=0)
    out = (here * parts[:, None]).sum(0) / total
    plgpu.store(out_ref, out.astype(dtype), mask=lanes)

  def per_query(*tail):
    return pl.BlockSpec(
        (None, None, None, *tail), lambda b, k, g: (b, k, g) + (0,) * len(tail)
    )

  return pl.pallas_call(
      kernel,
      grid=(batch, kv_heads, group),
      in_specs=[per_query(padded, width), per_query(padded), per_query(padded)],
      out_specs=per_query(width),
      out_shape=jax.ShapeDtypeStruct(
          (batch, kv_heads, group, head_dim), dtype
      ),
      compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
      interpret=interpret,
      name="decode_attention_combine",
  )(sums, totals, highest)


_OVER_CACHE = {
    "flash": decode_attention,
    "cudnn": _cudnn_over_cache,
    "paged": _paged_over_cache,
}
