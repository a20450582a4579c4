import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import config as config_lib
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.loss import Loss
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.models.config import num_params
from prefix_distill.models.transformer import Model
from prefix_distill.report import flops
from prefix_distill.report.flops import Lengths
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import step
from prefix_distill.train import step as step_lib


def lengths(prompts, sampled, **others) -> Lengths:
  return Lengths(np.array(prompts), np.array(sampled), **others)


def test_layers_equal_a_count_by_hand():
  config = toys.model_config(num_layers=2)
  # Multiply-adds of a token: 4 heads of 8 for queries and out, 2 of 8 for keys
  # and values, three MLP matrices.
  layer = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 32
  for length in (1, 7):
    # Of a pair of tokens: 4 heads of 8 against keys, and against values.
    pairs = sum(range(1, length + 1))
    wanted = 2 * 2 * layer * length + 2 * 2 * (2 * 4 * 8) * pairs
    assert flops.layers(config, [length]) == wanted


def test_a_batch_costs_the_sum_of_its_rows():
  config = toys.model_config()
  rows = [flops.forward(config, [2], [n]) for n in (3, 5, 9)]
  assert flops.forward(config, np.full(3, 2), np.array([3, 5, 9])) == sum(rows)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_they_are_made(family, tied):
  config = toys.model_config(family=family, tied=tied)
  made = Model(config).abstract_params()
  total = sum(x.size for x in jax.tree.leaves(made))
  assert num_params(config) == total
  without = total if tied else total - config.vocab_size * config.dim
  assert num_params(config, embeddings=False) == without


def test_a_cache_saves_what_was_read_before():
  config = toys.model_config()
  whole = flops.layers(config, [9])
  assert flops.layers(config, [9], [4]) == whole - flops.layers(config, [4])
  # Prompt of 4, answer of 6: the first of which comes with the prompt, and the
  # last of which is not fed.
  sampled = flops.prefill(config, [4]) + flops.decode(config, [4], [6])
  assert sampled == whole + flops.head(config, 6)
  assert sampled == flops.forward(config, [4], [6])


def test_a_distillation_update_is_the_sum_of_its_phases():
  student, teacher = toys.model_config(), toys.model_config(dim=64)
  these = lengths([3, 5], [4, 9])
  cost = flops.distillation(student, teacher, these)
  ours, theirs = (
      flops.forward(c, these.prompts, these.sampled) for c in (student, teacher)
  )
  assert cost.prefill + cost.decode == ours < theirs
  assert (cost.score, cost.forward, cost.backward) == (theirs, ours, 2 * ours)
  assert cost.optimizer == flops.ADAMW_OPERATIONS * num_params(student)
  assert cost.total == 4 * ours + theirs + cost.optimizer


def test_four_rollouts_of_a_prompt_cost_one_prefill():
  config = toys.model_config()
  one = flops.distillation(config, config, lengths([256], [32]))
  four = flops.distillation(config, config, lengths([256], [32] * 4))
  assert four.prefill == one.prefill == flops.prefill(config, [256])
  assert four.decode == 4 * one.decode
  assert four.score == 4 * one.score
  assert four.optimizer == one.optimizer


def test_answers_cost_whom_they_come_from():
  student, teacher = toys.model_config(), toys.model_config(dim=64)
  these = lengths([3], [4, 9])
  own, theirs, none = (
      flops.distillation(student, teacher, these, source)
      for source in ("student", "teacher", "data")
  )
  assert theirs.prefill > own.prefill > none.prefill == 0
  assert theirs.decode > own.decode > none.decode == 0
  assert own.score == theirs.score == none.score
  written = flops.answers(teacher, np.array([3, 3]), these.sampled)
  assert written.total == written.prefill + written.decode
  assert written.decode == theirs.decode


def test_a_teacher_with_its_own_prompt_pays_for_that():
  config = toys.model_config()
  these = lengths([3], [4, 9])
  longer = dataclasses.replace(these, teacher_prompts=np.array([8]))
  same, more = (flops.distillation(config, config, x) for x in (these, longer))
  assert more.score == flops.forward(config, np.array([8, 8]), [4, 9])
  assert more.total - same.total == more.score - same.score > 0
  # And if it writes the answers, it writes them after that prompt.
  by_teacher = flops.distillation(config, config, longer, "teacher")
  assert by_teacher.prefill == flops.prefill(config, [8]) > same.prefill


def test_tokens_that_are_not_trained_on_are_sampled_and_scored():
  config = toys.model_config()
  these = lengths([3], [4, 9])
  cut = dataclasses.replace(these, trained=np.array([4, 2]))
  whole, part = (flops.distillation(config, config, x) for x in (these, cut))
  assert (part.decode, part.score) == (whole.decode, whole.score)
  assert part.forward == flops.forward(config, np.array([3, 3]), [4, 2])


def test_supervised_training_only_updates():
  config, these = toys.model_config(), lengths([2, 3], [4, 9])
  cost = flops.supervised(config, these)
  assert cost.prefill == cost.decode == cost.score == 0
  once = flops.forward(config, these.prompts, these.sampled)
  assert cost.total == 3 * once + cost.optimizer


# What follows compares with the compiler. Models are wide, so that elementwise
# work, which it counts and the ledger does not, is small; and have one layer,
# for it counts a loop's body once.
PROMPT, SAMPLED, ROWS = 16, 33, 4
WHOLE = PROMPT + SAMPLED - 1
STUDENT = toys.model_config(
    dim=512,
    mlp_dim=1024,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_layers=1,
    vocab_size=1024,
)
TEACHER = dataclasses.replace(STUDENT, dim=768, num_kv_heads=4)
THESE = lengths([PROMPT] * ROWS, [SAMPLED] * ROWS)


