"""The paper's comparison on small tasks, with every number kept.

  python -m prefix_distill.experiments.reproduce

Does all that `docs/results/README.md` shows: trials of learning rates, runs of
every method with several seeds, an analysis of the trained students, and at
last tables, figures and the README's part. A run is a cell of a table: a task,
a method, a seed. `docs/results/runs.jsonl` keeps each finished run, and a run
that it holds is not done again, so the command can be stopped and continued,
also in another clone. `--tasks`, `--cells` and `--seeds` select some;
`--trials`, `--runs`, `--mechanism` and `--report` do that part alone.

  python -m prefix_distill.experiments.reproduce --check capable/linear/77

does one run with a seed of your own, adds nothing to the results, and says
whether it lands where they say that a new seed lands.

The analysis is of the students that the runs of this clone left: where the
divergence to the teacher is after training; and before it, where the gradient
of whole rollouts points, and what a prefix of the teacher's answer is worth. It
adds to `docs/results/mechanism.jsonl`.

`--student` is the language model of the tasks `language` and `half`, a
directory or hub id. The teacher is trained from it first, and so is a student
of every second of its layers. A run takes 5 GB of the disk while it lasts.

The trials are of the learning rates from which each method's was chosen, on a
seed that is used for nothing else; every method has the same number of trials.
The choice is by the validation split, which has no problem of the test split.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import types
from typing import Any
from typing import IO

import safetensors.numpy

from prefix_distill.experiments import results
from prefix_distill.models import huggingface

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIGS = _ROOT / "configs"
_STUDENT = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MADE = ("teacher", "half")  # Models that are trained from it first.
TRIAL_SEED = 100


@dataclasses.dataclass(frozen=True)
class Task:
  """A student, a teacher and problems.

  Attributes:
    about: what stands over its table.
    config: the file in `configs/`, and its argument; with `{teacher}` and
      `{student}` or `{half}` where a language model is learned from.
    every: updates from one evaluation to the next.
    rates: learning rates to choose from; empty if there are no trials.
    fast: a learning rate that learns sooner, of the cells that have it.
    settings: fields of the config, for every cell.
    prefix: fields of the config, for cells of method "prefix".
    of: by cell, further fields of the config.
    every_ablation: updates from one evaluation to the next in ablations; 0 for
      `every`.
    problems: of the test and of the validation split.
    gradients: the prefixes whose gradients are compared, in tokens.
    teacher_prefixes: those of the teacher's answers that the student goes on
      from.
    cells: those that are run unless `--cells` asks for others.
    seeds: how many seeds these have.
    note: what a reader of its tables should know.
  """

  about: str
  config: str
  every: int
  rates: tuple[float, ...] = ()
  fast: float = 1e-3
  settings: dict[str, str] = dataclasses.field(default_factory=dict)
  prefix: dict[str, str] = dataclasses.field(default_factory=dict)
  of: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
  every_ablation: int = 0
  problems: tuple[int, int] = (240, 240)
  gradients: str = "8,16,32,64,128"
  teacher_prefixes: str = "0,8,16,32,64,128"
  cells: tuple[str, ...] = ()
  seeds: int = 5
  note: str = ""

  @property
  def is_language(self) -> bool:
    """Whether a teacher is made of `--student`, and learned from."""
    return "{teacher}" in self.config


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method, a schedule or an ablation.

  Attributes:
    about: its name in tables.
    settings: fields of the config.
    main: whether it has trials and, if a task says so, denser evaluations; the
      others are ablations, with the learning rate of `like`.
    like: the cell whose learning rate it takes; itself if empty.
    is_fast: whether it has the task's larger learning rate, whatever the
      trials say.
  """

  about: str
  settings: dict[str, str]
  main: bool = True
  like: str = ""
  is_fast: bool = False


def _prefix(schedule: str, **settings: object) -> dict[str, str]:
  named = {f"prefix.{schedule}.{k}": str(v) for k, v in settings.items()}
  return {"method": "prefix", "prefix.schedule": schedule, **named}


_RATE = "optimizer.learning_rate"
_FULL = {"method": "full"}
_FIXED_16 = _prefix("fixed", length=16)
_FIXED_64 = _prefix("fixed", length=64)
_OFF_POLICY = {"rollout.source": "teacher"}


