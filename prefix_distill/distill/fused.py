"""The output head and the loss in one: `[B, P, V]` never exists.

Logits are formed for a chunk of tokens at a time, turned into the loss and its
gradient on the spot, and forgotten. The gradients of the hidden states and of
the head come out of the forward pass, so nothing is formed twice: it is the
work of the dense loss in the memory of a chunk. For that the loss must be a
weighted sum whose weights are known beforehand, as those of a mask are.

On a mesh each device takes its own rows and its own part of the vocabulary.
The head is gathered over `fsdp` once; over `tensor` it stays split, and only
sums over it travel; its gradient is summed over devices once, at the end,
instead of once a chunk.
"""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp

from prefix_distill import sharding
from prefix_distill.distill.divergence import Shard
from prefix_distill.models.transformer import head_logits

# Numbers a token, float32 [N] each.
PerToken = dict[str, jax.Array]
# Arrays of a chunk's size of which the loss keeps some at a time: two models'
# logits, a gradient and what XLA does not fuse.
_COPIES = 4
_PartitionSpec = jax.sharding.PartitionSpec


class TokenLoss(Protocol):
  """What `weighted_sum` sums."""

  def __call__(
      self,
      logits: jax.Array,
      other_logits: jax.Array | None,
      extras: Any,
      shard: Shard,
  ) -> tuple[jax.Array, jax.Array, PerToken]:
    """Returns losses, their gradients and metrics.

    Args:
      logits: float32 [N, V] of this device's part of the vocabulary.
      other_logits: the same of the other model; None if there is none.
      extras: a tree of [N].
      shard: which part of the vocabulary that is.

    Returns:
      Losses [N]; the gradients of each with respect to its logits [N, V]; and
      metrics.
    """


def weighted_sum(
    loss: TokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    extras: Any,
    other_hidden: jax.Array | None = None,
    other_head: jax.Array | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    memory: int = 2**28,
) -> tuple[jax.Array, PerToken]:
  """Sums a loss over tokens, straight from hidden states.

  Differentiable in `hidden` and `head` alone.

  Args:
    loss: of a chunk of tokens.
    hidden: [B, P, D], the student's final hidden states.
    head: [V, D], its output head.
    weights: [B, P], of each token in the sum.
    mask: bool [B, P], true on tokens that metrics are wanted of; those after
      the last one, in all rows, may be left out altogether.
    extras: a tree of [B, P], cut into chunks along with the states.
    other_hidden: [B, P, D'], the teacher's, of any width.
    other_head: [V', D'], its head; rows beyond the student's are padding.
    mesh: the device mesh; None for one device.
    memory: bytes of logits, roughly, that may exist at a time on a device.

  Returns:
    The sum, float32 []; and the metrics, each [B, P], 0 where they were left
    out.
  """
  rest = jax.lax.stop_gradient((
      weights.astype(jnp.float32), mask, extras, other_hidden,
      _fit(other_head, head.shape[0]),
  ))  # fmt: skip
  run = functools.partial(_on_mesh, loss, mesh, memory)

  @jax.custom_vjp
  def total(hidden, head):
    value, metrics, _ = run(False, hidden, head, *rest)
    return value, metrics

  def forward(hidden, head):
    value, metrics, gradients = run(True, hidden, head, *rest)
    return (value, metrics), gradients

  def backward(gradients, cotangents):
    return jax.tree.map(
        lambda g: (g * cotangents[0]).astype(g.dtype), gradients
    )

  total.defvjp(forward, backward)
  return total(hidden, head)


def per_token(loss: TokenLoss, *args: Any, **options: Any) -> PerToken:
  """Returns the metrics of `weighted_sum` alone, without gradients."""
  return jax.lax.stop_gradient(weighted_sum(loss, *args, **options)[1])


def _fit(head: jax.Array | None, rows: int) -> jax.Array | None:
  """Gives a head as many rows as the other's; all that differ are padding."""
  if head is None or head.shape[0] == rows:
    return head
  padding = ((0, max(rows - head.shape[0], 0)), (0, 0))
  return jnp.pad(head[:rows], padding)


def _on_mesh(
    loss: TokenLoss,
    mesh: jax.sharding.Mesh | None,
    memory: int,
    with_gradient: bool,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    extras: Any,
    other_hidden: jax.Array | None,
    other_head: jax.Array | None,
) -> tuple[jax.Array, PerToken, tuple[jax.Array, jax.Array] | None]:
  """Runs `_local` on every device, and adds up what they return."""
  arrays = (hidden, head, weights, mask, extras, other_hidden, other_head)
  if mesh is None or mesh.size == 1:
    return _local(loss, Shard(), memory, with_gradient, *arrays)
  rows, width = head.shape
  tensor = "tensor" if rows % mesh.shape["tensor"] == 0 else None
  fsdp = "fsdp" if width % mesh.shape["fsdp"] == 0 else None
  batch = _PartitionSpec(sharding.BATCH_AXES)
  whole_head = _PartitionSpec(tensor)

  def run(*arrays):
    value, metrics, gradients = _local(
        loss, Shard(tensor), memory, with_gradient, *arrays
    )
    value = jax.lax.psum(value, sharding.BATCH_AXES)
    if with_gradient:
      states, weight = gradients
      # Each part of the vocabulary has its own share in the states' gradient.
      if tensor:
        states = jax.lax.psum(states, tensor)
      if fsdp:  # First, so that the replicas add a part up and not the whole.
        weight = jax.lax.psum_scatter(
            weight, fsdp, scatter_dimension=1, tiled=True
        )
      weight = jax.lax.psum(weight, "data" if fsdp else sharding.BATCH_AXES)
      gradients = states, weight
    return value, metrics, gradients

  return jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(batch, whole_head, batch, batch, batch, batch, whole_head),
      out_specs=(
          _PartitionSpec(),
          batch,
          (batch, _PartitionSpec(tensor, fsdp)) if with_gradient else None,
      ),
      # Sums over a mesh axis are equal on it, which is not seen through loops.
      check_vma=False,
  )(*arrays)


