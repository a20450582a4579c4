"""The run: sample, score, update; evaluate, save, report.

The order is a contract. After update k: its metrics line, then the evaluation
if one is due, then the checkpoint if one is due. A run that was killed
anywhere goes on from its last checkpoint, after cutting what was written past
it, and so ends with the numbers of a run that was never stopped.
"""

from collections.abc import Collection
from collections.abc import Iterator
import contextlib
import pathlib
import signal
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from prefix_distill import distributed
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.data import prompts as prompts_lib
from prefix_distill.distill import prefix_schedule
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Params
from prefix_distill.report import flops
from prefix_distill.report import metrics as metrics_lib
from prefix_distill.report import report
from prefix_distill.report.flops import Lengths
from prefix_distill.train import answers
from prefix_distill.train import capacity
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib
from prefix_distill.train import update as update_lib
from prefix_distill.train.checkpoint import Checkpointer
from prefix_distill.train.ledger import Ledger
from prefix_distill.train.programs import Programs
from prefix_distill.train.step import TrainState


class Stop:
  """Turns Ctrl-C or a preemption into a wish to stop after the update."""

  wanted = False

  def ask(self, *_: Any) -> None:
    self.wanted = True
    if not _ignored(signal.SIGINT):
      # A second Ctrl-C does not wait.
      signal.signal(signal.SIGINT, signal.default_int_handler)
    print("\nStopping after this update ...", file=sys.stderr, flush=True)


def _ignored(number: signal.Signals) -> bool:
  return signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
  """Waits for Ctrl-C and SIGTERM.

  A run that was started with SIGINT ignored, as a script's background job is,
  is not stopped by a Ctrl-C that is meant for another program.
  """
  stop, numbers = Stop(), [signal.SIGTERM]
  if not _ignored(signal.SIGINT):
    numbers.append(signal.SIGINT)
  try:
    before = [signal.signal(number, stop.ask) for number in numbers]
  except ValueError:  # Not the main thread, as in some notebooks.
    yield stop
    return
  try:
    yield stop
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


_NOTHING = flops.StepFlops()


class Stopped(Exception):
  """The user stopped the run; the same command goes on with it."""


