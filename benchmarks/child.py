"""What the processes of `accelerator.py`'s stages share.

A stage is a list of measurements. Each is written down the moment it is known;
one that fails is written down with its error, and the next one goes on.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import faulthandler
import functools
import gc
import logging
import math
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from typing import Any

import accelerator
import jax

GIB = 2**30
# Seconds between two looks at whether the parent is alive.
_WATCH = 0.5


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Something to be measured.

  Attributes:
    name: unique in its stage.
    run: measures; returns what goes into the line, `shown` in the table.
    needs: bytes of the device's memory, about.
    limit: in seconds; 0 for that of the stage.
    skip: why it cannot be measured here; "" if it can.
    fresh: whether it is to be the first of its process, whose memory's peak
      nothing has raised before.
  """

  name: str
  run: Callable[[], dict[str, Any]]
  needs: float = 0
  limit: float = 0
  skip: str = ""
  fresh: bool = False


class Bench:
  """The arguments, the device and the lines so far."""

  def __init__(self, args: argparse.Namespace):
    self.args = args
    self.results = accelerator.Results(args.out, args.run)

  @functools.cached_property
  def device(self) -> jax.Device:
    return jax.devices()[0]

  @property
  def machine(self) -> dict[str, Any]:
    """What the stage `machine` has found, by this run or one before."""
    out = {}
    for (stage, _), line in self.results.latest().items():
      if stage == "machine" and line["status"] == "done":
        out |= line
    return out

  @property
  def memory(self) -> float:
    """Bytes of the device that a measurement may take.

    That is all of them, since a measurement deletes what the last one left.
    """
    stats = self.device.memory_stats()
    if self.device.platform == "cpu" or not stats:
      found = 1024 * int(proc("/proc/meminfo", "MemAvailable").split()[0])
    else:
      found = stats["bytes_limit"]
    return min(found, self.args.memory * GIB or math.inf)

  def peak(self) -> tuple[float, float]:
    """Returns bytes in use on the device, and the most since it began."""
    stats = self.device.memory_stats() or {}
    return stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use", 0)

  def share(self, flop: float, seconds: float) -> float:
    """Returns the share of the measured rate of bfloat16 products."""
    return flop / seconds / self.machine.get("matrix_flops", math.nan)


def proc(file: str, name: str) -> str:
  """Returns a value of one of Linux's tables."""
  for line in pathlib.Path(file).read_text().splitlines():
    key, _, value = line.partition(":")
    if key.strip() == name:
      return value.strip()
  return ""


def _measure(bench: Bench, stage: str, one: Measurement) -> None:
  """Measures, and writes the line."""
  if one.skip:
    bench.results.add(stage, one.name, "skipped", error=one.skip)
    return
  if one.needs and one.needs > bench.memory:
    available = bench.memory
    bench.results.add(
        stage,
        one.name,
        "skipped",
        needed=one.needs,
        available=available,
        error=(
            f"needs {one.needs / GIB:.3g} GiB, and {available / GIB:.3g} GiB"
            " are there"
        ),
    )
    return
  start = time.perf_counter()
  try:
    found = one.run()
  except Exception as error:  # pylint: disable=broad-except
    text = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_tb(error.__traceback__)[-4:])
    print(f"{one.name}: {text}\n{trace}", file=sys.stderr)
    bench.results.add(
        stage,
        one.name,
        "failed",
        error=text[:300],
        trace=trace[-1200:],
        seconds=time.perf_counter() - start,
    )
    return
  values = {"seconds": time.perf_counter() - start} | found
  bench.results.add(stage, one.name, "done", **values)


def _die_with_parent() -> None:
  """Ends this process and what it has started when its parent is gone."""
  parent = os.getppid()

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(_WATCH)
    os.killpg(0, signal.SIGKILL)

  threading.Thread(target=watch, daemon=True).start()


def start(make: Callable[[argparse.Namespace], Bench]) -> Bench:
  """Begins a stage's process."""
  _die_with_parent()
  # The log tells what took how long, and where a process was when it was ended.
  faulthandler.register(signal.SIGUSR1, all_threads=True)
  jax.config.update("jax_log_compiles", True)
  # Which would log the places of all arguments.
  logging.getLogger("jax._src.interpreters.pxla").setLevel(logging.ERROR)
  return make(accelerator.arguments())


def measure(
    bench: Bench, measurements: Iterable[Measurement], always: str = ""
) -> None:
  """Measures what is missing.

  Args:
    bench: of the process.
    measurements: of its stage.
    always: a name of one that is measured again.
  """
  stage, measurements = bench.args.child, list(measurements)
  names = [one.name for one in measurements]
  marker = accelerator.Marker(bench.args.out, stage)
  marker.write(names)
  settled, begun = bench.results.settled(stage) - {always}, False
  for one in measurements:
    if one.name in settled:
      continue
    if one.fresh and begun:
      sys.exit(accelerator.AGAIN)
    begun = True
    marker.write(names, one.name, one.limit)
    _measure(bench, stage, one)
    gc.collect()
  marker.write(names)
