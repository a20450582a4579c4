"""What is installed: pins, bounds, and a wheel that works without the clone."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

from packaging import markers
from packaging import requirements
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PYTHONS = ("3.11", "3.12", "3.13")
# Never needed by the commands of README; they come with extras of one's own.
_EXTRA = ("torch", "wandb", "mlflow", "mlflow-skinny", "tensorboardx")
# Imported only where they are installed, or part of a declared dependency.
_OPTIONAL = {"libtpu", "mlflow", "reasoning_gym", "tensorboardX", "wandb"}
_PARTS = {"annotated_types", "markupsafe", "pydantic_core"}
# Where the name of a distribution is not that of its module.
_MODULES = {
    "absl-py": "absl",
    "math-verify": "math_verify",
    "ml-collections": "ml_collections",
    "orbax-checkpoint": "orbax",
}
# Seconds instead of minutes.
_SMALL = (
    "--tracker=none --config.steps=2 --config.data.batch_size=8"
    " --config.evaluation.sets.heldout.size=32"
)


def _keyword(name: str):
  """Returns the value of a keyword of setup.py, in which names are lists."""
  tree = ast.parse((_ROOT / "setup.py").read_text())
  return next(
      node.value
      for node in ast.walk(tree)
      if isinstance(node, ast.keyword) and node.arg == name
  )


def _dependencies() -> list[requirements.Requirement]:
  found = ast.literal_eval(_keyword("install_requires"))
  return [requirements.Requirement(text) for text in found]


def _pins(python: str) -> dict[str, str]:
  """Returns the versions of constraints.txt on Linux."""
  about = markers.default_environment() | {
      "python_version": python,
      "python_full_version": f"{python}.0",
      "platform_machine": "x86_64",
      "sys_platform": "linux",
  }
  pins = {}
  for line in (_ROOT / "constraints.txt").read_text().splitlines():
    if line.startswith("#"):
      continue
    found = requirements.Requirement(line)
    if found.marker is None or found.marker.evaluate(about):
      (pin,) = found.specifier
      assert pin.operator == "=="
      assert found.name not in pins, line
      pins[found.name] = pin.version
  return pins


def _name(name: str) -> str:
  return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize("python", _PYTHONS)
def test_the_constraints_pin_every_dependency_within_its_bound(python):
  pins = _pins(python)
  for needed in _dependencies():
    version = pins[_name(needed.name)]
    assert needed.specifier.contains(version), f"{needed} but {version}"
  for plugin in ("cuda12", "cuda13"):
    assert pins[f"jax-{plugin}-plugin"] == pins["jax"]
  assert "libtpu" in pins
  assert not set(_EXTRA) & set(pins)


def test_all_that_is_imported_is_declared():
  declared = {_MODULES.get(_name(d.name), d.name) for d in _dependencies()}
  found = set()
  for path in (_ROOT / "prefix_distill").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.partition(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        found.add(node.module.partition(".")[0])
  found -= {*sys.stdlib_module_names, "prefix_distill", "configs"}
  assert found - _OPTIONAL - _PARTS == declared


def _run(
    command: list[str | pathlib.Path], place: pathlib.Path
) -> subprocess.CompletedProcess:
  """Runs a command without the paths of this process."""
  return subprocess.run(
      command,
      cwd=place,
      env={
          name: value
          for name, value in os.environ.items()
          if name not in ("PYTHONPATH", "VIRTUAL_ENV")
      }
      | {"PATH": f"{place / 'venv' / 'bin'}:{os.environ['PATH']}"},
      capture_output=True,
      text=True,
      check=False,
  )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
  """A virtual environment that has the wheel, and no clone beside it.

  The dependencies are this environment's, whose own copy of the package is not
  seen: files named .pth count only in an environment's own directory.
  """
  place = tmp_path_factory.mktemp("installed")
  ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "tests")
  shutil.copytree(_ROOT, place / "source", ignore=ignored)
  pip = (sys.executable, "-m", "pip")
  done = _run([*pip, "wheel", "--no-deps", "-w", "dist", "./source"], place)
  assert done.returncode == 0, done.stderr
  shutil.rmtree(place / "source")
  venv.create(place / "venv")
  python = place / "venv" / "bin" / "python"
  (wheel,) = (place / "dist").iterdir()
  install = [*pip, f"--python={python}", "install", "--no-deps", wheel]
  done = _run(install, place)
  assert done.returncode == 0, done.stderr
  (site,) = (place / "venv" / "lib").glob("python*/site-packages")
  paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
  (site / "dependencies.pth").write_text("\n".join(paths))
  return place


def _tour() -> str:
  """Returns what README and the tour have their readers type, in the small.

  What comes after "# Needs" is left out, and so is `plan`, whose compilers are
  an extra.
  """
  texts = []
  for page in ("README.md", "docs/index.md"):
    fences = re.findall(
        r"^```sh\n(.*?)^```$", (_ROOT / page).read_text(), re.M | re.S
    )
    texts += [fence.partition("# Needs")[0] for fence in fences]
  text = "\n".join(texts)
  for shown, meant in {
      "student=DIR,teacher=DIR": "student=MODEL,teacher=bundled:teacher",
      "prompts=FILE": "prompts=asked.jsonl,steps=2,tokens=32",
      "--step=40": "--step=0",
      "python3 -m venv .venv && . .venv/bin/activate": "",
  }.items():
    assert shown in text
    text = text.replace(shown, meant)
  return f"""
pip() {{ :; }}
python() {{ command python "$@" {_SMALL}; }}
prefix-distill() {{
  case "$*" in
    plan*) ;;
    train*own:*)
      command prefix-distill export --workdir=runs/math --step=2 --to=MODEL
      command prefix-distill "$@" --config.data.batch_size=8 --tracker=none ;;
    train*) command prefix-distill "$@" {_SMALL} ;;
    *) command prefix-distill "$@" ;;
  esac
}}
{text}
prefix-distill report --workdir=runs/math
"""


@pytest.mark.slow
def test_the_tour_runs_from_the_wheel(installed):
  (installed / "asked.jsonl").write_text(
      "".join(
          json.dumps({"question": f"What is {n} + 5?"}) + "\n" for n in range(9)
      )
  )
  done = _run(["bash", "-euo", "pipefail", "-c", _tour()], installed)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "Traceback" not in done.stdout + done.stderr
  for file in (
      "runs/math/export/model.safetensors",
      "runs/math/report/report.html",
      "runs/compared/heldout.png",
      "MODEL/model.safetensors",
  ):
    assert (installed / file).stat().st_size > 1000, file


@pytest.mark.slow
def test_the_tours_notebook_runs_from_the_wheel(installed):
  code = f"""
import nbclient, nbformat
notebook = nbformat.read({str(_ROOT / "colab" / "tour.ipynb")!r}, 4)
notebook.cells = [
    cell for cell in notebook.cells
    if "install" not in cell.metadata.get("tags", [])
]
nbclient.NotebookClient(notebook, timeout=900).execute()
"""
  done = _run(["python", "-c", code], installed)
  assert done.returncode == 0, done.stderr
