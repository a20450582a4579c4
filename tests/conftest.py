"""Settings of all tests, and of the processes that they start."""

import atexit
from importlib import metadata
import os
import shutil
import tempfile

import pytest

# Before JAX is imported: compiling takes most of the time, and toys gain
# nothing from better machine code. XLA's own passes run all the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if metadata.version("jaxlib").startswith("0.10."):
  # Later ones do not know the flag, and end at one that they do not know.
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])

# What one process compiled the others find; pytest's workers inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _programs = tempfile.mkdtemp(prefix="programs")
  atexit.register(shutil.rmtree, _programs, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Whose single tests take longest; last, one worker would be left with them.
_FIRST = ("test_notebook", "test_run", "test_processes", "test_methods")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the longest files first; the sort leaves the rest as it was."""
  order = {name: i for i, name in enumerate(_FIRST)}
  items.sort(key=lambda item: order.get(item.path.stem, len(order)))
