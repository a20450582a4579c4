"""FLOPs of jaxprs, against products by hand and against the ledger."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.loss import Loss
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.models import attention
from prefix_distill.models.transformer import Model
from prefix_distill.plan import cost
from prefix_distill.report import flops
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import step as step_lib

M, K, N = 6, 10, 14
PRODUCT = 2 * M * K * N


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def counted(function, *args, **settings) -> float:
  return cost.flops(jax.jit(function).trace(*args).jaxpr, **settings)


def test_a_product_is_two_flops_for_each_pair():
  a, b = array(M, K), array(K, N)
  assert counted(jnp.matmul, a, b) == PRODUCT
  batch = array(3, 2, M, K), array(3, 2, K, N)
  assert counted(jnp.matmul, *batch) == 6 * PRODUCT
  whole = functools.partial(jnp.tensordot, axes=2)
  assert counted(whole, a, array(M, K)) == 2 * M * K
  assert counted(lambda a, b: jnp.sin(a) * b[0, 0], a, b) == 0


def test_a_convolution_is_a_product_for_each_place_of_its_window():
  image, kernel = array(2, 8, 9, 4), array(3, 5, 2, 6)
  conv = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=2,
  )
  wanted = 2 * (2 * 8 * 9 * 6) * (3 * 5 * 2)
  assert counted(conv, image, kernel) == wanted


def abstract_mesh(**sizes: int) -> jax.sharding.AbstractMesh:
  types = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.sharding.AbstractMesh(
      tuple(sizes.values()), tuple(sizes), axis_types=types
  )


def layers(x, weights):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def test_loops_are_multiplied_out():
  x, w = array(M, K), array(5, K, K)
  once = 2 * M * K * K
  assert counted(layers, x, w) == 5 * once
  nested = lambda x, w: jax.lax.fori_loop(  # noqa: E731
      0, 3, lambda _, x: layers(x, w), x
  )
  assert counted(nested, x, w) == 15 * once


def test_a_loop_that_depends_on_data():
  def loop(x, w, end):
    return jax.lax.fori_loop(0, end, lambda _, x: x @ w, x)

  args, once = (array(M, K), array(K, K), array(dtype=jnp.int32)), 2 * M * K * K
  assert counted(loop, *args) == once
  assert counted(loop, *args, trips=11) == 11 * once


def test_a_conditional_costs_its_dearest_branch():
  def choose(flag, x, w):
    return jax.lax.cond(flag, lambda: x @ w[0], lambda: layers(x, w))

  args = array(dtype=bool), array(M, K), array(4, K, K)
  assert counted(choose, *args) == 4 * 2 * M * K * K


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_and_what_it_does_again(remat):
  def layer(x, w):
    return jnp.sin(jnp.sin(x @ w[0]) @ w[1]), None

  def loss(x, w):
    body = jax.checkpoint(layer) if remat else layer
    return jax.lax.scan(body, x, w)[0].sum()

  args = array(M, K), array(5, 2, K, K)
  once = 5 * 2 * 2 * M * K * K
  assert counted(loss, *args) == once
  wanted = (4 if remat else 3) * once
  assert counted(jax.grad(loss, (0, 1)), *args) == wanted


@jax.custom_vjp
def doubled(x, w):
  return 2 * (x @ w)


doubled.defvjp(
    lambda x, w: (doubled(x, w), (x, w)),
    lambda kept, g: (2 * g @ kept[1].T, 2 * kept[0].T @ g),
)


@jax.custom_jvp
def softened(x, w):
  return jax.nn.relu(x @ w)


softened.defjvp(lambda primals, tangents: (softened(*primals), tangents[0]))


def test_functions_in_functions():
  args = array(M, K), array(K, K)
  once = 2 * M * K * K
  inner = jax.jit(lambda x, w: doubled(softened(x, w), w))
  assert counted(inner, *args) == 2 * once
  loss = lambda x, w: doubled(x, w).sum()  # noqa: E731
  assert counted(jax.grad(loss, (0, 1)), *args) == 3 * once


def test_shards_are_counted_on_all_devices():
  mesh = abstract_mesh(data=2, fsdp=3, tensor=5)
  spec = jax.sharding.PartitionSpec

  def shards(axes, rows):
    product = jax.shard_map(
        lambda x, w: jnp.matmul(x, w),
        mesh=mesh,
        in_specs=(rows, spec()),
        out_specs=rows,
        axis_names=axes,
        check_vma=False,
    )
    return counted(product, array(30 * M, K), array(K, N))

  every = {"data", "fsdp", "tensor"}
  whole = 30 * PRODUCT
  assert shards(every, spec(("data", "fsdp", "tensor"))) == whole
  # Along an axis that does not split the work all do the same.
  assert shards(every, spec("data")) == 15 * whole
  assert shards({"data"}, spec("data")) == whole


def test_the_kernel_for_tpus_counts_half_of_the_pairs():
  rows, length, heads, dim = 2, 512, 4, 128
  q, kv = array(rows, length, heads, dim), array(rows, length, 2, dim)

  def loss(q, k, v):
    return jnp.sum(attention.splash_kernel(q, k, v))

  product = 2 * rows * heads * dim * length * (length + 1) / 2
  assert counted(loss, q, kv, kv) == 2 * product
  # Scores again twice, and four products; and what the row sums of output and
  # its gradient take, which JAX forms as a product.
  found = counted(jax.grad(loss, (0, 1, 2)), q, kv, kv)
  sums = 2 * rows * heads * length * dim
  assert found == 9 * product + sums


@pytest.mark.aot
def test_the_kernel_for_gpus_counts_half_of_the_pairs():
  rows, length, heads, dim = 2, 512, 4, 128
  q, kv = (
      array(rows, length, n, dim, dtype=jnp.bfloat16) for n in (heads, 2)
  )

  def loss(q, k, v):
    return jnp.sum(attention.cudnn(q, k, v).astype(jnp.float32))

  product = 2 * rows * heads * dim * length * (length + 1) / 2
  assert counted(loss, q, kv, kv) == 2 * product
  # Scores once more, and four products.
  found = counted(jax.grad(loss, (0, 1, 2)), q, kv, kv)
  assert found == 7 * product


def test_another_kernel_counts_by_its_grid():
  from jax.experimental import pallas as pl

  def kernel(x, w, out):
    out[...] = x[...] @ w[...]

  def function(x, w):
    return pl.pallas_call(
        kernel,
        grid=(4,),
        out_shape=array(4 * M, N),
        in_specs=[
            pl.BlockSpec((M, K), lambda i: (i, 0)),
            pl.BlockSpec((K, N), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((M, N), lambda i: (i, 0)),
    )(x, w)

  assert counted(function, array(4 * M, K), array(K, N)) == 4 * PRODUCT


def test_bytes_of_arrays_as_they_are_split():
  mesh = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
  split = jax.sharding.NamedSharding(
      abstract_mesh(data=4, tensor=2), jax.sharding.PartitionSpec("tensor")
  )
  tree = {
      "half": jax.ShapeDtypeStruct((6, 5), jnp.bfloat16, sharding=split),
      "whole": array(3, dtype=jnp.int8),
      "array": jax.device_put(
          np.zeros(7, np.float32), sharding.replicated(mesh)
      ),
  }
  assert sharding.bytes_per_device(tree) == 3 * 5 * 2 + 3 + 7 * 4


# The phases of an update, with the ledger's numbers for them.
PROMPT, SAMPLED, ROWS = 16, 33, 4
WHOLE = PROMPT + SAMPLED - 1
STUDENT = toys.model_config(
    dim=64,
    mlp_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_layers=3,
    vocab_size=128,
)
TEACHER = dataclasses.replace(STUDENT, dim=96, num_kv_heads=4)
LENGTHS = flops.Lengths(np.full(ROWS, PROMPT), np.full(ROWS, SAMPLED))
BATCH = PromptBatch(
    array(ROWS, PROMPT, dtype=jnp.int32),
    array(ROWS, PROMPT, dtype=bool),
    array(ROWS, dtype=jnp.int32),
)
ROLLOUT = Rollout(
    array(ROWS, SAMPLED, dtype=jnp.int32),
    array(ROWS, SAMPLED, dtype=bool),
    array(ROWS, SAMPLED),
    array(ROWS, SAMPLED),
)


def width(config) -> int:
  return config.num_layers * config.num_heads * config.head_dim


def hidden_pairs(config, tokens: int) -> float:
  """FLOPs of pairs that causality hides, computed without a kernel."""
  return ROWS * 4 * width(config) * tokens * (tokens - 1) / 2


def check(found: float, wanted: float) -> None:
  # To the product: nothing is left out on either side.
  assert found == pytest.approx(wanted, rel=1e-9)


def test_a_rollout_costs_what_the_ledger_says():
  model, settings = Model(STUDENT), generate.SamplerConfig((), 0, 13)
  draw = generate.Draw.of(SAMPLED)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def rollout(params, batch, key):
    return generate.sample(model, settings, SAMPLED, params, batch, key, draw)

  args = model.abstract_params(), BATCH, key
  found = counted(rollout, *args)
  phases = flops.distillation(STUDENT, STUDENT, LENGTHS)
  # A step attends to all columns of the cache, which are one more than the
  # tokens that are fed: to W instead of PROMPT + 1 to W - 1.
  columns = PROMPT + SAMPLED
  masked = sum(columns - t for t in range(PROMPT + 1, columns))
  masked *= ROWS * 4 * width(STUDENT)
  wanted = phases.prefill + phases.decode
  check(found, wanted + hidden_pairs(STUDENT, PROMPT) + masked)


def loss_of(form: str) -> Loss:
  if form == "exact":
    return ExactLoss(toys.distribution())
  return SampledLoss(toys.distribution(), form)


def score(loss: Loss, *args):
  return loss_lib.score(Model(TEACHER), loss, *args)


def test_scoring_costs_what_the_ledger_says():
  found = counted(
      functools.partial(score, loss_of("policy_gradient")),
      Model(TEACHER).abstract_params(),
      BATCH,
      ROLLOUT,
      trips=1,
  )
  wanted = flops.distillation(STUDENT, TEACHER, LENGTHS).score
  check(found, wanted + hidden_pairs(TEACHER, WHOLE))


@pytest.mark.parametrize("form", ["exact", "policy_gradient"])
@pytest.mark.parametrize("remat", ["none", "full", "dots", "offload"])
def test_an_update_costs_what_the_ledger_says(form, remat):
  chosen = loss_of(form)
  model = Model(STUDENT, remat=remat)
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
  found = counted(
      jax.value_and_grad(loss, has_aux=True),
      model.abstract_params(),
      head,
      (BATCH, ROLLOUT, scores),
      trips=1,
  )
  cost = flops.distillation(STUDENT, TEACHER, LENGTHS, remat=remat)
  wanted = cost.forward + cost.backward
  if form == "exact":  # Which forms the teacher's logits in the update.
    wanted += flops.head(TEACHER, ROWS * SAMPLED)
  # Scores and what is summed with them, in each pass over the layers.
  passes = 3 + (remat != "none")
  check(found, wanted + passes * hidden_pairs(STUDENT, WHOLE))
