"""The embedding table of a whole batch, on a mesh."""

import jax
import jax.numpy as jnp

from prefix_distill import sharding

_PartitionSpec = jax.sharding.PartitionSpec


def look_up(
    table: jax.Array,
    tokens: jax.Array,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Returns the rows of a table.

  On a mesh the table is gathered over `fsdp`, and each device looks up its own
  tokens; over `tensor` it stays split, and the rows found are added up. The
  gradient is formed where the tokens are, in float32, and scattered. Left to
  itself the partitioner looks up every device's tokens in each part of the
  table, sends the parts of the rows to and fro, and sums whole gradients.

  Args:
    table: [V, D].
    tokens: int32 [B, T].
    dtype: of the result, and of what is sent.
    mesh: the device mesh; None for one device.

  Returns:
    [B, T, D].
  """
  if mesh is None or mesh.size == 1:
    return table.astype(dtype)[tokens]
  rows, width = table.shape
  tensor = "tensor" if rows % mesh.shape["tensor"] == 0 else None
  fsdp = "fsdp" if width % mesh.shape["fsdp"] == 0 else None
  batch = _PartitionSpec(sharding.BATCH_AXES)
  split = _PartitionSpec(tensor, fsdp)

  def find(part, tokens):
    part = part.astype(dtype)
    if fsdp:
      part = jax.lax.all_gather(part, fsdp, axis=1, tiled=True)
    if not tensor:
      return part[tokens]
    here, mine = _here(tokens, part.shape[0])
    found = jnp.where(mine[..., None], part[here], jnp.zeros((), dtype))
    return jax.lax.psum(found, tensor)

  def gradient(found, tokens):
    shape = (rows // (mesh.shape["tensor"] if tensor else 1), width)
    found = found.astype(jnp.float32)
    here, mine = tokens, None
    if tensor:
      here, mine = _here(tokens, shape[0])
      found = jnp.where(mine[..., None], found, 0.0)
    part = jnp.zeros(shape, jnp.float32).at[here].add(found)
    part = jax.lax.psum(part, "data")
    if fsdp:
      return jax.lax.psum_scatter(part, fsdp, scatter_dimension=1, tiled=True)
    return jax.lax.psum(part, "fsdp")

  def on_mesh(function, in_specs, out_specs):
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
        # Sums over a mesh axis are equal on it, which is not always seen.
        check_vma=False,
    )  # fmt: skip

  @jax.custom_vjp
  def run(table, tokens):
    return on_mesh(find, (split, batch), batch)(table, tokens)

  def forward(table, tokens):
    return run(table, tokens), tokens

  def backward(tokens, found):
    grads = on_mesh(gradient, (batch, batch), split)(found, tokens)
    return grads.astype(table.dtype), None

  run.defvjp(forward, backward)
  return run(table, tokens)


def _here(tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens' rows in this device's part, and which are in it."""
  here = tokens - rows * jax.lax.axis_index("tensor")
  mine = (here >= 0) & (here < rows)
  return jnp.where(mine, here, 0), mine
