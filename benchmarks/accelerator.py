r"""Everything that matters on one accelerator, measured in ten minutes.

  python benchmarks/accelerator.py --out=DIR
  python benchmarks/accelerator.py --cpu --out=DIR

Needs no network and no weights: models have their true shapes and random
weights. The stages, in order of worth, are

  right    does it compute what it should, against numbers from float64
  rollout  Qwen3-1.7B writes: tokens a second, and what limits them
  update   Qwen3-1.7B learns from Qwen3-8B, as `plan` says, beside what it says
  peers    the same work by transformers and torch, if they are there
  learn    a distillation of real models, if --student and --teacher are given

Each runs in a process of its own and has a share of the time that is left.
What is measured is added to DIR/results.jsonl the moment it is known. What
fails, hangs or crashes is added with its error, and the next one goes on. The
same command on the same DIR measures what is missing there. It ends with a
table, which is kept in DIR/accelerator.md.

--cpu is a rehearsal: the same code at toy size, anywhere.
"""

import argparse
from collections.abc import Sequence
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table

_ROOT = pathlib.Path(__file__).parent.parent
# Stage -> its share of the time, next to those that are still to come.
STAGES = {"right": 4, "rollout": 4, "update": 4, "peers": 2, "learn": 2}
# Seconds that are kept for the table.
_LAST = 3
# Processes that a stage may use up; each is lost to one measurement.
_ATTEMPTS = 4
# Exit statuses of a stage's process: as they say, and to be started again.
NO_ACCELERATOR, ANOTHER_DEVICE, AGAIN = 3, 4, 5
# Of a device's memory; the rest is for libraries.
_MEMORY = "0.92"
# The stage `right` has many small programs. XLA would spend most of the stage's
# time on trying kernels for them.
UNTUNED = "--xla_gpu_autotune_level=0"
# On fewer the plan would slow down what is measured, and not be ready.
_PLANNING_CORES = 8


class Stopped(Exception):
  """A signal to stop."""


class Refused(Exception):
  """What cannot be measured here, as a sentence."""


