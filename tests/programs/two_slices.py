"""Which slice each device of a mesh is on, on two v5e:2x2: two_slices.py.

Prints a JSON object: for each mesh, the rows of the data axis, and for each
row the slices of its devices.
"""

import json
import os

# As on a host of the machine; read when jax is imported.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

from jax.experimental import topologies  # noqa: E402
import numpy as np  # noqa: E402

from prefix_distill import sharding  # noqa: E402
from prefix_distill.config import MeshSpec  # noqa: E402


def main() -> None:
  devices = topologies.get_topology_desc(
      platform="tpu", topology_name="v5e:2x2", num_slices=2
  ).devices
  found = {}
  for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2)):
    grid = sharding.make_mesh(MeshSpec(*sizes), devices).devices
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    found["x".join(map(str, sizes))] = slices.reshape(sizes[0], -1).tolist()
  print(json.dumps(found))


if __name__ == "__main__":
  main()
