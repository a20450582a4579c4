"""What a narrow cache does to the log-probabilities of a model's own answers.

  python benchmarks/cache.py --model=DIR

Answers are sampled with a cache in the compute dtype. Each is then written
again, token by token, over caches of other dtypes, and the distributions are
compared with those over a cache in float32.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch

_NARROW = ("bfloat16", "int8")
_QUESTIONS = (
    "What is 17 times 23? Think step by step.",
    "Explain why the sky is blue in three sentences.",
    "A train goes 60 miles in 45 minutes. How fast is it in miles per hour?",
    "Write a short poem about the sea.",
    "List five uses of a paper clip.",
    "What is the derivative of x^3 + 2x?",
    "Who was Marie Curie, and what did she discover?",
    "Ann has 7 pens and buys 3 packs of 4. How many has she now?",
)


def _compare(
    model: Model, params: dict, batch: PromptBatch, tokens: jax.Array
) -> dict[str, tuple[jax.Array, ...]]:
  """Writes answers [B, P] over caches of several dtypes.

  Returns:
    For each narrow one, [P, B] each: the KL to float32, the change of the
    token's log-probability, and whether the most probable token is another.
  """
  columns = batch.tokens.shape[1] + tokens.shape[1]
  layout = model.decode_layout(params)
  live = jnp.ones(len(tokens), bool)
  start = {
      name: model.prefill(params, batch.tokens, batch.mask, columns, name)
      for name in ("float32", *_NARROW)
  }

  def step(rows, token):
    out = {
        name: jax.nn.log_softmax(model.logits(params, hidden))
        for name, (hidden, _) in rows.items()
    }
    wanted = out.pop("float32")
    shown = {}
    for name, found in out.items():
      change = jnp.take_along_axis(found - wanted, token[:, None], 1)[:, 0]
      shown[name] = (
          jnp.sum(jnp.exp(found) * (found - wanted), axis=1),
          change,
          jnp.argmax(found, axis=1) != jnp.argmax(wanted, axis=1),
      )
    rows = {
        name: model.decode(layout, token, live, cache)
        for name, (_, cache) in rows.items()
    }
    return rows, shown

  return jax.lax.scan(step, start, tokens.T)[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--new", type=int, default=128)
  args = parser.parse_args()
  mesh = sharding.make_mesh(MeshSpec())
  model = Model(hf.read_config(args.model), mesh=mesh)
  shardings = sharding.param_shardings(model.abstract_params(), mesh)
  params = hf.load_params(args.model, model, shardings)
  tokenizer = tokenizer_lib.load(args.model)
  rows = [tokenizer.encode(tokenizer.prompt(q, "")) for q in _QUESTIONS]
  size = max(map(len, rows))
  tokens = np.array([[tokenizer.pad_id] * (size - len(r)) + r for r in rows])
  mask = np.array([[False] * (size - len(r)) + [True] * len(r) for r in rows])
  index = np.arange(len(rows), dtype=np.int32)
  batch = PromptBatch(tokens.astype(np.int32), mask, index)
  config = generate.SamplerConfig((), 0, model.config.vocab_size)
  written = jax.jit(
      functools.partial(generate.sample, model, config, args.new)
  )(params, batch, jax.random.key(0), generate.Draw.of(args.new)).tokens

  found = jax.jit(functools.partial(_compare, model))(params, batch, written)
  for name, values in found.items():
    kl, change, turned = map(np.asarray, values)
    print(
        f"{name}: KL to float32 {kl.mean():.1e} nats a token (largest"
        f" {kl.max():.1e}), sampled log-probs change by"
        f" {np.sqrt((change**2).mean()):.1e} (largest"
        f" {np.abs(change).max():.1e}), another most probable token at"
        f" {turned.mean():.1%} of {kl.size} tokens"
    )


if __name__ == "__main__":
  main()
