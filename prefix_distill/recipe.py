"""The recipe's settings: prefix, rollout and loss.

Frozen dataclasses that check themselves, as those of `specs`.
"""

import dataclasses

from prefix_distill import errors

SCHEDULES = (
    "linear", "fixed", "random", "drift", "plateau", "agreement", "audited",
)  # fmt: skip
FORMS = ("exact", "policy_gradient", "direct")
SOURCES = ("student", "teacher", "data")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("", *DTYPES, "int8")
REMATS = ("none", "full", "dots", "offload")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
  errors.check(
      value in choices, f"{name} is {value!r}; use one of {choices}."
  )


def check_truncation(group: str, top_k: int, top_p: float) -> None:
  errors.at_least(group, {"top_k": top_k}, 0)
  errors.check(
      0 < top_p <= 1,
      f"{group}.top_p is {top_p}; set it above 0 and to 1 at most, which is"
      " off.",
  )


@dataclasses.dataclass(frozen=True)
class PrefixSpec:
  """How much of each answer is sampled and supervised.

  Attributes:
    schedule: "linear" (the paper's) or "fixed"; or, from data, "plateau",
      "drift", "agreement" or "audited"; or "random". See
      `distill/controllers.py` for the rules and their sources.
    start: the first cap in tokens; also the smallest one, of those that can
      shrink.
    increment: by how much the cap changes.
    every: linear: updates between two changes.
    length: fixed: the cap.
    share: drift, plateau: of the rollouts, that must be reliable or reach the
      cap for it to grow; audited: of the divergence, that the cap covers.
    patience: drift: updates below the share before the cap shrinks; plateau:
      updates without progress before it grows; agreement: first updates in
      which nothing is cut.
    overlap: drift: below this overlap of the two models' most probable tokens
      a position counts as drifted.
    penalty: drift: of a drifted position; at 1 in all a rollout is unreliable.
    window, quantile, memory: agreement: tokens that are averaged, which
      quantile of past rollouts' minima is the threshold, and of how many.
    audit_every: audited: updates between two audits at most.
    tolerance: audited: nats; with less left in a prefix it is audited, and
      with less in a whole rollout training ends. 0 for neither.
    buckets: the static lengths that programs are compiled for; the exact cap
      inside a bucket is traced. The run's longest cap is added if it needs
      to be. Empty: the longest cap and its halves, seven at most.
  """

  schedule: str = "linear"
  start: int = 1
  increment: int = 256
  every: int = 1
  length: int = 256
  share: float = 0.5
  patience: int = 3
  overlap: float = 0.7
  penalty: float = 0.01
  window: int = 64
  quantile: float = 0.7
  memory: int = 4096
  audit_every: int = 8
  tolerance: float = 0.0
  buckets: tuple[int, ...] = ()

  def __post_init__(self):
    one_of("prefix.schedule", self.schedule, SCHEDULES)
    counts = ("start", "every", "length", "patience", "window", "memory",
              "audit_every")  # fmt: skip
    errors.at_least("prefix", {n: getattr(self, n) for n in counts}, 1)
    errors.at_least(
        "prefix",
        {n: getattr(self, n) for n in ("increment", "penalty", "tolerance")},
        0,
    )
    for name in ("share", "overlap", "quantile"):
      value = getattr(self, name)
      errors.check(
          0 <= value <= 1,
          f"prefix.{name} is {value}; set it between 0 and 1.",
      )
    errors.check(
        tuple(sorted(set(self.buckets))) == self.buckets,
        f"prefix.buckets {self.buckets} do not increase; sort them.",
    )

  @property
  def is_planned(self) -> bool:
    """Whether the caps are known before the run."""
    return self.schedule in ("linear", "fixed")


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
  """How the student samples.

  Attributes:
    per_prompt: rollouts for each prompt.
    max_len: the longest answer: the cap of full distillation, of the schedule
      and of supervised answers.
    temperature: of sampling *and* of both models in the loss.
    source: whose answers are learned from besides the student's: "student"
      for none, "teacher" samples prefixes from the teacher, "data" takes the
      beginnings of the records' completions.
    source_share: the share of updates that are made on those (1 - lambda of
      GKD, arXiv 2306.13649); 1 makes a run off-policy.
    cache_dtype: what the keys and values of sampling are kept in, "float32",
      "bfloat16" or "int8" (with a scale for each head and position); empty for
      the student's compute dtype.
    top_k: draw only from so many of the most probable tokens; 0 for all.
    top_p: draw only from the most probable tokens that together reach this
      probability; 1 for all. The loss compares the whole distributions.
    batch_tokens: tokens of prompts and prefixes that are sampled at a time,
      over all devices: what bounds the memory of keys and values. 0: as many
      as an accelerator's memory holds, and all on a CPU.
  """

  per_prompt: int
  max_len: int
  temperature: float = 1.0
  source: str = "student"
  source_share: float = 1.0
  cache_dtype: str = ""
  top_k: int = 0
  top_p: float = 1.0
  batch_tokens: int = 0

  def __post_init__(self):
    one_of("rollout.cache_dtype", self.cache_dtype, CACHE_DTYPES)
    one_of("rollout.source", self.source, SOURCES)
    errors.check(
        0 <= self.source_share <= 1,
        f"rollout.source_share is {self.source_share}; set it between 0 and"
        " 1.",
    )
    errors.at_least(
        "rollout", {"per_prompt": self.per_prompt, "max_len": self.max_len}, 1
    )
    errors.at_least("rollout", {"batch_tokens": self.batch_tokens}, 0)
    errors.check(
        self.temperature > 0,
        f"rollout.temperature is {self.temperature}; training samples, so set"
        " it above 0.",
    )
    check_truncation("rollout", self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class LossSpec:
  """The divergence on prefix tokens.

  Attributes:
    form: "exact" compares the whole distributions at every token;
      "policy_gradient" is the paper's loss on the sampled tokens, importance
      weighted; "direct" differentiates the estimate itself.
    divergence: exact: "reverse_kl" (the paper's), "forward_kl" or "jsd".
    beta: jsd: 0 is the forward KL, 1 the reverse KL (GKD, arXiv 2306.13649).
    top_k: exact: compare so many tokens one by one and the rest as one; 0 for
      all.
    top_k_of: whose most probable tokens those are, "teacher" or "student".
    estimator: of the sampled forms: "k1" or "k3"; see `distill/estimators.py`
      for what the gradient of each is.
    mixture: policy_gradient: clips the teacher's verdict on a token at the log
      of this weight (relaxed distillation, arXiv 2603.11137); 0 for never.
    min_entropy: policy_gradient: leaves out tokens at which the student's
      entropy is lower, in nats; 0 for none.
    window_start, window_end: train on positions [start, end) of each rollout
      only; negative ones count from the rollout's end, and an end of 0 is
      that end. The first n tokens: (0, n); the last n: (-n, 0).
    normalize: "rollouts" is the paper's mean over rollouts of the sum over
      tokens, "tokens" the mean over all tokens of the batch.
    merge_stop_tokens: take the stop tokens of student and teacher as one
      event, so that a base model is not punished for the name of its stop.
    logits_mib: memory for logits, in MiB a device; tokens are taken in chunks
      that keep to it.
  """

  form: str = "exact"
  divergence: str = "reverse_kl"
  beta: float = 0.5
  top_k: int = 0
  top_k_of: str = "teacher"
  estimator: str = "k1"
  mixture: float = 0.0
  min_entropy: float = 0.0
  window_start: int = 0
  window_end: int = 0
  normalize: str = "rollouts"
  merge_stop_tokens: bool = True
  logits_mib: int = 256

  def __post_init__(self):
    one_of("loss.form", self.form, FORMS)
    one_of("loss.divergence", self.divergence, DIVERGENCES)
    one_of("loss.top_k_of", self.top_k_of, ("teacher", "student"))
    one_of("loss.estimator", self.estimator, ("k1", "k3"))
    one_of("loss.normalize", self.normalize, ("rollouts", "tokens"))
    errors.at_least("loss", {"logits_mib": self.logits_mib}, 1)
    errors.at_least(
        "loss", {"top_k": self.top_k, "min_entropy": self.min_entropy}, 0
    )
    for name, value in (("beta", self.beta), ("mixture", self.mixture)):
      errors.check(
          0 <= value <= 1,
          f"loss.{name} is {value}; set it between 0 and 1.",
      )
    start, end = self.window_start, self.window_end
    errors.check(
        start < end or (end <= 0 <= start) or (start < 0 and end == 0),
        f"loss.window_start is {start} and loss.window_end {end}, which leaves"
        " no tokens; set the end behind the start.",
    )
    self._check_form()

  def _check_form(self) -> None:
    """Refuses settings that the form would silently ignore."""
    exact = self.form == "exact"
    relaxed = {"mixture": self.mixture, "min_entropy": self.min_entropy}
    for name, value in relaxed.items():
      errors.check(
          not value or self.form == "policy_gradient",
          f"loss.{name} is {value} but loss.form is {self.form!r}; it belongs"
          " to 'policy_gradient'.",
      )
    errors.check(
        exact or self.divergence == "reverse_kl",
        f"loss.divergence is {self.divergence!r} but loss.form is"
        f" {self.form!r}, which estimates the reverse KL; set loss.form to"
        " 'exact'.",
    )
    errors.check(
        exact or not self.top_k,
        f"loss.top_k is {self.top_k} but loss.form is {self.form!r}, which"
        " looks at the sampled token alone; set loss.form to 'exact'.",
    )
    errors.check(
        self.form != "direct" or self.estimator != "k1",
        "loss.form is 'direct' and loss.estimator 'k1', whose gradient is zero"
        " in expectation; set loss.estimator to 'k3', or loss.form to"
        " 'policy_gradient'.",
    )
