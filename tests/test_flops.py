import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.models.config import num_params
from prefix_distill.models.transformer import Model
from prefix_distill.report import flops


def test_forward_equals_a_count_by_hand():
  config = toys.model_config(num_layers=2)
  # Per token, multiply-adds: 4 heads of 8 for queries and out, 2 of 8 for
  # keys and values, three MLP matrices; and the parameters of the norms.
  attention = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 2 * 8
  layer = attention + 3 * 16 * 32 + 2 * 16
  dense = 2 * layer + 16 + 40 * 16
  for length in (1, 7):
    causal = 2 * 2 * 4 * 8 * length**2
    wanted = 2 * dense * length + causal
    assert flops.forward(config, [length]) == wanted


def test_a_batch_costs_the_sum_of_its_rows():
  config = toys.model_config()
  rows = [flops.forward(config, [n]) for n in (3, 5, 9)]
  assert flops.forward(config, np.array([3, 5, 9])) == sum(rows)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_they_are_made(family, tied):
  config = toys.model_config(family=family, tied=tied)
  made = Model(config).abstract_params()
  total = sum(x.size for x in jax.tree.leaves(made))
  assert num_params(config) == total
  without = total if tied else total - config.vocab_size * config.dim
  assert num_params(config, embeddings=False) == without


def test_forward_agrees_with_what_xla_counts():
  config = toys.model_config(
      dim=128, mlp_dim=512, num_heads=4, num_kv_heads=2, head_dim=32,
      num_layers=1, vocab_size=512,
  )  # fmt: skip
  model, length = Model(config), 64

  def forward(params, tokens):
    hidden = model.apply(params, tokens, jnp.ones(tokens.shape, bool))
    return model.logits(params, hidden)

  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  compiled = jax.jit(forward).lower(model.abstract_params(), tokens).compile()
  # XLA computes the whole square of attention, the ledger its causal half.
  half = 2 * config.num_heads * config.head_dim * length**2
  counted = compiled.cost_analysis()["flops"] - half
  assert flops.forward(config, [length]) == pytest.approx(counted, rel=0.05)


def test_supervised_training_costs_three_forward_passes():
  config, lengths = toys.model_config(), np.array([4, 9])
  cost = flops.supervised(config, lengths)
  assert (cost.prefill, cost.decode, cost.score) == (0, 0, 0)
  assert cost.total == cost.update == 3 * flops.forward(config, lengths)


def test_a_distillation_update_is_the_sum_of_its_phases():
  student, teacher = toys.model_config(), toys.model_config(dim=64)
  prompts, lengths = np.array([3, 5]), np.array([4, 9])
  cost = flops.distillation(student, teacher, prompts, lengths)
  whole = prompts + lengths
  ours, theirs = (flops.forward(c, whole) for c in (student, teacher))
  assert ours < theirs
  assert cost.prefill == flops.forward(student, prompts)
  assert cost.prefill + cost.decode == ours
  assert (cost.score, cost.update) == (theirs, 3 * ours)
  assert cost.total == 4 * ours + theirs


def test_four_rollouts_of_a_prompt_cost_one_prefill():
  config = toys.model_config()
  one = flops.distillation(config, config, np.array([256]), np.array([32]))
  four = flops.distillation(config, config, np.array([256]), np.full(4, 32))
  assert four.prefill == one.prefill == flops.forward(config, [256])
  assert four.decode == 4 * one.decode
  assert four.score == 4 * one.score
