"""A run's settings, and what must fit between their parts."""

import dataclasses

from prefix_distill import errors
from prefix_distill.recipe import LossSpec
from prefix_distill.recipe import PrefixSpec
from prefix_distill.recipe import RolloutSpec
from prefix_distill.specs import CheckpointSpec
from prefix_distill.specs import DataSpec
from prefix_distill.specs import EvaluationSpec
from prefix_distill.specs import MeshSpec
from prefix_distill.specs import ModelSpec
from prefix_distill.specs import OptimizerSpec

METHODS = ("prefix", "full", "sft", "seqkd")


@dataclasses.dataclass(frozen=True)
class Config:
  """A run.

  Attributes:
    method: "prefix" stops rollouts at a growing or fixed cap, "full" at
      `rollout.max_len`; "sft" trains on the records' completions; "seqkd" has
      the teacher write an answer to each prompt once, keeps them in the
      workdir, and trains on those (arXiv 1606.07947).
    steps: updates.
    seed: of the data order, sampling and random initialisation.
    teacher: None for `sft`.
  """

  method: str
  steps: int
  student: ModelSpec
  data: DataSpec
  rollout: RolloutSpec
  optimizer: OptimizerSpec
  evaluation: EvaluationSpec
  seed: int = 0
  teacher: ModelSpec | None = None
  prefix: PrefixSpec = PrefixSpec()
  loss: LossSpec = LossSpec()
  mesh: MeshSpec = MeshSpec()
  checkpoint: CheckpointSpec = CheckpointSpec()

  def __post_init__(self):
    errors.check(
        self.method in METHODS,
        f"method is {self.method!r}; use one of {METHODS}.",
    )
    errors.at_least("config", {"steps": self.steps, "seed": self.seed}, 0)
    errors.check(
        self.student.param_dtype == "float32",
        f"student.param_dtype is {self.student.param_dtype!r}, but AdamW's"
        " small steps vanish in bfloat16; set it to 'float32' and, to compute"
        " in bfloat16, student.compute_dtype.",
    )
    distils = not self.is_supervised
    errors.check(
        self.method == "sft" or self.teacher is not None,
        f"method is {self.method!r} but teacher is None; name a teacher.",
    )
    errors.check(
        self.method != "sft" or bool(self.data.train.completion),
        "method is 'sft' but data.train.completion is empty; name the field"
        " that holds the answers to learn.",
    )
    errors.check(
        distils or self.rollout.per_prompt == 1,
        f"method is {self.method!r} but rollout.per_prompt is"
        f" {self.rollout.per_prompt}; a record has one completion, so set it"
        " to 1.",
    )
    errors.check(
        distils or not self.data.teacher_prompt,
        f"method is {self.method!r} but data.teacher_prompt is set, and no"
        " teacher scores anything; leave it empty.",
    )
    errors.check(
        self.prefix.schedule != "fixed"
        or self.prefix.length <= self.rollout.max_len,
        f"prefix.length is {self.prefix.length} but rollout.max_len is"
        f" {self.rollout.max_len}; lower the first or raise the second.",
    )
    self._check_source()
    errors.check(
        not self.student.offload,
        "student.offload is True, but the student is never idle; set it to"
        " False (optimizer.offload keeps its moments in the host's memory).",
    )

  def _check_source(self) -> None:
    """Checks the rollouts' source and the schedule against the loss."""
    source, form = self.rollout.source, self.loss.form
    errors.check(
        source == "student" or form == "exact",
        f"rollout.source is {source!r} but loss.form is {form!r}, which needs"
        " tokens that the student drew; set loss.form to 'exact'.",
    )
    errors.check(
        source != "data" or bool(self.data.train.completion),
        "rollout.source is 'data' but data.train.completion is empty; name the"
        " field that holds the answers.",
    )
    errors.check(
        self.schedule != "drift" or form == "exact",
        f"prefix.schedule is 'drift' but loss.form is {form!r}, which does not"
        " see the two models' most probable tokens; set loss.form to 'exact'.",
    )
    errors.check(
        self.schedule != "agreement" or source == "student",
        f"prefix.schedule is 'agreement' but rollout.source is {source!r};"
        " it cuts the student's own rollouts, so set that to 'student'.",
    )

  @property
  def is_supervised(self) -> bool:
    """Whether it learns from given answers, without a teacher's scores."""
    return self.method in ("sft", "seqkd")

  @property
  def reads_completions(self) -> bool:
    """Whether records need a completion."""
    return self.method == "sft" or self.rollout.source == "data"

  @property
  def schedule(self) -> str:
    """What chooses the caps; empty if they are all of full length."""
    return self.prefix.schedule if self.method == "prefix" else ""

  @property
  def rollouts_per_step(self) -> int:
    return self.data.batch_size * self.rollout.per_prompt

  @property
  def longest_prefix(self) -> int:
    """The largest cap that this run can reach."""
    if self.method != "prefix":
      return self.rollout.max_len
    if self.prefix.schedule == "fixed":
      return self.prefix.length
    if self.prefix.schedule != "linear":
      return self.rollout.max_len
    changes = max(self.steps - 1, 0) // self.prefix.every
    last = self.prefix.start + self.prefix.increment * changes
    return min(last, self.rollout.max_len)
