"""A run's programs for a machine that is not there: shapes, no arrays."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import ModelSpec
from prefix_distill.errors import ConfigError
from prefix_distill.models import huggingface as hf
from prefix_distill.models import published
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.rollout.sampling import Truncation
from prefix_distill.train import capacity
from prefix_distill.train import setup as setup_lib
from prefix_distill.train.compile import Program
from prefix_distill.train.compile import Segments
from prefix_distill.train.compile import Stage
from prefix_distill.train.programs import Programs

# Evaluation's programs, by whose answers they decode.
EVALUATION = {"student": "evaluate", "teacher": "evaluate teacher"}
_SAMPLING = (
    "move", "prefill", "layout", "decode", "cut", *EVALUATION.values()
)  # fmt: skip
# For a laptop without a network: the architectures of the paper's models.
_KNOWN = {
    "Qwen/Qwen3-1.7B": published.QWEN3_1_7B,
    "Qwen/Qwen3-8B": published.QWEN3_8B,
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

  def stages(self, cap: int) -> list[Stage]:
    """Returns the programs of an update."""
    return list(self.programs.stages(cap, self.teacher_params))

  def evaluation(self) -> list[Stage]:
    """Returns the decoding of evaluation, for each size of the cache."""
    setup, spec = self.setup, self.setup.config.evaluation
    if not spec.sets:
      return []
    stages = list(_evaluate(self, setup.student, EVALUATION["student"]))
    if spec.teacher:
      stages += _evaluate(self, setup.teacher, EVALUATION["teacher"])
    return stages

  def mesh(self, name: str) -> jax.sharding.Mesh:
    """Returns the mesh that a program runs on."""
    if name in _SAMPLING:
      return self.setup.sampling_mesh
    return self.setup.mesh

  def _prefilling(self, name: str) -> Any:
    """Returns weights that prompts are read with between two segments."""
    setup = self.setup
    model = setup.teacher if name == EVALUATION["teacher"] else setup.student
    shapes = jax.eval_shape(model.cast, model.abstract_params())
    return sharding.with_shardings(shapes, setup.sampling_mesh)

  def beside(self, name: str, several: bool) -> Any:
    """Returns what lies in a device's memory while a program runs.

    Args:
      name: of the stage.
      several: whether the update goes through the memory in parts, whose
        gradients are being added up.
    """
    config, state = self.setup.config, self.programs.abstract_state()
    lying = {}
    two_meshes = self.setup.sampling_mesh != self.setup.mesh
    idle = name in _SAMPLING and name != EVALUATION["teacher"]
    if not (config.teacher.offload and idle or name == "score"):
      lying["teacher"] = self.teacher_params
    takes_student = ("move", "gradient", "apply")
    if not two_meshes:
      takes_student += ("prefill", "layout")
    if name not in takes_student:
      lying["student"] = state.params
    if two_meshes and name in EVALUATION.values():
      lying["moved"] = self._prefilling(name)
    if not (config.optimizer.offload or name == "apply"):
      lying["moments"] = state.opt_state
    if name == "score" and several:
      lying["gradient"] = state.params
    return lying


def _evaluate(plan: Plan, model: Model, name: str) -> Iterator[Stage]:
  """Yields the program that decodes a segment of evaluation's answers.

  One for each size of the cache; the last is for rows as long as may be.
  """
  setup, spec = plan.setup, plan.setup.config.evaluation
  mesh, model = setup.sampling_mesh, setup.for_sampling(model)
  config = generate.SamplerConfig(
      setup.stop_ids, setup.chat.pad_id, setup.chat.num_tokens,
      truncation=Truncation(spec.top_k, spec.top_p),
  )  # fmt: skip
  place = generate.state_shardings(model, config)
  prompt = max(
      one.max_prompt_len or setup.config.data.max_prompt_len
      for one in spec.sets.values()
  )
  rows = capacity.answers(
      setup, model, config, plan.programs.resting(), prompt
  )
  layout = jax.eval_shape(model.decode_layout, model.abstract_params())
  layout = sharding.placed(layout, sharding.decode_params(layout, mesh))
  steps, drawn = generate.segment(model), 1
  program = Program(
      generate.decode,
      3,
      out_shardings=(place, sharding.batch_sharding(mesh)),
      donate_argnums=4,
      compiler_options=generate.compiler_options(mesh),
  )
  kernel = model.cache_kernel(generate.cache_dtype(model, config))
  for room in continuous_batching.rooms(model, config, prompt, spec.max_len):
    columns = generate.columns(model, config, prompt + room)
    state = jax.eval_shape(
        lambda columns=columns: generate.empty(
            model, config, rows, columns, jax.random.key(0)
        )
    )
    segments = Segments(
        steps, -(-(room + 1 - drawn) // steps), drawn,
        setup.config.data.max_prompt_len, columns, kernel.reads_lengths,
    ).until(spec.max_len)  # fmt: skip
    draw = generate.Draw.of(spec.max_len)
    args = (model, config, steps, layout, sharding.placed(state, place), draw)
    if segments.count:
      yield Stage(name, program, args, rows=rows, segments=segments)
      drawn += segments.count * steps


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
  return setup_lib.make_model(config, spec, mesh)


def build(
    config: Config, devices: list, memory: float | None = None
) -> Plan:
  """Puts a run together.

  Args:
    config: of the run.
    devices: of the machine.
    memory: bytes of a device that programs may use; None for no limit.

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
  setup_lib.check_batches(config, mesh)
  student, teacher = (
      _model(spec, mesh) for spec in (config.student, config.teacher)
  )
  rows = min(student.config.vocab_size, teacher.config.vocab_size)
  setup = setup_lib.Setup(
      config, mesh, student, teacher, _Tokens(rows), (0,), (0,), None, {},
      memory,
  )  # fmt: skip
  programs = Programs(setup)
  return Plan(setup, programs, programs.abstract_teacher())
