"""Tunix's sampler on its Llama; greedy, which is its fastest way."""

import functools
import json
import pathlib
import sys

import contest
import jax
import jax.numpy as jnp
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as params_lib


class _Numbers:
  """A tokenizer for prompts that are token ids."""

  def encode(self, text, **_):
    return [int(word) for word in text.split()]

  def decode(self, ids, **_):
    return ""

  def bos_id(self):
    return None

  def eos_id(self):
    return -1

  def pad_id(self):
    return 0


def main() -> None:
  path, dtype = sys.argv[1:]
  c = json.loads((pathlib.Path(path) / "config.json").read_text())
  config = llama.ModelConfig(
      num_layers=c["num_hidden_layers"],
      vocab_size=c["vocab_size"],
      embed_dim=c["hidden_size"],
      hidden_dim=c["intermediate_size"],
      num_heads=c["num_attention_heads"],
      head_dim=c["head_dim"],
      num_kv_heads=c["num_key_value_heads"],
      rope_theta=int(c.get("rope_theta", 10_000)),
      norm_eps=c["rms_norm_eps"],
      weight_tying=c["tie_word_embeddings"],
  )
  mesh = jax.make_mesh(
      (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  model = params_lib.create_model_from_safe_tensors(
      path, config, mesh, jnp.dtype(dtype)
  )

  @functools.cache
  def sampler(length):
    cache = sampler_lib.CacheConfig(
        length, config.num_layers, config.num_kv_heads, config.head_dim
    )
    return sampler_lib.Sampler(model, _Numbers(), cache)

  def answer(tokens, new):
    prompt = len(tokens[0])
    out = sampler(prompt + new)(
        [" ".join(map(str, row)) for row in tokens],
        max_generation_steps=new,
        max_prompt_length=prompt,
        eos_tokens=[-1],
    )
    assert all(len(row) == new for row in out.tokens)

  contest.serve(answer)


if __name__ == "__main__":
  main()
