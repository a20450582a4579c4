"""An on-policy update, side by side with those of other packages.

  python benchmarks/step.py --teacher=DIR --student=DIR

Rollout, the teacher's scores, the exact reverse KL and AdamW, all in float32.
As in `rollout.py`, contestants take turns and the missing ones are left out.
"""

import argparse

import contest
import numpy as np
import rich.console
import rich.table

from prefix_distill.models import huggingface as hf

NAMES = ("ours_step", "torch_step", "trl_step")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--teacher", required=True)
  parser.add_argument("--student", required=True)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new", type=int, nargs="+", default=[64])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--names", nargs="+", default=NAMES)
  parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH")
  args = parser.parse_args()
  vocabulary = hf.read_config(args.student).vocab_size
  contestants = contest.start(
      args.names,
      dict(p.split("=") for p in args.python),
      args.teacher,
      args.student,
  )
  table = rich.table.Table(title="seconds an update")
  others = [name for name in args.names if name != args.names[0]]
  headings = [f"{name} / {args.names[0]}" for name in others]
  for heading in ("batch, prompt, new", *args.names, *headings):
    table.add_column(heading)
  rng = np.random.default_rng(0)
  for new in args.new:
    shape = (args.batch, args.prompt)
    tokens = rng.integers(10, vocabulary - 10, shape).tolist()
    medians = contest.take_turns(
        contestants, args.repeats, tokens=tokens, new=new
    )
    table.add_row(
        f"{args.batch}, {args.prompt}, {new}",
        *(f"{medians[n]:.1f}" if n in medians else "-" for n in args.names),
        *(
            f"{medians[n] / medians[args.names[0]]:.2f}"
            if n in medians
            else "-"
            for n in others
        ),
    )
  for contestant in contestants:
    contestant.close()
  rich.console.Console(width=100).print(table)


if __name__ == "__main__":
  main()
