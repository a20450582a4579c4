"""The FLOPs of each phase of an update, from actual lengths.

The count covers the work of this package on real tokens. A prompt is read once
and cached, attention is causal, and the output head runs only on positions that
predict a token. The count leaves out padding, elementwise work (norms, softmax,
sampling) and the attention scores that kernels compute again in the backward
pass. Tests compare each phase with the compiler's own count. `Prices` charges
the updates of a run, and `Totals` is the ledger that the run keeps.

The `paper_` functions are the paper's formula, by which its tables compare
methods. The formula is coarser: every rollout reads its prompt again, the
student's log-probabilities take their own pass, the optimizer is free, and all
weights are trained, even those that LoRA leaves alone.

A product of [m, k] and [k, n] is 2 m k n FLOPs.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_adapters
from prefix_distill.models.config import num_params
from prefix_distill.models.config import num_trained

# AdamW's operations per parameter: mean of the gradient 1, its norm 2, clipping
# 3, moments 3 + 4, bias corrections 2, root, epsilon and quotient 3, decay 2,
# learning rate 1, sum 1. XLA also counts 22, and 6 more for what keeps numbers
# that are not finite out: the norm of the step, and the choice between new and
# old. Those are not AdamW's, and not charged.
ADAMW_OPERATIONS = 22
Array = np.ndarray | Sequence[float] | float


@dataclasses.dataclass(frozen=True)
class RewritingLengths:
  """The actual lengths of answers that the teacher rewrites, in tokens.

  Attributes:
    drafts: [prompts * n], of the student's answers.
    prompts: [prompts * n], of the teacher's turns, which hold those.
    written: [prompts * n], of what the teacher wrote.
    kept: [prompts * n], of what was taken of that, before the cap; 0 of a
      rewriting that failed.
  """

  drafts: np.ndarray
  prompts: np.ndarray
  written: np.ndarray
  kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class Lengths:
  """The actual lengths of an update's sequences, in tokens.

  Attributes:
    prompts: [prompts].
    sampled: [prompts * n], of each answer, at least 1, or 0 if it is masked;
      the n answers to one prompt are neighbours.
    teacher_prompts: [prompts] or [prompts * n], of the teacher's own prompts;
      None if the teacher reads the student's.
    trained: [prompts * n], the tokens of each answer that train the student;
      None for all.
    rewriting: how the answers came about; None if they were not rewritten.
  """

  prompts: np.ndarray
  sampled: np.ndarray
  teacher_prompts: np.ndarray | None = None
  trained: np.ndarray | None = None
  rewriting: RewritingLengths | None = None

  @property
  def drawn(self) -> int:
    """Tokens that were sampled, by whichever model."""
    if self.rewriting is None:
      return int(self.sampled.sum())
    return int(self.rewriting.drafts.sum() + self.rewriting.written.sum())

  @property
  def read(self) -> np.ndarray:
    """[prompts * n], the prompt of each answer."""
    return self._fan_out(self.prompts)

  @property
  def teacher_read(self) -> np.ndarray:
    """[prompts * n], the prompt that the teacher reads for each answer."""
    own = self.teacher_prompts
    return self._fan_out(self.prompts if own is None else own)

  @property
  def learned(self) -> np.ndarray:
    """[prompts * n], the tokens of each answer that train the student."""
    return self.sampled if self.trained is None else self.trained

  def _fan_out(self, prompts: np.ndarray) -> np.ndarray:
    return np.repeat(prompts, len(self.sampled) // len(prompts))


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """The FLOPs of one update, by phase.

  Attributes:
    prefill: reading the prompts and sampling the first tokens.
    decode: sampling the other tokens.
    score: the teacher's forward pass, with its output head.
    forward: the student's forward pass in the update.
    backward: the student's backward pass, with the recomputation by `remat`.
    optimizer: everything from gradients to new parameters.
  """

  prefill: float = 0.0
  decode: float = 0.0
  score: float = 0.0
  forward: float = 0.0
  backward: float = 0.0
  optimizer: float = 0.0

  @property
  def total(self) -> float:
    return sum(dataclasses.asdict(self).values())


PHASES = tuple(field.name for field in dataclasses.fields(StepFlops))


def layers(config: ModelConfig, lengths: Array, cached: Array = 0) -> float:
  """FLOPs of the layers over all sequences, without the output head.

    2 P (T - C) + 4 L n_heads d_head (T (T + 1) - C (C + 1)) / 2

  P is the number of weights in the layers' matrices, and in their adapters,
  which are not merged in a run. A token at position t attends to t tokens,
  itself included, in two products of n_heads d_head each. The first C of the T
  tokens are in the cache.

  Args:
    config: the model.
    lengths: T of each sequence.
    cached: C of each.
  """
  new, old = np.asarray(lengths, float), np.asarray(cached, float)
  pairs = (new * (new + 1) - old * (old + 1)) / 2
  width = config.num_layers * config.num_heads * config.head_dim
  dense = 2.0 * (_matrices(config) + num_adapters(config)) * (new - old)
  return float(np.sum(dense + 4.0 * width * pairs))


def _matrices(config: ModelConfig) -> int:
  """Counts the weights of the layers' matrix products."""
  c = config
  attention = c.dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  return c.num_layers * (attention + 3 * c.dim * c.mlp_dim)


