"""Answers of very different lengths: are the rows kept busy?

  python benchmarks/slots.py [--model=DIR]

Answers problems whose lengths differ twentyfold and compares the time with
that of as many tokens in rows that never idle, decoded by the same engine with
stop tokens off. 1 is perfect; decoding in fixed batches, each waiting for its
longest row, is shown beside it. Tokens that stop an answer are picked so that
lengths spread.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import rich.console
import rich.table

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.data import bundled_tasks
from prefix_distill.data import prompts as prompts_lib
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch

_STOP_WORDS = (" 13", " 17", "17", "13", " 19", "19")


def _prompts(tokenizer: tokenizer_lib.Tokenizer, count: int) -> PromptBatch:
  task = bundled_tasks.MathTask("test", count)
  rows = [
      prompts_lib.encode_prompt(tokenizer, record["question"], 64, "<think>")
      for record in (task[i] for i in range(count))
  ]
  tokens, mask = (np.stack(x) for x in zip(*rows, strict=True))
  return PromptBatch(tokens, mask, np.arange(count, dtype=np.int32))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", default="bundled:teacher")
  parser.add_argument("--problems", type=int, default=200)
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--cap", type=int, default=224)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  tokenizer, mesh = tokenizer_lib.load(args.model), sharding.make_mesh(
      MeshSpec()
  )
  model = Model(hf.read_config(args.model), mesh=mesh)
  shardings = sharding.param_shardings(model.abstract_params(), mesh)
  params = hf.load_params(args.model, model, shardings)
  words = [w for word in _STOP_WORDS for w in tokenizer.encode(word)[-1:]]
  prompts, key = _prompts(tokenizer, args.problems), jax.random.key(0)

  def engine(stops: tuple[int, ...]) -> continuous_batching.Engine:
    config = generate.SamplerConfig(
        stops, tokenizer.pad_id, tokenizer.num_tokens
    )
    return continuous_batching.Engine(model, config, params, args.rows)

  spread, steady = engine((*tokenizer.stop_ids, *words)), engine(())

  def run(
      engine: continuous_batching.Engine, batch: PromptBatch
  ) -> tuple[float, list[int]]:
    draw = generate.Draw.of(args.cap)
    start = time.perf_counter()
    lengths = [len(t) for _, t, _ in engine.answers(batch, key, draw)]
    return time.perf_counter() - start, lengths

  def in_batches() -> float:
    """Whole batches, one after the other."""
    seconds = 0.0
    for first in range(0, args.problems, args.rows):
      part = jax.tree.map(lambda x, i=first: x[i : i + args.rows], prompts)
      seconds += run(spread, part)[0]
    return seconds

  full = jax.tree.map(lambda x: x[: 2 * args.rows], prompts)
  run(spread, prompts), run(steady, full), in_batches()  # Compiles.
  ratios, batched = [], []
  for _ in range(args.repeats):
    seconds, lengths = run(spread, prompts)
    steady_seconds, steady_lengths = run(steady, full)
    ideal = sum(lengths) * steady_seconds / sum(steady_lengths)
    ratios.append(seconds / ideal)
    batched.append(in_batches() / ideal)
  table = rich.table.Table(
      title=f"{args.problems} answers of {min(lengths)} to {max(lengths)}"
      f" tokens (mean {np.mean(lengths):.0f}), {args.rows} rows"
  )
  for heading in ("", "time / time with all rows busy"):
    table.add_column(heading)
  table.add_row("rows refilled", f"{statistics.median(ratios):.2f}")
  table.add_row("in fixed batches", f"{statistics.median(batched):.2f}")
  rich.console.Console(width=100).print(table)


if __name__ == "__main__":
  main()