def _window(start: int, end: int) -> dict[str, str]:
  bounds = {"loss.window_start": str(start), "loss.window_end": str(end)}
  return _FULL | bounds


def _ablation(about: str, settings: dict[str, str], like: str) -> Cell:
  return Cell(about, settings, main=False, like=like)


CELLS = {
    "full": Cell("full on-policy distillation", _FULL),
    "linear": Cell("growing prefix (the paper's)", _prefix("linear")),
    "fixed-16": Cell("prefix of 16", _FIXED_16),
    "fixed-64": Cell("prefix of 64", _FIXED_64),
    "random": Cell("random prefix", _prefix("random")),
    "audited": Cell(
        "audited (ours)",
        _prefix("audited", start=8, divergence_fraction=0.9, min_nats=0.3),
    ),
    "seqkd": Cell("SeqKD", {"method": "seqkd"}),
    # They learn sooner; for comparisons under small budgets.
    "full-fast": Cell(
        "full, larger learning rate", _FULL, main=False, is_fast=True
    ),
    "fixed-64-fast": Cell(
        "prefix of 64, larger learning rate",
        _FIXED_64,
        main=False,
        is_fast=True,
    ),
    "fixed-8": _ablation(
        "prefix of 8", _prefix("fixed", length=8), "fixed-16"
    ),
    "popd": _ablation(
        "growing by one token (POPD)",
        _prefix("linear", start=8, increment=1),
        "linear",
    ),
    "drift": _ablation(
        "drift budget and weights (Prune-OPD)",
        _prefix(
            "drift", start=16, increment=16, min_overlap=0.4, max_drifted=50
        ),
        "linear",
    ),
    "plateau": _ablation(
        "plateau of four signals, or utilisation (Adaptive FastOPD)",
        # While nine tenths of the answers reach the cap, it grows at once.
        _prefix(
            "plateau",
            start=16,
            increment=16,
            min_reached_fraction=0.9,
            patience_updates=2,
        ),
        "linear",
    ),
    "agreement": _ablation(
        "agreement stop (KAT)",
        _prefix(
            "agreement",
            window_tokens=16,
            memory_rollouts=512,
            warmup_updates=5,
            min_rollouts=64,
        ),
        "full",
    ),
    "first-32": _ablation(
        "full rollouts, loss on the first 32", _window(0, 32), "full"
    ),
    "32-64": _ablation(
        "full rollouts, loss on 32 to 64", _window(32, 64), "full"
    ),
    "last-32": _ablation(
        "full rollouts, loss on the last 32", _window(-32, 0), "full"
    ),
    "full-forward": _ablation(
        "full, forward KL",
        _FULL | {"loss.exact.divergence": "forward_kl"},
        "full",
    ),
    "forward": _ablation(
        "forward KL, prefix of 64",
        _FIXED_64 | {"loss.exact.divergence": "forward_kl"},
        "fixed-64",
    ),
    "off-reverse": _ablation(
        "the teacher's prefixes of 64, reverse KL",
        _FIXED_64 | _OFF_POLICY,
        "fixed-64",
    ),
    "off-forward": _ablation(
        "the teacher's prefixes of 64, forward KL",
        _FIXED_64 | _OFF_POLICY | {"loss.exact.divergence": "forward_kl"},
        "fixed-64",
    ),
}

