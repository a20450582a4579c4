"""The length rules on eight devices: what one device sees, chooses and learns.

length_rules_on_devices.py RULE [RULE ...]
"""

import sys

import jax
import numpy as np
import test_length_rules as rules

from prefix_distill import sharding
from prefix_distill.config import MeshSpec

MESHES = ((8, 1, 1), (2, 2, 2), (1, 2, 4))


def check_what_is_seen() -> None:
  one = rules.seen()
  for sizes in MESHES:
    eight = rules.seen(sharding.make_mesh(MeshSpec(*sizes)))
    for name, values in one.items():
      np.testing.assert_allclose(
          np.asarray(eight[name])[rules.MASK],
          np.asarray(values)[rules.MASK],
          atol=1e-5,
      )


if __name__ == "__main__":
  assert len(jax.devices()) == 8
  check_what_is_seen()
  for rule in sys.argv[1:]:
    rules.assert_same_update(rule, shape=(2, 2, 2))
  print("OK")