class Run:
  """One run in one workdir."""

  def __init__(
      self,
      setup: setup_lib.Setup,
      workdir: pathlib.Path,
      spent: flops.StepFlops = _NOTHING,
  ):
    """Starts or goes on; `spent` FLOPs were spent before the first update."""
    config = setup.config
    self.setup, self.config, self.workdir = setup, config, workdir
    self.programs = Programs(setup)
    self.checkpointer = Checkpointer(
        workdir / "checkpoints", config.checkpoint
    )
    # Running sums, see `Ledger`; `answer_len` is as last evaluated.
    self.totals: dict[str, Any] = {"seconds": 0.0, "answer_len": 0.0}
    self.key = jax.random.key(config.seed)
    self.teacher_params: Params | None = None
    self.writes = jax.process_index() == 0
    self.state = self._start()
    self.control = prefix_schedule.Control(config, self.totals)
    self.ledger = Ledger(setup, self.totals, spent)
    self.programs.compile_ahead(self.teacher_params)

  def _start(self) -> TrainState:
    """Restores the latest checkpoint, or loads the student."""
    setup, step = self.setup, self.checkpointer.latest_step()
    self.resumed = step is not None
    if step is None:
      params = setup_lib.load_model(
          self.config.student, setup.student, setup.mesh, self.config.seed
      )
      state = self.programs.init(params)
    else:
      state, data, self.totals = self.checkpointer.restore(
          self.programs.abstract_state()
      )
      setup.data.set_state(data)
      print(f"Resuming after update {step} of {self.config.steps}.")
    if self.writes:
      self.writer = metrics_lib.Writer(self.workdir / "metrics.jsonl", step)
    if setup.teacher is not None:
      self.teacher_params = setup_lib.load_model(
          self.config.teacher, setup.teacher, setup.mesh, self.config.seed
      )
    return state

  def write(self, values: dict[str, Any]) -> None:
    if self.writes:
      self.writer.write(values)

  def save(self) -> None:
    self.checkpointer.save(
        self.state, self.setup.data.get_state(), self.totals
    )

  def evaluate(self, step: int, which: str = "student") -> None:
    """Evaluates the student or the teacher on all sets."""
    setup = self.setup
    model, params = setup.student, self.state.params
    stop_ids = setup.stop_ids
    if which == "teacher":
      model = setup.teacher
      params = self.programs.on_device(self.teacher_params)
      stop_ids = setup.teacher_stop_ids
    start = time.perf_counter()

    def write(values: dict[str, Any]) -> None:
      if which == "student" and values["mode"] == "sampled":
        self.totals["answer_len"] = values["mean_length"]
      self.write({
          "step": step,
          "model": which,
          "flops": self.totals["flops"],
          **values,
          "seconds_evaluate": time.perf_counter() - start,
      })
      if self.writes:
        tqdm.tqdm.write(report.evaluation_line(which, step, values))

    spec, model = self.config.evaluation, setup.for_sampling(model)
    sets = self._sets(step)
    if not sets:
      return
    rows = capacity.answers(
        setup, model, evaluator.sampler_config(setup.chat, spec, stop_ids),
        self.programs.resting(), evaluator.longest_prompt(sets),
    )  # fmt: skip
    evaluator.evaluate(
        model, params, setup.chat, spec, sets, setup.sampling_mesh, stop_ids,
        rows, self.config.seed, write,
    )  # fmt: skip

  def _sets(self, step: int) -> dict[str, evaluator.Problems]:
    """Returns the sets to evaluate after update `step`."""
    between, sets = self.config.evaluation.between, self.setup.problems
    last = step == self.config.steps or self.control.finished
    if last or not between:
      return sets
    return {name: sets[name] for name in between}

  def update(self, step: int) -> dict[str, Any]:
    """Does update number `step` (from 0) and returns its metrics line."""
    begin, clock = time.perf_counter(), update_lib.Clock()
    cap, source = self.control.cap, self.control.source(step)
    prompts, completions = next(self.setup.data)
    prompts = prompts_lib.trim(prompts, self.config.data)
    read = prompts.mask.sum(1), prompts.for_teacher().mask.sum(1)
    self.state, done = update_lib.run(
        self.programs, self.state, self.teacher_params,
        *sharding.global_batch((prompts, completions), self.setup.mesh),
        update_lib.Request(
            cap,
            jax.random.fold_in(self.key, step),
            None if self.config.is_supervised else source,
            self.control.threshold,
        ),
        clock,
    )  # fmt: skip
    metrics, mask = done.metrics, done.mask
    self.control.observe(metrics, mask, done.minima)
    line = {"step": step + 1, "prefix_len": cap}
    line |= _flatten(metrics, self.config)
    lengths = (read[0], mask.sum(1), read[1], done.trained.sum(1))
    line |= self.ledger.add(Lengths(*lengths), source)
    if self.config.rollout.source != "student":
      line["source"] = source
    if done.minima is not None:
      line["trained_len"] = float(done.trained.sum(1).mean())
    if not self.config.is_supervised:
      line |= metrics_lib.of_rollouts(done.tokens, mask, self.setup.stop_ids)
    self.totals["seconds"] += time.perf_counter() - begin
    line |= {
        "dropped": self.setup.data.dropped,
        **self.programs.compilations(),
        "seconds": self.totals["seconds"],
        **clock.seconds,
        "tokens_per_second": float(mask.sum())
        / (time.perf_counter() - begin),
    }
    return line


