"""Plants faults in a copy of the package; the tests must see every one."""

import compileall
import os
import pathlib
import shutil
import subprocess
import sys

from faults import Fault
from faults import FAULTS
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PARTS = ("prefix_distill", "configs", "tests", "benchmarks")
_FILES = ("conftest.py", "pyproject.toml")
# A fault that is of such a kind is a slip of the list, and no test sees it.
_BROKEN = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError")


def _sources(root: pathlib.Path) -> dict[pathlib.Path, str]:
  files = sorted((root / "prefix_distill").rglob("*.py"))
  return {file: file.read_text() for file in files}


def test_every_fault_has_one_place_and_a_name_of_its_own():
  texts = "\0".join(_sources(_ROOT).values())
  counts = {fault.name: texts.count(fault.old) for fault in FAULTS}
  assert {n: count for n, count in counts.items() if count != 1} == {}
  assert len(counts) == len(FAULTS)
  assert all(fault.new != fault.old for fault in FAULTS)


def test_every_fault_names_tests_that_exist():
  for fault in FAULTS:
    assert fault.tests
    for test in fault.tests:
      file, _, function = test.partition("::")
      name = function.partition("[")[0]
      assert f"def {name}(" in (_ROOT / file).read_text(), test


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
  """Copies what the tests need."""
  root = tmp_path_factory.mktemp("faults")
  ignore = shutil.ignore_patterns("__pycache__", "runs", ".*")
  for name in _PARTS:
    shutil.copytree(_ROOT / name, root / name, ignore=ignore)
  for name in _FILES:
    shutil.copy(_ROOT / name, root)
  compileall.compile_dir(root / "prefix_distill", quiet=1)
  return root


def _run(copy: pathlib.Path, *tests: str) -> tuple[int, str]:
  """Runs tests on the copy; returns the exit status and what was printed."""
  # What Python would keep of a fault could be taken for the code without it.
  environment = os.environ | {
      "PYTHONPATH": str(copy),
      "PYTHONDONTWRITEBYTECODE": "1",
  }
  done = subprocess.run(
      [
          sys.executable,
          "-m",
          "pytest",
          "-x",
          "-p",
          "no:cacheprovider",
          "-o",
          "addopts=-q",
          *tests,
      ],
      cwd=copy,
      env=environment,
      text=True,
      timeout=900,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
  )
  return done.returncode, done.stdout


@pytest.mark.faults
def test_without_a_fault_they_pass(copy):
  """So that what fails below fails for its fault."""
  tests = dict.fromkeys(test for fault in FAULTS for test in fault.tests)
  code, out = _run(copy, *tests)
  assert code == 0, out[-5000:]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_seen(copy, fault: Fault):
  ((file, text),) = (
      (file, text)
      for file, text in _sources(copy).items()
      if fault.old in text
  )
  before = file.stat()
  file.write_text(text.replace(fault.old, fault.new))
  try:
    code, out = _run(copy, *fault.tests)
  finally:
    file.write_text(text)
    # So that it is known for the one that was compiled.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
  # Tests failed; with 2 and above pytest could not run them.
  assert code == 1, out[-5000:]
  assert not any(f"E   {name}" in out for name in _BROKEN), out[-5000:]
