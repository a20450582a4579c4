import json
import re

import jax
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.errors import ConfigError
from prefix_distill.models.config import Lora
from prefix_distill.models.transformer import Model

P = jax.sharding.PartitionSpec
AXES = ("data", "fsdp", "tensor")
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.AbstractMesh:
  return jax.sharding.AbstractMesh((data, fsdp, tensor), AXES)


def parameters(**changes) -> dict[str, tuple[int, ...]]:
  params = Model(toys.model_config(**changes)).abstract_params()
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {sharding.path_name(path): leaf.shape for path, leaf in leaves}


@FAMILIES
def test_every_parameter_matches_exactly_one_rule(family):
  for tied in (False, True):
    found = parameters(family=family, tied=tied, lora=Lora(2))
    for name, shape in found.items():
      rules = [axes for key, axes in sharding.RULES if re.search(key, name)]
      assert len(rules) == 1, name
      assert len(rules[0]) in (0, len(shape)), name


def test_every_rule_matches_a_parameter():
  names = {
      n for f in ("qwen3", "qwen2") for n in parameters(family=f, lora=Lora(2))
  }
  for pattern, _ in sharding.RULES:
    assert any(re.search(pattern, name) for name in names), pattern


@FAMILIES
def test_matrices_are_split_over_both_axes_and_vectors_over_one_at_most(
    family,
):
  for name, shape in parameters(family=family).items():
    spec = sharding.partition(name, shape, mesh(1, 2, 2))
    split = {axis for axis in spec if axis}
    if "norm" in name:
      assert not split
    elif "bias" in name:
      assert split == {"tensor"}
    else:
      assert split == {"fsdp", "tensor"}


def test_adapters_are_split_as_the_axes_of_their_products():
  found, here = parameters(lora=Lora(2)), mesh(1, 2, 2)
  for name, shape in found.items():
    if not name.endswith("_a"):
      continue
    product, b = name.removesuffix("_a"), name[:-1] + "b"
    whole = sharding.partition(product, found[product], here)
    inputs = sharding.partition(name, shape, here)
    outputs = sharding.partition(b, found[b], here)
    # A [L, rank, inputs] and B [L, outputs, rank] of a weight [L, outputs,
    # inputs]: what is not the rank lies as it does there.
    count = len(outputs) - 2
    assert (None, *outputs[1:-1], *inputs[2:]) == tuple(whole), name
    assert inputs[1] is None and outputs[-1] is None and count > 0, name


def test_layers_are_not_split():
  for name, shape in parameters(lora=Lora(2)).items():
    if name.startswith("layers/"):
      spec = sharding.partition(name, shape, mesh(1, 2, 2))
      assert not spec or spec[0] is None


def test_a_dimension_that_an_axis_does_not_divide_stays_whole():
  key, embed = "layers/attention/key", "embed/weight"
  four = mesh(1, 2, 4)
  assert sharding.partition(key, (2, 4, 8, 16), four) == P(
      None, "tensor", None, "fsdp"
  )
  assert sharding.partition(key, (2, 2, 8, 16), four) == P(
      None, None, None, "fsdp"
  )
  assert sharding.partition(key, (2, 2, 8, 15), mesh(1, 2, 4)) == P(
      *[None] * 4
  )
  assert sharding.partition(embed, (423, 16), four) == P(None, "fsdp")


def test_an_unknown_parameter_is_refused():
  with pytest.raises(KeyError, match="layers/gate/router"):
    sharding.partition("layers/gate/router", (4, 4), mesh(1, 1, 1))


def test_an_optimizers_moments_lie_as_their_parameters_do():
  here = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
  params = Model(toys.model_config()).abstract_params()
  count = jax.ShapeDtypeStruct((), np.int32)
  tree = sharding.param_shardings({"mu": params, "count": count}, here)
  assert tree["mu"] == sharding.param_shardings(params, here)
  assert tree["count"].spec == P()


def test_the_data_axis_takes_the_devices_that_are_left():
  one = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
  assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "spec", [MeshSpec(fsdp=2), MeshSpec(tensor=3), MeshSpec(data=2)]
)
def test_a_mesh_that_does_not_fill_the_devices_is_refused(spec):
  sizes = f"{spec.data} x {spec.fsdp} x {spec.tensor}"
  with pytest.raises(ConfigError, match=f"is {sizes}, .*the 1 devices"):
    sharding.make_mesh(spec, jax.devices()[:1])


def test_a_batch_that_does_not_split_evenly_is_refused():
  sharding.check_batch("data.batch_size", 16, mesh(2, 2, 2))
  with pytest.raises(ConfigError) as error:
    sharding.check_batch("data.batch_size", 18, mesh(2, 2, 2))
  for text in (
      "data.batch_size is 18",
      "divisible by 4",
      "data x fsdp",
      "set it to 20.",
  ):
    assert text in str(error.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("eight"))
  process = toys.start("eight_devices.py", directory, devices=8)
  (printed,) = toys.finish([process], seconds=180)
  lines = printed.strip().splitlines()
  names = (
      "one device",
      "eight devices",
      "in parts",
      "two meshes",
      "two meshes in parts",
  )
  return dict(zip(names, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    "name", ["eight devices", "in parts", "two meshes", "two meshes in parts"]
)
def test_a_mesh_of_eight_devices_computes_what_one_device_does(runs, name):
  one, ours = runs["one device"], runs[name]
  assert len(one["losses"]) == 5
  assert set(one["lengths"]) == set(range(1, 9))
  assert one["losses"][-1] < 0.9 * one["losses"][0]
  assert ours["losses"] == pytest.approx(one["losses"], rel=1e-4)
  assert ours["norms"] == pytest.approx(one["norms"], rel=1e-3)
  assert ours["tokens"] == one["tokens"]


@pytest.mark.parametrize("name", ["eight devices", "two meshes"])
def test_a_mesh_of_eight_devices_sees_the_same_in_rollouts(runs, name):
  one, ours = (runs[x]["inspected"] for x in ("one device", name))
  assert one.keys() == ours.keys() and len(one["tokens"]) > 12
  for field, wanted in one.items():
    np.testing.assert_allclose(ours[field], wanted, rtol=1e-3, atol=1e-5)


def test_weights_are_loaded_onto_the_mesh_as_they_are_without_one(runs):
  assert all(run["loads_equal"] for run in runs.values())
  assert all(run["checksums_equal"] for run in runs.values())
  assert runs["one device"]["share"] == 1
  # A quarter (fsdp x tensor), and the norms whole.
  assert 0.25 < runs["eight devices"]["share"] < 0.27


def test_a_mesh_does_not_compile_more_often(runs):
  assert [run["compilations"] for run in runs.values()] == [
      {
          "compilations_sample": 2,
          "compilations_score": 1,
          "compilations_update": 1,
      }
  ] * 5
