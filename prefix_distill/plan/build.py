"""A run's programs for a machine that is not there: shapes, no arrays."""

import dataclasses
from typing import Any

import jax

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.errors import ConfigError
from prefix_distill.models import hf
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import paper_tables
from prefix_distill.specs import ModelSpec
from prefix_distill.train import setup as setup_lib
from prefix_distill.train.compile import Stage
from prefix_distill.train.programs import Programs

# For a laptop without a network: the architectures of the paper's models.
_KNOWN = {
    "Qwen/Qwen3-1.7B": paper_tables.QWEN3_1_7B,
    "Qwen/Qwen3-8B": paper_tables.QWEN3_8B,
}


@dataclasses.dataclass(frozen=True)
class _Tokens:
  """What programs want to know of a tokenizer; none of it moves a byte."""

  num_tokens: int
  pad_id: int = 0
  special_ids: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config on a machine.

  Attributes:
    setup: without data.
    programs: none compiled yet.
    teacher_params: shapes, on the device.
  """

  setup: setup_lib.Setup
  programs: Programs
  teacher_params: Params

  def stages(self, bucket: int) -> list[Stage]:
    """Returns the programs of an update whose cap ends in a bucket."""
    return list(self.programs.stages(bucket, self.teacher_params))

  def beside(self, name: str, several: bool) -> Any:
    """Returns what lies in a device's memory while a program runs.

    Args:
      name: of the stage.
      several: whether the update goes through the memory in parts, whose
        gradients are being added up.
    """
    config, state = self.setup.config, self.programs.abstract_state()
    lying = {}
    sampling = name in ("prefill", "layout", "decode", "cut")
    if not (config.teacher.offload and sampling or name == "score"):
      lying["teacher"] = self.teacher_params
    if name not in ("prefill", "layout", "gradient", "apply"):
      lying["student"] = state.params
    if not (config.optimizer.offload or name == "apply"):
      lying["moments"] = state.opt_state
    if name == "score" and several:
      lying["gradient"] = state.params
    return lying


def architecture(path: str) -> tuple[ModelConfig, bool]:
  """Reads a model's architecture; of the paper's models it is known.

  Returns:
    It, and whether it was read.

  Raises:
    UserError: it cannot be read, and is none of the paper's.
  """
  try:
    return hf.read_config(path), True
  except hf.ModelFilesError:
    known = _KNOWN.get(path.removesuffix("-Base"))
    if known is None:
      raise
    return known, False


def _model(spec: ModelSpec, mesh: jax.sharding.Mesh) -> Model:
  config, _ = architecture(spec.path)
  return Model(config, spec.compute_dtype, spec.remat, mesh)


def build(config: Config, devices: list) -> Plan:
  """Puts a run together.

  Raises:
    ConfigError: the mesh does not fill the devices, a batch does not split
      over it, or there is no teacher.
  """
  if config.teacher is None:
    raise ConfigError(
        f"method is {config.method!r}, which has no teacher; plan a"
        " distillation, with method 'prefix' or 'full'."
    )
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch("data.batch_size", config.data.batch_size, mesh)
  student, teacher = (
      _model(spec, mesh) for spec in (config.student, config.teacher)
  )
  rows = min(student.config.vocab_size, teacher.config.vocab_size)
  setup = setup_lib.Setup(
      config, mesh, student, teacher, _Tokens(rows), (0,), (0,), None, {}
  )
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, config.teacher.param_dtype),
      teacher.abstract_params(),
  )
  return Plan(
      setup, Programs(setup), sharding.with_shardings(shapes, mesh)
  )