def head(config: ModelConfig, positions: Array) -> float:
  """FLOPs of the output head over all positions: 2 V D each."""
  return 2.0 * config.vocab_size * config.dim * float(np.sum(positions))


def prefill(config: ModelConfig, prompts: Array) -> float:
  """FLOPs of reading prompts and predicting one token after each."""
  return layers(config, prompts) + head(config, np.size(prompts))


def decode(config: ModelConfig, prompts: Array, sampled: Array) -> float:
  """FLOPs of sampling answers after `prefill`, which predicts the first token.

  The model never reads the last token of an answer.

  Args:
    config: the model.
    prompts: tokens before each answer.
    sampled: tokens of each answer, at least 1.
  """
  fed = np.maximum(np.asarray(sampled, float) - 1, 0)
  read = np.asarray(prompts, float)
  return layers(config, read + fed, read) + head(config, fed)


def answers(config: ModelConfig, prompts: Array, sampled: Array) -> StepFlops:
  """FLOPs of sampling an answer to each prompt."""
  return StepFlops(
      prefill(config, prompts), decode(config, prompts, sampled)
  )


def forward(config: ModelConfig, prompts: Array, predicted: Array) -> float:
  """FLOPs of a pass over whole sequences that predicts the answers' tokens.

  The model does not read the last token. Only the last position of the prompt
  predicts a token.

  Args:
    config: the model.
    prompts: tokens before each answer.
    predicted: tokens of each answer, at least 1.
  """
  fed = np.maximum(np.asarray(predicted, float) - 1, 0)
  return layers(config, prompts + fed) + head(config, predicted)


def _recomputed(config: ModelConfig, lengths: Array, remat: str) -> float:
  """FLOPs of the recomputation by `remat`.

  "full" and "offload" compute the layers again, without the last product of
  each layer, from mlp_dim to dim: the next layer has kept its input. "dots"
  computes the two products of attention again.
  """
  if remat == "none":
    return 0.0
  lora, width = config.lora, config.mlp_dim
  if remat == "dots":
    weights = _matrices(config) + num_adapters(config)
    pairs = layers(config, lengths) - 2.0 * weights * float(np.sum(lengths))
    # Only the gradient of `out` needs the second product.
    needs_both = lora is None or "out" in lora.targets
    return pairs if needs_both else pairs / 2
  if lora is not None and "down" in lora.targets:
    width += lora.rank  # Its adapters need the product with A.
  last = 2.0 * config.num_layers * config.dim * width
  return layers(config, lengths) - last * float(np.sum(lengths))


def _training(
    student: ModelConfig, read: Array, learned: Array, remat: str
) -> dict[str, float]:
  """FLOPs of the update; a product's backward pass is two such products.

  A weight that is not trained takes only one: the gradient of its input.
  """
  once = forward(student, read, learned)
  fed = np.asarray(read, float) + np.maximum(np.asarray(learned) - 1, 0)
  again, frozen = _recomputed(student, fed, remat), 0.0
  if student.lora is not None:
    frozen = 2.0 * _matrices(student) * float(np.sum(fed))
    frozen += head(student, learned)
  return {
      "forward": once,
      "backward": 2 * once - frozen + again,
      "optimizer": float(ADAMW_OPERATIONS * num_trained(student)),
  }


def sampler(
    student: ModelConfig, teacher: ModelConfig, source: str
) -> ModelConfig | None:
  """Returns the model that samples a source's answers; None for given ones."""
  return {"student": student, "teacher": teacher, "data": None}[source]


