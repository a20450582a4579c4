"""The paper's table on a small task.

  python -m prefix_distill.experiments.reproduce

Runs `configs/math.py` on the bundled task with every method, schedule and
ablation, for the capable and the weak student and several seeds. Finished runs
are not repeated, so the script can be stopped and continued. `--cells` and
`--students` select some. The results go to `docs/results`: `results.jsonl`,
tables and a figure.
"""

import argparse
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import pathlib
import subprocess
import sys

from prefix_distill.experiments import analyze

STUDENTS = {"capable": "tiny", "weak": "tiny-weak"}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One line of the table.

  Attributes:
    about: its description in the table.
    settings: fields of the config.
    of: further settings of one student.
  """

  about: str
  settings: dict[str, str]
  of: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


def _prefix(schedule: str, **settings: object) -> dict[str, str]:
  named = {f"prefix.{schedule}.{k}": str(v) for k, v in settings.items()}
  return {"prefix.schedule": schedule, **named} | _BUCKETS


_BUCKETS = {"prefix.buckets": "(32,64,128,256)"}
_FULL = {"method": "full"}
_FIXED_64 = _prefix("fixed", length=64)
_OFF_POLICY = {"rollout.source": "teacher"}


def _increments(capable: int, weak: int) -> dict[str, dict[str, str]]:
  return {
      "capable": {"prefix.linear.increment": str(capable)},
      "weak": {"prefix.linear.increment": str(weak)},
  }


def _window(start: int, end: int) -> dict[str, str]:
  bounds = {"loss.window_start": str(start), "loss.window_end": str(end)}
  return _FULL | bounds


CELLS = {
    "full": Cell("full on-policy distillation", _FULL),
    "seqkd": Cell(
        "SeqKD: supervised on the teacher's answers",
        {"method": "seqkd", "steps": "100"},
    ),
    "fixed-8": Cell("prefix of 8", _prefix("fixed", length=8)),
    "fixed-16": Cell("prefix of 16", _prefix("fixed", length=16)),
    "fixed-32": Cell("prefix of 32", _prefix("fixed", length=32)),
    "fixed-64": Cell("prefix of 64", _FIXED_64),
    "linear": Cell(
        "linear schedule (the paper's)", _BUCKETS, _increments(2, 4)
    ),
    "popd": Cell(
        "linear, in steps of five updates (POPD)",
        _prefix("linear", start=8, every=5),
        _increments(10, 20),
    ),
    "random": Cell("random cap", _prefix("random")),
    "drift": Cell(
        "drift budget (Prune-OPD)",
        _prefix(
            "drift",
            start=16,
            increment=16,
            min_overlap=0.4,
            max_drifted=50,
            min_reliable_fraction=0.1,
        ),
    ),
    "plateau": Cell(
        "plateau and utilisation (Adaptive FastOPD)",
        _prefix("plateau", start=16, increment=16, patience_updates=2),
    ),
    "agreement": Cell(
        "agreement stop (KAT)",
        _prefix(
            "agreement", window_tokens=16, memory_rollouts=512, warmup_updates=5
        ),
    ),
    "audited": Cell(
        "audited (ours)",
        _prefix("audited", start=8, divergence_fraction=0.9, min_nats=0.3),
    ),
    "first-32": Cell("full rollouts, loss on the first 32", _window(0, 32)),
    "32-64": Cell("full rollouts, loss on 32 to 64", _window(32, 64)),
    "64-96": Cell("full rollouts, loss on 64 to 96", _window(64, 96)),
    "last-32": Cell("full rollouts, loss on the last 32", _window(-32, 0)),
    "forward": Cell(
        "on-policy forward KL, prefix of 64",
        _FIXED_64 | {"loss.exact.divergence": "forward_kl"},
    ),
    "off-reverse": Cell(
        "off-policy (teacher's prefixes of 64), reverse KL",
        _FIXED_64 | _OFF_POLICY,
    ),
    "off-forward": Cell(
        "off-policy (teacher's prefixes of 64), forward KL",
        _FIXED_64 | _OFF_POLICY | {"loss.exact.divergence": "forward_kl"},
    ),
    "mixture": Cell(
        "half of the updates off-policy, prefix of 64",
        _FIXED_64 | _OFF_POLICY | {"rollout.source_share": "0.5"},
    ),
}
_COMMON = {
    "evaluation.every": "10",
    "evaluation.sets.heldout.size": "240",
    "evaluation.greedy": "False",
    "evaluation.teacher": "False",
}


def command(student: str, name: str, seed: int, workdir: pathlib.Path) -> list:
  """Returns the command line of one run."""
  cell = CELLS[name]
  settings = _COMMON | cell.settings | cell.of.get(student, {})
  settings["seed"] = str(seed)
  config = pathlib.Path(__file__).parents[2] / "configs" / "math.py"
  return [
      sys.executable,
      "-m",
      "prefix_distill.main",
      f"--config={config}:{STUDENTS[student]}",
      f"--workdir={workdir}",
      *(f"--config.{k}={v}" for k, v in settings.items()),
  ]


def _run(
    student: str, name: str, seed: int, workdir: pathlib.Path, core: int | None
) -> str:
  """Runs a cell to its end; returns a line to print."""
  place = workdir / student / name / str(seed)
  label = f"{student} {name} seed {seed}"
  if (place / "export").is_dir():
    return f"{label}: done before"
  place.mkdir(parents=True, exist_ok=True)
  line = command(student, name, seed, place)
  if core is not None:
    line = ["taskset", "-c", str(core), *line]
  with (place / "log").open("a") as log:
    code = subprocess.run(line, stdout=log, stderr=log, check=False).returncode
  return f"{label}: {'done' if code == 0 else f'FAILED, see {place}/log'}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add, path = parser.add_argument, pathlib.Path
  add("--students", nargs="+", default=[*STUDENTS], choices=STUDENTS)
  add("--cells", nargs="+", default=[*CELLS], choices=CELLS)
  add("--seeds", nargs="+", type=int, default=[0, 1, 2])
  add("--workdir", type=path, default=path("runs/reproduce"))
  add("--out", type=path, default=path("docs/results"))
  add("--parallel", type=int, default=1, help="runs at a time, one per core")
  add("--only_report", action="store_true", help="run nothing, gather again")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the cells and writes the results; returns the exit status."""
  args = _parse(arguments)
  # The seeds are the outer loop, so that an early stop leaves a whole table of
  # fewer seeds.
  todo = [
      (student, name, seed)
      for seed in args.seeds
      for student in args.students
      for name in args.cells
  ]
  failed = False
  if not args.only_report:
    failed = _run_all(todo, args.workdir, args.parallel)
  names = {name: cell.about for name, cell in CELLS.items()}
  analyze.gather(args.workdir, names, args.out)
  return int(failed)


def _run_all(
    todo: Sequence[tuple[str, str, int]], workdir: pathlib.Path, parallel: int
) -> bool:
  """Runs cells, some at a time; returns whether any failed."""
  cores = list(range(parallel)) if parallel > 1 else [None]
  failed, count = False, 0

  def work(cell: tuple[str, str, int]) -> str:
    core = cores.pop()
    try:
      return _run(*cell, workdir, core)
    finally:
      cores.append(core)

  with futures.ThreadPoolExecutor(parallel) as pool:
    for said in pool.map(work, todo):
      count += 1
      print(f"[{count}/{len(todo)}] {said}", flush=True)
      failed |= "FAILED" in said
  return failed


if __name__ == "__main__":
  sys.exit(main())
