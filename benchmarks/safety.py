r"""What the guard against numbers that are not finite, and checksums, cost.

  python benchmarks/safety.py

runs `configs/math.py` once, then times in turn what each of its updates and
saves pays: the optimizer's step with and without the guard, and the checksums
of a state. It prints their share of the run's time. With `--workdir` it takes
the times of a run that is finished instead. On a busy machine that is surer
than whole runs, of which

  python benchmarks/safety.py --whole=5

does pairs in turn, with both and with neither, and prints the ratio of their
times and of what the processor worked (user and system), with its spread. Flags
behind `--` are the run's.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import functools
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import config as config_lib
from prefix_distill import main as main_lib
from prefix_distill import sharding
from prefix_distill.report import report
from prefix_distill.train import checkpoint
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib
from prefix_distill.train import workdir as workdir_lib

_ROOT = pathlib.Path(__file__).parent.parent
_DEFAULT = ("--config=configs/math.py",)


@contextlib.contextmanager
def _unsafe() -> None:
  """Takes new arrays whatever they are, and sums nothing."""
  with (
      mock.patch.object(step_lib, "guarded", lambda finite, new, old: new),
      mock.patch.object(checkpoint, "checksums_of", lambda tree: ({}, [])),
  ):
    yield


# Whole runs.


def _child(safe: bool, flags: Sequence[str]) -> None:
  """Is a run, in this process."""
  with contextlib.nullcontext() if safe else _unsafe():
    sys.argv = ["prefix_distill.main", *flags]
    main_lib.start()


def _run(
    workdir: pathlib.Path, flags: Sequence[str], safe: bool = True
) -> tuple[float, float]:
  """Returns seconds of a run, and of the processor."""
  before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
  done = subprocess.run(
      [
          sys.executable,
          __file__,
          f"--child={'safe' if safe else 'unsafe'}",
          "--",
          *flags,
          f"--workdir={workdir}",
      ],
      cwd=_ROOT,
      env=os.environ | {"PYTHONPATH": str(_ROOT)},
      check=False,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
  )
  if done.returncode:
    sys.exit(f"error: the run failed:\n{done.stderr[-2000:]}")
  wall = time.time() - start
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  worked = after.ru_utime + after.ru_stime
  return wall, worked - before.ru_utime - before.ru_stime


def _whole(directory: pathlib.Path, flags: Sequence[str], pairs: int) -> None:
  """Prints how much longer runs take with both than with neither."""
  _run(directory / "warm", flags)
  _run(directory / "warm-unsafe", flags, safe=False)
  ratios = []
  for pair in range(pairs):
    times = {}
    # Either comes first in turn: a machine may grow slower.
    for safe in (pair % 2 == 0, pair % 2 != 0):
      place = directory / f"{pair}-{'safe' if safe else 'unsafe'}"
      times[safe] = _run(place, flags, safe)
    ratios.append([a / b for a, b in zip(times[True], times[False],
                                         strict=True)])
    print(
        "pair {}: with both {:.1f} s ({:.1f} s worked), with neither {:.1f} s"
        " ({:.1f} s)".format(pair + 1, *times[True], *times[False]),
        flush=True,
    )
  for name, found in zip(("time", "work"), zip(*ratios, strict=True),
                         strict=True):
    more = [100 * (ratio - 1) for ratio in found]
    print(f"{name}: {_spread(more, '%')} more with both")


# What is paid for an update and a save.


def _spread(values: Sequence[float], unit: str) -> str:
  """Shows the median, and the quartiles."""
  low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
  return f"{middle:.3g} {unit} ({low:.3g} to {high:.3g})"


def _seconds(run: Callable[[], None]) -> tuple[float, float]:
  """Returns seconds of a call, and of the processor."""
  wall, worked = time.perf_counter(), time.process_time()
  run()
  return time.perf_counter() - wall, time.process_time() - worked


def _state(
    config: config_lib.Config,
) -> tuple[step_lib.TrainState, step_lib.Gradient, Callable]:
  """Returns a run's first state, some gradient, and the optimizer's step."""
  mesh = sharding.make_mesh(config.mesh)
  spec = config.student
  student = setup_lib.make_model(
      setup_lib.hf.read_config(spec.path), spec, mesh
  )
  tx = step_lib.optimizer(config.optimizer, config.steps)
  params = setup_lib.load_model(spec, student, mesh, config.seed)
  grads = jax.tree.map(lambda x: 1e-3 * jnp.sign(x), params)
  one = (jnp.float32(1), jnp.int32(1))
  total = step_lib.Gradient(grads, {"loss": one}, jnp.int32(1))
  state = jax.jit(functools.partial(step_lib.init_state, tx=tx))(params)
  return state, total, functools.partial(step_lib.apply, tx, "rollouts")


def guard(
    config: config_lib.Config, rounds: int
) -> tuple[list[float], list[float]]:
  """Returns what the guard adds to an update in each round: seconds, work."""
  state, total, apply = _state(config)
  steps = {}
  for safe in (True, False):
    # Another function each, or the second would be the first one's program.
    step = jax.jit(lambda *args: apply(*args), donate_argnums=0)
    with contextlib.nullcontext() if safe else _unsafe():
      state, _ = jax.block_until_ready(step(state, total))
    steps[safe] = step

  def take(safe: bool) -> None:
    nonlocal state
    state, _ = jax.block_until_ready(steps[safe](state, total))

  found = []
  for turn in range(rounds):
    times = {}
    for safe in (turn % 2 == 0, turn % 2 != 0):
      times[safe] = _seconds(functools.partial(take, safe))
    found.append([a - b for a, b in zip(times[True], times[False],
                                        strict=True)])
  return tuple(map(list, zip(*found, strict=True)))


def checksums(
    config: config_lib.Config, rounds: int
) -> tuple[list[float], list[float]]:
  """Returns what the checksums of a save take: seconds, work."""
  state, _, _ = _state(config)

  def measure() -> None:
    sums, _ = checkpoint.checksums_of(state)
    checkpoint._sealed({"checksums": sums})

  measure()  # Compiles.
  found = [_seconds(measure) for _ in range(rounds)]
  return tuple(map(list, zip(*found, strict=True)))


def saves(config: config_lib.Config, steps: int) -> int:
  """Returns how often a run of so many updates saves."""
  every = (config.checkpoint.every, config.evaluation.every)
  due = {s for s in range(steps + 1) for n in every if n and s % n == 0}
  return len(due | {0, steps})


def _parts(workdir: pathlib.Path, rounds: int) -> None:
  """Prints the share of both in a run that is finished."""
  config = workdir_lib.read_config(workdir)
  lines = report.read_metrics(workdir / "metrics.jsonl")
  updates = [x for x in lines if "prefix_len" in x]
  evaluated: dict[tuple, float] = {}
  for x in lines:
    if "seconds_evaluate" in x:  # Of a model after an update, so far.
      evaluated[x["step"], x["model"]] = x["seconds_evaluate"]
  whole = updates[-1]["seconds"] + sum(evaluated.values())
  count = saves(config, len(updates))
  added, summed = guard(config, rounds), checksums(config, rounds)
  print(
      f"the run: {len(updates)} updates, {count} saves, {whole:.1f} s of"
      " updates and evaluations"
  )
  for number, name in enumerate(("time", "work")):
    update, save = added[number], summed[number]
    shown = [[1000 * x for x in seconds] for seconds in (update, save)]
    print(f"{name}: the guard adds {_spread(shown[0], 'ms')} to an update,"
          f" checksums {_spread(shown[1], 'ms')} to a save")
    shares = [
        100 * (len(updates) * a + count * b) / whole
        for a, b in zip(sorted(update), sorted(save), strict=True)
    ]
    print(f"{name}: {_spread(shares, '%')} of the run")
  median = statistics.median(x["seconds_update"] for x in updates)
  print(f"an update's gradient and step take {1000 * median:.3g} ms")


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__.partition("\n")[0], allow_abbrev=False
  )
  parser.add_argument("--workdir", type=pathlib.Path, help="of a finished run")
  parser.add_argument("--rounds", type=int, default=51)
  parser.add_argument("--whole", type=int, default=0, help="pairs of runs")
  parser.add_argument("--directory", type=pathlib.Path, help="keeps the runs")
  parser.add_argument("--child", choices=("safe", "unsafe"))
  parser.add_argument("flags", nargs="*")
  args = parser.parse_args()
  flags = args.flags or _DEFAULT
  if args.child:
    _child(args.child == "safe", flags)
    return
  with contextlib.ExitStack() as stack:
    directory = args.directory or pathlib.Path(
        stack.enter_context(tempfile.TemporaryDirectory())
    )
    directory = directory.absolute()
    if args.whole:
      _whole(directory, flags, args.whole)
      return
    workdir = args.workdir
    if workdir is None:
      workdir = directory / "run"
      _run(workdir, flags)
    _parts(workdir.absolute(), args.rounds)


if __name__ == "__main__":
  main()