def distillation(
    student: ModelConfig,
    teacher: ModelConfig,
    lengths: Lengths,
    source: str = "student",
    remat: str = "none",
    sees: bool = False,
) -> StepFlops:
  """FLOPs of a distillation update, as this package computes it.

  Each prompt is read once for all its rollouts. The student's log-probabilities
  are a by-product of the update. The teacher's logits count under `score`,
  though the exact loss computes them in the program of the update.

  Args:
    student: its architecture.
    teacher: its architecture.
    lengths: of the sequences.
    source: the model that sampled the answers, "student" or "teacher"; "data"
      for given answers, and "rewrite" for both models, in turn.
    remat: the recomputation in the backward pass, see `ModelSpec`.
    sees: whether the schedule sees all sampled tokens before it chooses those
      that train. Then the student's forward pass has all of them, and both
      output heads run once more.
  """
  cost = StepFlops(
      score=forward(teacher, lengths.teacher_read, lengths.sampled),
      **_training(student, lengths.read, lengths.learned, remat),
  )
  if sees:
    cost = dataclasses.replace(
        cost,
        score=cost.score + head(teacher, lengths.sampled),
        forward=forward(student, lengths.read, lengths.sampled)
        + head(student, lengths.learned),
    )
  if source == "rewrite":
    these = lengths.rewriting
    drafts = decode(student, lengths.read, these.drafts)
    return dataclasses.replace(
        cost,
        prefill=prefill(student, lengths.prompts)
        + prefill(teacher, these.prompts),
        decode=drafts + decode(teacher, these.prompts, these.written),
    )
  writer = sampler(student, teacher, source)
  if writer is None:
    return cost
  prompts, read = lengths.prompts, lengths.read
  if source == "teacher" and lengths.teacher_prompts is not None:
    prompts, read = lengths.teacher_prompts, lengths.teacher_read
  return dataclasses.replace(
      cost,
      prefill=prefill(writer, prompts),
      decode=decode(writer, read, lengths.sampled),
  )


def supervised(
    student: ModelConfig, lengths: Lengths, remat: str = "none"
) -> StepFlops:
  """FLOPs of a supervised update on given answers."""
  return StepFlops(**_training(student, lengths.read, lengths.learned, remat))


@dataclasses.dataclass(frozen=True)
class Convention:
  """The choices that the paper's formula leaves open, or its totals contradict.

  The paper does not define N or the attention term. The defaults fit its totals
  best (see `paper_tables`): N without embeddings, as in Qwen's model cards, and
  all pairs of tokens, as in appendix B of PaLM (arXiv 2204.02311).

  Attributes:
    head: whether N counts the output head.
    table: whether N counts an embedding table that is not the head.
    attention: FLOPs of training for each layer, head, channel and pair of
      tokens: 12 for all pairs, 6 for the causal half.
    forward: a forward pass as a fraction of training. The paper's text says a
      third, the default; its tables fit a ninth.
  """

  head: bool = False
  table: bool = False
  attention: int = 12
  forward: float = 1 / 3

  def params(self, config: ModelConfig) -> int:
    """Returns N."""
    tables = config.vocab_size * config.dim
    count = num_params(config, embeddings=False) - tables * (not self.head)
    return count + tables * (self.table and not config.tied)


PAPER = Convention()


def paper_train(
    config: ModelConfig, lengths: Array, convention: Convention = PAPER
) -> float:
  """FLOPs of a forward and a backward pass, summed.

    F_train(M, T) = 6 N T + 12 L n_heads d_head T^2

  Source: arXiv 2602.15260, appendix B.

  Args:
    config: the model.
    lengths: tokens of each sequence, prompt included.
    convention: what counts.
  """
  lengths = np.asarray(lengths, float)
  width = config.num_layers * config.num_heads * config.head_dim
  dense = 6.0 * convention.params(config) * lengths
  attention = float(convention.attention) * width * lengths**2
  return float(np.sum(dense + attention))


def paper_forward(
    config: ModelConfig, lengths: Array, convention: Convention = PAPER
) -> float:
  """FLOPs of a forward pass, summed: F_train / 3."""
  return convention.forward * paper_train(config, lengths, convention)


def paper_distillation(
    student: ModelConfig,
    teacher: ModelConfig,
    lengths: Lengths,
    source: str = "student",
    convention: Convention = PAPER,
) -> float:
  """FLOPs of a distillation update.

    F_OPD(T) = F_train(S, T) + 2 F_fwd(S, T) + F_fwd(T', T)

  for student S and teacher T': the update, sampling, and the log-probabilities
  of the student and the teacher, each over whole sequences. Source: arXiv
  2602.15260, appendix B. The formula has no answers of another model; here the
  model that samples them takes the place of one F_fwd(S, T); of rewritten ones,
  the student for its drafts and the teacher for its turns.

  Args:
    student: its architecture.
    teacher: its architecture.
    lengths: of the sequences.
    source: see `flops.distillation`.
    convention: what counts.
  """
  whole = lengths.read + lengths.sampled
  total = paper_train(student, lengths.read + lengths.learned, convention)
  total += paper_forward(student, whole, convention)
  total += paper_forward(
      teacher, lengths.teacher_read + lengths.sampled, convention
  )
  if source == "rewrite":
    these = lengths.rewriting
    total += paper_forward(student, lengths.read + these.drafts, convention)
    total += paper_forward(teacher, these.prompts + these.written, convention)
    return total
  writer = sampler(student, teacher, source)
  if writer is not None:
    total += paper_forward(writer, whole, convention)
  return total


