"""The notebooks run, and define nothing of their own."""

import ast
import os
import pathlib

import nbclient
import nbformat
import pytest

_FOLDER = pathlib.Path(__file__).parent.parent / "colab"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))


def _code(notebook):
  """The code cells, without the one that installs and without magics."""
  return [
      "\n".join(x for x in cell.source.splitlines() if not x.startswith("%"))
      for cell in notebook.cells
      if cell.cell_type == "code"
  ]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_short_and_defines_nothing(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert len(notebook.cells) <= 15
  for source in _code(notebook):
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
    assert not any(isinstance(n, kinds) for n in ast.walk(ast.parse(source)))


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path):
  notebook = nbformat.read(path, as_version=4)
  notebook.cells = [
      cell
      for cell in notebook.cells
      if "install" not in cell.metadata.get("tags", [])
  ]
  client = nbclient.NotebookClient(
      notebook, timeout=300, resources={"metadata": {"path": str(_FOLDER)}}
  )
  # It trains a real model, which is worth optimizing.
  client.execute(
      env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  )
  outputs = str([cell.get("outputs") for cell in notebook.cells])
  assert "image/png" in outputs and "text/html" in outputs
