"""What an update moves at least, how long it takes at least, which mesh."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib

from prefix_distill import errors
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import MeshSpec
from prefix_distill.data import records
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.errors import UserError
from prefix_distill.evaluate import benchmarks
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_params
from prefix_distill.plan import build
from prefix_distill.plan import machines
from prefix_distill.plan.collectives import Planned
from prefix_distill.plan.collectives import UNKNOWN
from prefix_distill.plan.machines import Machine
from prefix_distill.plan.measure import Measured

_GIB = 2**30
_FLOAT32 = 4
# Of a device's memory: what weights, moments and gradients may take on one
# host, and what the longest decoding may, with all that lies beside it.
_HELD = 0.6
_DECODING = 0.85


class TooLargeError(UserError):
  """A run whose weights alone do not fit the machine."""


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What seconds are reckoned with.

  Attributes:
    utilization: of the peak FLOPs, in what is limited by them.
    reach: of the memory's bandwidth. An H200 reached 0.56 to 0.58 while it
      decoded (docs/results/accelerator.md).
    links: of the bandwidth of links.
    price: of a device and hour, in any currency; 0 for none.
    source: where some of the first two were measured; empty for assumed.
    missing: which of them was not, and is assumed.
  """

  utilization: float = 0.5
  reach: float = 0.6
  links: float = 0.8
  price: float = 0.0
  source: str = ""
  missing: str = ""


def measured(file: pathlib.Path, price: float = 0.0) -> Assumptions:
  """Reads what `benchmarks/accelerator.py` measured on one device.

  Utilization is that of its updates, scores and gradients together; the
  memory's that of its rollouts with the most rows. Shares are of that device's
  data sheet, so one device's shares can be used for another kind. One that the
  file lacks is assumed.

  Args:
    file: its results.jsonl.
    price: see `Assumptions`.

  Raises:
    ConfigError: the file cannot be read, or lacks both.
  """
  try:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    done = [one for one in lines if one.get("status") == "done"]
  except (OSError, ValueError, AttributeError) as error:
    raise errors.ConfigError(
        f"--measured={file} cannot be read ({error}); give the results.jsonl"
        " of benchmarks/accelerator.py."
    ) from error
  name = next((str(one["device"]) for one in done if "device" in one), "")
  kind = next((k for k in machines.CHIPS if k in name.lower()), None)
  updates = [
      one
      for one in done
      if one.get("stage") == "update"
      and one["name"].rpartition(" ")[2] in ("score", "gradient")
  ]
  rollouts = [one for one in done if "least_bytes" in one]
  for found, wanted in (
      (kind, f"a device of a known kind ({', '.join(machines.CHIPS)})"),
      (updates or rollouts, "a rollout, of score or of gradient"),
  ):
    if not found:
      raise errors.ConfigError(
          f"--measured={file} holds no line of {wanted}; run"
          " benchmarks/accelerator.py to its end, or leave --measured out."
      )
  chip, found = machines.CHIPS[kind], {}
  if updates:
    flops, spent = (sum(one[k] for one in updates) for k in ("flops", "phase"))
    found["utilization"] = flops / spent / chip.flops
  if rollouts:
    most = max(one["rows"] for one in rollouts)
    largest = [one for one in rollouts if one["rows"] == most]
    read = sum(one["least_bytes"] for one in largest)
    spent = sum(
        (one["new"] - 1) * one["ms_per_token"] / 1e3 for one in largest
    )
    found["reach"] = read / spent / chip.bandwidth
  missing = {"utilization": "the products", "reach": "the memory"}
  return Assumptions(
      **found, price=price, source=f"{name}, {file}",
      missing="".join(v for k, v in missing.items() if k not in found),
  )  # fmt: skip


