"""The kernel for one query a row computes attention, and nothing else."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.models import attention
from prefix_distill.models.kv_cache import LayerCache

_ATTEND = jax.jit(
    functools.partial(attention.decode_attention, interpret=True),
    static_argnames="splits",
)
# Columns of a block, of heads as wide as `_inputs` makes them.
_BLOCK = 64


def _inputs(dtype, lengths, columns, group=2, kv_heads=2, head_dim=128):
  """Returns the kernel's arguments, and the keys and values in float64."""
  rng = np.random.default_rng(columns)
  batch, cache = len(lengths), (len(lengths), kv_heads, columns, head_dim)
  wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
  queries = rng.standard_normal((batch, kv_heads * group, head_dim))
  queries, scales = jnp.asarray(queries, wide), ()
  if dtype == jnp.int8:
    pair = [rng.integers(-127, 128, cache).astype(np.int8) for _ in range(2)]
    scales = [
        rng.uniform(0.002, 0.03, cache[:3]).astype(np.float32) for _ in range(2)
    ]
    exact = [
        x * s[..., None].astype(np.float64)
        for x, s in zip(pair, scales, strict=True)
    ]
  else:
    pair = [jnp.asarray(rng.standard_normal(cache), dtype) for _ in range(2)]
    exact = [np.asarray(x, np.float64) for x in pair]
  lengths = jnp.array(lengths, jnp.int32)
  return (queries, LayerCache(*pair, *scales), lengths), exact


def _by_hand(queries, lengths, keys, values):
  """One query at a time, in float64."""
  queries = np.asarray(queries, np.float64)
  out, group = np.zeros(queries.shape), queries.shape[1] // keys.shape[1]
  for row, head in np.ndindex(queries.shape[:2]):
    seen = row, head // group, slice(int(lengths[row]))
    scores = keys[seen] @ queries[row, head] / np.sqrt(queries.shape[2])
    weights = np.exp(scores - scores.max())
    out[row, head] = weights @ values[seen] / weights.sum()
  return out


def _check(dtype, lengths, columns, splits=1, **sizes):
  args, exact = _inputs(dtype, lengths, columns, **sizes)
  found = _ATTEND(*args, splits=splits)
  assert found.dtype == args[0].dtype and found.shape == args[0].shape
  wanted = _by_hand(args[0], args[2], *exact)
  # Weights and results are rounded to bfloat16, unless all is float32.
  atol = 1e-5 if dtype == jnp.float32 else 2e-2
  np.testing.assert_allclose(
      np.asarray(found, np.float64), wanted, atol=atol, rtol=0
  )


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_lengths_around_the_edges_of_blocks(dtype, splits):
  assert attention._block_columns(128, dtype) == _BLOCK
  columns = 3 * _BLOCK + 7
  edges = [n * _BLOCK + d for n in (1, 2, 3) for d in (-1, 0, 1)]
  _check(dtype, [1, 2, *edges, columns - 1, columns], columns, splits)


@pytest.mark.parametrize(
    "group, dtype, splits",
    [
        (1, jnp.bfloat16, 1),
        (1, jnp.int8, 2),
        (2, jnp.float32, 2),
        (3, jnp.float32, 1),
        (3, jnp.int8, 1),
        (8, jnp.bfloat16, 2),
        (17, jnp.float32, 1),
    ],
)
def test_any_number_of_queries_shares_a_head(group, dtype, splits):
  _check(dtype, [170, 133], 200, splits, group=group, head_dim=64)


@pytest.mark.parametrize(
    "head_dim, dtype, splits",
    [
        (8, jnp.float16, 2),
        (32, jnp.bfloat16, 1),
        (96, jnp.float32, 2),
        (96, jnp.int8, 1),
        (256, jnp.float32, 1),
    ],
)
def test_any_width_of_a_head(head_dim, dtype, splits):
  _check(dtype, [170, 133], 200, splits, head_dim=head_dim)


@pytest.mark.parametrize(
    "columns, splits", [(1, 1), (1, 2), (5, 7), (64, 1), (128, 2), (300, 7)]
)
def test_any_number_of_columns_and_splits(columns, splits):
  _check(jnp.float32, [columns, (columns + 1) // 2, 1], columns, splits)


@pytest.mark.parametrize(
    "dtype, splits",
    [
        (jnp.bfloat16, 1),
        (jnp.bfloat16, 3),
        (jnp.float32, 1),
        (jnp.int8, 1),
        (jnp.int8, 3),
    ],
)
def test_what_lies_beyond_a_row_does_not_matter(dtype, splits):
  lengths, columns = [1, 63, 129, 150], 200
  args, _ = _inputs(dtype, lengths, columns)
  beyond = jnp.arange(columns) >= jnp.array(lengths)[:, None, None]

  def poisoned(x):
    where = beyond[..., None] if x.ndim == 4 else beyond
    return jnp.where(where, -128 if x.dtype == jnp.int8 else jnp.nan, x)

  queries, layer, rows = args
  bad = (queries, jax.tree.map(poisoned, layer), rows)
  clean, found = (_ATTEND(*x, splits=splits) for x in (args, bad))
  np.testing.assert_array_equal(found, clean)


def test_large_scores_do_not_overflow():
  (queries, layer, lengths), exact = _inputs(jnp.float32, [100, 7], 100)
  queries *= 1000
  for splits in (1, 3):
    found = _ATTEND(queries, layer, lengths, splits=splits)
    wanted = _by_hand(queries, lengths, *exact)
    np.testing.assert_allclose(found, wanted, atol=1e-2)


def test_rows_are_split_where_there_are_few_and_they_are_long():
  assert attention.num_splits(64, 8, 2304) == 1
  assert attention.num_splits(8, 8, 16384) == 8
  assert attention.num_splits(8, 8, 600) == 2
  assert attention.num_splits(1, 1, 100) == 1
  assert attention.num_splits(1, 1, 2**20) == 64


@pytest.mark.aot
def test_gpus_run_one_kernel_or_two_and_copy_no_cache():
  """Ahead of time, on a machine without the accelerator."""
  process = toys.start("compile_decode_attention.py", devices=1)
  (printed,) = toys.finish([process], seconds=500)
  found = json.loads(printed.strip().splitlines()[-1])
  assert len(found) == 8
  for name, program in found.items():
    kernels = 1 if name.startswith("whole") else 2
    assert program["instructions"] == ["custom-call"] * kernels, name
    # Those of the splits' sums, not of a cache or its blocks in another type.
    assert program["scratch"] < program["cache"] / 4, name


def test_scales_belong_to_int8():
  (queries, layer, lengths), _ = _inputs(jnp.int8, [3], 8)
  bare = LayerCache(layer.keys, layer.values)
  with pytest.raises(ValueError, match="scales"):
    _ATTEND(queries, bare, lengths)
  (queries, floats, lengths), _ = _inputs(jnp.float32, [3], 8)
  scales = (layer.key_scales, layer.value_scales)
  with pytest.raises(ValueError, match="scales"):
    _ATTEND(queries, LayerCache(floats.keys, floats.values, *scales), lengths)
