"""The chunked head against whole logits: memory and time.

  python benchmarks/head.py
  python benchmarks/head.py --topology=v5e:4x4 --shapes 128,2048,151936

Both compute the reverse KL of a batch and its gradients with respect to the
student's hidden states and head. Memory is the compiler's own count of what
exists besides arguments and results; times are medians, in turn. With
--topology (needs jax[tpu]) both are compiled for TPUs that are not there, in
bfloat16 on a mesh of fsdp alone, memory is that of one device, and nothing
runs.
"""

import argparse
import functools
import os
import re
import statistics
import time

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import divergence
from prefix_distill.distill.divergence import Distribution
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig
from prefix_distill.models.transformer import head_logits
from prefix_distill.models.transformer import Model
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores

_STOPS = 2
# What a TPU's compiler says of a program that is too large.
_NEEDED = re.compile(r"required for HLO temporaries \(([\d.]+)G\)")


def _model(vocabulary: int, width: int, mesh: jax.sharding.Mesh) -> Model:
  """A model of which only the head is used."""
  return Model(
      ModelConfig(
          "qwen3",
          vocabulary,
          width,
          8,
          1,
          1,
          1,
          8,
          1e-6,
          RopeConfig(1e4),
          False,
          8,
      ),
      mesh=mesh,
  )


def _dense(dist, mesh, hidden, head, teacher_hidden, teacher_head, mask):
  """The same loss from whole logits, differentiated by JAX."""
  del mesh
  logits = head_logits(hidden, head), head_logits(teacher_hidden, teacher_head)
  kl = divergence.compare(
      divergence.reverse_kl_term, *divergence.distributions(*logits, dist)
  )
  return jnp.sum(jnp.where(mask, kl, 0))


def _chunked(dist, mesh, hidden, head, teacher_hidden, teacher_head, mask):
  rollout = Rollout(jnp.zeros(mask.shape, jnp.int32), mask)
  value, _ = chunked_head.weighted_sum(
      *ExactLoss(dist).arguments(
          _model(*head.shape, mesh), {"head": {"weight": head}}, teacher_head,
          hidden, rollout, TeacherScores(teacher_hidden), mask,
      )
  )
  return value


def _compile(loss, shape, widths, mesh, dtype):
  """Compiles value and gradients; returns the program and its inputs."""
  rows, length, vocabulary = shape
  dist = Distribution(1.0, vocabulary - 267, tuple(range(_STOPS)))
  batch = sharding.batch_sharding(mesh)
  head = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec("tensor", "fsdp")
  )
  shapes = []
  for width in widths:
    shapes.append(
        jax.ShapeDtypeStruct((rows, length, width), dtype, sharding=batch)
    )
    shapes.append(
        jax.ShapeDtypeStruct((vocabulary, width), dtype, sharding=head)
    )
  shapes.append(jax.ShapeDtypeStruct((rows, length), bool, sharding=batch))
  program = jax.jit(
      jax.value_and_grad(functools.partial(loss, dist, mesh), (0, 1)),
      out_shardings=(sharding.replicated(mesh), (batch, head)),
  )
  return program.lower(*shapes).compile(), shapes


def _inputs(shapes):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [
      jnp.ones(s.shape, bool)
      if s.dtype == bool
      else 0.1 * jax.random.normal(k, s.shape, s.dtype)
      for s, k in zip(shapes, keys, strict=True)
  ]


def _seconds(program, inputs) -> float:
  start = time.perf_counter()
  jax.block_until_ready(program(*inputs))
  return time.perf_counter() - start


def _topology_mesh(name: str) -> jax.sharding.Mesh:
  # Or libtpu would look for the machine that it thinks it is on.
  for variable, value in (
      ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
      ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
      ("TPU_SKIP_MDS_QUERY", "1"),
      ("TPU_WORKER_HOSTNAMES", "localhost"),
      ("TPU_WORKER_ID", "0"),
  ):
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies  # Only with jax[tpu].

  devices = topologies.get_topology_desc(
      platform="tpu", topology_name=name
  ).devices
  return sharding.make_mesh(MeshSpec(data=1, fsdp=len(devices)), devices)


def _row(shape, widths, mesh, dtype, repeats) -> list[str]:
  """Measures one shape; the cells of its row."""
  memory, times, outcome = {}, {"dense": [], "chunked": []}, {}
  programs = {}
  for name, loss in (("dense", _dense), ("chunked", _chunked)):
    try:
      program, shapes = _compile(loss, shape, widths, mesh, dtype)
    except Exception as error:  # pylint: disable=broad-except
      needed = _NEEDED.search(str(error))
      if not needed:
        raise
      memory[name] = float(needed[1]) * 2**30
      outcome[name] = f"{needed[1]} GiB, too much"
      continue
    programs[name] = program
    memory[name] = program.memory_analysis().temp_size_in_bytes
    outcome[name] = f"{memory[name] / 2**30:.2f} GiB"
  if repeats:
    inputs = _inputs(shapes)
    for turn in range(repeats + 1):
      for name, program in programs.items():
        seconds = _seconds(program, inputs)
        if turn:
          times[name].append(seconds)
  cells = [" x ".join(f"{n:,}" for n in shape), *outcome.values()]
  cells.append(f"{memory['dense'] / memory['chunked']:.1f}")
  medians = [statistics.median(t) if t else None for t in times.values()]
  cells += [f"{m:.2f} s" if m else "-" for m in medians]
  cells.append(f"{medians[1] / medians[0]:.2f}" if all(medians) else "-")
  return cells


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
      "--shapes",
      nargs="+",
      default=["2,128,49152", "8,128,49152", "8,512,49152", "8,512,151936"],
      help="B,P,V of each row",
  )
  parser.add_argument("--widths", default="", help="student,teacher")
  parser.add_argument("--topology", default="", help="such as v5e:4x4")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  table = rich.table.Table(
      "B x P x V",
      "dense",
      "chunked",
      "less",
      "dense",
      "chunked",
      "time",
      title="reverse KL with gradients: memory, and time",
  )
  if args.topology:
    mesh, dtype, repeats = _topology_mesh(args.topology), jnp.bfloat16, 0
    widths = args.widths or "2048,4096"
  else:
    mesh = sharding.make_mesh(MeshSpec())
    dtype, repeats = jnp.float32, args.repeats
    widths = args.widths or "512,1024"
  widths = [int(w) for w in widths.split(",")]
  for text in args.shapes:
    shape = tuple(int(n) for n in text.split(","))
    table.add_row(*_row(shape, widths, mesh, dtype, repeats))
  rich.console.Console(width=100).print(table)


if __name__ == "__main__":
  main()
