"""The bundled run on meshes and numbers of processes: the same numbers."""

import pytest
import test_processes
import toys

pytestmark = pytest.mark.slow

_FLAGS = (
    "--config=configs/math.py",
    "--config.steps=5",
    "--config.data.batch_size=8",
    "--config.rollout.max_len=24",
    "--config.prefix.buckets=(8,24)",
    # At a cap of one token the two models agree so well that the gradient is
    # little but rounding errors, which Adam would blow up.
    "--config.prefix.linear.start=4",
    "--config.prefix.linear.increment=3",
    "--config.evaluation.max_len=24",
    "--config.evaluation.every=0",
    "--config.evaluation.batch_size=8",
    "--config.evaluation.greedy=False",
    "--config.evaluation.sets.heldout.size=8",
)
# Processes, devices of each, and data x fsdp x tensor, and tensor while
# sampling. In the last ones an axis that batches are not split over runs
# through two or four processes.
_LAYOUTS = (
    (1, 8, (8, 1, 1, 0)),
    (1, 8, (1, 8, 1, 0)),
    (1, 8, (2, 2, 2, 0)),
    (1, 8, (1, 2, 4, 0)),
    (1, 8, (1, 8, 1, 4)),
    (2, 2, (4, 1, 1, 0)),
    (2, 4, (1, 8, 1, 0)),
    (4, 2, (2, 2, 2, 0)),
    (4, 2, (1, 2, 4, 0)),
    (4, 2, (1, 1, 8, 0)),
    (4, 2, (1, 8, 1, 4)),
)


def start_and_end(root, name, processes, devices, mesh):
  names = ("data", "fsdp", "tensor", "sampling_tensor")
  sizes = zip(names, mesh, strict=True)
  started = toys.start_run(
      *_FLAGS,
      f"--workdir={root / name}",
      *(f"--config.mesh.{axis}={size}" for axis, size in sizes),
      processes=processes,
      devices=devices,
  )
  for code, _, err in toys.end(started, 1800):
    assert code == 0, err[-3000:]
  return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def single(root):
  """The workdir of a run on one device."""
  return start_and_end(root, "single", 1, 1, (1, 1, 1, 0))


def test_a_run_learns_something(single):
  updates = [x for x in test_processes.lines(single) if "kl" in x]
  assert [x["prefix_len"] for x in updates] == [4, 7, 10, 13, 16]
  assert updates[-1]["kl"] < 0.5 * updates[0]["kl"]


@pytest.mark.parametrize("processes, devices, mesh", _LAYOUTS)
def test_a_layout_gives_the_numbers_of_one_device(
    root, single, processes, devices, mesh
):
  name = f"{processes}-{'x'.join(map(str, mesh))}"
  found = start_and_end(root, name, processes, devices, mesh)
  test_processes.assert_same_lines(
      test_processes.lines(found), test_processes.lines(single)
  )
  ours, theirs = map(test_processes.weights, (found, single))
  for tensor, wanted in theirs.items():
    assert ours[tensor] == pytest.approx(wanted, rel=0, abs=2e-4), tensor
