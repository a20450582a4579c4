"""What a segment of decoding is compiled to, where no accelerator is."""

import json

import pytest
import toys

pytestmark = pytest.mark.aot


def compiled(machine, dtype):
  process = toys.start("decode_kernels.py", machine, dtype, devices=1)
  (printed,) = toys.finish([process], seconds=500)
  return json.loads(printed.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "machine, dtype, most",
    [
        ("h100:1", "bfloat16", 12.5),
        ("h100:1", "int8", 17),
        ("v5e:2x2", "bfloat16", None),
        ("v6e:2x2", "bfloat16", None),
    ],
)
def test_a_token_takes_few_kernels_and_waits_for_nobody(machine, dtype, most):
  found = compiled(machine, dtype)
  layer = (found["kernels_4"] - found["kernels_2"]) / 2
  assert most is None or layer <= most
  # The host knows how often the loop runs, and nothing in it branches.
  assert found["trips"] in (64, None if machine.startswith("v") else 64)
  assert found["conditionals"] == 0
  # Neither a copy of a layer's cache nor room for one.
  assert found["copied"] < found["cache"] / 16
  assert found["temporary"] < found["cache"]
