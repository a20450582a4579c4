"""How long a prefix each update samples and supervises."""

from prefix_distill.config import Config

# Below this a program is so small that a bucket of its own saves nothing.
_SMALLEST_BUCKET = 32


def cap(config: Config, step: int) -> int:
  """Returns the cap of update `step`, counted from 0.

  The paper's schedule (section 3): L starts at 1 and grows by 256 after every
  update; never above `rollout.max_len`, which is also the cap of full
  distillation.
  """
  longest = config.rollout.max_len
  if config.method != "prefix":
    return longest
  prefix = config.prefix
  if prefix.schedule == "fixed":
    return min(prefix.length, longest)
  return min(prefix.start + prefix.increment * step, longest)


def buckets(config: Config) -> tuple[int, ...]:
  """Returns the static lengths that rollouts are compiled for.

  Those of `prefix.buckets`, or else powers of two, as far as the run's longest
  cap needs them; that cap itself if none of them holds it.
  """
  longest = config.longest_prefix
  if config.method != "prefix" or config.prefix.schedule == "fixed":
    return (longest,)
  given = config.prefix.buckets or tuple(
      _SMALLEST_BUCKET * 2**i for i in range(longest.bit_length())
  )
  shorter = tuple(length for length in given if length < longest)
  return (*shorter, min((b for b in given if b >= longest), default=longest))


def bucket(lengths: tuple[int, ...], wanted: int) -> int:
  """Returns the smallest bucket that holds `wanted` tokens."""
  return next(length for length in lengths if length >= wanted)
