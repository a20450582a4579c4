"""What an update moves at least, how long it takes at least, which mesh."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
import pathlib

from prefix_distill import sharding
from prefix_distill import strict_json
from prefix_distill.config import Config
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import records
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_params
from prefix_distill.plan import machines
from prefix_distill.plan.machines import Machine
from prefix_distill.plan.programs import Measured
from prefix_distill.plan.programs import Plan

_GIB, _FLOAT32 = 2**30, 4
# Shares of a device's memory that the choice of a mesh allows: for weights,
# moments and gradients on one host, and for the longest decoding with all that
# lies beside it.
_HELD, _DECODING = 0.6, 0.85


class TooLargeError(UserError):
  """A run whose weights alone do not fit the machine."""


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What seconds are reckoned with.

  Attributes:
    utilization: share of the peak FLOPs that products reach.
    reach: share of the memory's bandwidth. An H200 reached 0.56 to 0.58 while
      it decoded (docs/results/accelerator.md).
    links: share of the links' bandwidth.
    price: of a device and hour, in any currency; 0 for none.
    source: where utilization or reach was measured; empty if both are assumed.
    missing: which of the two the source lacks, so that it is assumed.
  """

  utilization: float = 0.5
  reach: float = 0.6
  links: float = 0.8
  price: float = 0.0
  source: str = ""
  missing: str = ""


def measured(file: pathlib.Path, price: float = 0.0) -> Assumptions:
  """Reads what `benchmarks/accelerator.py` measured on one device.

  Utilization is that of all scores and gradients together. The memory's share
  is that of the rollouts with the most rows. Both are shares of that device's
  data sheet, so they can be used for another kind of device. A share that the
  file lacks is assumed.

  Args:
    file: the benchmark's results.jsonl.
    price: see `Assumptions`.

  Raises:
    ConfigError: the file cannot be read, or lacks both shares.
  """
  try:
    texts = file.read_bytes().splitlines()
    lines = [strict_json.parse(text) for text in texts]
    done = [one for one in lines if one.get("status") == "done"]
  except (OSError, ValueError, AttributeError) as error:
    raise ConfigError(
        f"--measured={file} cannot be read ({error}); give the results.jsonl"
        " of benchmarks/accelerator.py."
    ) from error
  name = next((str(one["device"]) for one in done if "device" in one), "")
  kind = next((k for k in machines.CHIPS if k in name.lower()), None)
  updates = [
      one
      for one in done
      if one.get("stage") == "update"
      and one["name"].endswith((" score", " gradient"))
  ]
  rollouts = [one for one in done if "least_bytes" in one]
  kinds = f"a device of a known kind ({', '.join(machines.CHIPS)})"
  for found, wanted in (
      (kind, kinds),
      (updates or rollouts, "a rollout, of score or of gradient"),
  ):
    if not found:
      raise ConfigError(
          f"--measured={file} holds no line of {wanted}; run"
          " benchmarks/accelerator.py to its end, or leave --measured out."
      )
  chip, found, missing = machines.CHIPS[kind], {}, ""
  if updates:
    flops, spent = (sum(one[k] for one in updates) for k in ("flops", "phase"))
    found["utilization"] = flops / spent / chip.flops
  else:
    missing = "the products"
  if rollouts:
    most = max(one["rows"] for one in rollouts)
    rollouts = [one for one in rollouts if one["rows"] == most]
    read = sum(one["least_bytes"] for one in rollouts)
    times = ((one["new"] - 1) * one["ms_per_token"] / 1e3 for one in rollouts)
    found["reach"] = read / sum(times) / chip.bandwidth
  else:
    missing = "the memory"
  source = f"{name}, {file}"
  return Assumptions(**found, price=price, source=source, missing=missing)


def least_sent(plan: Plan) -> float:
  """Returns the bytes that a device has to send in one run of `gradient`.

  Layers are gathered over fsdp twice, forward and backward, in the compute
  dtype. The output head is gathered once, and for an exact loss so is the
  teacher's. Gradients are scattered once and then summed over data: those of
  the layers in the compute dtype, the head's in float32. What is looked up of
  the embeddings travels too and is not counted here.
  """
  setup, sizes = plan.models, plan.models.mesh.shape
  n, data, tensor = sizes["fsdp"], sizes["data"], sizes["tensor"]
  width, c = setup.student.dtype.itemsize, setup.student.config
  table = c.vocab_size * c.dim
  weights = num_params(c) - table * (1 if c.tied else 2)
  gathered = width * (2 * weights + table)
  scattered = width * weights + _FLOAT32 * table
  if isinstance(setup.loss, ExactLoss):
    t = setup.teacher.config
    gathered += setup.teacher.dtype.itemsize * t.vocab_size * t.dim
  around = (n - 1) / n * (gathered + scattered) / tensor
  # The gradient of a separate embedding table is in parts from the start.
  summed = scattered + (0 if c.tied else _FLOAT32 * table)
  return around + 2 * (data - 1) / data * summed / tensor / n


