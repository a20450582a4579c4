import io
import json
import pathlib

import pytest

from prefix_distill.errors import UserError
from prefix_distill.report import report


def write(path, lines, resume_step=None):
  writer = report.MetricsWriter(path, resume_step)
  for line in lines:
    writer.write(line)


def test_what_is_written_is_read(tmp_path):
  lines = [{"step": 1, "kl": 0.5}, {"step": 2, "set": "math"}]
  write(tmp_path / "metrics.jsonl", lines)
  assert report.read_metrics(tmp_path / "metrics.jsonl") == lines


def test_a_missing_file_has_no_lines(tmp_path):
  assert report.read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_is_on_the_disk_before_write_returns(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = report.MetricsWriter(path, None)
  for step in range(3):
    writer.write({"step": step})
    assert path.read_text().count("\n") == step + 1


def test_resuming_cuts_what_is_past_the_checkpoint(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, [{"step": i, "kl": i / 2} for i in range(6)])
  write(path, [{"step": 4, "kl": 9}], resume_step=3)
  lines = report.read_metrics(path)
  assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
  assert lines[-1]["kl"] == 9


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, [{"step": 1}, {"step": 2, "kl": 0.25}])
  whole = path.read_text()
  for end in range(len('{"step": 1}\n'), len(whole) - 1):
    path.write_text(whole[:end])
    assert report.read_metrics(path) == [{"step": 1}]
    write(path, [{"step": 2}], resume_step=5)
    assert report.read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\n",
        b"[1]\n",
        b"{}\n",
        b'{"step": "two"}\n',
        b"\0\n",
        b"[" * 100_000 + b"\n",
        b'{"step": 2, "kl": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b'{"step": ' + b"9" * 99 + b"}\n",
        b'{"step": -2}\n',
        b'{"step": 2, "prefix_len": NaN}\n',
        b'{"step": 2, "prefix_len": 1e999}\n',
    ],
    ids=range(12),
)
def test_a_damaged_line_takes_no_other_with_it(tmp_path, damage, capsys):
  path = tmp_path / "metrics.jsonl"
  lines = [{"step": i, "prefix_len": 4} for i in (1, 2, 3)]
  write(path, lines)
  first, _, last = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first + damage + last)
  assert report.read_metrics(path) == [lines[0], lines[2]]
  write(path, [], resume_step=3)
  assert "lacks the lines of 1 of the first 3" in capsys.readouterr().err
  path.unlink()
  write(path, [], resume_step=3)
  assert "lacks the lines of 3 of the first 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.partial"])
def test_a_directory_in_its_place_is_named(tmp_path, name):
  path = tmp_path / "metrics.jsonl"
  (tmp_path / name).mkdir()
  with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
    report.MetricsWriter(path, None)


def test_a_disk_that_is_full_for_a_while_loses_no_line(
    tmp_path, monkeypatch, capsys
):
  path = tmp_path / "metrics.jsonl"
  writer = report.MetricsWriter(path, None)
  writer.write({"step": 1})
  opened = pathlib.Path.open

  class Full(io.RawIOBase):
    """A file that takes five bytes more."""

    def __init__(self, file):
      self._file = file

    def writable(self):
      return True

    def tell(self):
      return self._file.tell()

    def write(self, data):
      return self._file.write(data[:5])

    def close(self):
      self._file.close()

  def full(self, mode="r", *args, **options):
    file = opened(self, mode, *args, **options)
    return Full(file) if mode == "ab" else file

  monkeypatch.setattr(pathlib.Path, "open", full)
  for step in (2, 3):
    writer.write({"step": step})
    assert path.read_text() == '{"step": 1}\n'
  assert capsys.readouterr().err.count("cannot be written") == 1
  monkeypatch.setattr(pathlib.Path, "open", opened)
  writer.write({"step": 4})
  assert [x["step"] for x in report.read_metrics(path)] == [1, 2, 3, 4]


def test_a_new_run_starts_an_empty_file(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, [{"step": 1}])
  write(path, [])
  assert path.read_text() == ""


def test_numbers_that_json_lacks_become_null(tmp_path):
  path = tmp_path / "metrics.jsonl"
  line = {"step": 1, "kl": float("nan"), "grad_norm": float("inf"), "x": 1.5}
  write(path, [line])
  assert json.loads(path.read_text(), parse_constant=int) == {
      "step": 1,
      "kl": None,
      "grad_norm": None,
      "x": 1.5,
  }