def planned(plan: build.Plan, name: str = "") -> list[Planned]:
  """Returns the collectives that a program of a run is meant to have.

  Weights that go to the mesh of sampling are exchanged, by neighbours of which
  an axis of either mesh may hold several groups. Else weights of a layer are
  gathered over fsdp where they are used, and their gradients scattered back;
  over data gradients are summed; over tensor sums of activations travel, once
  for the attention and once for the MLP.
  """
  setup = plan.setup
  every = ("data", "fsdp")
  sizes = {"layer": 0, "table": 0}
  for model in (setup.student, setup.teacher):
    c = model.config
    layer = (num_params(c, False) - c.vocab_size * c.dim) // c.num_layers
    sizes["layer"] = max(sizes["layer"], layer)
    sizes["table"] = max(sizes["table"], c.vocab_size * c.dim)
  largest = _FLOAT32 * max(sizes.values())
  if name == "move":
    anywhere = ("fsdp", "tensor", *UNKNOWN)
    return [
        Planned(kind, anywhere, largest, "weights to be sampled with")
        for kind in ("all-to-all", "collective-permute")
    ]
  activations = 2**40  # They depend on the batch, and on nothing else.
  return [
      Planned("all-gather", ("fsdp",), largest, "weights where they are used"),
      Planned("collective-permute", every, largest, "the same, in steps"),
      Planned("reduce-scatter", every, largest, "gradients of weights"),
      Planned("all-reduce", ("data",), largest, "gradients over replicas"),
      Planned("all-reduce", ("tensor",), activations, "sums over the heads"),
      Planned("reduce-scatter", ("tensor",), activations, "the same, cut"),
      Planned("all-gather", ("tensor",), activations, "the same, whole"),
      Planned("all-to-all", ("fsdp",), activations, "columns of embeddings"),
      # A TPU's compiler sums the output head's gradient whole and cuts it,
      # instead of scattering it: twice the bytes of that.
      Planned("all-reduce", every, _FLOAT32 * sizes["table"], "the head's"),
      Planned("all-reduce", (*every, "tensor"), 2**22, "metrics, norms"),
  ]  # fmt: skip


def least_sent(plan: build.Plan) -> float:
  """Returns the bytes that a device has to send in one run of `gradient`.

  Layers are gathered over fsdp twice, forward and backward, in the compute
  dtype, and the output head once; gradients are scattered once, those of the
  layers in the same dtype, the head's in float32, in which it is summed up; and
  summed over data. An exact loss wants the teacher's output head as well, once.
  Of the embeddings only what is looked up travels, which is not counted here.
  """
  setup, mesh = plan.setup, plan.setup.mesh
  n, data = mesh.shape["fsdp"], mesh.shape["data"]
  held = mesh.shape["tensor"]
  width = setup.student.dtype.itemsize
  c = setup.student.config
  table = c.vocab_size * c.dim
  weights = num_params(c) - table * (1 if c.tied else 2)
  gathered = width * (2 * weights + table)
  scattered = width * weights + _FLOAT32 * table
  teacher = setup.teacher
  if isinstance(setup.loss, ExactLoss):
    gathered += teacher.dtype.itemsize * (
        teacher.config.vocab_size * teacher.config.dim
    )
  around = (n - 1) / n * (gathered + scattered) / held
  # An embedding table of its own has its gradient in parts from the start.
  summed = scattered + (0 if c.tied else _FLOAT32 * table)
  return around + 2 * (data - 1) / data * summed / held / n


def seconds(
    one: Measured, machine: Machine, assumptions: Assumptions, devices: int
) -> tuple[float, str]:
  """Returns how long all runs of a program in an update take, and why.

  The longest of what the products, the memory and the links take.
  """
  chip = machine.chip
  links = {}
  for name, total in one.sent.items():
    links[name] = total / (chip.link * assumptions.links)
  parts = {
      "FLOPs": one.flops / devices / (chip.flops * assumptions.utilization),
      "memory": one.moved / (chip.bandwidth * assumptions.reach),
      "links": sum(links.values()),
  }
  why = max(parts, key=parts.__getitem__)
  return one.times * parts[why], why