class Results:
  """The lines of a file, each whole or not there.

  Attributes:
    file: one JSON object a line.
  """

  def __init__(self, directory: pathlib.Path, run: str, mend: bool = False):
    """Opens the file.

    Args:
      directory: of the file.
      run: what this run's lines are marked with.
      mend: cut off what a kill has left of a line; not while others write.
    """
    self.file, self._run = directory / "results.jsonl", run
    if mend and self.file.is_file():
      content = self.file.read_bytes()
      whole = content[: content.rfind(b"\n") + 1]
      if whole != content:
        os.truncate(self.file, len(whole))

  def lines(self) -> list[dict[str, Any]]:
    if not self.file.is_file():
      return []
    return [json.loads(line) for line in self.file.read_text().splitlines()]

  def add(self, stage: str, name: str, status: str, **values: Any) -> None:
    """Adds a line, which is on the disk when this returns."""
    line = {"run": self._run, "stage": stage, "name": name, "status": status}
    text = json.dumps(_finite(line | values)) + "\n"
    with self.file.open("ab", buffering=0) as file:
      file.write(text.encode())
      os.fsync(file.fileno())

  def settled(self, stage: str) -> set[str]:
    """Returns what succeeded, or was tried by this run."""
    return {
        line["name"]
        for line in self.lines()
        if line["stage"] == stage
        and (line["status"] == "done" or line["run"] == self._run)
    }

  def latest(self) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the last line of each measurement, a successful one if any."""
    out = {}
    for line in self.lines():
      key = line["stage"], line["name"]
      if line["status"] == "done" or out.get(key, {}).get("status") != "done":
        out[key] = line
    return out


def _finite(value: Any) -> Any:
  """JSON has no NaN."""
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, float) and (value != value or abs(value) == 1e999):
    return None
  return value


class Marker:
  """What a stage's process is at: read by the one that watches it."""

  def __init__(self, directory: pathlib.Path, stage: str):
    self._file = directory / f"running-{stage}.json"

  def write(
      self, names: Sequence[str], at: str = "", limit: float = 0
  ) -> None:
    """Says what is measured now.

    Args:
      names: of all that the process measures.
      at: the one that begins; "" for none.
      limit: in seconds; 0 for that of the stage.
    """
    content = {
        "names": list(names),
        "at": at,
        "since": time.time(),
        "limit": limit,
    }
    partial = self._file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(self._file)

  def read(self) -> dict[str, Any]:
    if not self._file.is_file():
      return {"names": [], "at": "", "since": 0, "limit": 0}
    return json.loads(self._file.read_text())

  def delete(self) -> None:
    self._file.unlink(missing_ok=True)


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
      "--out", type=pathlib.Path, default=pathlib.Path("runs/accelerator")
  )
  parser.add_argument("--seconds", type=float, default=600)
  parser.add_argument("--cpu", action="store_true", help="a rehearsal")
  parser.add_argument(
      "--stages", default=",".join(STAGES), help="some of them, in order"
  )
  parser.add_argument(
      "--only", default="", help="measure what this regular expression finds"
  )
  parser.add_argument(
      "--plan", default="", help="what `plan --topology=h100:1 --json` wrote"
  )
  parser.add_argument("--student", default="", help="learn: a model directory")
  parser.add_argument("--teacher", default="", help="learn: a model directory")
  parser.add_argument(
      "--learn", default="", help="learn: more flags of prefix_distill.main"
  )
  parser.add_argument("--commit", default="", help="where git cannot say")
  parser.add_argument(
      "--memory", type=float, default=0, help="GiB to get along with"
  )
  parser.add_argument("--child", default="", help=argparse.SUPPRESS)
  parser.add_argument("--run", default="", help=argparse.SUPPRESS)
  parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
  parser.add_argument("--programs", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.out = args.out.resolve()
  unknown = set(args.stages.split(",")) - STAGES.keys()
  if unknown:
    parser.error(f"--stages={args.stages} is none of {', '.join(STAGES)}.")
  if bool(args.student) != bool(args.teacher):
    parser.error("--student and --teacher go together; give both.")
  return args


def _commit(given: str) -> str:
  if given:
    return given
  command = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return "unknown"
  return found.stdout.strip() or "unknown"


class Bench:
  """Runs stages, each in a process of its own."""

  def __init__(self, args: argparse.Namespace, run: str):
    self._args, self._run = args, run
    self.results = Results(args.out, run, mend=True)
    self._ends = time.time() + max(args.seconds - _LAST, 0)
    self._programs = tempfile.mkdtemp(prefix="accelerator")
    # Of a stage that is running; and of the plan.
    self._children: dict[str, subprocess.Popen] = {}
    self._closed = False

  @property
  def left(self) -> float:
    return self._ends - time.time()

  def close(self) -> None:
    """Ends what runs; its lines are in the file already."""
    self._closed = True
    for stage, process in list(self._children.items()):
      _end(process)
      self._marker(stage).delete()
    shutil.rmtree(self._programs, ignore_errors=True)

  def _marker(self, stage: str) -> Marker:
    return Marker(self._args.out, stage)

  def _log(self, stage: str) -> pathlib.Path:
    return self._args.out / f"log-{stage}.txt"

  def stage(self, stage: str, limit: float) -> int:
    """Runs a stage until it ends or its time is up; returns its exit status.

    A process that crashes, or hangs in one measurement, is followed by another
    for the rest.
    """
    until = time.time() + limit
    lost, marker = 0, self._marker(stage)
    while lost < _ATTEMPTS:
      marker.delete()
      status, why = self._watch(stage, until)
      if self._closed:
        return 1
      if status == AGAIN:
        continue
      if status in (0, NO_ACCELERATOR, ANOTHER_DEVICE) and not why:
        marker.delete()
        return status
      at = marker.read()["at"]
      why = why or f"the process ended with {_ending(status)}"
      name = at or "start"
      if at in self.results.settled(stage):
        name = f"after {at}"  # Whose line was there already.
      self.results.add(
          stage,
          name,
          "limit" if status is None else "failed",
          error=why,
          log=self._tail(stage),
      )
      lost += 1
      if not at or until - time.time() < 5:
        break
    self._not_begun(stage, limit)
    marker.delete()
    return 1

  def interrupted(self, why: str) -> None:
    """Adds a line for whatever was running."""
    for stage in self._children:
      at = self._marker(stage).read()["at"]
      if at and at not in self.results.settled(stage):
        self.results.add(stage, at, "limit", error=why)

  def _not_begun(self, stage: str, limit: float) -> None:
    settled = self.results.settled(stage)
    for name in self._marker(stage).read()["names"]:
      if name not in settled:
        self.results.add(
            stage,
            name,
            "limit",
            error=f"not begun: the stage's {limit:.0f} s were up",
        )

  def _watch(self, stage: str, until: float) -> tuple[int | None, str]:
    """Runs one process; returns its exit status and why it was ended."""
    child = self._children[stage] = self._start(stage, until)
    begun, marker = time.time(), self._marker(stage)
    while child.poll() is None:
      if self._closed:  # It was started while the others were ended.
        _end(child)
      time.sleep(0.05)
      now, running = time.time(), marker.read()
      why = ""
      if now > until:
        why = f"the stage's limit of {until - begun:.0f} s was reached"
      elif running["limit"] and now > running["since"] + running["limit"]:
        why = f"the measurement's limit of {running['limit']:.0f} s was reached"
      if why:
        child.send_signal(signal.SIGUSR1)  # It says where it is.
        time.sleep(0.3)
        _end(child)
        return None, why
    _end(child)  # What it has started and left.
    return child.returncode, ""

  def _start(self, stage: str, until: float) -> subprocess.Popen:
    args = self._args
    script = "machine.py" if stage == "machine" else "stages.py"
    command = [
        sys.executable,
        str(pathlib.Path(__file__).with_name(script)),
        *sys.argv[1:],
        f"--child={stage}",
        f"--run={self._run}",
        f"--until={until}",
        f"--programs={self._programs}",
        f"--commit={_commit(args.commit)}",
    ]
    with self._log(stage).open("ab") as log:
      log.write(f"\n== {stage}, {time.strftime('%H:%M:%S')}\n".encode())
      log.flush()
      return subprocess.Popen(
          command,
          env=environment(args.cpu, stage, self._programs),
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          start_new_session=True,
      )

  def _tail(self, stage: str) -> str:
    text = self._log(stage).read_text(errors="replace").rpartition("\n== ")[2]
    return text[-600:]

  def plan(self, topology: str) -> None:
    """Starts the plan of the update, which is ready when its stage is."""
    few = len(os.sched_getaffinity(0)) < _PLANNING_CORES
    if self._args.plan or self._args.cpu or not topology or few:
      return
    command = [
        # It ends in time even if this process is killed.
        "timeout",
        str(int(max(self.left, 1))),
        "nice",
        sys.executable,
        "-m",
        "prefix_distill.plan",
        "--config=configs/math.py:qwen3-1.7b",
        f"--topology={topology}:1",
        "--prefix=256,2048",
        f"--json={self._args.out / 'plan.json'}",
    ]
    with self._log("plan").open("ab") as log:
      self._children["plan"] = subprocess.Popen(
          command,
          cwd=_ROOT,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          env=environment(False, "plan", self._programs),
          start_new_session=True,
      )


def environment(cpu: bool, stage: str, programs: str) -> dict[str, str]:
  """Returns what a stage's process starts with."""
  env = dict(os.environ)
  paths = [str(_ROOT), str(_ROOT / "benchmarks"), env.get("PYTHONPATH", "")]
  env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
  env["PYTHONUNBUFFERED"] = "1"
  env.setdefault("HF_HUB_OFFLINE", "1")
  env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY)
  # Those that share the device with processes of their own take it as needed.
  if stage in ("machine", "right", "peers", "learn"):
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  env.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
  env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  if stage == "right" and not cpu:
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {UNTUNED}"
  if cpu:
    # Toys gain nothing from better machine code, as in `tests/conftest.py`.
    env["JAX_PLATFORMS"] = "cpu"
    env.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
      flags.append("--xla_cpu_use_fusion_emitters=false")
    env.setdefault("XLA_FLAGS", " ".join(flags))
  return env


