import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.train import microbatch


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (0, 1),  # No limit.
        (32 * 10, 1),
        (32 * 10 - 1, 2),
        (8 * 10, 4),
        (8 * 10 - 1, 8),
        (1, 8),  # A row for each shard at least.
    ],
)
def test_as_few_parts_as_keep_to_the_limit(most, wanted):
  assert microbatch.count(32, 10, most, shards=4) == wanted


def test_parts_are_even():
  # Of 6 rows a shard there are 1, 2, 3 and 6 parts; 4 would be enough.
  assert microbatch.count(24, 10, 60, shards=4) == 6
  assert microbatch.count(24, 10, 80, shards=4) == 3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_together_are_the_whole_in_its_order(count):
  mesh = jax.make_mesh(
      (1, 1, 1), ("data", "fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )  # fmt: skip
  whole = np.arange(8 * 3).reshape(8, 3)
  take = jax.jit(microbatch.take, static_argnums=(0, 1))
  taken = [
      np.asarray(take(count, mesh, jnp.array(whole), i)) for i in range(count)
  ]
  assert [len(x) for x in taken] == [8 // count] * count
  np.testing.assert_array_equal(microbatch.join(taken), whole)
  # Each row was then repeated, neighbours together.
  repeated = [np.repeat(x, 2, axis=0) for x in taken]
  np.testing.assert_array_equal(
      microbatch.join(repeated, 2), np.repeat(whole, 2, axis=0)
  )


def test_given_answers_are_cut_at_the_cap():
  given = toys.rollout([2, 5, 8], 8)
  cut = microbatch._shorten(6, given, 4)
  assert cut.tokens.shape == cut.mask.shape == (3, 6)
  assert cut.mask.sum(axis=1).tolist() == [2, 4, 4]
  np.testing.assert_array_equal(cut.tokens, given.tokens[:, :6])
