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