def paper_supervised(student: ModelConfig, lengths: Lengths) -> float:
  """FLOPs of a supervised update: F_train."""
  return paper_train(student, lengths.read + lengths.learned)


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the updates so far, and the schedule's state.

  Attributes:
    schedule: the state of the prefix schedule, JSON.
    seconds: time of the updates.
    tokens: sampled tokens.
    flops: all FLOPs.
    phases: the same by phase.
    flops_paper: FLOPs by the paper's formula, of the updates alone.
    flops_full: an estimate of what the same updates would have cost with whole
      answers.
    skipped: updates that were skipped because numbers were not finite.
    skipped_running: how many of the last updates were skipped.
    teacher_update: after which update the teacher's weights were the student's;
      0 if the teacher is as it was loaded.
  """

  schedule: dict[str, Any]
  seconds: float = 0.0
  tokens: int = 0
  flops: float = 0.0
  phases: StepFlops = StepFlops()
  flops_paper: float = 0.0
  flops_full: float = 0.0
  skipped: int = 0
  skipped_running: int = 0
  teacher_update: int = 0

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "Totals":
    return cls(**values | {"phases": StepFlops(**values["phases"])})

  def line(self) -> dict[str, Any]:
    """Returns the sums as a metrics line has them."""
    line = {
        "tokens": self.tokens,
        "flops": self.flops,
        "flops_paper": self.flops_paper,
    }
    for phase, value in dataclasses.asdict(self.phases).items():
      line[f"flops_{phase}"] = value
    if self.flops_full:
      line["flops_full_estimate"] = self.flops_full
    return line


@dataclasses.dataclass(frozen=True)
class Bought:
  """Answers that were made before the first update.

  An update pays for the answers that it is the first to use. So a run that is
  stopped early does not pay for those that it did not need.

  Attributes:
    cost: of all of them.
    updates: how many updates use each once; after those they are free.
  """

  cost: StepFlops = StepFlops()
  updates: float = 1.0

  def share(self, step: int) -> float:
    """Returns the share that update `step`, from 0, is the first to use."""
    before, after = (min(x / self.updates, 1.0) for x in (step, step + 1))
    return after - before


@dataclasses.dataclass(frozen=True)
class Prices:
  """What an update of certain models costs.

  Attributes:
    student: the student's architecture.
    teacher: the teacher's; None for supervised training.
    remat: what the student computes again, see `ModelSpec`.
    compares: whether full distillation's cost is estimated too.
    bought: answers that the updates use.
    sees: whether the schedule sees the tokens before the loss is summed.
  """

  student: ModelConfig
  teacher: ModelConfig | None
  remat: str = "none"
  compares: bool = False
  bought: Bought = Bought()
  sees: bool = False

  def charge(
      self,
      totals: Totals,
      lengths: Lengths,
      source: str = "student",
      whole: float = 0.0,
      step: int = 0,
  ) -> Totals:
    """Adds an update to the sums.

    Args:
      totals: before the update.
      lengths: of the update's sequences.
      source: who sampled the answers, see `distillation`.
      whole: mean length of whole answers, for the estimate of full
        distillation's cost; 0 if no answer was evaluated, and there is no
        estimate.
      step: the update's number, from 0.
    """
    cost, before = self._cost(lengths, source), totals.phases
    share = self.bought.share(step)
    phases = StepFlops(**{
        phase: getattr(before, phase)
        + getattr(cost, phase)
        + share * getattr(self.bought.cost, phase)
        for phase in PHASES
    })
    full = 0.0
    if self.compares and (whole or lengths.rewriting is not None):
      answers, by = np.full(len(lengths.sampled), whole), "student"
      if lengths.rewriting is not None:  # Whole ones are at hand.
        answers, by = lengths.rewriting.kept, source
      answers = dataclasses.replace(lengths, sampled=answers, trained=None)
      whole_answers = dataclasses.replace(self, sees=False)
      full = whole_answers._cost(answers, by).total
    return dataclasses.replace(
        totals,
        tokens=totals.tokens + lengths.drawn,
        flops=totals.flops + cost.total + share * self.bought.cost.total,
        phases=phases,
        flops_paper=totals.flops_paper + self._paper(lengths, source),
        flops_full=totals.flops_full + full,
    )

  def _cost(self, lengths: Lengths, source: str) -> StepFlops:
    if self.teacher is None:
      return supervised(self.student, lengths, self.remat)
    return distillation(
        self.student, self.teacher, lengths, source, self.remat, self.sees
    )

  def _paper(self, lengths: Lengths, source: str) -> float:
    if self.teacher is None:
      return paper_supervised(self.student, lengths)
    return paper_distillation(
        self.student, self.teacher, lengths, source
    )
