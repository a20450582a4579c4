"""The chunked head on meshes of 8 devices: equal to one, and what travels."""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import test_chunked_head
from test_chunked_head import HEAD
from test_chunked_head import HIDDEN
from test_chunked_head import OBJECTIVES
from test_chunked_head import ROWS
from test_chunked_head import VOCABULARY

from prefix_distill import sharding
from prefix_distill.config import MeshSpec

MESHES = ((8, 1, 1), (2, 2, 2), (1, 2, 4))


def check_meshes() -> None:
  """Every objective, in two or three chunks on each device."""
  spec = jax.sharding.PartitionSpec
  for sizes in MESHES:
    mesh = sharding.make_mesh(MeshSpec(*sizes))
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    hidden = jax.device_put(HIDDEN, place(spec(sharding.BATCH_AXES)))
    head = jax.device_put(HEAD, place(spec("tensor", "fsdp")))
    rows = ROWS // (sizes[0] * sizes[1])
    memory = 4 * rows * 4 * 4 * VOCABULARY // sizes[2]
    for objective in OBJECTIVES.values():
      objective = dataclasses.replace(objective, memory=memory)
      test_chunked_head.assert_equals_dense(
          objective, test_chunked_head.ours(objective, mesh, hidden, head)
      )
    test_chunked_head.assert_token_scores(mesh)


def check_a_vocabulary_that_does_not_divide() -> None:
  mesh = sharding.make_mesh(MeshSpec(1, 2, 4))
  head = jnp.concatenate([HEAD, test_chunked_head.normal(5, 2, 8)])  # 18 rows
  for name in ("reverse_kl", "policy gradient"):
    got = test_chunked_head.ours(OBJECTIVES[name], mesh, HIDDEN, head)
    wanted = test_chunked_head.ours(OBJECTIVES[name], None, HIDDEN, head)
    for x, y in zip(
        jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True
    ):
      # As `assert_equals_dense` compares gradients: small ones are differences
      # of large terms, whose rounding depends on the machine.
      scale = max(np.abs(y).max(), 1)
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5 * scale)


def check_that_no_logits_are_gathered_and_weights_travel_once() -> None:
  text = test_chunked_head.compiled_loss(sharding.make_mesh(MeshSpec(1, 2, 4)))

  def sizes(kind: str) -> list[int]:
    found = re.findall(rf"= (.*?) {kind}\(", text)
    return sorted(
        sum(
            int(np.prod([int(x) for x in dims.split(",") if x]))
            for dims in re.findall(r"\[([\d,]*)\]", result)
        )
        for result in found
    )

  # Both heads over fsdp, once: a quarter of the vocabulary, of whole width.
  assert sizes("all-gather") == [16 * 6, 16 * 8], sizes("all-gather")
  # The head's gradient over fsdp, once.
  assert sizes("reduce-scatter") == [16 * 4], sizes("reduce-scatter")
  # The states' gradient at the end; besides only a few numbers a token, and
  # so for the 64 tokens of a chunk.
  *small, states = sizes("all-reduce")
  assert states == ROWS // 2 * 64 * 8, sizes("all-reduce")
  assert max(small) <= 6 * 64, sizes("all-reduce")


if __name__ == "__main__":
  if sys.argv[1] == "equal":
    check_meshes()
    check_a_vocabulary_that_does_not_divide()
  else:
    check_that_no_logits_are_gathered_and_weights_travel_once()
  print("OK")
