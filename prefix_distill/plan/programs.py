"""A run's programs for a machine that is not there: called, compiled, measured.

A machine is known by its devices' data sheets, and by how to get its compiler.

The run's own update and its own evaluation are called on shapes; no array
exists. What a compiler says of a program is kept in a file, named by a hash of
the program's text, the machine and the versions. A second look then costs the
tracing alone.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np
import rich.console

from prefix_distill import compilation
from prefix_distill import sharding
from prefix_distill.compilation import Variant
from prefix_distill.config import Config
from prefix_distill.distill import chunked_head
from prefix_distill.distill import prefix_schedule
from prefix_distill.errors import ConfigError
from prefix_distill.errors import JsonError
from prefix_distill.errors import read_json
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models import lora
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_adapters
from prefix_distill.models.config import num_params
from prefix_distill.models.config import QWEN3_0_6B
from prefix_distill.models.config import QWEN3_1_7B
from prefix_distill.models.config import QWEN3_4B
from prefix_distill.models.config import QWEN3_8B
from prefix_distill.models.config import QWEN3_14B
from prefix_distill.models.config import R1_DISTILL_LLAMA_8B
from prefix_distill.models.config import R1_QWEN_1_5B
from prefix_distill.models.config import R1_QWEN_7B
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.plan import cost
from prefix_distill.plan.cost import Allowed
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.train import microbatch
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import update
from prefix_distill.train.setup import Models
from prefix_distill.train.update import Programs
from prefix_distill.train.update import REWRITE_ROLE

_GIB, _FLOAT32 = 2**30, 4
# JAX says one of these when a compiler is not installed.
_MISSING = re.compile(
    "not installed|not found|plugin|unknown backend|not implemented for cuda"
)
# More devices than any pod has.
_MOST_DEVICES = 2**16
_TARGETS = pathlib.Path(__file__).parent / "targets"
# Evaluation's programs, by the model that writes the answers; and that of the
# teacher which answers the prompts of SeqKD before the first update.
EVALUATION = {"student": "evaluate", "teacher": "evaluate teacher"}
ANSWER = "answer"
# Scores the student's answers in evaluations.
SCORING = "inspect"
ANSWERING = (*EVALUATION.values(), ANSWER)
_SAMPLING = ("move", "prefill", "layout", "decode", "cut")
# Of the teacher that rewrites answers.
_MOVE, _PREFILL, _LAYOUT, _DECODE = REWRITING = tuple(
    f"{REWRITE_ROLE}{name}" for name in _SAMPLING[:4]
)
REWRITING_ROWS = (_PREFILL, _DECODE)
# The programs to compile, cheap ones first. The cut moves a few tokens.
_TRAINING = (
    *("refresh", "move", "layout", _MOVE, _LAYOUT),
    *("apply", "score", "prefill", _PREFILL),
)
ORDER = (*_TRAINING, *ANSWERING, SCORING, "decode", _DECODE, "gradient")
# These programs are the same for all lengths of the prefix.
_ONCE = ("refresh", "move", "layout", "apply", *REWRITING)
# The architectures of the recipes' models, for a laptop without a network.
_KNOWN = {
    "Qwen/Qwen3-0.6B": QWEN3_0_6B,
    "Qwen/Qwen3-1.7B": QWEN3_1_7B,
    "Qwen/Qwen3-4B": QWEN3_4B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": R1_QWEN_1_5B,
    "Skywork/Skywork-OR1-7B": R1_QWEN_7B,
    "Qwen/Qwen3-14B": QWEN3_14B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": R1_DISTILL_LLAMA_8B,
}
# A collective needs no plan if a device sends no more than so many bytes, nor
# than this share of the largest weight. Counters and the like are so small.
_NEGLIGIBLE, _SMALL_SHARE = 2**20, 1 / 16
# Where there is a device XLA tunes its products and then fuses fewer of them.
# On an H200 score and gradient took 1.07 and 1.05 of what was compiled without
# one, decoding and prompts 1.00 and 1.01 (docs/results/accelerator.md).
_TUNED, _TUNING = ("score", "gradient"), 1.08
# A TPU's compiler says "Used 26.90G of 15.75G hbm", or "... required for HLO
# temporaries (16.17G) exceeds available HBM (15.75G)".
_USED = re.compile(
    r"(?:[Uu]sed |required[^(]*\()([\d.]+)([KMGT])i?B?"
    r"(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class MachineError(UserError):
  """A machine that is not known, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device's data sheet.

  Attributes:
    platform: "tpu" or "gpu".
    flops: dense bfloat16 FLOPs a second.
    memory: bytes that programs may use. On a TPU what the compiler allows; on a
      GPU nine tenths, for XLA's allocator and the libraries need some.
    bandwidth: bytes a second of the memory.
    link: bytes a second that a device sends, one way, over all links.
    accelerator: a TPU's accelerator type, without the size.
    host: devices of a host.
  """

  platform: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  accelerator: str = ""
  host: int = 4


# Numbers are of the makers' data sheets.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip("tpu", 197e12, 15.75 * _GIB, 819e9, 180e9, "v5litepod"),
    "v5p": Chip("tpu", 459e12, 95.73 * _GIB, 2765e9, 540e9, "v5p"),
    "v6e": Chip("tpu", 918e12, 31.24 * _GIB, 1640e9, 360e9, "v6e"),
    "a100": Chip("gpu", 312e12, 0.9 * 79.15 * _GIB, 2039e9, 300e9, "", 8),
    "h100": Chip("gpu", 989e12, 0.9 * 79.1 * _GIB, 3352e9, 450e9, "", 8),
    "h200": Chip("gpu", 989e12, 0.9 * 139.8 * _GIB, 4800e9, 450e9, "", 8),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """A number of devices of one kind.

  Attributes:
    name: as it was asked for.
    chip: data sheet of each device.
    shape: devices along each dimension of a TPU's slice; the number of GPUs.
    slices: number of a TPU's slices.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.slices