def _flatten(metrics: dict[str, Any], config: Config) -> dict[str, float]:
  """Makes flat JSON of the update's metrics.

  What no token belonged to, a bin of positions or the special tokens, is left
  out.
  """
  out = {}
  width = step_lib.bin_width(config.rollout.max_len)
  for name, value in metrics.items():
    if np.ndim(value) == 0:
      if name != "kl_special" or np.isfinite(value):
        out[name] = float(value)
      continue
    for i, part in enumerate(value):
      if np.isfinite(part):
        out[f"{name}_{i * width}"] = float(part)
  return out


def _any_process(wanted: bool) -> bool:
  """Whether any process wants to stop: a signal may reach one of them only."""
  if jax.process_count() == 1:
    return wanted
  return bool(np.any(multihost_utils.process_allgather(np.array(wanted))))


@contextlib.contextmanager
def _trace(directory: pathlib.Path, step: int) -> Iterator[None]:
  """Writes what the host and the devices do inside, for xprof and Perfetto."""
  with (
      jax.profiler.trace(directory / "trace"),
      jax.profiler.StepTraceAnnotation("update", step_num=step),
  ):
    yield


def _steps(run: Run, stop: Stop, traced: Collection[int]) -> None:
  """Evaluates, then updates until the last step."""
  config, first = run.config, int(run.state.step)
  every = config.evaluation.every
  if not run.resumed:
    run.evaluate(0)
    run.save()
  bar = tqdm.tqdm(
      total=config.steps,
      initial=first,
      desc=config.method,
      unit="update",
      disable=not run.writes,
      # A log file gets a line now and then instead of a moving bar.
      mininterval=0.1 if sys.stderr.isatty() else 10,
  )
  with bar:
    for step in range(first, config.steps):
      if run.control.finished:
        break
      with contextlib.ExitStack() as stack:
        if step + 1 in traced:
          stack.enter_context(_trace(run.workdir, step + 1))
        line = run.update(step)
      run.write(line)
      bar.set_postfix(report.progress(line), refresh=step == first)
      bar.update()
      done = step + 1
      last = done == config.steps or run.control.finished
      if last or (every and done % every == 0):
        run.evaluate(done)
      stopping = _any_process(stop.wanted)
      if last or stopping or done % config.checkpoint.every == 0:
        run.save()
      if stopping and not last:
        raise Stopped(
            f"Stopped after update {done} of {config.steps}; the same command"
            " goes on from there."
        )


def train(
    config: Config, workdir: pathlib.Path, traced: Collection[int] = ()
) -> None:
  """Runs to the last update, and writes the report and the export.

  Args:
    config: the settings.
    workdir: see the README.
    traced: updates, counted from 1, whose trace is written to workdir/trace.

  Raises:
    ValueError: a setting, file or model does not fit; see `setup.prepare`.
    Stopped: the user asked for it; the state is saved.
  """
  setup = setup_lib.prepare(config, workdir)
  writes = jax.process_index() == 0
  # The export comes last and appears whole, so it marks a finished run.
  finished = (workdir / "export").is_dir()
  if not distributed.from_first("finished", finished):
    if writes:
      print(report.headline(config, setup.mesh.shape, workdir), flush=True)
    spent = _NOTHING
    if config.method == "seqkd":
      setup, spent = answers.with_answers(setup, workdir)
    run = Run(setup, workdir, spent)
    with stop_on_signal() as stop:
      _steps(run, stop, traced)
    if setup.teacher is not None and config.evaluation.teacher:
      run.evaluate(int(run.state.step), "teacher")
    run.programs.close()
    run.checkpointer.close()
    model, graded = config.teacher or config.student, config.evaluation
    hf.export(
        run.state.params,
        config.student.path,
        config.student.tokenizer_path,
        workdir / "export",
        hf.export_dtype(config.export.dtype, model.path),
        hf.Serving(
            setup.stop_ids, graded.temperature, graded.top_k, graded.top_p
        ),
    )
  if writes:
    report.write(workdir)