def evaluations(
    config: Config,
) -> Iterator[tuple[str, Sequence[str], int]]:
  """Yields a run's evaluations: whose program, names of sets, how often."""
  spec = config.evaluation
  if not spec.sets:
    return
  every = tuple(spec.sets)
  # Before the first update, and on the way.
  before = 1 + (max(config.steps - 1, 0) // spec.every if spec.every else 0)
  yield build.EVALUATION["student"], spec.between or every, before
  yield build.EVALUATION["student"], every, 1
  if spec.teacher:
    yield build.EVALUATION["teacher"], every, 1


def answers(spec: EvaluationSpec, names: Sequence[str]) -> int:
  """Returns how many answers an evaluation of some sets writes.

  Raises:
    UserError: a set cannot be read, and its size is not known.
  """
  total = 0
  for name in names:
    one = spec.sets[name]
    number = one.size or benchmarks.PROBLEMS.get(one.source)
    if number is None:
      number = len(records.read(one))
    total += number * (one.samples + int(spec.greedy))
  return total


def suggest_mesh(
    config: Config, student: ModelConfig, teacher: ModelConfig,
    machine: Machine,
) -> MeshSpec:  # fmt: skip
  """Chooses a mesh: as little tensor parallelism as the memory allows.

  Weights, moments and gradients are split over fsdp, which sends less than
  tensor shards do as long as there is a prompt for each device. The weights
  that decode are split over sampling_tensor alone, and so are the keys and
  values of one prompt's rollouts, of which a device has some at least; or, when
  the teacher is evaluated, of one answer. Slices, and GPUs of more hosts if one
  host holds the weights, are replicas.
  """
  budget = machine.chip.memory
  inside = machine.size // machine.slices
  held = 16 * num_params(student)
  held += (2 if config.teacher.param_dtype == "bfloat16" else 4) * num_params(
      teacher
  )
  width = 2 if config.student.compute_dtype == "bfloat16" else 4
  if machine.chip.platform == "gpu":
    host = min(machine.chip.host, inside)
    if held / host <= _HELD * budget:
      inside = host
  prompt = config.data.max_prompt_len
  decoding = width * num_params(student) + _cache_bytes(
      student, width,
      config.rollout.per_prompt * (prompt + prefix_schedule.longest(config)),
  )  # fmt: skip
  if config.evaluation.sets and config.evaluation.teacher:
    width = 2 if config.teacher.compute_dtype == "bfloat16" else 4
    decoding = max(decoding, width * num_params(teacher) + _cache_bytes(
        teacher, width, prompt + config.evaluation.max_len
    ))  # fmt: skip
  resting = held - _FLOAT32 * num_params(student)  # Gradients come later.
  most = min(inside, student.num_kv_heads)
  tensor = 1
  while tensor < most and config.data.batch_size % (machine.size // tensor):
    tensor *= 2
  sampling = tensor
  while (
      sampling < most
      and resting / inside + decoding / sampling > _DECODING * budget
  ):
    sampling *= 2
  return MeshSpec(
      data=machine.size // inside, fsdp=inside // tensor, tensor=tensor,
      sampling_tensor=sampling if sampling != tensor else 0,
  )  # fmt: skip


def _cache_bytes(model: ModelConfig, width: int, tokens: int) -> int:
  """Returns the bytes of the keys and values of so many tokens."""
  pair = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  return width * pair * tokens


def choose_buckets(config: Config) -> tuple[int, ...]:
  """Returns the lengths to compile for: the first, one near 2048, the last."""
  needed = prefix_schedule.needed(config)
  middle = min(needed, key=lambda b: abs(b - 2048))
  return tuple(sorted({needed[0], middle, needed[-1]}))


def check_weights(plan: build.Plan, machine: Machine) -> None:
  """Raises TooLargeError if not even weights and the like fit.

  While the student is differentiated its weights, their gradient and the
  teacher's weights lie side by side, and the moments unless they are offloaded.
  To say so takes no compiler.
  """
  parts = held(plan)
  parts["gradient"] = parts["student"]
  config = plan.setup.config
  if config.optimizer.offload:
    del parts["moments"]
  total, limit = sum(parts.values()), machine.chip.memory
  if total <= limit:
    return
  listed = ", ".join(f"{k} {v / _GIB:.1f}" for k, v in parts.items())
  replicas = plan.setup.mesh.shape["data"]
  least = math.ceil(total / limit * machine.size / replicas)
  offload = "" if config.optimizer.offload else ", or optimizer.offload=True"
  raise TooLargeError(
      f"a device of {machine.name} would hold {total / _GIB:.1f} of"
      f" {limit / _GIB:.2f} GiB before the first activation ({listed}); use"
      f" {least} devices or more with mesh.data=1{offload}."
  )


def held(plan: build.Plan) -> dict[str, float]:
  """Returns bytes on a device of what a run keeps throughout."""
  state = plan.programs.abstract_state()
  parts = {
      "student": state.params,
      "moments": state.opt_state,
      "teacher": plan.teacher_params,
  }
  size = sharding.bytes_per_device
  return {name: float(size(tree)) for name, tree in parts.items()}
