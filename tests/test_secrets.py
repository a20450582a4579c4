"""Passwords and tokens get into no file of a run, and into no message."""

import os
import pathlib
import subprocess
import sys

import pytest
import toys

from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError

_ROOT = pathlib.Path(__file__).parent.parent
_PASSWORD = "hunter2hunter2"
_SECRETS = {
    "HF_TOKEN": "hf_Qx7Qx7Qx7Qx7Qx7Qx7",
    "WANDB_API_KEY": "f00dfeedf00dfeed",
    "AWS_SECRET_ACCESS_KEY": "Zm9v/YmFyYmF6cXV4",
}
_URLS = (
    f"https://user:{_PASSWORD}@host.invalid/train.jsonl",
    f"https://{_PASSWORD}@host.invalid/train.jsonl",
    f"hf://datasets/owner/name?token={_PASSWORD}",
    f"gs://bucket/name?a=b&access_token={_PASSWORD}&c=d",
    f"https://host.invalid/x?X-Amz-Signature={_PASSWORD}",
)


def _run(*command: str) -> tuple[int, bytes]:
  """Returns the exit status, and all that was said."""
  found = subprocess.run(
      [sys.executable, *command],
      cwd=_ROOT,
      env=os.environ | _SECRETS,
      timeout=400,
      check=False,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
  )
  return found.returncode, found.stdout


def _leaks(data: bytes) -> list[str]:
  wanted = (*_SECRETS.values(), _PASSWORD)
  return [one for one in wanted if one.encode() in data]


def test_a_run_writes_no_secret_of_its_environment(tmp_path):
  workdir = tmp_path / "run"
  code, said = _run(
      "-m",
      "prefix_distill.main",
      f"--workdir={workdir}",
      *toys.SMALL_RUN,
      "--trace=2",
  )
  assert code == 0, said
  assert not _leaks(said)
  files = [path for path in workdir.rglob("*") if path.is_file()]
  names = {path.relative_to(workdir).parts[0] for path in files}
  assert names >= {
      "config.json",
      "contents.json",
      "metrics.jsonl",
      "checkpoints",
      "report",
      "export",
      "trace",
  }
  for path in files:
    assert not _leaks(path.read_bytes()), path


@pytest.mark.parametrize(
    "flag",
    [
        f"--config.data.train.source={_URLS[0]}",
        f"--config.steps={_SECRETS['HF_TOKEN']}",
        f"--trace={_SECRETS['WANDB_API_KEY']}",
        f"--workdir={_URLS[0]}",
    ],
)
def test_a_refused_flag_is_not_repeated_with_its_secret(flag, tmp_path):
  workdir = tmp_path / "run"
  code, said = _run(
      "-m", "prefix_distill.main", f"--workdir={workdir}", *toys.SMALL_RUN, flag
  )
  assert code == 1
  assert b"error: " in said and b"***" in said, said
  assert not _leaks(said)
  assert not workdir.exists()


@pytest.mark.parametrize("url", _URLS)
@pytest.mark.parametrize(
    "name", ["data.train.source", "student.path", "teacher.tokenizer"]
)
def test_a_place_with_a_password_is_refused(name, url):
  values = config_lib.plain(toys.run_config("bundled:weak", "bundled:teacher"))
  *groups, last = name.split(".")
  at = values
  for group in groups:
    at = at[group]
  at[last] = url
  with pytest.raises(ConfigError) as caught:
    config_lib.from_dict(values)
  sentence = str(caught.value)
  assert sentence.startswith(f"{name} is ") and "HF_TOKEN" in sentence
  assert _PASSWORD not in sentence


@pytest.mark.parametrize("url", _URLS)
def test_a_message_is_redacted(url):
  shown = str(UserError(f"{url} is not there (see {pathlib.Path(url)})."))
  assert _PASSWORD not in shown
  assert shown.count("***") == 2


def test_what_is_no_secret_stays(monkeypatch):
  monkeypatch.setenv("SSH_KEY", "/home/me/key")
  monkeypatch.setenv("SOME_TOKEN", "abc")
  for text in (
      "https://host/x?page=2 at 10:30, me@host, a:b@c, /home/me/key, abc",
      "hf_transfer owner/name@main gs://bucket/a@b",
  ):
    assert errors.redacted(text) == text


def test_a_traceback_is_redacted():
  code, said = _run(
      "-c",
      "import os\n"
      "from prefix_distill import errors\n"
      "errors.hide_secrets()\n"
      "try:\n"
      f"  raise ValueError('{_URLS[0]}')\n"
      "except ValueError as error:\n"
      "  raise RuntimeError(os.environ['WANDB_API_KEY']) from error\n",
  )
  assert code == 1
  assert b"Traceback" in said and b"RuntimeError: ***" in said
  # But for the program's own lines, which are in no environment or URL.
  assert not _leaks(said)
