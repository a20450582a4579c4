"""Attention of one query per row over a key/value cache, on GPUs.

The kernel reads a row's columns only up to the row's length, so a step's memory
traffic depends on the text and not on the cache's size. It reads an int8 cache
as int8 and widens it in registers.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

# The fewest rows of a tensor core's product; a kv head's queries are padded.
_ROWS = 16
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


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
  """Attends from each row's query to the first `lengths` columns of its cache.

  The columns beyond a row's length may hold anything, even NaN.

  Args:
    queries: [B, N, H].
    keys: [B, K, M, H], floats or int8; query head n reads head n // (N / K).
    values: [B, K, M, H], of the keys' dtype.
    lengths: int32 [B], 1 to M.
    key_scales: float32 [B, K, M], for int8 only: a key is its integers times
      this.
    value_scales: float32 [B, K, M], for int8 only.
    splits: the programs that share a row's columns; None for `num_splits`.
    interpret: runs the kernel slowly on any device.

  Returns:
    [B, N, H], in the queries' dtype; the softmax is float32.
  """
  batch, num_heads, head_dim = queries.shape
  kv_heads, columns = keys.shape[1:3]
  scaled = keys.dtype == jnp.int8
  if scaled != (key_scales is not None) or scaled != (value_scales is not None):
    raise ValueError(
        f"The cache is {keys.dtype}; give scales for int8 and nothing else."
    )
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
  operands = [lengths, queries.reshape(*grouped, head_dim), keys, values]
  specs = [pl.BlockSpec((batch,), lambda b, k, s: (0,))]
  specs += [per_head(rows, width)] + [per_head(padded_columns, width)] * 2
  if scaled:
    operands += [key_scales, value_scales]
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
          _kernel,
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
  return max(_ROWS, pl.next_power_of_2(size))


def _kernel(
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
    interpret: see `attend`.
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