def seconds(
    one: Measured, machine: Machine, assumptions: Assumptions
) -> tuple[float, str]:
  """Returns how long all runs of a program in an update take, and why.

  It is the longest of what the products, the memory and the links take.
  """
  chip, a = machine.chip, assumptions
  parts = {
      "FLOPs": one.flops / machine.size / (chip.flops * a.utilization),
      "memory": one.moved / (chip.bandwidth * a.reach),
      "links": sum(s / (chip.link * a.links) for s in one.sent.values()),
  }
  why = max(parts, key=parts.__getitem__)
  return one.times * parts[why], why


def evaluations(config: Config) -> Iterator[tuple[str, Sequence[str], int]]:
  """Yields a run's evaluations: the model, names of sets, how often."""
  spec = config.evaluation
  if not spec.sets:
    return
  every = tuple(spec.sets)
  # One before the first update, and the others between updates.
  between = 1 + (max(config.steps - 1, 0) // spec.every if spec.every else 0)
  yield "student", spec.between or every, between
  yield "student", every, 1
  if spec.teacher:
    yield "teacher", every, 1


def answers(spec: EvaluationSpec, names: Sequence[str]) -> int:
  """Returns how many answers an evaluation of some sets writes.

  Raises:
    UserError: a set cannot be read, and its size is not known.
  """
  total = 0
  for name in names:
    one = spec.sets[name]
    number = one.size or evaluator.PROBLEMS.get(one.source)
    if number is None:
      number = len(records.read(one))
    total += number * (one.samples + int(spec.greedy))
  return total


def suggest_mesh(
    config: Config,
    student: ModelConfig,
    teacher: ModelConfig,
    machine: Machine,
) -> MeshSpec:
  """Chooses a mesh: as little tensor parallelism as the memory allows.

  Weights, moments and gradients are split over fsdp. That sends less than
  tensor shards do, as long as there is a prompt for each device. The weights
  that decode are split over sampling_tensor alone. So are keys and values; a
  device holds at least those of one prompt's rollouts, and those of one answer
  if the teacher is evaluated. Slices are replicas, and so are the hosts of GPUs
  if one host holds the weights.
  """
  budget = machine.chip.memory
  inside = machine.size // machine.slices
  held = 16 * num_params(student)
  held += _width(config.teacher.param_dtype) * num_params(teacher)
  if machine.chip.platform == "gpu":
    host = min(machine.chip.host, inside)
    if held / host <= _HELD * budget:
      inside = host
  prompt = config.data.max_prompt_len
  longest = prompt + prefix_schedule.longest(config)
  rollouts = config.rollout.per_prompt * longest
  decoding = _decoding(config.student, student, rollouts)
  if config.evaluation.sets and config.evaluation.teacher:
    answer = prompt + config.evaluation.max_len
    decoding = max(decoding, _decoding(config.teacher, teacher, answer))
  resting = held - _FLOAT32 * num_params(student)  # Gradients come later.
  most = min(inside, student.num_kv_heads)
  tensor = 1
  while tensor < most and config.data.batch_size % (machine.size // tensor):
    tensor *= 2
  sampling, room = tensor, _DECODING * budget - resting / inside
  while sampling < most and decoding / sampling > room:
    sampling *= 2
  return MeshSpec(
      machine.size // inside,
      inside // tensor,
      tensor,
      sampling_tensor=sampling if sampling != tensor else 0,
  )


def _width(dtype: str) -> int:
  return 2 if dtype == "bfloat16" else 4


def _decoding(spec: ModelSpec, model: ModelConfig, tokens: int) -> int:
  """Returns bytes of a model's weights and of some tokens' keys and values."""
  pair = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  return _width(spec.compute_dtype) * (num_params(model) + pair * tokens)


def check_weights(plan: Plan, machine: Machine) -> None:
  """Raises TooLargeError if not even weights and the like fit.

  While the student is differentiated its weights, their gradient and the
  teacher's weights lie side by side, and the moments unless they are offloaded.
  To check that takes no compiler.
  """
  parts = held(plan)
  parts["gradient"] = parts["student"]
  config, offload = plan.models.config, ", or optimizer.offload=True"
  if config.optimizer.offload:
    del parts["moments"]
    offload = ""
  total, limit = sum(parts.values()), machine.chip.memory
  if total <= limit:
    return
  listed = ", ".join(f"{k} {v / _GIB:.1f}" for k, v in parts.items())
  replicas = plan.models.mesh.shape["data"]
  least = math.ceil(total / limit * machine.size / replicas)
  raise TooLargeError(
      f"a device of {machine.name} would hold {total / _GIB:.1f} of"
      f" {limit / _GIB:.2f} GiB before the first activation ({listed}); use"
      f" {least} devices or more with mesh.data=1{offload}."
  )


def held(plan: Plan) -> dict[str, float]:
  """Returns bytes on a device of what a run keeps throughout."""
  state = plan.programs.abstract_state()
  size = sharding.bytes_per_device
  return {
      "student": float(size(state.params)),
      "moments": float(size(state.opt_state)),
      "teacher": float(size(plan.teacher_params)),
  }