_WINDOWS = ("first-32", "32-64", "last-32")
_FORMS = ("forward", "off-reverse", "off-forward")
_WORDS = {
    # All is over in ten updates at the config's own 3e-4.
    "settings": {"steps": "32", _RATE: "1e-4"},
    "fast": 3e-4,
    "prefix": {"prefix.buckets": "(32,64,128,256)"},
    "every_ablation": 8,
    "problems": (240, 120),
    "note": (
        "The learning rate is 1e-4 for all, without trials, and was set before"
        " these runs so that the rise can be seen: at the default command's"
        ' 3e-4, here "larger", all is over in ten updates. There are 32 updates'
        " of 32 rollouts."
    ),
}
_SUMS_CELLS = (
    *("full", "linear", "fixed-8", "full-forward"),
    *("off-reverse", "off-forward", *_WINDOWS, "seqkd"),
)
_SUMS = {
    "every": 6,
    "settings": {
        "steps": "12",
        "evaluation.scored": "100",
        # Of language models, that is usual; and faster where a CPU has AMX.
        "student.compute_dtype": "bfloat16",
        "teacher.compute_dtype": "bfloat16",
    },
    "of": {
        "linear": {"prefix.linear.increment": "5"},
        "seqkd": {"steps": "18"},
    },
    "problems": (100, 0),
    # Of 56 tokens, the last 40 of which stay hidden in the second.
    "gradients": "8,16,32",
    "teacher_prefixes": "0,8,16",
}
TASKS = {
    "capable": Task(
        "word problems, capable student",
        "math.py:tiny",
        4,
        of={
            "linear": {"prefix.linear.increment": "3"},
            "seqkd": {"steps": "64"},
        },
        cells=(
            *("full", "linear", "fixed-16", "fixed-64", "random", "full-fast"),
            *_WINDOWS,
            *_FORMS,
        ),
        **_WORDS,
    ),
    "weak": Task(
        "word problems, weak student",
        "math.py:tiny-weak",
        4,
        of={
            "linear": {"prefix.linear.increment": "6"},
            "seqkd": {"steps": "64"},
        },
        cells=(
            *("full", "linear", "fixed-16", "fixed-64", "full-fast"),
            *_WINDOWS,
            *_FORMS,
        ),
        **_WORDS,
    ),
    "chain": Task(
        "chains of sums",
        "math.py:chain",
        5,
        rates=(3e-4, 1e-3),
        prefix={"prefix.buckets": "(32,64,128,240)"},
        of={
            "linear": {"prefix.linear.increment": "4"},
            "seqkd": {"steps": "120"},
        },
        cells=(
            *("full", "linear", "fixed-16", "fixed-64", "random", "audited"),
            *("seqkd", "full-fast", "fixed-64-fast", "full-forward"),
            *_WINDOWS,
            *_FORMS,
        ),
    ),
    "language": Task(
        "sums written out, SmolLM2-135M-Instruct",
        "language.py:student={student},teacher={teacher}",
        note=(
            "A first look: 12 updates of 16 rollouts, computed in bfloat16. The"
            " student is the model as it comes, and the teacher the same model"
            " after 20 updates of `method=sft`. After 12 updates hardly an"
            " answer is right, so accuracy says little yet; the divergence"
            " does."
        ),
        cells=(*_SUMS_CELLS, "fixed-16", "random", "audited", "plateau"),
        seeds=1,
        **_SUMS,
    ),
    "half": Task(
        "sums written out, every second layer of SmolLM2-135M-Instruct",
        "language.py:student={half},teacher={teacher}",
        note=(
            "As above, but the student has 15 of the 30 layers, and was trained"
            " like the teacher before: 20 updates of `method=sft`."
        ),
        cells=_SUMS_CELLS,
        seeds=1,
        **_SUMS,
    ),
}
# Cells in the figure.
_DRAWN = (
    "full",
    "linear",
    "fixed-16",
    "fixed-64",
    "random",
    "seqkd",
    "full-fast",
    "full-forward",
    "forward",
    "off-forward",
    "fixed-8",
)
# The students of these cells are analysed.
_ANALYSED = ("full", "linear", "fixed-16", "fixed-64", "random", "audited")
_COMMON = {
    "evaluation.greedy": "False",
    "evaluation.teacher": "False",
    "checkpoint.every": "1000",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run: a task, a cell, a seed, and a learning rate if it is a trial."""

  task: str
  cell: str
  seed: int
  rate: float | None = None

  @property
  def key(self) -> dict[str, Any]:
    """What names the run in `runs.jsonl`."""
    trial = {} if self.rate is None else {"rate": self.rate}
    return {"task": self.task, "cell": self.cell, "seed": self.seed} | trial

  def __str__(self) -> str:
    return " ".join(str(x) for x in self.key.values())


def key(run: dict[str, Any]) -> tuple:
  """Returns what tells a run of `runs.jsonl` from the others."""
  return tuple(run.get(x) for x in ("task", "cell", "seed", "rate"))


def command(
    todo: Experiment,
    workdir: pathlib.Path,
    runs: Sequence[dict[str, Any]],
    models: Mapping[str, str] = types.MappingProxyType({}),
) -> list[str]:
  """Returns the command line of one run.

  Args:
    todo: the run.
    workdir: its directory.
    runs: what is known; a run that is no trial takes the learning rate that
      the trials of its cell chose, and the config's if there were none.
    models: the student and the teacher of a language model's task.
  """
  task, cell = TASKS[todo.task], CELLS[todo.cell]
  sizes = dict(
      zip((results.TEST, results.VALIDATION), task.problems, strict=True)
  )
  # Trials do not see the test split.
  sets = {
      name: size
      for name, size in sizes.items()
      if size and (name != results.TEST or todo.rate is None)
  }
  # A method that is drawn as a curve is evaluated more often.
  every = task.every
  if not cell.main and not cell.is_fast:
    every = task.every_ablation or every
  settings = {"evaluation.every": str(every)} | _COMMON | task.settings
  settings |= {f"evaluation.sets.{x}.size": str(n) for x, n in sets.items()}
  if cell.settings["method"] == "prefix":
    settings |= task.prefix
  settings |= cell.settings | task.of.get(todo.cell, {})
  rate = task.fast if cell.is_fast else todo.rate
  if rate is None:
    rate = results.chosen_rate(runs, todo.task, cell.like or todo.cell)
  if rate is not None:
    settings[_RATE] = f"{rate:g}"
  settings["seed"] = str(todo.seed)
  return [
      sys.executable,
      "-m",
      "prefix_distill.main",
      f"--config={_config(task, models)},sets={'+'.join(sets)}",
      f"--workdir={workdir}",
      *(f"--config.{k}={v}" for k, v in settings.items()),
  ]


def _config(task: Task, models: Mapping[str, str]) -> str:
  return f"{_CONFIGS / task.config}".format(
      **{name: models.get(name, "") for name in ("student", "half", "teacher")}
  )


def halve(source: str, to: pathlib.Path) -> None:
  """Writes a model that has every second layer of another, from the first on.

  Args:
    source: a directory or hub id.
    to: the new directory, which appears whole or not at all.

  Raises:
    ModelFilesError: there is no such model, or its files are incomplete.
  """
  place = huggingface.resolve(source, weights=True)
  weights, tensors = huggingface.Weights(place), {}
  for name in weights.names():
    in_layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    layer, new_name = 0, name
    if in_layer:
      layer = int(in_layer[1])
      new_name = f"model.layers.{layer // 2}.{in_layer[2]}"
    if layer % 2 == 0:
      tensors[new_name] = weights.read(name, (slice(None),))
  # Not `huggingface.whole_directory`: that starts JAX, and this process would
  # take the accelerator from the runs.
  partial = to.with_name(to.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for file in place.iterdir():
    if file.is_file() and ".safetensors" not in file.name:
      shutil.copyfile(file, partial / file.name)
  safetensors.numpy.save_file(
      tensors, partial / huggingface.SINGLE, metadata={"format": "pt"}
  )
  settings = huggingface.read_json(place / "config.json")
  layers = settings["num_hidden_layers"]
  # Some families list a property of each layer.
  settings = {
      name: x[::2] if isinstance(x, list) and len(x) == layers else x
      for name, x in settings.items()
  }
  settings["num_hidden_layers"] = (layers + 1) // 2
  huggingface.write_json(partial / "config.json", settings)
  partial.rename(to)


class Runner:
  """Does runs, and adds each to `runs.jsonl` when it has ended."""

  def __init__(
      self,
      workdir: pathlib.Path,
      file: pathlib.Path,
      student: str = _STUDENT,
  ):
    self._workdir, self._file = workdir, file
    # Not beside the tasks, one of which is called as a model is.
    models = workdir / "models"
    made = {name: str(models / name / "export") for name in _MADE}
    self._models = {"student": student} | made
    self._lock, self._making = threading.Lock(), threading.Lock()
    self._failed = set()

  def _make(self, name: str, log: IO[str]) -> bool:
    """Trains a model that a task needs, unless it is there.

    Args:
      name: "teacher" or "half".
      log: gets what the training prints.

    Returns:
      Whether it is there. Training that failed is not tried again.
    """
    export = pathlib.Path(self._models[name])
    if export.is_dir() or name in self._failed:
      return export.is_dir()
    source = self._models["student"]
    if name == "half":
      untrained = export.parents[1] / "untrained-half"
      if not untrained.is_dir():
        halve(source, untrained)
      source = str(untrained)
    asked = f"method=sft,student={source}"
    line = [
        sys.executable,
        "-m",
        "prefix_distill.main",
        f"--config={_CONFIGS}/language.py:{asked}",
        f"--workdir={export.parent}",
    ]
    subprocess.run(line, stdout=log, stderr=log, check=False)
    if not export.is_dir():
      self._failed.add(name)
    return export.is_dir()

  def _make_all(self, task: str, log: IO[str]) -> bool:
    """Makes the models that a task needs; returns whether they are there."""
    needed = [x for x in _MADE if f"{{{x}}}" in TASKS[task].config]
    with self._making:
      return all([self._make(name, log) for name in needed])

  def runs(self) -> list[dict[str, Any]]:
    return results.load(self._file)

  def place(self, todo: Experiment) -> pathlib.Path:
    return self._workdir / str(todo).replace(" ", "/")

  def run(
      self, todo: Experiment, core: int | None = None
  ) -> dict[str, Any] | None:
    """Does a run to its end; returns what is kept of it, None if it failed."""
    place = self.place(todo)
    place.mkdir(parents=True, exist_ok=True)
    line = command(todo, place, self.runs(), self._models)
    if core is not None:
      line = ["taskset", "-c", str(core), *line]
    with (place / "log").open("a") as log:
      if not self._make_all(todo.task, log):
        return None
      subprocess.run(line, stdout=log, stderr=log, check=False)
    found = results.read_run(place)
    return found and todo.key | found

  def run_all(self, all_runs: Sequence[Experiment], parallel: int) -> bool:
    """Does what is not done, some at a time; returns whether any failed."""
    done = {key(run) for run in self.runs()}
    left = [x for x in all_runs if key(x.key) not in done]
    print(f"{len(all_runs) - len(left)} of {len(all_runs)} were done before.")
    cores = list(range(parallel)) if parallel > 1 else [None]

    def work(todo: Experiment) -> bool:
      core = cores.pop()
      try:
        run = self.run(todo, core)
      finally:
        cores.append(core)
      with self._lock:
        if run is not None:
          with self._file.open("a") as file:
            file.write(json.dumps(run) + "\n")
          if TASKS[todo.task].is_language:  # They take gigabytes.
            for large in ("checkpoints", "export"):
              shutil.rmtree(self.place(todo) / large, ignore_errors=True)
        failed = f"FAILED, see {self.place(todo)}/log"
        print(f"{todo}: {failed if run is None else 'done'}", flush=True)
      return run is None

    with futures.ThreadPoolExecutor(parallel) as pool:
      return any(list(pool.map(work, left)))


  def analyse(
      self, task: str, known: Sequence[dict[str, Any]]
  ) -> list[dict[str, Any]]:
    """Analyses a task and the students that it left; returns new lines.

    Args:
      task: its name.
      known: lines of `mechanism.jsonl`; what is there is not done again.
    """
    of, spec = {"task": task}, TASKS[task]
    known = [line for line in known if line["task"] == task]
    done = {line["what"] for line in known}
    students = {(line.get("cell"), line.get("seed")) for line in known}
    places = {
        str(self.place(Experiment(task, run["cell"], run["seed"])) / "export"):
            {"cell": run["cell"], "seed": run["seed"]}
        for run in self.runs()
        if run["task"] == task and run["cell"] in _ANALYSED
        if "rate" not in run and (run["cell"], run["seed"]) not in students
    }
    there = [path for path in places if pathlib.Path(path).is_dir()]
    lines = []
    if spec.is_language:  # Its students are scored in their evaluations.
      known_already = {"gradient", "teacher_prefix"} <= done
      if known_already or not self._make_all(task, sys.stdout):
        return []
    elif there or "position" not in done:
      found = self._analysis(task, "position", f"--students={','.join(there)}")
      before = {"cell": "before", "seed": 0}
      lines += [
          of | {"what": "position"} | at | results.binned(found[path])
          for path in found
          if (at := places.get(path, before)) != before
          or "position" not in done
      ]
    if "gradient" not in done:
      flags = (f"--lengths={spec.gradients}", "--batches=8")
      (values,) = self._analysis(task, "gradient", *flags).values()
      lines.append(of | {"what": "gradient"} | values)
    if "teacher_prefix" not in done:
      found = self._analysis(
          task, "teacher_prefix", f"--lengths={spec.teacher_prefixes}"
      )
      rows = [
          {name: row[name] for name in results.PREFIX_FIELDS}
          for row in found[results.TEST]
      ]
      lines.append(of | {"what": "teacher_prefix", "rows": rows})
    return lines

  def _analysis(self, task: str, what: str, *flags: str) -> dict[str, Any]:
    place = self._workdir / task / f"analysis-{what}"
    shutil.rmtree(place, ignore_errors=True)  # Of an analysis of before.
    place.mkdir(parents=True)
    line = [
        sys.executable,
        "-m",
        "prefix_distill.experiments.analyze",
        f"--config={_config(TASKS[task], self._models)}",
        f"--what={what}",
        f"--workdir={place}",
        *(f"--config.{k}={v}" for k, v in TASKS[task].settings.items()),
        *flags,
    ]
    subprocess.run(line, check=True)
    return json.loads((place / "analysis" / f"{what}.json").read_text())


def _experiments(args: argparse.Namespace) -> list[Experiment]:
  """The seeds are the outer loop: an early stop leaves a whole table."""
  most = max(TASKS[task].seeds for task in args.tasks)
  return [
      Experiment(task, cell, seed)
      for seed in args.seeds or range(most)
      for task in args.tasks
      if args.seeds or seed < TASKS[task].seeds
      for cell in args.cells or TASKS[task].cells
  ]


def _trials(args: argparse.Namespace) -> list[Experiment]:
  return [
      Experiment(task, cell, TRIAL_SEED, rate)
      for task in args.tasks
      for cell in args.cells or TASKS[task].cells
      if CELLS[cell].main
      for rate in TASKS[task].rates
  ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add, path = parser.add_argument, pathlib.Path
  add("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
  add("--cells", nargs="+", default=[], choices=CELLS)
  add("--seeds", nargs="+", type=int, default=[])
  add("--student", default=_STUDENT, help="a directory or hub id")
  add("--workdir", type=path, default=path("runs/reproduce"))
  add("--docs", type=path, default=_ROOT / "docs" / "results")
  add("--parallel", type=int, default=1, help="runs at a time, one per core")
  only = parser.add_mutually_exclusive_group()
  for part, text in _PARTS.items():
    only.add_argument(
        f"--{part}",
        action="store_const",
        const=part,
        dest="part",
        help=f"only {text}",
    )
  add("--check", metavar="TASK/CELL/SEED", help="one run beside the results")
  return parser.parse_args(arguments)


# What the command does, in this order.
_PARTS = {
    "trials": "the trials of learning rates, on the validation split",
    "runs": "the runs",
    "mechanism": "the analysis of the trained students",
    "report": "the pages, from what was kept",
}


def _check(runner: Runner, name: str) -> int:
  """Does one run of the reader's; returns 0 if it lands where it should."""
  task, cell, seed = name.split("/")
  todo = Experiment(task, cell, int(seed))
  known = results.curves(x for x in runner.runs() if x.get("rate") is None)
  run = runner.run(todo)
  if run is None:
    print(f"The run failed, see {runner.place(todo)}/log.")
    return 1
  text, inside = results.compare_seed(known[task, cell], run)
  print(text)
  return int(not inside)


def main(arguments: Sequence[str] | None = None) -> int:
  """Does runs and writes the results; returns the exit status."""
  args = _parse(arguments)
  runner = Runner(args.workdir, args.docs / "runs.jsonl", args.student)
  if args.check:
    return _check(runner, args.check)
  args.docs.mkdir(parents=True, exist_ok=True)
  failed = False
  for part, of in (("trials", _trials), ("runs", _experiments)):
    if args.part in (None, part):
      failed |= runner.run_all(of(args), args.parallel)
  if args.part in (None, "mechanism"):
    path = args.docs / "mechanism.jsonl"
    for task in args.tasks:
      lines = runner.analyse(task, results.load(path))
      with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
  results.write(
      runner.runs(),
      args.docs,
      {name: task.about for name, task in TASKS.items()},
      {name: cell.about for name, cell in CELLS.items()},
      _DRAWN,
      results.load(args.docs / "mechanism.jsonl"),
      {name: task.note for name, task in TASKS.items()},
      results.load(args.docs / "again.jsonl"),
  )
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
