"""Looks for settings with which a run fits a machine.

First smaller batches, which cost little. Where one row for each shard is still
too much, what costs time: layers are computed again, moments, layers' inputs
or the teacher wait in the host's memory, and more tensor shards split what a
row takes.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import math

from prefix_distill import errors
from prefix_distill.config import Config
from prefix_distill.plan import build
from prefix_distill.plan.jobs import Job
from prefix_distill.plan.jobs import Look
from prefix_distill.plan.measure import Measured

# Batches that are tried, each half, double, or what the last one's memory says.
_TRIES = 6
# Settings that bound a program's memory, and the programs that they bound.
_LIMITS = {
    ("optimizer", "batch_tokens"): ("gradient", "score"),
    ("rollout", "batch_tokens"): ("decode", "prefill"),
    ("evaluation", "batch_size"): tuple(build.EVALUATION.values()),
}
_Setting = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Found:
  """Settings, and what could not be made to fit.

  Attributes:
    config: with the settings.
    failed: a sentence for each program that does not fit with any.
  """

  config: Config
  failed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Wanted:
  """A program that is to fit.

  Attributes:
    measured: what it takes as it is.
    config: what that was measured with.
    setting: what bounds its batch; None if it takes none.
    largest: whether the largest batch that fits is asked for.
  """

  measured: Measured
  config: Config
  setting: _Setting | None
  largest: bool


def search(
    look: Look, found: Found, broken: Sequence[Measured], largest: bool
) -> Found:
  """Changes settings until programs fit, one program after the other.

  Args:
    look: compiles.
    found: what was found so far.
    broken: the programs, as measured with its config.
    largest: whether to look for the largest batches that fit.
  """
  config, failed = found.config, list(found.failed)
  longest = {one.name: one for one in broken}  # The last is the longest.
  bounded = {
      name: setting for setting, names in _LIMITS.items() for name in names
  }
  rest = sorted(longest.keys() - bounded.keys())
  for name in [*(name for name in bounded if name in longest), *rest]:
    wanted = _Wanted(longest[name], found.config, bounded.get(name), largest)
    better = _fit(look, config, wanted)
    if better is None:
      failed.append(_failed(name, longest[name].bucket))
    else:
      config = better
  return Found(config, tuple(dict.fromkeys(failed)))


def _failed(name: str, bucket: int) -> str:
  return (
      f"{name} at P = {bucket:,} does not fit with the smallest batches either;"
      " use more devices, or fewer rollouts a prompt."
  )


def _fit(look: Look, config: Config, wanted: _Wanted) -> Config | None:
  """Returns the config with which a program fits, or None."""
  for candidate in _remedies(config, wanted.measured.name):
    best = _largest_batch(look, candidate, wanted)
    if best is not None:
      return best
  return None


def _remedies(config: Config, name: str) -> Iterator[Config]:
  """Yields the config, then with one remedy more at a time."""
  yield config
  steps: list[Callable[[Config], Config]] = [_offload_moments]
  if name == "gradient":
    if config.student.remat != "offload":
      steps.insert(0, functools.partial(_with, part="student", remat="full"))
    steps.append(functools.partial(_with, part="student", remat="offload"))
  heads = build.architecture(config.student.path)[0].num_kv_heads
  if name in ("gradient", "score", "apply"):
    split = _split_training
  else:
    split = _split_sampling
    steps.append(_offload_teacher)
  steps += [lambda c: split(c, heads)] * int(math.log2(heads))
  for step in steps:
    try:
      changed = step(config)
    except errors.ConfigError:
      continue  # Batches or axes that do not divide.
    if changed != config:
      yield changed
    config = changed


def _with(config: Config, part: str, **fields) -> Config:
  return dataclasses.replace(
      config, **{part: dataclasses.replace(getattr(config, part), **fields)}
  )


def _offload_moments(config: Config) -> Config:
  return _with(config, "optimizer", offload=True)


def _offload_teacher(config: Config) -> Config:
  return _with(config, "teacher", offload=True)


def _split_training(config: Config, most: int) -> Config:
  mesh = config.mesh
  sampling = mesh.sampling_tensor or mesh.tensor
  if 2 * mesh.tensor > most or mesh.fsdp % 2:
    return config
  return _with(
      config, "mesh", fsdp=mesh.fsdp // 2, tensor=2 * mesh.tensor,
      sampling_tensor=0 if sampling == 2 * mesh.tensor else sampling,
  )  # fmt: skip


def _split_sampling(config: Config, most: int) -> Config:
  mesh = config.mesh
  sampling = 2 * (mesh.sampling_tensor or mesh.tensor)
  if sampling > most or mesh.fsdp * mesh.tensor % sampling:
    return config
  return _with(config, "mesh", sampling_tensor=sampling)


def _largest_batch(
    look: Look, config: Config, wanted: _Wanted
) -> Config | None:
  """Lowers one limit until one program fits; raises it if asked to."""
  name, bucket = wanted.measured.name, wanted.measured.bucket

  def measure(job: Job, candidate: Config) -> Measured:
    as_it_is = candidate == wanted.config
    return wanted.measured if as_it_is else look.measure(job)

  if wanted.setting is None:
    one = measure(look.job(config, name, bucket), config)
    return config if one.verdict(look.machine) else None
  part, field = wanted.setting
  start = getattr(getattr(config, part), field)
  if not start:  # As many rows as it was measured with.
    start = wanted.measured.rows
    if field == "batch_tokens":
      start *= config.data.max_prompt_len + bucket
    start = 2 ** (start - 1).bit_length()
  limit, best, previous = start, None, None
  for _ in range(_TRIES):
    candidate = _with(config, part, **{field: limit})
    try:
      job = look.job(candidate, name, bucket)
    except errors.ConfigError:
      break  # Fewer rows than shards.
    if job.rows == previous:  # One row a device, or all of them.
      break
    one = measure(job, candidate)
    fits, previous = one.verdict(look.machine), one.rows
    if fits:
      best = limit if best is None else max(best, limit)
      if limit < start or not wanted.largest:
        break
      limit *= 2
    elif best is not None:
      break
    else:
      # Memory grows with the rows at most.
      excess = one.memory / look.machine.chip.memory
      limit //= 2 ** max(1, math.floor(math.log2(max(excess, 1))))
  if best is None:
    return None
  return config if best == start else _with(config, part, **{field: best})


def advice(asked: Config, found: Found) -> list[str]:
  """Returns the settings that were found as flags, and what did not fit."""
  flags = []
  for part in (
      "mesh", "rollout", "optimizer", "student", "teacher", "evaluation"
  ):  # fmt: skip
    old, new = getattr(asked, part), getattr(found.config, part)
    for field in dataclasses.fields(new):
      value = getattr(new, field.name)
      if value != getattr(old, field.name):
        flags.append(f"--config.{part}.{field.name}={value}")
  return ([" ".join(flags)] if flags else []) + list(found.failed)