def counted(function, *args) -> float:
  """What XLA counts; nothing is run."""
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.cost_analysis()["flops"]


def hidden_pairs(config, tokens: int) -> float:
  """FLOPs of pairs that causality hides, which are computed all the same."""
  width = config.num_layers * config.num_heads * config.head_dim
  return ROWS * 4 * width * tokens * (tokens - 1) / 2


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


BATCH = PromptBatch(
    array(ROWS, PROMPT), array(ROWS, PROMPT, dtype=bool), array(ROWS)
)
ROLLOUT = Rollout(
    array(ROWS, SAMPLED),
    array(ROWS, SAMPLED, dtype=bool),
    *(array(ROWS, SAMPLED, dtype=jnp.float32) for _ in range(2)),
)


def check(ledger: float, hidden: float, xla: float) -> None:
  assert ledger + hidden == pytest.approx(xla, rel=0.03)
  # So that the comparison is one of the ledger.
  assert hidden < 0.05 * ledger


def test_prefill_agrees_with_the_compiler():
  model, length = Model(STUDENT), 64

  def prefill(params, tokens, mask):
    hidden, cache = model.prefill(params, tokens, mask, length)
    return model.logits(params, hidden), cache

  xla = counted(
      prefill,
      model.abstract_params(),
      array(ROWS, length),
      array(ROWS, length, dtype=bool),
  )
  ledger = flops.prefill(STUDENT, [length] * ROWS)
  check(ledger, hidden_pairs(STUDENT, length), xla)


def test_a_step_of_decoding_agrees_with_the_compiler():
  config = dataclasses.replace(STUDENT, num_layers=2)
  model, before = Model(config), 255
  params = model.abstract_params()
  # The last column is free: the step attends to all of them, none masked.
  tokens, mask = array(ROWS, before), array(ROWS, before, dtype=bool)
  prefill = functools.partial(model.prefill, columns=before + 1)
  _, cache = jax.eval_shape(prefill, params, tokens, mask)

  def decode(params, tokens, live, cache):
    hidden, cache = model.decode(params, tokens, live, cache)
    return model.logits(params, hidden), cache

  xla = counted(
      decode,
      jax.eval_shape(model.decode_layout, params),
      array(ROWS),
      array(ROWS, dtype=bool),
      cache,
  )
  ledger = flops.decode(config, np.full(ROWS, before), np.full(ROWS, 2))
  check(ledger, 0, xla)


def loss_of(form: str) -> Loss:
  if form == "exact":
    return ExactLoss(toys.distribution())
  return SampledLoss(toys.distribution(), form)


def score(loss: Loss, *args):
  return loss_lib.score(Model(TEACHER), loss, *args)


def test_scoring_agrees_with_the_compiler():
  # The sampled loss, for which the teacher's logits are formed here.
  xla = counted(
      functools.partial(score, loss_of("policy_gradient")),
      Model(TEACHER).abstract_params(),
      BATCH,
      ROLLOUT,
  )
  ledger = flops.distillation(STUDENT, TEACHER, THESE).score
  check(ledger, hidden_pairs(TEACHER, WHOLE), xla)


@pytest.mark.parametrize(
    ("form", "remat"),
    [
        ("exact", "none"), ("policy_gradient", "none"), ("exact", "full"),
        ("exact", "dots"),
    ],
)
def test_forward_and_backward_agree_with_the_compiler(form, remat):
  model, chosen = Model(STUDENT, remat=remat), loss_of(form)
  teacher = Model(TEACHER).abstract_params()
  scores = jax.eval_shape(
      functools.partial(score, chosen), teacher, BATCH, ROLLOUT
  )
  loss = functools.partial(
      step_lib.distillation_loss,
      model,
      chosen,
      step_lib.Watch(SAMPLED, ()),
      step_lib.Window(),
  )
  head = Model(TEACHER).head(teacher) if form == "exact" else None
  xla = counted(
      jax.value_and_grad(loss, has_aux=True),
      model.abstract_params(),
      head,
      (BATCH, ROLLOUT, scores),
  )
  cost = flops.distillation(STUDENT, TEACHER, THESE, remat=remat)
  ledger = cost.forward + cost.backward
  if form == "exact":  # Which forms the teacher's logits in the update.
    ledger += flops.head(TEACHER, ROWS * SAMPLED)
  passes = 3 if remat == "none" else 4
  check(ledger, passes * hidden_pairs(STUDENT, WHOLE), xla)


def test_the_optimizer_agrees_with_the_compiler():
  tx = step.optimizer(config_lib.OptimizerSpec(learning_rate=1e-3), 10)
  params = Model(STUDENT).abstract_params()

  def update(state, grads):
    sums = {"loss": (jnp.ones(()), jnp.ones(()))}
    total = step_lib.Gradient(grads, sums, jnp.int32(3))
    return step_lib.apply(tx, "rollouts", state, total)

  state = jax.eval_shape(
      functools.partial(step_lib.init_state, tx=tx), params
  )
  xla = counted(update, state, params)
  ledger = flops.supervised(STUDENT, lengths([1], [1])).optimizer
  # What keeps numbers that are not finite out is no part of AdamW.
  guard = 6 * num_params(STUDENT)
  assert ledger + guard == pytest.approx(xla, rel=0.05)
