"""A whole run as one process, or as one of two.

two_processes.py WORKDIR STUDENT TEACHER [PORT INDEX]. Two processes then set
their export and metrics aside and start again, so that they are restored.
"""

import pathlib
import shutil
import sys

import jax
from jax.experimental import multihost_utils
import toys

from prefix_distill.specs import MeshSpec
from prefix_distill.train import loop


def main() -> None:
  workdir, student, teacher, *process = sys.argv[1:]
  if process:
    port, index = process
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    assert (jax.process_count(), jax.local_device_count()) == (2, 2)
  assert jax.device_count() == 4
  mesh = MeshSpec(data=2, fsdp=2)
  config = toys.run_config(student, teacher, mesh=mesh)
  loop.train(config, pathlib.Path(workdir))
  if process:
    multihost_utils.sync_global_devices("trained")
    if jax.process_index() == 0:
      _set_aside(pathlib.Path(workdir))
    multihost_utils.sync_global_devices("set aside")
    loop.train(config, pathlib.Path(workdir))


def _set_aside(workdir: pathlib.Path) -> None:
  (workdir / "export").rename(workdir / "first_export")
  shutil.copy(workdir / "metrics.jsonl", workdir / "first_metrics.jsonl")


if __name__ == "__main__":
  main()