def _end(process: subprocess.Popen) -> None:
  """Kills a process and those that it has started."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


def _ending(status: int) -> str:
  if status >= 0:
    return f"exit status {status}"
  return f"signal {signal.Signals(-status).name}"


def _stage(bench: Bench, stages: Sequence[str], together: int) -> None:
  """Runs the first stage in its share of the time that is left.

  Args:
    bench: runs it.
    stages: those that have not begun, in order.
    together: the number of stages that run at a time.
  """
  weights = [STAGES[name] for name in stages]
  share = min(weights[0] / sum(weights) * together, 1)
  limit = max(bench.left, 0) * share
  if limit < 1:
    bench.results.add(
        stages[0], "start", "limit", error="not begun: the time was up"
    )
    return
  bench.stage(stages[0], limit)


def _run(bench: Bench, stages: Sequence[str], cpu: bool) -> None:
  """Runs all stages.

  Raises:
    Refused: there is no accelerator, or another one than before.
  """
  status = bench.stage("machine", min(90, max(bench.left, 1)))
  if status == NO_ACCELERATOR:
    raise Refused(
        "JAX finds no accelerator here; --cpu rehearses all stages at toy size."
    )
  if status == ANOTHER_DEVICE:
    raise Refused(
        f"{bench.results.file} has measurements of another device than"
        " this one; choose another --out."
    )
  machine = bench.results.latest().get(("machine", "device"), {})
  bench.plan("" if cpu else machine.get("topology", ""))
  # A rehearsal's times say nothing, so two stages may share the processor.
  together = 2 if cpu else 1
  pool = concurrent.futures.ThreadPoolExecutor(together)
  running = [
      pool.submit(_stage, bench, stages[i:], together)
      for i in range(len(stages))
  ]
  try:
    for one in running:
      one.result()
  finally:  # After a signal nothing is begun any more.
    pool.shutdown(wait=False, cancel_futures=True)


def _shown(line: dict[str, Any]) -> str:
  """Returns what the table says of a measurement."""
  if line["status"] == "done":
    return line.get("shown", "")
  return f"{line['status']}: {line.get('error', '')}"


def _heading(results: Results) -> str:
  machine = {
      line["name"]: line
      for line in results.lines()
      if line["stage"] == "machine" and line["status"] == "done"
  }.get("device", {})
  names = ("date", "commit", "jax", "driver", "cudnn", "processor", "cores")
  facts = [f"{n} {machine[n]}" for n in names if machine.get(n)]
  return f"{machine.get('device', 'unknown device')}: {', '.join(facts)}"


def tables(results: Results, directory: pathlib.Path) -> None:
  """Prints the table, and keeps it as Markdown."""
  heading = _heading(results)
  table = rich.table.Table(
      "stage",
      rich.table.Column("measured", no_wrap=True),
      "result",
      box=rich.box.SIMPLE_HEAD,
      title=heading,
  )
  text = [
      f"## {heading.partition(':')[0]}",
      "",
      heading.partition(": ")[2] + ".",
      "",
      "| stage | measured | result |",
      "|---|---|---|",
  ]
  order = ["machine", *STAGES]
  found = sorted(
      results.latest().items(), key=lambda item: order.index(item[0][0])
  )
  for (stage, name), line in found:
    shown = " ".join(_shown(line).split())
    table.add_row(stage, name, rich.markup.escape(shown))
    cell = shown.replace("|", "\\|")
    text.append(f"| {stage} | {name} | {cell} |")
  (directory / "accelerator.md").write_text("\n".join(text) + "\n")
  width = None if sys.stdout.isatty() else 160
  rich.console.Console(width=width).print(table)


def _stop(number: int, frame: Any) -> None:
  del frame
  for other in (signal.SIGTERM, signal.SIGINT):
    signal.signal(other, signal.SIG_IGN)  # Once is enough.
  raise Stopped(signal.Signals(number).name)


def main() -> None:
  args = arguments()
  args.out.mkdir(parents=True, exist_ok=True)
  now = datetime.datetime.now(datetime.UTC)
  bench = Bench(args, now.isoformat(timespec="milliseconds"))
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _stop)
  try:
    _run(bench, [s for s in STAGES if s in args.stages.split(",")], args.cpu)
  except Stopped as stopped:
    bench.interrupted(f"stopped by {stopped}")
  except Refused as refused:
    print(f"error: {refused}", file=sys.stderr)
    sys.exit(2)
  finally:
    bench.close()
  tables(bench.results, args.out)


if __name__ == "__main__":
  main()
