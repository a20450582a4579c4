"""Writes a run's report again: `prefix-distill report --workdir=DIR`."""

import argparse
import pathlib
import sys

from prefix_distill.errors import ArgumentParser
from prefix_distill.errors import check
from prefix_distill.errors import check_path
from prefix_distill.errors import UserError
from prefix_distill.report import page
from prefix_distill.train import workdir as workdir_lib


def start() -> None:
  """Does what the command line says, or exits with one sentence."""
  parser = ArgumentParser(
      prog="prefix-distill report",
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
  )
  parser.add_argument("--workdir", default="", help="Where the run is kept.")
  name = parser.parse_args(sys.argv[1:]).workdir
  try:
    check(bool(name), "--workdir is missing; set it.")
    check_path("workdir", name)
    workdir = pathlib.Path(name)
    workdir_lib.read_config(workdir)  # Or no run is there.
    check(
        (workdir / "metrics.jsonl").is_file(),
        f"{workdir} has no metrics.jsonl; the run has not begun yet.",
    )
    page.write(workdir)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  start()
