"""Settings of all tests, and of the processes that they start."""

import atexit
from importlib import metadata
import os
import shutil
import tempfile

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
