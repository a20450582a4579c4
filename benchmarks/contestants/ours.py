"""This package's rollouts."""

import functools
import sys

import contest
import jax
import numpy as np

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch


def main() -> None:
  path, dtype = sys.argv[1:]
  mesh = sharding.make_mesh(MeshSpec())
  model = Model(hf.read_config(path), dtype, mesh=mesh)
  shardings = sharding.param_shardings(model.abstract_params(), mesh)
  params = hf.load_params(path, model, shardings, dtype)
  config = generate.SamplerConfig((), 0, model.config.vocab_size)

  @functools.cache
  def program(new):
    return jax.jit(functools.partial(generate.sample, model, config, new))

  def answer(tokens, new, per_prompt=1):
    tokens = np.array(tokens, np.int32)
    rows = np.arange(len(tokens), dtype=np.int32)
    batch = PromptBatch(tokens, np.ones(tokens.shape, bool), rows)
    key = jax.random.key(0)
    rollout = program(new)(params, batch, key, generate.Draw.of(new))
    assert np.asarray(rollout.mask).all()
    return {"drawn": np.asarray(rollout.tokens)[0, :4].tolist()}

  contest.serve(answer)


if __name__ == "__main__":
  main()
