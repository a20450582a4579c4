import ast
from collections.abc import Iterator
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "prefix_distill"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERYWHERE = sorted(
    p
    for folder in ("prefix_distill", "configs", "benchmarks", "launch", "tests")
    for p in (ROOT / folder).rglob("*.py")
)

# A part may import from itself and from the lines above it.
ORDER = (
    {"assets", "errors", "lost_process", "structs", "worker"},
    {"config"},
    {"sharding", "distributed"},
    {"compilation"},
    {"models"},
    {"data", "rollout", "report"},
    {"distill"},
    {"evaluate"},
    {"train"},
    {"preflight", "command_line"},
    {"main", "model_commands", "plan", "runs"},
    {"commands", "experiments"},
)
RANK = {part: i for i, parts in enumerate(ORDER) for part in parts}


def imports(path: pathlib.Path) -> Iterator[str]:
  """Yields the dotted names of everything that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path} has a relative import."
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_file(name: str) -> pathlib.Path | None:
  """Returns the package's file that holds a dotted name, if one does."""
  parts = name.split(".")
  for end in range(len(parts), 0, -1):
    base = ROOT.joinpath(*parts[:end])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
      if parts[0] == "prefix_distill" and path.is_file():
        return path
  return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_go_one_way(path):
  if path.parent == PACKAGE and path.stem == "__init__":
    assert list(imports(path)) == ["os"]
    return
  for name in imports(path):
    parts = name.split(".")
    if parts[0] == "prefix_distill" and parts[1] != part(path):
      assert RANK[parts[1]] < RANK[part(path)], f"{path} imports {name}"


def test_every_part_has_its_place_in_the_order():
  assert {part(p) for p in FILES} - {"__init__"} == set(RANK)


def test_every_class_has_a_name_of_its_own():
  names = [
      node.name
      for path in FILES
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.ClassDef)
  ]
  assert sorted(names) == sorted(set(names))


def test_the_report_needs_no_jax():
  todo, seen = list((PACKAGE / "report").glob("*.py")), set()
  while todo:
    path = todo.pop()
    seen.add(path)
    for name in imports(path):
      assert name.split(".")[0] not in ("jax", "flax", "optax", "orbax"), path
      inner = module_file(name)
      if inner and inner not in seen:
        todo.append(inner)
  assert PACKAGE / "models" / "config.py" in seen


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda p: p.stem)
def test_nothing_that_runs_code_from_files_is_used(path):
  roots = {name.split(".")[0] for name in imports(path)}
  assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "marshal"}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.keyword) and node.arg in (
        "trust_remote_code",
        "allow_pickle",
    ):
      assert ast.unparse(node.value) == "False", f"{path}:{node.lineno}"
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      assert called not in ("eval", "exec", "torch.load"), path