def known_machines() -> str:
  """Returns a sentence's part that names the machines."""
  tpus = [k for k, chip in CHIPS.items() if chip.platform == "tpu"]
  gpus = [k for k, chip in CHIPS.items() if chip.platform == "gpu"]
  return (
      f"TPUs {', '.join(tpus)} with the shape of a slice, as v5e:4x4 or"
      " v5p:2x2x2 (two such slices: v5e:4x4*2), and GPUs"
      f" {', '.join(gpus)} with their number, as h100:8"
  )


def parse_machine(name: str) -> Machine:
  """Reads "v5e:4x4", "v5e:4x4*2" (two slices) or "h100:8".

  Raises:
    MachineError: the name is of another form, or of no such machine.
  """
  number = "[0-9]{1,6}"
  found = re.fullmatch(
      rf"(\w+):({number}(?:x{number})*)(?:\*({number}))?", name
  )
  kind = found and CHIPS.get(found[1])
  if not kind:
    raise MachineError(
        f"--topology={shown(name)[1:-1]} is not known; there are"
        f" {known_machines()}."
    )
  shape = tuple(map(int, found[2].split("x")))
  slices = int(found[3] or 1)
  size = math.prod(shape) * slices
  if not 1 <= size <= _MOST_DEVICES:
    raise MachineError(
        f"--topology={shown(name)[1:-1]} has {size} devices; use 1 or more, up"
        f" to {_MOST_DEVICES}."
    )
  if kind.platform == "gpu":
    if len(shape) > 1 or slices > 1:
      raise MachineError(
          f"--topology={name}: GPUs have a number and no shape; use"
          f" {found[1]}:{math.prod(shape) * slices}."
      )
    if shape[0] > kind.host and shape[0] % kind.host:
      raise MachineError(
          f"--topology={name}: {shape[0]} GPUs do not fill hosts of"
          f" {kind.host}; use a multiple of {kind.host}."
      )
  wanted = 3 if found[1] == "v5p" else 2
  if kind.platform == "tpu" and len(shape) != wanted:
    raise MachineError(
        f"--topology={name}: slices of {found[1]} have {wanted} dimensions;"
        f" use {found[1]}:{'x'.join(['2'] * wanted)} or the like."
    )
  return Machine(name, kind, shape, slices)


