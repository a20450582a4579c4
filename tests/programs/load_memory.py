"""Loads a model and prints the peak of its own memory: load_memory.py DIR.

Prints a JSON object: bytes of the weights, of the largest file, and by how
much anonymous memory grew at its highest. Files that are mapped do not count,
for the system takes their pages back when it wants to.
"""

import json
import pathlib
import sys
import threading
import time

import jax

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params


def _anonymous() -> int:
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) * 1024
  raise RuntimeError("no RssAnon in /proc/self/status")


def _load(directory: str) -> Params:
  mesh = sharding.make_mesh(MeshSpec())
  model = Model(hf.read_config(directory), mesh=mesh)
  shardings = sharding.param_shardings(model.abstract_params(), mesh)
  return jax.block_until_ready(hf.load_params(directory, model, shardings))


def main() -> None:
  directory = sys.argv[1]
  _load("bundled:teacher")  # What is loaded once and for all does not count.
  before, peak, done = _anonymous(), [0], threading.Event()

  def watch() -> None:
    while not done.is_set():
      peak[0] = max(peak[0], _anonymous())
      time.sleep(0.001)

  thread = threading.Thread(target=watch)
  thread.start()
  params = _load(directory)
  done.set()
  thread.join()
  files = pathlib.Path(directory).glob("*.safetensors")
  print(json.dumps({
      "weights": sum(x.nbytes for x in jax.tree.leaves(params)),
      "largest_file": max(file.stat().st_size for file in files),
      "peak": peak[0] - before,
  }))


if __name__ == "__main__":
  main()
