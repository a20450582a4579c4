import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.errors import ConfigError
from prefix_distill.train import microbatch
from prefix_distill.train.update import Programs


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
      (1, 1, 1),
      ("data", "fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
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


# The toys' weights, moments and gradients are small beside the logits.
_BESIDE = 256 * 2**20
_ROW = 2**14


def _programs(memory, **optimizer):
  config = toys.run_config("student", "teacher")
  config = dataclasses.replace(
      config, optimizer=dataclasses.replace(config.optimizer, **optimizer)
  )
  mesh = sharding.make_mesh(MeshSpec(data=1, fsdp=-1))
  models = toys.models(config, mesh, memory=memory)
  return models, Programs(models)


def _batch(rows, length):
  return toys.prompts(rows, 5), toys.rollout([length] * rows, length)


def test_training_takes_the_rows_that_the_memory_holds():
  def rows(memory, length):
    models, programs = _programs(memory)
    return microbatch.trained(models, programs.resting(), 5, length)

  some, more = (rows(1.3 * _BESIDE + n * _ROW, 8) for n in (1000, 2000))
  assert 1 < some < more
  assert rows(1.3 * _BESIDE + 1000 * _ROW, 800) < some
  # Too little even for one row: the device says so, and not this number.
  assert rows(_BESIDE, 8) == 1


@pytest.mark.parametrize("length", [8, 64])
def test_without_a_limit_microbatches_follow_from_the_memory(length):
  batch = _batch(64, length)
  _, programs = _programs(None)
  assert programs.microbatches.scoring_count(*batch) == 1
  memory = 1.2 * _BESIDE
  models, programs = _programs(memory)
  held = microbatch.trained(models, programs.resting(), 5, length)
  parts = programs.microbatches.scoring_count(*batch)
  assert 64 // parts <= held and 64 % parts == 0
  # A limit in the settings counts, whatever the memory.
  _, programs = _programs(memory, batch_tokens=2 * (5 + length))
  assert programs.microbatches.scoring_count(*batch) == 32
  _, programs = _programs(_BESIDE)
  assert programs.microbatches.scoring_count(*batch) == 64


@pytest.mark.parametrize(
    ("spec", "devices", "wanted"),
    [
        (MeshSpec(1, -1), 8, (1, 8, 1)),
        (MeshSpec(1, -1), 1, (1, 1, 1)),
        (MeshSpec(2, -1, 2), 8, (2, 2, 2)),
        (MeshSpec(-1, 2), 8, (4, 2, 1)),
        (MeshSpec(1, 4), 8, (1, 4, 1)),
    ],
)
def test_an_open_axis_takes_the_devices_that_are_left(spec, devices, wanted):
  full = spec.filled(devices)
  assert (full.data, full.fsdp, full.tensor) == wanted


def test_axes_that_cannot_be_open():
  with pytest.raises(ConfigError, match="one axis takes"):
    MeshSpec(-1, -1)
  with pytest.raises(ConfigError, match="does not divide"):
    MeshSpec(1, -1, sampling_tensor=3).filled(8)
  mesh = sharding.make_mesh(MeshSpec(1, -1), jax.devices()[:1])
  assert set(mesh.shape.values()) == {1}
