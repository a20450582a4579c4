"""Pods of several slices: only the data axis leaves a slice."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
  """What a layout looks at."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "a device"

  @property
  def process_index(self) -> int:
    return self.slice_index


@pytest.fixture
def grids(monkeypatch):
  """Meshes of devices that are not there, which JAX would refuse to build."""
  monkeypatch.setattr(
      jax.sharding, "Mesh", lambda grid, names, axis_types: grid
  )


def slices(count: int, size: int) -> list[Device]:
  # Out of order, as nothing promises that they come in order.
  pairs = [(i, s) for i in range(size) for s in range(count)]
  return [Device(s * size + i, s, (i, 0, 0)) for i, s in pairs]


@pytest.mark.parametrize(
    "count, size, spec, shape",
    [
        (2, 4, MeshSpec(8, 1, 1), (8, 1, 1)),
        (2, 4, MeshSpec(-1, 4, 1), (2, 4, 1)),
        (2, 4, MeshSpec(2, 2, 2), (2, 2, 2)),
        (4, 2, MeshSpec(-1, 1, 2), (4, 1, 2)),
        (3, 4, MeshSpec(6, 1, 2), (6, 1, 2)),
    ],
)
def test_the_data_axis_alone_leaves_a_slice(grids, count, size, spec, shape):
  grid = sharding.make_mesh(spec, slices(count, size))
  assert grid.shape == shape
  assert sorted(d.id for d in grid.flat) == list(range(count * size))
  of_row = np.vectorize(lambda d: d.slice_index)(grid).reshape(shape[0], -1)
  assert (of_row == of_row[:, :1]).all()
  # And slices lie one after the other, each in one piece.
  rows = shape[0] // count
  assert of_row[:, 0].tolist() == sorted(list(range(count)) * rows)


@pytest.mark.parametrize(
    "spec", [MeshSpec(1, 8, 1), MeshSpec(-1, 1, 8), MeshSpec(1, 2, 4)]
)
def test_weights_that_would_lie_over_two_slices_are_refused(grids, spec):
  with pytest.raises(ConfigError) as error:
    sharding.make_mesh(spec, slices(2, 4))
  for text in (
      f"1 x {spec.fsdp} x {spec.tensor}",
      "2 slices",
      "mesh.data a multiple of 2",
      "4 devices of a slice",
  ):
    assert text in str(error.value)


@pytest.mark.aot
def test_a_pod_of_two_slices_is_laid_out_by_slices():
  """On what JAX says of a v5e:2x2 twice, without one."""
  process = toys.start("two_slices.py", devices=1)
  (printed,) = toys.finish([process], seconds=300)
  found = json.loads(printed.strip().splitlines()[-1])
  assert found == {
      "8x1x1": [[0]] * 4 + [[1]] * 4,
      "2x4x1": [[0] * 4, [1] * 4],
      "2x2x2": [[0] * 4, [1] * 4],
      "4x1x2": [[0] * 2] * 2 + [[1] * 2] * 2,
  }
