"""JSON that is damaged has a reason, whatever Python's parser does with it."""

import json

import pytest

from prefix_distill.errors import JsonError
from prefix_distill.errors import parse_json
from prefix_distill.errors import read_json

_DAMAGED = {
    b"": "Expecting value",
    b'{"a": ': "Expecting value",
    b"\xff\xfe{}": "not UTF-8",
    b"\xef\xbb\xbf{}": "BOM",
    b"[" * 100_000: "brackets",
    b"[" * 500 + b"]" * 500: "brackets",
    b'{"a":' * 101 + b"1" + b"}" * 101: "brackets",
    b"9" * 5000: "digits",
    b"-" + b"9" * 400: "digits",
    b"1e999": "too large",
    b"[NaN]": "NaN",
    b"[-Infinity]": "-Infinity",
}


@pytest.mark.parametrize(("text", "said"), _DAMAGED.items(), ids=range(12))
def test_what_is_no_json_has_a_reason(text, said, tmp_path):
  with pytest.raises(JsonError, match=said) as caught:
    parse_json(text)
  assert len(str(caught.value)) < 100 and "\n" not in str(caught.value)
  (tmp_path / "file").write_bytes(text)
  with pytest.raises(JsonError, match=said):
    read_json(tmp_path / "file")


def test_what_is_no_file_has_a_reason(tmp_path):
  with pytest.raises(JsonError, match="Is a directory"):
    read_json(tmp_path)
  with pytest.raises(JsonError, match="No such file"):
    read_json(tmp_path / "none")


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, None, True, "\u00e9"]}, [], 10**299, 1.7e308, ""]
)
def test_what_is_json_is_read(value):
  assert parse_json(json.dumps(value)) == value
  assert parse_json(json.dumps(value).encode()) == value


def test_others_records_may_have_any_number():
  text = f"[1e999, -Infinity, {'9' * 400}]"
  found = parse_json(text, finite=False)
  assert found == [float("inf"), -float("inf"), 10**400 - 1]
  with pytest.raises(JsonError, match="digits"):
    parse_json("9" * 5000, finite=False)
