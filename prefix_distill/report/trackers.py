"""Sends a run's numbers, texts and pictures to TensorBoard, wandb or MLflow.

`metrics.jsonl` stays the record of a run; a tracker shows it elsewhere. Its
client is loaded only when it is chosen (--tracker), and nothing that goes wrong
in it ends or changes a run: it is told once, and the tracker is left.

  tensorboard   tensorboardX writes to WORKDIR/tensorboard
  wandb         WANDB_PROJECT, WANDB_MODE and so on are read by wandb itself
  mlflow        so are MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME; the
                package mlflow-skinny suffices for a server of yours
  auto          tensorboard if tensorboardX is installed, and else none
  none

A run that goes on adds to what the tracker has of it.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import hashlib
import html
import importlib.util
import math
import os
import pathlib
import sys
import tempfile
from typing import Any

from prefix_distill.errors import ConfigError
from prefix_distill.errors import one_line
from prefix_distill.report import plots

NAMES = ("auto", "none", "tensorboard", "wandb", "mlflow")
# What `pip install` and `import` call the clients.
_CLIENTS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
# How MLFLOW_TRACKING_URI names a database; without it MLflow makes one.
_DATABASES = ("", "sqlite", "mysql", "postgresql", "mssql")
# Fields that are no measurements.
_LABELS = ("step", "set", "mode", "model", "grading", "verdicts", "source")


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
  """Names the numbers of a line of `metrics.jsonl`: train/kl, for example."""
  place = "train"
  if "mode" in line:
    place = f"eval/{line['set']}/{line['model']}/{line['mode']}"
  return {
      f"{place}/{name}": float(value)
      for name, value in line.items()
      if name not in _LABELS
      and isinstance(value, (int, float))
      and math.isfinite(value)
  }


def check(name: str) -> str:
  """Returns the tracker that a name stands for, without loading it.

  Raises:
    ConfigError: there is none of that name, or its client is not installed.
  """
  if name not in NAMES:
    raise ConfigError(
        f"--tracker={name} is no tracker; use one of {', '.join(NAMES)}."
    )
  if name == "auto":
    there = importlib.util.find_spec(_CLIENTS["tensorboard"]) is not None
    return "tensorboard" if there else "none"
  client = _CLIENTS.get(name)
  if client and importlib.util.find_spec(client) is None:
    raise ConfigError(
        f"--tracker={name} needs the package {client}; install it with"
        f" pip install {client}, or use --tracker=none."
    )
  # What mlflow-skinny leaves out of mlflow; it would fail when the run starts.
  store = os.environ.get("MLFLOW_TRACKING_URI", "")
  if (
      name == "mlflow"
      and store.partition(":")[0].partition("+")[0] in _DATABASES
      and importlib.util.find_spec("sqlalchemy") is None
  ):
    raise ConfigError(
        f"--tracker=mlflow would write to a database ({store or 'mlflow.db'}),"
        " which the package mlflow-skinny alone cannot; install it with pip"
        " install mlflow, or set MLFLOW_TRACKING_URI to a server's address."
    )
  return name


class Tracker:
  """Takes lines, texts and pictures, and forgets them."""

  def write(self, line: Mapping[str, Any]) -> None:
    """Takes a line of `metrics.jsonl`."""

  def text(self, name: str, text: str, step: int) -> None:
    """Takes a text, such as some answers."""

  def picture(self, file: pathlib.Path, step: int) -> None:
    """Takes a picture of the report, a PNG."""

  def close(self) -> None:
    """Sends what waits."""


class _TensorBoard(Tracker):

  def __init__(
      self, workdir: pathlib.Path, settings: Mapping[str, Any], step: int | None
  ):
    import tensorboardX

    # What a killed run wrote past its checkpoint is written again.
    purge = None if step is None else step + 1
    self._writer = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=purge
    )
    if step is None:
      self._writer.add_text("settings", f"```\n{_yaml(settings)}\n```", 0)

  def write(self, line: Mapping[str, Any]) -> None:
    for name, value in scalars(line).items():
      self._writer.add_scalar(name, value, line["step"])

  def text(self, name: str, text: str, step: int) -> None:
    self._writer.add_text(name, text, step)

  def picture(self, file: pathlib.Path, step: int) -> None:
    import matplotlib.image

    pixels = matplotlib.image.imread(file)[..., :3]
    self._writer.add_image(file.stem, pixels, step, dataformats="HWC")

  def close(self) -> None:
    self._writer.close()


class _Wandb(Tracker):

  def __init__(
      self, workdir: pathlib.Path, settings: Mapping[str, Any], step: int | None
  ):
    import wandb

    del step  # Rows are placed by the update, whenever they come.
    self._wandb = wandb
    self._run = wandb.init(
        dir=str(workdir),
        id=_identity(workdir),
        name=workdir.name,
        resume="allow",
        config=dict(settings),
    )
    self._run.define_metric("update")
    self._run.define_metric("*", step_metric="update")

  def write(self, line: Mapping[str, Any]) -> None:
    self._run.log({"update": line["step"], **scalars(line)})

  def text(self, name: str, text: str, step: int) -> None:
    page = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
    self._run.log({"update": step, name: page})

  def picture(self, file: pathlib.Path, step: int) -> None:
    self._run.log({"update": step, file.stem: self._wandb.Image(str(file))})

  def close(self) -> None:
    self._run.finish()


class _MLflow(Tracker):

  def __init__(
      self, workdir: pathlib.Path, settings: Mapping[str, Any], step: int | None
  ):
    import mlflow

    del step
    self._client, file = mlflow, workdir / "mlflow_run"
    known = file.read_text().strip() if file.is_file() else None
    run = mlflow.start_run(run_id=known, run_name=workdir.name)
    if known is None:
      file.write_text(run.info.run_id)
      mlflow.log_dict(dict(settings), "settings.json")

  def write(self, line: Mapping[str, Any]) -> None:
    self._client.log_metrics(scalars(line), step=line["step"])

  def text(self, name: str, text: str, step: int) -> None:
    self._client.log_text(text, f"{name}-{step}.txt")

  def picture(self, file: pathlib.Path, step: int) -> None:
    del step
    self._client.log_artifact(str(file))

  def close(self) -> None:
    self._client.end_run()


_KINDS: Mapping[str, type[Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


class _Guarded(Tracker):
  """A tracker whose failures are told once, and then left alone."""

  def __init__(self, name: str, make: Callable[[], Tracker]):
    self._name, self._inner = name, Tracker()
    with self._guard():
      self._inner = make()

  @contextlib.contextmanager
  def _guard(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Of any client, network or disk.
      print(
          f"Warning: {self._name} takes no more of this run"
          f" ({one_line(error)}); metrics.jsonl has all of it.",
          file=sys.stderr,
          flush=True,
      )
      self._inner = Tracker()

  def write(self, line: Mapping[str, Any]) -> None:
    with self._guard():
      self._inner.write(line)

  def text(self, name: str, text: str, step: int) -> None:
    with self._guard():
      self._inner.text(name, text, step)

  def picture(self, file: pathlib.Path, step: int) -> None:
    with self._guard():
      self._inner.picture(file, step)

  def close(self) -> None:
    with self._guard():
      self._inner.close()


def make(
    name: str,
    workdir: pathlib.Path,
    settings: Mapping[str, Any],
    step: int | None,
) -> Tracker:
  """Starts or goes on with a tracker.

  Args:
    name: what `check` returned.
    workdir: of the run.
    settings: of the run, plain.
    step: the update after which a run goes on; None if it begins.
  """
  if name == "none":
    return Tracker()
  return _Guarded(name, lambda: _KINDS[name](workdir, settings, step))


def show_figures(
    tracker: Tracker, lines: Sequence[Mapping[str, Any]], method: str
) -> None:
  """Gives a tracker the report's figures.

  Args:
    tracker: of the run.
    lines: of its metrics.jsonl.
    method: the run's.
  """
  with tempfile.TemporaryDirectory() as directory:
    for name in plots.draw(lines, pathlib.Path(directory), method, "png"):
      tracker.picture(pathlib.Path(directory, name), lines[-1]["step"])


def _identity(workdir: pathlib.Path) -> str:
  """Names a run so that its next start finds it."""
  return hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]


def _yaml(values: Mapping[str, Any], indent: str = "") -> str:
  """Shows nested settings, one a line."""
  lines = []
  for name, value in values.items():
    if isinstance(value, Mapping):
      lines += [f"{indent}{name}:", _yaml(value, indent + "  ")]
    else:
      lines.append(f"{indent}{name}: {value!r}")
  return "\n".join(lines)
