"""The chunked head: output head and loss in one, `[B, P, V]` never exists.

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

import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple
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
# The states' and the head's; None for a head that is not trained.
_Gradients = tuple[jax.Array, jax.Array | None]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadInputs:
  """Hidden states and output heads: the logits are their products.

  Attributes:
    hidden: [B, P, D], the student's final hidden states.
    head: [V, D], its output head.
    other_hidden: [B, P, D'], the teacher's, of any width; None if there is no
      teacher.
    other_head: [V', D'], its head; rows beyond the student's are padding.
  """

  hidden: jax.Array
  head: jax.Array
  other_hidden: jax.Array | None = None
  other_head: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInputs:
  """Per-token inputs of the loss besides the hidden states.

  Attributes:
    weights: [B, P], of each token in the sum.
    mask: bool [B, P], true on tokens whose metrics are wanted; positions behind
      the last such token of all rows may be left out.
    extras: a tree of [B, P], cut into chunks along with the states.
  """

  weights: jax.Array
  mask: jax.Array
  extras: Any = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def weighted_sum(
    loss: TokenLoss,
    inputs: HeadInputs,
    tokens: TokenInputs,
    mesh: jax.sharding.Mesh | None = None,
    memory: int = 2**28,
    trains_head: bool = True,
) -> tuple[jax.Array, PerToken]:
  """Sums a loss over tokens, straight from hidden states.

  Differentiable in the student's states and head alone.

  Args:
    loss: of a chunk of tokens.
    inputs: states and heads.
    tokens: weights and the like.
    mesh: the device mesh; None for one device.
    memory: bytes of logits, roughly, that may exist at a time on a device.
    trains_head: whether the head's gradient is wanted; it is 0 if not.

  Returns:
    The sum, float32 []; and the metrics, each [B, P], 0 where they were left
    out.
  """
  del trains_head
  return _run(loss, inputs, tokens, mesh, memory, with_gradient=False)[0]


def per_token(*args: Any) -> PerToken:
  """Returns the metrics of `weighted_sum` alone, without gradients."""
  return jax.lax.stop_gradient(weighted_sum(*args)[1])


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


@jax.named_scope("loss")
def _run(
    loss: TokenLoss,
    inputs: HeadInputs,
    tokens: TokenInputs,
    mesh: jax.sharding.Mesh | None,
    memory: int,
    trains_head: bool = True,
    with_gradient: bool = True,
) -> tuple[tuple[jax.Array, PerToken], _Gradients | None]:
  """Runs `_local` on every device; returns the sum, metrics and gradients."""
  (rows, width), other_head = inputs.head.shape, inputs.other_head
  if other_head is not None and len(other_head) != rows:
    # What the smaller vocabulary lacks is padding in the other one.
    padding = ((0, max(rows - len(other_head), 0)), (0, 0))
    other_head = jnp.pad(other_head[:rows], padding)
    inputs = dataclasses.replace(inputs, other_head=other_head)
  weights = tokens.weights.astype(jnp.float32)
  tokens = dataclasses.replace(tokens, weights=weights)
  local = functools.partial(_local, loss, memory, trains_head, with_gradient)
  if mesh is None or mesh.size == 1:
    return local(_Axes(), inputs, tokens)
  axes = _Axes(
      sharding.BATCH_AXES,
      "tensor" if rows % mesh.shape["tensor"] == 0 else None,
      "fsdp" if width % mesh.shape["fsdp"] == 0 else None,
  )
  batch, head = _PartitionSpec(axes.batch), _PartitionSpec(axes.tensor)
  gradients = (batch, None)
  if trains_head:
    gradients = (batch, _PartitionSpec(axes.tensor, axes.fsdp))
  return jax.shard_map(
      functools.partial(local, axes),
      mesh=mesh,
      in_specs=(HeadInputs(batch, head, batch, head), batch),
      out_specs=(
          (_PartitionSpec(), batch), gradients if with_gradient else None
      ),
      # Sums over a mesh axis are equal on it, which is not seen through loops.
      check_vma=False,
  )(inputs, tokens)


class _Axes(NamedTuple):
  """The axes of a mesh; all are None on one device.

  Attributes:
    batch: those that rollouts are split over.
    tensor: the axis that the vocabulary is split over, if it is.
    fsdp: the axis that the gradient of the head is split over, if it is.
  """

  batch: tuple[str, ...] | None = None
  tensor: str | None = None
  fsdp: str | None = None


def _local(
    loss: TokenLoss,
    memory: int,
    trains_head: bool,
    with_gradient: bool,
    axes: _Axes,
    inputs: HeadInputs,
    tokens: TokenInputs,
) -> tuple[tuple[jax.Array, PerToken], _Gradients | None]:
  """One device's part: its rows, and its rows of the heads.

  Args:
    loss: of a chunk of tokens.
    memory: bytes of logits.
    trains_head: whether to return the head's gradient.
    with_gradient: whether to return gradients at all.
    axes: what is split.
    inputs: with the part of the vocabulary that the device holds.
    tokens: see `weighted_sum`.
  """
  head, weights = inputs.head, tokens.weights
  rows, length = weights.shape
  shard, dtype = Shard(axes.tensor), inputs.hidden.dtype
  count, size = chunks(rows * length, head.shape[0], memory)

  def split(x: jax.Array) -> jax.Array:
    # Positions first: the last ones are padding in all rows, and left out.
    x = jnp.swapaxes(x, 0, 1).reshape(rows * length, *x.shape[2:])
    padding = [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  def join(x: jax.Array) -> jax.Array:
    x = x.reshape(count * size, *x.shape[2:])[: rows * length]
    return jnp.swapaxes(x.reshape(length, rows, *x.shape[1:]), 0, 1)

  parts = jax.tree.map(
      split, (inputs.hidden, inputs.other_hidden, weights, tokens.extras)
  )

  def chunk(i: Any, before: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """Returns sums and rows of chunk i, added to those of the chunks before."""
    hidden, other_hidden, weights, extras = jax.tree.map(
        lambda x: x[i], parts
    )
    other = None
    if other_hidden is not None:
      other = head_logits(other_hidden, inputs.other_head)
    values, d_logits, metrics = loss(
        head_logits(hidden, head), other, extras, shard
    )
    d_hidden = d_head = None
    if with_gradient:
      d_logits = (d_logits * weights[:, None]).astype(dtype)
      d_hidden = d_logits @ head.astype(dtype)
    if with_gradient and trains_head:
      d_head = jnp.einsum(
          "nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32
      )
    sums, found = (jnp.sum(values * weights), d_head), (metrics, d_hidden)
    if before is None:
      return sums, found
    return jax.tree.map(jnp.add, before[0], sums), jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0),
        before[1], found,
    )

  if count == 1:
    sums, found = chunk(0)
    found = jax.tree.map(lambda x: x[None], found)
  else:
    used = jnp.any(split(tokens.mask), axis=1)
    needed = jnp.max(jnp.where(used, jnp.arange(count) + 1, 0))
    sums, found = jax.eval_shape(chunk, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), (
        jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), found)
    )
    sums, found = jax.lax.fori_loop(0, needed, chunk, zeros)
  (value, d_head), (metrics, d_hidden) = sums, jax.tree.map(join, found)
  if axes.batch:
    value = jax.lax.psum(value, axes.batch)
  if not with_gradient:
    return (value, metrics), None
  # Each part of the vocabulary has its own share in the states' gradient.
  if axes.tensor:
    d_hidden = jax.lax.psum(d_hidden, axes.tensor)
  if not trains_head:
    return (value, metrics), (d_hidden, None)
  d_head = d_head.astype(head.dtype)
  if axes.fsdp:  # First, so that the replicas add a part up and not the whole.
    d_head = jax.lax.psum_scatter(
        d_head, axes.fsdp, scatter_dimension=1, tiled=True
    )
  if axes.batch:
    d_head = jax.lax.psum(d_head, "data" if axes.fsdp else axes.batch)
  return (value, metrics), (d_hidden, d_head)


def _scaled(
    loss: TokenLoss,
    mesh: jax.sharding.Mesh | None,
    memory: int,
    trains_head: bool,
    gradients: _Gradients,
    cotangents: tuple[jax.Array, PerToken],
) -> tuple[HeadInputs, None]:
  """Returns the gradients of `weighted_sum`: those of states and head."""
  del loss, mesh, memory, trains_head
  scaled = jax.tree.map(
      lambda g: (g * cotangents[0]).astype(g.dtype), gradients
  )
  return HeadInputs(*scaled), None


weighted_sum.defvjp(_run, _scaled)
