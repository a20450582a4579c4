"""The commands of README and docs: each is one that works.

Bash reads the fences of a page from top to bottom, as a reader pastes them,
with a recorder in the place of every program. What it recorded is then parsed
by the command itself: flags, config and settings. A command that takes more
than a laptop comes after a line "# Needs ..." that says what.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from configs import math as experiment
from prefix_distill import config as config_lib

_ROOT = pathlib.Path(__file__).parent.parent
_PAGES = (
    "README.md",
    *sorted(str(p.relative_to(_ROOT)) for p in (_ROOT / "docs").rglob("*.md")),
)
_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
# Commands in the running text, and in paragraphs that are set in.
_INLINE = re.compile(
    r"`((?:prefix-distill|python\s+-m\s+prefix_distill\.)[^`]*\s--[^`]*)`"
)
_INDENTED = re.compile(r"^    ((?:prefix-distill|python) .*)$", re.M)
# What no laptop has; the rest of these are launch/'s.
_REMOTE = ("gcloud", "gcsfuse", "ssh-add", "slurm.sh", "tpu.sh", "gke.sh")
_LOCAL = (
    "git",
    "local.sh",
    "ls",
    "pip",
    "prefix-distill",
    "pytest",
    "python",
    "python3",
    "ruff",
    "uv",
)
_RECORDER = f"""#!{sys.executable} -S
import json, os, sys
name = os.path.basename(sys.argv[0])
kept = ("FENCE", "NEEDS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
line = [[name, *sys.argv[1:]], {{k: os.environ.get(k, "") for k in kept}}]
with open(os.environ["CALLS"], "a") as file:
  file.write(json.dumps(line) + "\\n")
"""


def _fences(page: str) -> list[tuple[str, str]]:
  """Returns the languages and texts of a page's fences."""
  return _FENCE.findall((_ROOT / page).read_text())


def _script(page: str) -> str:
  """Returns all that a page has its readers type, as a shell script."""
  text = (_ROOT / page).read_text()
  lines = []
  for match in _FENCE.finditer(text):
    if match[1] == "sh":
      line = text[: match.start()].count("\n") + 1
      lines += [f"export FENCE={page}:{line} NEEDS=''", match[2]]
  rest = _FENCE.sub("", text)
  lines.append(f"export FENCE={page} NEEDS=''")
  inline = [" ".join(x.split()) for x in _INLINE.findall(rest)]
  lines += [x for x in inline if "..." not in x] + _INDENTED.findall(rest)
  return re.sub(
      r"^# Needs (.*)$",
      lambda match: f"export NEEDS={shlex.quote(match[1])}",
      "\n".join(lines),
      flags=re.M,
  )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
  """A directory with recorders, and the files that the pages name."""
  place = tmp_path_factory.mktemp("place")
  for name in (*_REMOTE, *_LOCAL):
    folder = "launch" if name.endswith(".sh") else "bin"
    file = place / folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(_RECORDER)
    file.chmod(0o755)
  for name in ("bash", "seq"):
    (place / "bin" / name).symlink_to(shutil.which(name))
  (place / ".venv" / "bin").mkdir(parents=True)
  (place / ".venv" / "bin" / "activate").touch()
  # What `git clone REPO prefix_distill` makes.
  (place / "prefix_distill").symlink_to(".")
  (place / "runs" / "math").mkdir(parents=True)
  asked = [{"question": f"What is {n} + 5?", "answer": n} for n in range(80)]
  lines = "".join(json.dumps(x) + "\n" for x in asked)
  (place / "FILE.jsonl").write_text(lines)
  return place


@pytest.fixture(scope="module")
def calls(place) -> list[tuple[list[str], dict[str, str]]]:
  """The programs that the pages call: arguments, and the environment."""
  file = place / "calls"
  for page in _PAGES:
    script = _script(page)
    for name, value in {
        "prompts=FILE": "prompts=FILE.jsonl",
        "eval=FILE": "eval=FILE.jsonl",
        "DIR,": "bundled:teacher,",
        "HOST:PORT": "host:8476",
        "gs://BUCKET": "gs://bucket",
    }.items():
      script = script.replace(name, value)
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=place,
        env={"PATH": str(place / "bin"), "CALLS": str(file)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def parsed(calls, place) -> list[tuple[list[str], dict[str, str], dict]]:
  """The commands of the package, and what they said to their arguments."""
  # What earlier commands would have written.
  settings = config_lib.from_dict(experiment.get_config("tiny").to_dict())
  for name in ("mine.json", "runs/math/config.json"):
    (place / name).write_text(json.dumps(config_lib.plain(settings)))
  found = []
  for arguments, environment in calls:
    name, *rest = arguments
    if name.endswith(".sh") and "--" in rest:
      rest = rest[rest.index("--") + 1 :]
      found.append((["prefix-distill", "train", *rest], environment))
    package = " ".join(rest).startswith("-m prefix_distill.")
    if name == "prefix-distill" or name == "python" and package:
      found.append((arguments, environment))
  done = subprocess.run(
      [sys.executable, _ROOT / "tests" / "programs" / "parse_commands.py"],
      input=json.dumps([arguments for arguments, _ in found]),
      cwd=place,
      env=os.environ | {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1"},
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  said = json.loads(done.stdout)
  return [(*given, told) for given, told in zip(found, said, strict=True)]


@pytest.mark.parametrize("page", _PAGES)
def test_a_fence_says_what_it_is(page):
  assert {kind for kind, _ in _fences(page)} <= {"sh", "python", "text"}


def test_every_command_of_the_package_is_accepted(parsed):
  wrong = [
      f"{environment['FENCE']}: {' '.join(arguments)}: {told['error']}"
      for arguments, environment, told in parsed
      if told["error"]
  ]
  assert not wrong, "\n".join(wrong)
  assert len(parsed) >= 30


def test_a_command_that_needs_more_than_a_laptop_says_so(calls, parsed):
  silent = [
      f"{environment['FENCE']}: {' '.join(arguments)}"
      for arguments, environment in calls
      if arguments[0] in _REMOTE and not environment["NEEDS"]
  ]
  silent += [
      f"{environment['FENCE']}: {' '.join(arguments)}"
      for arguments, environment, told in parsed
      if told["reads"] and not environment["NEEDS"]
  ]
  assert not silent, "\n".join(silent)


def test_a_checkpoint_that_a_page_asks_for_is_kept(calls):
  """After the default command, whose run is runs/math."""
  config = experiment.get_config("tiny")
  spec = config.checkpoint
  kept = [config.steps - n * spec.every for n in range(spec.keep)]
  asked = [
      int(part.removeprefix("--step="))
      for arguments, _ in calls
      for part in arguments
      if re.match("--step=[0-9]", part)
  ]
  assert asked and set(asked) <= set(kept)


def test_the_launch_scripts_take_the_flags_that_the_pages_give(calls):
  found = [a for a, _ in calls if a[0].endswith(".sh")]
  for name, command, *rest in found:
    done = subprocess.run(
        [_ROOT / "launch" / name, command, "--dry-run", *rest],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name} {command} {rest}: {done.stderr}"
  assert {name for name, *_ in found} == {
      "local.sh",
      "slurm.sh",
      "tpu.sh",
      "gke.sh",
  }


def test_other_commands_name_what_is_there(calls):
  """Scripts and their flags, tests and their markers, extras."""
  about = tomllib.loads((_ROOT / "pyproject.toml").read_text())
  markers = about["tool"]["pytest"]["ini_options"]["markers"]
  setup = (_ROOT / "setup.py").read_text()
  for (name, *rest), environment in calls:
    where = f"{environment['FENCE']}: {name} {' '.join(rest)}"
    if name == "pip":
      for extra in re.findall(r"\[(.*)\]", " ".join(rest)):
        for one in extra.split(","):
          assert f'"{one}": ' in setup, where
    elif name == "pytest":
      for option, value in zip(rest, [*rest[1:], ""], strict=False):
        if option == "-m":
          assert any(m.startswith(f"{value}: ") for m in markers), where
        elif option.endswith(".py"):
          assert (_ROOT / option).is_file(), where
    elif name == "python" and rest[0] != "-m":
      text = (_ROOT / rest[0]).read_text()
      for flag in re.findall(r"--[a-z_-]+", " ".join(rest[1:])):
        assert f'"{flag}"' in text, where