def devices(machine: Machine) -> list:
  """Returns devices to compile for, none of which is there.

  Raises:
    MachineError: the compiler is not installed, or knows no such slice.
  """
  kind, platform = machine.name.partition(":")[0], machine.chip.platform
  try:
    if platform == "tpu":
      size = math.prod(machine.shape)
      # The compiler wants some accelerator type; the shape counts.
      os.environ.setdefault(
          "TPU_ACCELERATOR_TYPE", f"{machine.chip.accelerator}-{size}"
      )
      options = {"num_slices": machine.slices} if machine.slices > 1 else {}
      name = f"{kind}:{'x'.join(map(str, machine.shape))}"
      return topologies.get_topology_desc(name, "tpu", **options).devices
    hosts = max(machine.size // machine.chip.host, 1)
    return topologies.get_topology_desc(
        "compile_only",
        "cuda",
        topology=f"1x{hosts}x{machine.size // hosts}",
        target_config=(_TARGETS / f"{kind}.txtpb").read_text(),
    ).devices
  except Exception as error:  # libtpu and the plugins raise many kinds.
    reason = " ".join(str(error).split())[:300]
    if _MISSING.search(reason.lower()):
      compiler, install = "cuda", "'jax[cuda13]' (or [cuda12])"
      if platform == "tpu":
        compiler, install = "tpu", "'jax[tpu]'"
      raise MachineError(
          f"--topology={machine.name} needs the compiler for {compiler}, which"
          f" is not installed here; run: pip install {install}."
          f" ({reason})"
      ) from error
    raise MachineError(
        f"--topology={machine.name} is refused by the compiler ({reason});"
        f" there are {known_machines()}."
    ) from error


@dataclasses.dataclass(frozen=True)
class Stage:
  """A program of an update or an evaluation, and how often it runs.

  Attributes:
    name: the program's; of the decoding of whole answers one of `ANSWERING`.
    variant: the program for its shapes.
    times: how often it runs.
    rows: of one run, over all devices; 0 if it has none.
    trips: how often a loop in it runs whose end depends on data, at most.
    share: of the cache that "decode" reads for a token, on average.
  """

  name: str
  variant: Variant
  times: int
  rows: int = 0
  trips: int = 1
  share: float = 1.0

  @property
  def columns(self) -> int:
    """Columns of the cache of a program that decodes; else 0."""
    state = self.variant.arguments.get("state")
    decodes = isinstance(state, generate.DecodeState)
    return state.cache.columns if decodes else 0


def _rows(variant: Variant) -> int:
  """Returns the rows of a program's batch."""
  for argument in variant.arguments.values():
    parts = argument if isinstance(argument, tuple) else (argument,)
    for part in parts:
      if isinstance(part, PromptBatch):
        return len(part.tokens)
      if isinstance(part, generate.DecodeState):
        return len(part.newest)
  return 0


def _share(variant: Variant, prompt: int, drawn: int) -> float:
  """Returns the share of the cache that a segment of decoding reads a token.

  Args:
    variant: of `generate.decode`.
    prompt: tokens of a row's prompt.
    drawn: tokens that a row has drawn before.
  """
  found = variant.arguments
  model, config = found["model"], found["config"]
  kernel = model.cache_kernel(generate.cache_dtype(model, config))
  if not kernel.reads_lengths:
    return 1.0
  read = prompt + drawn + found["steps"] / 2
  return min(read / found["state"].cache.columns, 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config on a machine.

  Attributes:
    models: of the run's updates.
    programs: the run's programs, none compiled yet.
    answering: the models while the teacher answers the prompts of SeqKD, which
      it does alone; None for another method.
  """

  models: Models
  programs: Programs
  answering: Models | None = None

  @property
  def teacher_params(self) -> Params:
    """Shapes of the teacher's weights on the devices."""
    return self.programs.on_device(self.programs.abstract_teacher())

  @property
  def student_params(self) -> Params:
    """Shapes of the student's weights, adapters included."""
    trained = self.programs.abstract_state().params
    return lora.join(self.programs.abstract_base(), trained)

  def stages(self, cap: int) -> list[Stage]:
    """Returns the programs of an update whose rollouts all reach a cap."""
    calls: list[Variant] = []
    with compilation.watching(calls.append):
      self.programs.update_on_shapes(cap)
    return self._stages(calls, self.models.config.data.max_prompt_len)

  @property
  def rewrites(self) -> bool:
    """Whether updates learn from rewritten answers."""
    return self.programs.sources[0] == "rewrite"

  def length(self, name: str, bucket: int) -> int:
    """Returns the longest answer that a program of an update with P sees."""
    rollout = self.models.config.rollout
    if name in REWRITING:
      return rollout.rewriting_len
    drafts = self.rewrites and name in _SAMPLING
    return rollout.draft_len if drafts else bucket

  def _stages(self, calls: Iterable[Variant], usual: int) -> list[Stage]:
    """Counts calls; `usual` is the number of tokens of a usual prompt."""
    found: dict[Variant, list[float]] = {}
    drawn, prompt = 1, usual
    for variant in calls:
      share, name = 1.0, variant.program.name
      if name in ("prefill", _PREFILL):
        drawn, prompt = 1, usual
        if name == _PREFILL:
          prompt = self.models.config.rollout.rewrite.max_prompt_len
      elif name in ("decode", _DECODE):
        share = _share(variant, prompt, drawn)
        drawn += variant.arguments["steps"]
      found.setdefault(variant, []).append(share)
    return [
        Stage(
            variant.program.name,
            variant,
            len(shares),
            _rows(variant),
            self._chunks(variant),
            sum(shares) / len(shares),
        )
        for variant, shares in found.items()
    ]

  def _chunks(self, variant: Variant) -> int:
    """Returns in how many chunks the output head takes the tokens, at most."""
    if variant.program.name not in ("score", "gradient", SCORING):
      return 1
    found = variant.arguments
    rollout = found.get("rollout") or found["inputs"][1]
    mesh, student = self.models.mesh, self.models.student.config
    split = mesh.shape["tensor"]
    rows = student.vocab_size // (1 if student.vocab_size % split else split)
    tokens = rollout.tokens.size // sharding.batch_shards(mesh)
    return chunked_head.chunks(tokens, rows, self.models.loss.memory)[0]

  def evaluation(self) -> list[Stage]:
    """Returns the decoding of evaluation, for each size of the cache.

    All answers are as long as they may be.
    """
    models, spec = self.models, self.models.config.evaluation
    if not spec.sets:
      return []
    stages = self._evaluate("student", models.student, self.student_params)
    if spec.teacher and models.teacher is not None:
      stages += self._evaluate("teacher", models.teacher, self.teacher_params)
    return stages

  def scoring(self) -> list[Stage]:
    """Returns the program that scores a batch of evaluation's answers.

    A batch has as many answers as an update has rollouts. The list is empty if
    no answer is scored.
    """
    spec = self.models.config.evaluation
    if not (spec.scored and spec.sets):
      return []
    calls: list[Variant] = []
    scoring = self.programs
    if self.answering is not None:
      scoring = Programs(self.answering.scoring)
    with compilation.watching(calls.append):
      scoring.divergences_on_shapes(
          self.student_params, self._longest_prompt
      )
    return [x for x in self._stages(calls, 0) if x.name == SCORING]

  @property
  def _longest_prompt(self) -> int:
    """S of evaluation's prompts."""
    config = self.models.config
    sets, usual = config.evaluation.sets, config.data.max_prompt_len
    return max(one.max_prompt_len or usual for one in sets.values())

  def answers(self) -> list[Stage]:
    """Returns the decoding of the teacher's answers, as `evaluation` does."""
    if self.answering is None:
      return []
    models, config = self.answering, self.answering.config
    sampler = generate.SamplerConfig(
        models.teacher_stop_ids, models.pad_id, models.num_tokens
    )
    prompt, length = config.data.max_prompt_len, config.rollout.max_len
    params = self.answering_params
    model = models.for_sampling(models.teacher)
    rows = microbatch.answers(models, model, sampler, params, prompt, length)
    return self._decoding(
        ANSWER, model, sampler, params, (rows, prompt, length)
    )

  @property
  def answering_params(self) -> Params:
    """Shapes of the weights of the teacher that answers."""
    models = self.answering
    dtype = models.config.teacher.param_dtype
    return update.abstract_weights(models.teacher, dtype, models.mesh)

  def _evaluate(self, role: str, model: Model, params: Params) -> list[Stage]:
    models, spec = self.models, self.models.config.evaluation
    model = models.for_sampling(model)
    config = evaluator.sampler_config(
        spec, models.stop_ids, models.pad_id, models.num_tokens
    )
    prompt = self._longest_prompt
    resting = self.programs.resting()
    rows = microbatch.answers(models, model, config, resting, prompt)
    shape = rows, prompt, spec.max_len
    return self._decoding(EVALUATION[role], model, config, params, shape)

  def _decoding(
      self,
      name: str,
      model: Model,
      config: generate.SamplerConfig,
      params: Params,
      shape: tuple[int, int, int],
  ) -> list[Stage]:
    """Returns the decoding of answers of full length, under a name.

    Args:
      name: one of `ANSWERING`.
      model: on the mesh of sampling.
      config: how it samples.
      params: shapes of its weights.
      shape: rows, tokens of a prompt and of an answer.
    """
    rows, prompt, length = shape
    prompts = PromptBatch(
        jax.ShapeDtypeStruct((rows, prompt), np.int32),
        jax.ShapeDtypeStruct((rows, prompt), bool),
        jax.ShapeDtypeStruct((rows, 2), np.int32),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    calls: list[Variant] = []
    with compilation.watching(calls.append):
      engine = continuous_batching.Engine(model, config, params, rows)
      for _ in engine.answers(prompts, key, generate.Draw.of(length)):
        pass
    usual = self.models.config.data.max_prompt_len
    return [
        dataclasses.replace(stage, name=name)
        for stage in self._stages(calls, usual)
        if stage.name == "decode"
    ]

  def mesh(self, name: str) -> jax.sharding.Mesh:
    """Returns the mesh that a program runs on."""
    if name in (*_SAMPLING, *REWRITING, *ANSWERING):
      return self.models.sampling_mesh
    return self.models.mesh

  def beside(self, stage: Stage) -> dict[str, Any]:
    """Returns shapes of what lies in the memory while a program runs."""
    models, config, name = self.models, self.models.config, stage.name
    state, lying = self.programs.abstract_state(), {}
    two_meshes = models.sampling_mesh != models.mesh
    if name == ANSWER:  # Neither the student nor its moments are there yet.
      lying["teacher"] = self.answering_params
      if two_meshes:
        lying["moved"] = self._moved(self.answering.teacher)
      return lying
    evaluated = {v: k for k, v in EVALUATION.items()}.get(name)
    teacher_waits = (
        config.teacher.offload
        and (name in _SAMPLING or evaluated == "student")
    )
    shared = models.shares_weights
    takes_teacher = ["score", "refresh", _MOVE, SCORING]
    takes_student = ["refresh", "move", "gradient", "apply", SCORING]
    if not two_meshes:
      takes_teacher += [_PREFILL, _LAYOUT]
      takes_student += ["prefill", "layout"]
    if not (teacher_waits or shared or name in takes_teacher):
      lying["teacher"] = self.teacher_params
    if name == "apply":  # It takes what is trained alone.
      lying["student"] = self.programs.abstract_base()
    elif name not in takes_student:
      has_base = shared and name in takes_teacher
      lying["student"] = state.params if has_base else self.student_params
    if two_meshes and evaluated:  # Prompts are read between two segments.
      model = models.teacher if evaluated == "teacher" else models.student
      lying["moved"] = self._moved(model)
    if not config.optimizer.offload and name != "apply":
      lying["moments"] = state.opt_state
    if name == "score" and stage.times > 1:  # A part's gradient is kept.
      lying["gradient"] = state.params
    return lying

  def _moved(self, model: Model) -> Params:
    """Shapes of a model's weights on the mesh of sampling."""
    weights = jax.eval_shape(model.cast, model.abstract_params())
    return sharding.with_shardings(weights, self.models.sampling_mesh)

  def _largest(self) -> tuple[int, int]:
    """Returns float32 bytes of the largest layer and of the largest table."""
    layers, tables, models = [], [], self.answering or self.models
    for model in (models.student, models.teacher):
      c = model.config
      tables.append(_FLOAT32 * c.vocab_size * c.dim)
      rest = num_params(c, False) - c.vocab_size * c.dim
      layers.append(_FLOAT32 * (rest + num_adapters(c)) // c.num_layers)
    return max(layers), max(tables)

  def unplanned(
      self, name: str, found: Sequence[cost.Collective]
  ) -> list[str]:
    """Returns sentences on a program's collectives that no plan allows."""
    negligible = min(_NEGLIGIBLE, _SMALL_SHARE * max(self._largest()))
    return cost.audit(found, self._allowed(name), negligible)

  def _allowed(self, name: str) -> list[Allowed]:
    """Returns the collectives that a program may have.

    Weights that go to the mesh of sampling are exchanged by neighbours; an
    axis of either mesh may hold several groups of neighbours. In all other
    programs a layer's weights are gathered over fsdp where they are used, and
    their gradients are scattered back. Gradients are summed over data. Over
    tensor travel sums of activations, one for the attention and one for the
    MLP.
    """
    layer, table = self._largest()
    most = max(layer, table)
    if name in ("move", _MOVE):
      axes = ("fsdp", "tensor", *cost.UNKNOWN)
      why = "weights to be sampled with"
      kinds = ("all-to-all", "collective-permute")
      return [Allowed(kind, axes, most, why) for kind in kinds]
    every = ("data", "fsdp")
    activations = 2**40  # Their size depends on the batch alone.
    return [
        Allowed("all-gather", ("fsdp",), most, "weights where they are used"),
        Allowed("collective-permute", every, most, "the same, in steps"),
        Allowed("reduce-scatter", every, most, "gradients of weights"),
        Allowed("all-reduce", ("data",), most, "gradients over replicas"),
        Allowed("all-reduce", ("tensor",), activations, "sums over the heads"),
        Allowed("reduce-scatter", ("tensor",), activations, "the same, cut"),
        Allowed("all-gather", ("tensor",), activations, "the same, whole"),
        Allowed("all-to-all", ("fsdp",), activations, "columns of embeddings"),
        # A TPU's compiler sums the output head's gradient whole and cuts it,
        # instead of scattering it. That takes twice the bytes.
        Allowed("all-reduce", every, table, "the head's"),
        Allowed("all-reduce", (*every, "tensor"), 2**22, "metrics, norms"),
    ]


def architecture(path: str) -> tuple[ModelConfig, bool]:
  """Reads a model's architecture; those of the recipes' models are known.

  Returns:
    The architecture, and whether it was read.

  Raises:
    UserError: it cannot be read, and the model is none of the recipes'.
  """
  try:
    return hf.read_config(path), True
  except hf.DownloadError as error:
    known = _KNOWN.get(path.removesuffix("-Base"))
    if known is None:
      raise hf.DownloadError(
          f"{str(error)[:-1]}; or put its config.json, all that a plan reads of"
          " a model, into a directory, and give that."
      ) from error
    return known, False


def build(config: Config, devices: list, memory: float | None = None) -> Plan:
  """Puts a run together.

  Args:
    config: settings of the run.
    devices: the machine's devices.
    memory: bytes of a device that programs may use; None for no limit.

  Raises:
    ConfigError: the mesh does not fill the devices, a batch does not split
      over the mesh, there is no teacher, or it cannot be refreshed.
  """
  if config.teacher is None:
    raise ConfigError(
        f"method is {config.method!r}, which has no teacher; plan a"
        " distillation, with method 'prefix', 'full' or 'seqkd'."
    )
  mesh = sharding.make_mesh(config.mesh, devices)
  setup_lib.check_batches(config, mesh)
  student, teacher = (
      architecture(spec.path)[0] for spec in (config.student, config.teacher)
  )
  models = [
      setup_lib.make_model(found, spec, mesh)
      for found, spec in (
          (lora.adapted(student, config), config.student),
          (teacher, config.teacher),
      )
  ]
  setup_lib.check_refresh(config, *(model.config for model in models))
  built = Models(
      config,
      mesh,
      *models,
      num_tokens=min(m.config.vocab_size for m in models),
      special_ids=(0,),
      stop_ids=(0,),
      teacher_stop_ids=(0,),
      memory=memory,
  )
  if not config.is_supervised:
    return Plan(built, Programs(built))
  learning = dataclasses.replace(built, teacher=None)
  return Plan(learning, Programs(learning), built)


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile.

  Attributes:
    plan: of the run.
    stage: the program.
    bucket: P, the length of prefixes or answers.
  """

  plan: Plan
  stage: Stage
  bucket: int

  @property
  def rows(self) -> int:
    return self.stage.rows


def jobs(plan: Plan, buckets: Sequence[int]) -> list[Job]:
  """Returns the programs to compile, cheap ones first.

  A bucket has several decoders, of which the last takes most; it stands for
  all. A program that does not depend on the bucket is there once.
  """
  once = {*_ONCE, *(_SAMPLING if plan.rewrites else ())}
  config = plan.models.config
  last = {stage.name: stage for stage in plan.evaluation()}
  longest = config.evaluation.max_len
  found = [Job(plan, stage, longest) for stage in last.values()]
  found += [Job(plan, stage, longest) for stage in plan.scoring()]
  longest = config.rollout.max_len
  found += [Job(plan, stage, longest) for stage in plan.answers()[-1:]]
  for i, bucket in enumerate(buckets):
    last = {stage.name: stage for stage in plan.stages(bucket)}
    for name, stage in last.items():
      if name in ORDER and (i == 0 or name not in once):
        found.append(Job(plan, stage, plan.length(name, bucket)))
  return sorted(found, key=lambda j: (ORDER.index(j.stage.name), j.bucket))


@dataclasses.dataclass(frozen=True)
class Measured:
  """What is known of a program before it ever runs.

  Attributes:
    name: the stage's name.
    bucket: P.
    times: how often the program runs in an update.
    rows: rows of one run, over all devices.
    flops: FLOPs of one run, over all devices, loops multiplied out.
    moved: bytes that a device at least reads and writes in one run.
    memory: bytes on a device, with everything that lies beside the program. On
      TPU an upper bound, for the compiler shares some. For a refused program
      what it wants, if the compiler says so, else 0.
    refused: the sentence of a TPU's compiler; empty if the program fits.
    sent: bytes that a device sends in one run, by kind of collective and axes.
    exact: false if a loop's trip count had to be guessed.
    unplanned: sentences on collectives that nothing plans.
    seconds: time that compiling took.
  """

  name: str
  bucket: int
  times: int
  rows: int
  flops: float
  moved: float
  memory: float = 0.0
  refused: str = ""
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  exact: bool = True
  unplanned: list[str] = dataclasses.field(default_factory=list)
  seconds: float = 0.0

  def verdict(self, machine: Machine) -> bool:
    """Whether it fits: the compiler's word on TPU, a budget on GPU."""
    if machine.chip.platform == "tpu":
      return not self.refused
    return self.memory <= machine.chip.memory


def reckon(stage: Stage, bucket: int) -> Measured:
  """Returns what follows from a program's trace alone."""
  flops = cost.flops(stage.variant.traced.jaxpr, stage.trips)
  return Measured(
      stage.name, bucket, stage.times, stage.rows, flops, moved(stage)
  )


def moved(stage: Stage) -> float:
  """Returns the bytes that a device at least reads and writes in one run.

  A step of decoding reads the weights, and of the cache what its kernel reads.
  Any other program reads its arguments and writes its results.
  """
  size, variant = sharding.bytes_per_device, stage.variant
  if not stage.columns:
    dynamic = variant.args[variant.program.static :]
    arrays = [
        x
        for x in jax.tree.leaves(dynamic)
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
    ]
    return float(size(arrays) + size(variant.results))
  found = variant.arguments
  params, state = found["params"], found["state"]
  weights = size(params)
  if "head" in params:
    # Of a table of its own only the lines that are looked up are read.
    weights -= size(params["embed"])
  cache = size(state.cache.layers)
  rest = weights + size(state) - cache
  return found["steps"] * (rest + stage.share * cache)


def _with_others(variant: Variant, others: Any) -> jax.stages.Lowered:
  """Lowers a program with arguments more, which it does not use.

  So the compiler's memory estimate counts arrays that lie there meanwhile.
  """
  program = variant.program
  options = program.options | {"keep_unused": True}
  donated = options.pop("donate_argnums", None)
  if donated is not None:
    options["donate_argnums"] = donated + 1

  def function(_, *args):
    return program.function(*args)

  jitted = jax.jit(
      function,
      static_argnums=tuple(range(1, program.static + 1)),
      **options,
  )
  return jitted.trace(others, *variant.args).lower()


def measure(job: Job, machine: Machine) -> Measured:
  """Compiles a program, or recalls what was found before.

  The memory of a program that a GPU's compiler would tune is taken a little
  larger than the compiler says.

  Raises:
    JaxRuntimeError: the compiler fails for another reason than the memory.
  """
  plan, stage = job.plan, job.stage
  known = reckon(stage, job.bucket)
  lowered = _with_others(stage.variant, plan.beside(stage))
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  directory = home.expanduser() / "prefix_distill" / "plan"
  file = directory / f"{_key(lowered, job, machine)}.json"
  found = _recalled(file)
  if found is None:
    start = time.monotonic()
    found = _compile(lowered, job)
    found["seconds"] = time.monotonic() - start
    directory.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.rename(file)
  if machine.chip.platform == "gpu" and stage.name in _TUNED:
    found["memory"] *= _TUNING
  return dataclasses.replace(known, **found)


def _recalled(file: pathlib.Path) -> dict[str, Any] | None:
  """Returns what was found before; None if nothing, or nothing readable."""
  try:
    found = read_json(file)
  except JsonError:
    return None
  return found if isinstance(found, dict) and "memory" in found else None


def _key(lowered: jax.stages.Lowered, job: Job, machine: Machine) -> str:
  versions = [jax.__version__, jax.lib.__version__]
  try:
    import libtpu  # noqa: PLC0415

    versions.append(libtpu.__version__)
  except ImportError:
    pass
  mesh = dict(job.plan.mesh(job.stage.name).shape)
  text = f"{lowered.as_text()}{machine}{mesh}{job.stage.trips}{versions}"
  for file in (cost.__file__, __file__):
    text += pathlib.Path(file).read_text()
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _compile(lowered: jax.stages.Lowered, job: Job) -> dict[str, Any]:
  """Returns fields of `Measured`."""
  plan, stage = job.plan, job.stage
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _refusal(str(error))
  sizes = compiled.memory_analysis()
  memory = getattr(sizes, "total_allocation_bytes", 0)
  if not memory:
    memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    memory += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
  mesh = plan.mesh(stage.name).shape
  found = cost.collectives(compiled.as_text(), mesh, stage.trips)
  sent = {}
  for one in found:
    if one.total:
      name = f"{one.kind} over {' x '.join(one.axes)}"
      sent[name] = sent.get(name, 0.0) + one.total
  return {
      "memory": float(memory),
      "sent": sent,
      "exact": all(one.exact for one in found),
      "unplanned": plan.unplanned(stage.name, found),
  }


def _refusal(text: str) -> dict[str, Any]:
  """Returns the numbers of a TPU compiler's refusal, and a sentence's part."""
  found = _USED.search(text)
  if not found:
    return {"refused": " ".join(text.split())[:300]}
  used, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
  sentence = f"needs {used / _GIB:.1f} of {limit / _GIB:.2f} GiB"
  return {"refused": sentence, "memory": used}


@dataclasses.dataclass(frozen=True)
class Look:
  """Compiles programs for a machine, and prints the progress.

  Attributes:
    machine: the machine to compile for.
    devices: the machine's devices.
    console: for the progress.
  """

  machine: Machine
  devices: list
  console: rich.console.Console

  def build(self, config: Config) -> Plan:
    return build(config, self.devices, self.machine.chip.memory)

  def at(self, config: Config, buckets: Sequence[int]) -> list[Measured]:
    """Compiles all programs of a config."""
    todo = jobs(self.build(config), buckets)
    return [
        self.measure(job, f"[{i}/{len(todo)}] ")
        for i, job in enumerate(todo, 1)
    ]

  def job(self, config: Config, name: str, bucket: int) -> Job:
    """Returns one program of a config."""
    # What is rewritten may be longer than what is learned of it.
    bucket = min(bucket, prefix_schedule.longest(config))
    found = jobs(self.build(config), (bucket,))
    return next(job for job in found if job.stage.name == name)

  def measure(self, job: Job, number: str = "") -> Measured:
    """Compiles a program and prints what it takes, behind a number."""
    label = f"{number}{job.stage.name} at P = {job.bucket:,}"
    label += f", {job.rows:,} rows" if job.rows else ""
    with self.console.status(f"{label}: compiling"):
      found = measure(job, self.machine)
    size = found.refused or f"{found.memory / _GIB:.1f} GiB"
    text = f"{label}: {size} ({found.seconds:.0f} s)"
    self.console.print(text, markup=False)
    return found
