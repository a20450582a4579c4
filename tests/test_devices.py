"""What a device lacks is not used: older GPUs have neither of the two."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import config as config_lib
from prefix_distill import sharding
from prefix_distill.models import attention
from prefix_distill.plan import programs
from prefix_distill.rollout import generate
from prefix_distill.train import setup as setup_lib


@dataclasses.dataclass(frozen=True)
class Fake:
  """As much of a jax.Device as is asked for."""

  compute_capability: str | None
  platform: str = "gpu"
  device_kind: str = "Tesla T4"
  id: int = 0
  process_index: int = 0

  def memory_stats(self) -> dict[str, int]:
    return {"bytes_limit": 2**34}


_SILENT = types.SimpleNamespace(platform="gpu", device_kind="A new GPU")
# Device, whether it has bfloat16, whether it has cuDNN's attention.
_DEVICES = {
    "V100": (Fake("7.0"), False, False),
    "T4": (Fake("7.5"), False, False),
    "A100": (Fake("8.0"), True, True),
    "A10": (Fake("8.6"), True, True),
    "H100": (Fake("9.0"), True, True),
    "H100 by its platform": (Fake("9.0", "cuda"), True, True),
    "H100 by its architecture": (Fake("9.0a"), True, True),
    "B200": (Fake("10.0"), True, True),
    "RTX 5090": (Fake("12.0"), True, True),
    "MI250": (Fake("gfx90a"), True, False),
    "MI250 by its platform": (Fake("gfx90a", "rocm"), True, False),
    "a GPU that says nothing": (_SILENT, True, False),
    "a GPU that says None": (Fake(None), True, False),
    "a GPU that says something else": (Fake("newest"), True, False),
    "TPU": (Fake(None, "tpu"), True, False),
    "CPU": (types.SimpleNamespace(platform="cpu"), True, False),
}


def _mesh(*members) -> types.SimpleNamespace:
  return types.SimpleNamespace(devices=np.array(members, object)[:, None, None])


@pytest.mark.parametrize("name", _DEVICES)
def test_a_device_says_what_it_has(name):
  device, bfloat16, cudnn = _DEVICES[name]
  assert sharding.has_bfloat16(device) is bfloat16
  assert sharding.has_cudnn_attention(device) is cudnn


def test_this_machine_s_devices_have_bfloat16_and_no_cudnn():
  assert sharding.has_bfloat16(jax.devices()[0])
  assert not sharding.has_cudnn_attention(jax.devices()[0])


def _queries(dtype=jnp.bfloat16, width=64):
  return jax.ShapeDtypeStruct((2, 4, 4, width), dtype)


@pytest.mark.parametrize("name", _DEVICES)
def test_attention_takes_the_kernel_that_the_device_has(name):
  device, _, cudnn = _DEVICES[name]
  mesh, other = _mesh(device), attention.blocked
  if device.platform == "tpu":
    other = attention.splash_kernel
  wanted = attention.cudnn if cudnn else other
  assert attention._kernel(mesh, _queries()) is wanted
  unit = 128 if device.platform == "tpu" else 64 if cudnn else 1
  assert attention.aligned(65, mesh) == -(-65 // unit) * unit


def test_cudnns_kernel_is_for_bfloat16_and_heads_that_it_knows():
  mesh = _mesh(Fake("9.0"))
  unfit = (_queries(jnp.float32), _queries(width=256), _queries(width=60))
  for queries in unfit:
    assert attention._kernel(mesh, queries) is attention.blocked
  tpu = _mesh(Fake(None, "tpu"))
  assert attention._kernel(tpu, _queries(jnp.float32)) is (
      attention.splash_kernel
  )


def test_all_devices_of_a_mesh_must_have_it():
  old, new = Fake("7.5"), Fake("9.0")
  for pair in ((old, new), (new, old)):
    assert attention._kernel(_mesh(*pair), _queries()) is attention.blocked
    assert sharding.first_without(sharding.has_bfloat16, _mesh(*pair)) is old
  assert attention._kernel(_mesh(new, new), _queries()) is attention.cudnn
  assert sharding.first_without(sharding.has_bfloat16, _mesh(new, new)) is None


def _config(student: str, teacher: str) -> config_lib.Config:
  config = toys.run_config("bundled:weak", "bundled:teacher")
  return dataclasses.replace(
      config,
      student=dataclasses.replace(config.student, compute_dtype=student),
      teacher=dataclasses.replace(
          config.teacher, compute_dtype=teacher, param_dtype="bfloat16"
      ),
  )


def _fakes(capability: str) -> list[Fake]:
  return [Fake(capability, id=i) for i in range(2)]


@pytest.fixture
def machine(monkeypatch):
  """Puts two GPUs of a compute capability into this machine."""

  def put(capability: str) -> None:
    make = functools.partial(sharding.make_mesh, devices=_fakes(capability))
    monkeypatch.setattr(setup_lib.sharding, "make_mesh", make)

  return put


_BOTH = "student.compute_dtype and teacher.compute_dtype are"
_TEACHER = "teacher.compute_dtype is"
_LACKS = (
    " 'bfloat16', which Tesla T4 (compute capability 7.5) lacks; float32 is"
    " used instead."
)


@pytest.mark.parametrize(
    ("capability", "student", "teacher", "said"),
    [
        ("7.5", "bfloat16", "bfloat16", _BOTH + _LACKS),
        ("7.5", "float32", "bfloat16", _TEACHER + _LACKS),
        ("7.5", "float32", "float32", ""),
        ("8.0", "bfloat16", "bfloat16", ""),
    ],
)
def test_a_run_says_once_that_it_computes_in_float32(
    capability, student, teacher, said, machine, monkeypatch, capsys, tmp_path
):
  machine(capability)
  config = _config(student, teacher)
  setup = setup_lib.prepare(config, tmp_path).models
  assert setup.memory == 2**34
  assert capsys.readouterr().out == (f"Warning: {said}\n" if said else "")
  wanted = "float32" if capability == "7.5" else student
  assert setup.student.dtype == setup.teacher.dtype == wanted
  assert setup.for_sampling(setup.student).dtype == wanted
  # The settings are the same, so that another machine can go on with the run,
  # and the weights lie in what they were to lie in.
  assert setup.config.teacher.compute_dtype == teacher
  assert setup.config.teacher.param_dtype == "bfloat16"
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  setup_lib.prepare(config, tmp_path)
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "dtype"), [("7.5", "float32"), ("9.0", "bfloat16")]
)
def test_the_plan_computes_in_the_same(capability, dtype, monkeypatch):
  # A faked device has no compiler to ask.
  monkeypatch.setattr(generate, "compiler_options", lambda mesh: {})
  config = dataclasses.replace(
      _config("bfloat16", "bfloat16"), mesh=config_lib.MeshSpec(fsdp=2)
  )
  plan = programs.build(config, _fakes(capability))
  assert plan.models.student.dtype == plan.models.teacher.dtype == dtype
  lying = jax.tree.leaves(plan.teacher_params)
  assert {x.dtype.name for x in lying} == {"bfloat16"}


def _write(root, files):
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.parametrize(
    "file, words",
    [
        ("proc/driver/nvidia/version", "NVIDIA GPU.*cuda13"),
        ("dev/accel0", "a TPU.*tpu"),
        ("sys/bus/pci/devices/0000:00:04.0/device", "a TPU.*tpu"),
    ],
)
def test_an_accelerator_that_idles_is_told(file, words, tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.delenv("JAX_PLATFORM_NAME", raising=False)
  assert not sharding.unused_accelerator(tmp_path)
  card = "sys/bus/pci/devices/0000:00:{}/{}"
  files = {card.format("03.0", "vendor"): "0x1ae0\n"}
  files |= {card.format("03.0", "device"): "0x0042\n"}  # A network card.
  files |= {card.format("04.0", "vendor"): "0x1ae0\n"}
  files |= {card.format("04.0", "device"): "0x0042\n"}
  _write(tmp_path, files)
  assert not sharding.unused_accelerator(tmp_path)
  _write(tmp_path, {file: "0x0063\n"})
  assert re.search(words, sharding.unused_accelerator(tmp_path))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # It is meant.
  assert not sharding.unused_accelerator(tmp_path)
