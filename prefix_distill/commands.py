"""The commands: `prefix-distill train --config=math`, and so on."""

from collections.abc import Sequence
import difflib
import importlib
import sys

# What each does, and the module whose `start` does it. A module is imported
# only when its command is given: `plan` sets the environment before JAX.
COMMANDS = {
    "train": ("trains a student, or goes on with a run", "main"),
    "preflight": (
        "shows what the models would read; reads no weights",
        "main",
    ),
    "plan": (
        "says what a run takes on a machine before it is paid for",
        "plan.__main__",
    ),
    "eval": (
        "grades a model's answers to problems",
        "model_commands",
    ),
    "sample": ("shows a model's answers to prompts of yours", "model_commands"),
    "chat": ("talks to a model in the terminal", "model_commands"),
    "export": (
        "writes a checkpoint as a Hugging Face model directory",
        "model_commands",
    ),
    "report": ("writes a run's report again", "runs"),
    "compare": (
        "puts several runs into one table and one figure",
        "runs",
    ),
}
_EXAMPLES = """
  prefix-distill train --config=math
  prefix-distill eval --model=runs/math
  prefix-distill sample --model=runs/math --prompt='What is 7 + 5?'

--config takes a file, or the name of a config that ships with the package.
`prefix-distill COMMAND --help` lists a command's flags, and for train all
settings."""


def usage() -> str:
  """Returns what `prefix-distill --help` prints."""
  width = max(map(len, COMMANDS))
  about = {name: text for name, (text, _) in COMMANDS.items()}
  lines = [f"  {name:{width}}  {text}" for name, text in about.items()]
  return "\n".join([
      "On-policy distillation from reasoning prefixes.",
      "",
      "prefix-distill COMMAND [--FLAG=VALUE ...]",
      "",
      *lines,
      *_EXAMPLES.splitlines(),
  ])


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs a command; exits with its status."""
  given = [*(sys.argv[1:] if arguments is None else arguments)]
  if not given or given[0] in ("--help", "-h", "help"):
    print(usage())
    sys.exit(0 if given else 2)
  name, *rest = given
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    mend = f"did you mean {near[0]}?" if near else "there are "
    mend += "" if near else ", ".join(COMMANDS) + "."
    sys.exit(f"error: {name!r} is no command; {mend}")
  if name == "preflight":
    rest.append("--preflight")
  sys.argv = [f"prefix-distill {name}", *rest]
  module = importlib.import_module(f"prefix_distill.{COMMANDS[name][1]}")
  module.start()


if __name__ == "__main__":
  main()
