"""Rollouts of one prompt share its prefill.

  python benchmarks/fan_out.py --model=DIR

Times four rollouts of every prompt, which read it once, against the same
number of rollouts of four copies of it, and a prefill alone.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.report import flops
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--prompts", type=int, default=2)
  parser.add_argument("--prompt", type=int, default=256)
  parser.add_argument("--new", type=int, default=32)
  parser.add_argument("--per_prompt", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  mesh = sharding.make_mesh(MeshSpec())
  model = Model(hf.read_config(args.model), mesh=mesh)
  shardings = sharding.param_shardings(model.abstract_params(), mesh)
  params = hf.load_params(args.model, model, shardings)
  rng, draw = np.random.default_rng(0), generate.Draw.of(args.new)
  shape = (args.prompts, args.prompt)
  tokens = rng.integers(10, model.config.vocab_size - 10, shape, np.int32)
  key, columns = jax.random.key(0), args.prompt + args.new

  def batch(copies: int) -> PromptBatch:
    rows = np.repeat(tokens, copies, axis=0)
    index = np.arange(len(rows), dtype=np.int32)
    return PromptBatch(rows, np.ones(rows.shape, bool), index)

  def program(per_prompt: int, function, size: int):
    config = generate.SamplerConfig(
        (), 0, model.config.vocab_size, per_prompt
    )
    return jax.jit(functools.partial(function, model, config, size))

  n = args.per_prompt
  runs = {
      f"{n} rollouts a prompt": (program(n, generate.sample, args.new), 1),
      f"{n} copies of it": (program(1, generate.sample, args.new), n),
      "prefill alone": (program(1, generate.prefill, columns), 1),
  }
  seconds = {name: [] for name in runs}
  for turn in range(args.repeats + 1):
    for name, (run, copies) in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(params, batch(copies), key, draw))
      if turn:
        seconds[name].append(time.perf_counter() - start)
  for name, times in seconds.items():
    print(f"{name}: {statistics.median(times):.2f} s")
  prompts = np.full(args.prompts, args.prompt)
  prefill = flops.prefill(model.config, prompts)
  every = np.ones(args.prompts * n)
  decode = flops.decode(model.config, args.prompt * every, args.new * every)
  print(f"ledger: prefill {prefill:.2e}, decode {decode:.2e}")


if __name__ == "__main__":
  main()