def _local(
    loss: TokenLoss,
    shard: Shard,
    memory: int,
    with_gradient: bool,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    mask: jax.Array,
    extras: Any,
    other_hidden: jax.Array | None,
    other_head: jax.Array | None,
) -> tuple[jax.Array, PerToken, tuple[jax.Array, jax.Array] | None]:
  """One device's part: its rows, and its rows of the heads."""
  rows, length = weights.shape
  states = (hidden, other_hidden)
  count, size = chunks(rows * length, head.shape[0], memory)

  def split(x: jax.Array) -> jax.Array:
    # Positions first: the last ones are padding in all rows, and left out.
    x = jnp.swapaxes(x, 0, 1).reshape(rows * length, *x.shape[2:])
    padding = [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  def join(x: jax.Array) -> jax.Array:
    x = x.reshape(count * size, *x.shape[2:])[: rows * length]
    return jnp.swapaxes(x.reshape(length, rows, *x.shape[1:]), 0, 1)

  chunk = functools.partial(
      _chunk, loss, shard, with_gradient, head, other_head
  )
  parts = jax.tree.map(split, (*states, weights, extras))
  if count == 1:
    first = jax.tree.map(lambda x: x[0], parts)
    value, metrics, gradients = chunk(*first)
    metrics, d_hidden = jax.tree.map(
        lambda x: join(x[None]), (metrics, gradients and gradients[0])
    )
    d_head = gradients and gradients[1]
  else:
    used = jnp.any(split(mask), axis=1)
    (value, d_head), (metrics, d_hidden) = _loop(chunk, used, parts)
    metrics, d_hidden = jax.tree.map(join, (metrics, d_hidden))
  if not with_gradient:
    return value, metrics, None
  return value, metrics, (d_hidden, d_head.astype(head.dtype))


def chunks(tokens: int, vocabulary: int, memory: int) -> tuple[int, int]:
  """Returns how many chunks of how many tokens keep to the memory.

  Chunks are whole tiles of a TPU, if the memory allows.
  """
  most = max(memory // (4 * _COPIES * vocabulary), 1)
  if tokens <= most:
    return 1, tokens
  tile = next(size for size in (128, 8, 1) if size <= most)
  most -= most % tile
  size = math.ceil(tokens / math.ceil(tokens / most) / tile) * tile
  return math.ceil(tokens / size), size


def _chunk(
    loss: TokenLoss,
    shard: Shard,
    with_gradient: bool,
    head: jax.Array,
    other_head: jax.Array | None,
    hidden: jax.Array,
    other_hidden: jax.Array | None,
    weights: jax.Array,
    extras: Any,
) -> tuple[jax.Array, PerToken, tuple[jax.Array, jax.Array] | None]:
  """Returns a chunk's sum, metrics, and gradients of states and head."""
  other = None
  if other_hidden is not None:
    other = head_logits(other_hidden, other_head)
  logits = head_logits(hidden, head)
  values, d_logits, metrics = loss(logits, other, extras, shard)
  value = jnp.sum(values * weights)
  if not with_gradient:
    return value, metrics, None
  d_logits = (d_logits * weights[:, None]).astype(hidden.dtype)
  d_hidden = d_logits @ head.astype(hidden.dtype)
  d_head = jnp.einsum(
      "nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32
  )
  return value, metrics, (d_hidden, d_head)


def _loop(
    chunk: Callable[..., Any], used: jax.Array, parts: tuple[Any, ...]
) -> tuple[tuple[jax.Array, Any], tuple[PerToken, Any]]:
  """Runs chunks up to the last one that is used, adding sums up."""
  count = len(used)
  needed = jnp.max(jnp.where(used, jnp.arange(count) + 1, 0))
  shapes = jax.eval_shape(chunk, *jax.tree.map(lambda x: x[0], parts))
  zeros = functools.partial(
      jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype)
  )
  value, metrics, gradients = shapes
  d_hidden, d_head = gradients or (None, None)
  sums = zeros((value, d_head))
  stacked = jax.tree.map(
      lambda x: jnp.zeros((count, *x.shape), x.dtype), (metrics, d_hidden)
  )

  def body(i, carry):
    sums, stacked = carry
    value, metrics, gradients = chunk(*jax.tree.map(lambda x: x[i], parts))
    d_hidden, d_head = gradients or (None, None)
    sums = jax.tree.map(jnp.add, sums, (value, d_head))
    stacked = jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0),
        stacked, (metrics, d_hidden),
    )  # fmt: skip
    return sums, stacked

  return jax.lax.fori_loop(0, needed, body, (sums, stacked))
