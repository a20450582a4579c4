"""The notebooks run, and define nothing of their own."""

import ast
import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

_FOLDER = pathlib.Path(__file__).parent.parent / "colab"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))
# What each shows; the others take minutes.
_SHOWN = {
    "figures": ["image/png", "FLOPs"],
    "neighbours": ["image/png", " tokens", "student on heldout"],
    "own_models": ["Chosen: ", " tokens", "model.safetensors"],
    "tour": ["image/png", "text/html"],
}
_QUICK = ("own_models", "tour")


def _code(notebook):
  """The code cells, without the one that installs, magics and commands."""
  return [
      "\n".join(
          x for x in cell.source.splitlines() if not x.startswith(("%", "!"))
      )
      for cell in notebook.cells
      if cell.cell_type == "code" and not _installs(cell)
  ]


def _installs(cell) -> bool:
  return "install" in cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_short_and_defines_nothing(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert len(notebook.cells) <= 15
  for source in _code(notebook):
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
    assert not any(isinstance(n, kinds) for n in ast.walk(ast.parse(source)))


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_begins_with_the_installation_and_keeps_no_outputs(path):
  code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
  assert _installs(code[0]) and "bash install.sh" in code[0].source
  assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize(
    "path",
    [
        p if p.stem in _QUICK else pytest.param(p, marks=pytest.mark.slow)
        for p in _NOTEBOOKS
    ],
    ids=lambda p: p.name,
)
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  notebook.cells = [cell for cell in notebook.cells if not _installs(cell)]
  client = nbclient.NotebookClient(
      notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
  )
  binaries = pathlib.Path(sys.executable).parent
  client.execute(
      env=os.environ
      | {
          # It trains a real model, which is worth optimizing.
          "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
          "PATH": f"{binaries}:{os.environ['PATH']}",
          "PYTHONPATH": str(_FOLDER.parent),
      }
  )
  outputs = str([cell.get("outputs") for cell in notebook.cells])
  assert "Traceback" not in outputs
  for kind in _SHOWN[path.stem]:
    assert kind in outputs


def _install_cell() -> str:
  """Returns the cell that installs; all notebooks have the same."""
  cells = {
      cell.source
      for path in _NOTEBOOKS
      for cell in nbformat.read(path, 4).cells
      if _installs(cell)
  }
  (source,) = cells
  return source


def test_the_first_cell_clones_once_and_installs(tmp_path):
  """On Colab the notebook lies beside no clone."""
  script = _install_cell().removeprefix("%%bash\n")

  def run(text):
    return subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

  done = run(script)
  assert done.returncode and "Put the address of the repository" in done.stderr
  origin = tmp_path / "origin"
  (origin / "colab").mkdir(parents=True)
  (origin / "colab" / "install.sh").write_text("echo installed in $PWD")
  for line in (
      "git init -q -b main .",
      "git add .",
      "git -c user.name=a -c user.email=a@b commit -qm one",
  ):
    subprocess.run(line.split(), cwd=origin, check=True)
  script = script.replace("REPOSITORY=", f"REPOSITORY={origin}")
  for _ in range(2):  # A cell that is run again.
    done = run(script)
    assert done.stdout == f"installed in {tmp_path}/clone/colab\n", done.stderr


def test_whoever_publishes_writes_the_address_once(tmp_path):
  root = _FOLDER.parent
  names = ("README.md", "setup.py", "CITATION.cff", "mkdocs.yml")
  for name in (*names, *(f"colab/{p.name}" for p in _NOTEBOOKS)):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes((root / name).read_bytes())
  (tmp_path / "colab" / "address.py").write_bytes(
      (_FOLDER / "address.py").read_bytes()
  )

  def run(address):
    return subprocess.run(
        [sys.executable, tmp_path / "colab" / "address.py", address],
        capture_output=True,
        text=True,
        check=False,
    )

  assert "give https://github.com/OWNER/NAME" in run("gitlab.com/a/b").stderr
  before = (tmp_path / "README.md").read_text()
  assert not run("https://github.com/someone/else.git").returncode
  assert not run("https://github.com/me/prefix_distill").returncode
  text = (tmp_path / "README.md").read_text()
  assert "someone" not in text
  for path in _NOTEBOOKS:
    badge = (
        "(https://colab.research.google.com/github/me/prefix_distill/blob/main/"
        f"colab/{path.name})"
    )
    assert text.count(badge) == 1
    notebook = nbformat.read(tmp_path / "colab" / path.name, 4)
    nbformat.validate(notebook)
    assert (
        "REPOSITORY=https://github.com/me/prefix_distill\n"
        in notebook.cells[1].source
    )
  # Nothing but the badges is new in the README.
  assert [x for x in text.splitlines() if "colab.research" not in x] == [
      x for x in before.splitlines() if "](colab/" not in x
  ]
  address = "https://github.com/me/prefix_distill"
  urls = f'project_urls={{"Source": "{address}", "Paper": '
  assert urls in (tmp_path / "setup.py").read_text()
  cited = (tmp_path / "CITATION.cff").read_text()
  assert cited.count(f'repository-code: "{address}"') == 1
  assert f"repo_url: {address}\n" in (tmp_path / "mkdocs.yml").read_text()


@pytest.mark.parametrize(
    "plugin, driver, extra",
    [
        ("jax-cuda12-plugin", "580.10", "[cuda12]"),
        ("jax-cuda13-plugin", "550.54", "[cuda13]"),
        ("", "580.10", "[cuda13]"),
        ("", "550.54", "[cuda12]"),
        (None, "", ""),
    ],
)
def test_the_installation_takes_the_plugin_that_is_there(
    plugin, driver, extra, tmp_path
):
  """Colab's own plugin stays, whatever the driver allows."""
  scripts = {"pip": f'[ "$1" = list ] && echo "{plugin}  0.1" || echo "$*"'}
  if plugin is not None:
    scripts["nvidia-smi"] = f'[ "$1" = -L ] || echo {driver}.1'
  for name, line in scripts.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
    (tmp_path / name).chmod(0o755)
  binaries = pathlib.Path(sys.executable).parent
  done = subprocess.run(
      ["bash", _FOLDER / "install.sh"],
      env=os.environ
      | {
          "PATH": f"{tmp_path}:{binaries}:{os.environ['PATH']}",
          "PYTHONPATH": str(_FOLDER.parent),
          "JAX_PLATFORMS": "cpu",
      },
      capture_output=True,
      text=True,
      check=True,
  )
  assert f"install -q {_FOLDER.parent}{extra}\n" in done.stdout
  assert "It computes on " in done.stdout
