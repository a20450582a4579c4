"""Rollouts, side by side with those of other packages.

  python benchmarks/rollout.py --model=DIR

DIR is a model in Hugging Face format. The contestants load the same weights,
each in a process of its own, and take turns, so that whatever else the machine
does hits all of them. A contestant whose packages are not installed is left out
with a word; `--python NAME=PATH` gives one its own interpreter.

`of the limit` compares with the least time in which the weights and the cache
could be read from memory once for every token and the prompts' and tokens'
multiplications made, as measured here on a long vector and a square matrix.
"""

import argparse

import contest
import machine
import numpy as np
import rich.console
import rich.table

from prefix_distill.models import huggingface as hf
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_params
from prefix_distill.report import flops

NAMES = ("ours", "torch_generate", "tunix_sampler")


def limit(
    config: ModelConfig,
    here: machine.Machine,
    case: tuple[int, int, int],
    width: int,
) -> float:
  """Returns the least seconds that a rollout can take on this machine.

  Args:
    config: the model.
    here: the machine.
    case: batch, prompt and new tokens.
    width: bytes of a number.
  """
  batch, prompt, new = case
  weights = width * num_params(config, embeddings=False)
  column = 2 * width * config.num_layers * config.num_kv_heads * config.head_dim
  read = flops.prefill(config, np.full(batch, prompt))
  total = here.seconds(weights, read)
  # The first new token comes with the prompt.
  for length in range(prompt + 1, prompt + new):
    step = flops.decode(config, length - 1, 2)
    total += here.seconds(weights + batch * column * length, batch * step)
  return total


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new", type=int, nargs="+", default=[64, 128])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--names", nargs="+", default=NAMES)
  parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH")
  args = parser.parse_args()
  config, here = hf.read_config(args.model), machine.measure()
  print(
      f"memory {here.bytes_per_second / 1e9:.1f} GB/s, matrix product"
      f" {here.flops_per_second / 1e9:.0f} GFLOP/s"
  )
  cases = [(b, args.prompt, n) for b in args.batch for n in args.new]
  pythons = dict(p.split("=") for p in args.python)
  contestants = contest.start(args.names, pythons, args.model, args.dtype)
  table = rich.table.Table(title=f"{args.model}, {args.dtype}, tokens/s")
  headings = ("batch, prompt, new", *args.names, "ours / best", "of the limit")
  for heading in headings:
    table.add_column(heading)
  rng = np.random.default_rng(0)
  width = 2 if args.dtype == "bfloat16" else 4
  for case in cases:
    tokens = rng.integers(10, config.vocab_size - 10, case[:2]).tolist()
    medians = contest.take_turns(
        contestants, args.repeats, tokens=tokens, new=case[2]
    )
    least = limit(config, here, case, width)
    share = least / medians["ours"]
    table.add_row(*_row(case, medians, args.names), f"{share:.0%}")
  for contestant in contestants:
    contestant.close()
  rich.console.Console(width=100).print(table)


def _row(
    case: tuple[int, int, int],
    medians: dict[str, float],
    names: tuple[str, ...],
) -> list[str]:
  rate = {name: case[0] * case[2] / s for name, s in medians.items()}
  others = [r for name, r in rate.items() if name != "ours"]
  ratio = f"{rate['ours'] / max(others):.2f}" if others else "-"
  cells = [f"{rate[name]:.1f}" if name in rate else "-" for name in names]
  return [", ".join(map(str, case)), *cells, ratio]


if __name__ == "__main__":
  main()
