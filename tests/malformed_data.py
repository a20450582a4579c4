"""Makes malformed data files and tokenizer directories, and says what is right.

Each case writes into an empty directory. `test_malformed_data` runs a check on
it: a case either is refused with one sentence that has the words in `says`, or
is read, and then gives what `reads` says.

  python tests/malformed_data.py DIRECTORY    # writes all cases, to look at
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import datetime
import decimal
import json
import pathlib
import shutil
import sys
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefix_distill import assets

QUESTION, ANSWER = "How many pens?", "7"
COMPLETION = "\nWe add.\n</think>\n\n\\boxed{7}"


@dataclasses.dataclass(frozen=True)
class Case:
  """A malformed input.

  Attributes:
    name: its kind, a slash and what is special about it.
    write: writes it into a directory and returns the path to name in a config.
    says: words of the sentence that refuses it; empty if it is read.
    reads: what is read: questions of a file, or stop tokens of a tokenizer.
    fields: settings of the data set.
  """

  name: str
  write: Callable[[pathlib.Path], pathlib.Path]
  says: tuple[str, ...] = ()
  reads: Any = None
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def record(**changes: Any) -> dict[str, Any]:
  good = {"question": QUESTION, "answer": ANSWER, "completion": COMPLETION}
  return good | changes


def line(**changes: Any) -> str:
  return json.dumps(record(**changes))


def messages(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
  return [{"role": role, "content": content} for role, content in turns]


def part(text: Any) -> dict[str, Any]:
  return {"type": "text", "text": text}


def _file(name: str, content: bytes | str) -> Callable:
  def write(directory):
    path, text = directory / name, content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

  return write


def _jsonl(*rows: Any) -> Callable:
  return _file("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _parquet(column: str, values: list[Any], kind: Any = None) -> Callable:
  def write(directory):
    rows = [record() for _ in values]
    table = pa.Table.from_pylist(rows)
    at = table.column_names.index(column)
    table = table.set_column(at, column, pa.array(values, kind))
    pq.write_table(table, directory / "a.parquet")
    return directory / "a.parquet"

  return write


_DEEP = 100_000
_LINE = line()

# What a file is, and what is said about it.
_REFUSED_FILES = {
    "empty": ("a.jsonl", b"", "has no records"),
    "blank lines": ("a.jsonl", b"\n \n\r\n", "has no records"),
    "a mark alone": ("a.jsonl", b"\xef\xbb\xbf", "has no records"),
    "a list of none": ("a.json", b"[]", "has no records"),
    "an object of none": ("a.jsonl", b"{}\n", "line 1 has no field"),
    "cut": ("a.jsonl", (_LINE + "\n" + _LINE[:-9]).encode(), "line 2 is not"),
    "two on a line": ("a.jsonl", (_LINE + _LINE).encode(), "line 1 is not"),
    "no braces": ("a.jsonl", b"question: How many?\n", "line 1 is not JSON"),
    "single quotes": ("a.jsonl", str(record()).encode(), "line 1 is not JSON"),
    "a list in lines": ("a.jsonl", f"[{_LINE}]".encode(), "not a JSON object"),
    "a text": ("a.jsonl", b'"How many?"\n', "line 1 is not a JSON object"),
    "a number": ("a.jsonl", b"7\n", "line 1 is not a JSON object"),
    "null": ("a.jsonl", b"null\n", "line 1 is not a JSON object"),
    "UTF-16": ("a.jsonl", _LINE.encode("utf-16"), "cannot be read as jsonl"),
    "Latin-1": ("a.jsonl", '{"question": "é"}'.encode("latin-1"), "cannot be"),
    "zeros": ("a.jsonl", b"\0" * 99, "line 1 is not JSON"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\0\0\0\0\0", "cannot be read as jsonl"),
    "brackets": (
        "a.jsonl",
        b"[" * _DEEP + b"]" * _DEEP,
        "line 1 is not JSON (it has brackets",
    ),
    "deep fields": (
        "a.jsonl",
        b'{"question": ' + b'{"a": ' * _DEEP + b"1" + b"}" * _DEEP + b"}",
        "line 1 is not JSON (it has brackets",
    ),
    "digits": ("a.jsonl", b'{"n": ' + b"9" * 9999 + b"}", "line 1 is"),
    "a bare object": (
        "a.json",
        json.dumps(record(), indent=1).encode(),
        "line 1 is not",
    ),
    "a list of texts": ("a.json", b'["How many?"]', "record 1 is not a JSON"),
    "a list, cut": ("a.json", f"[{_LINE},".encode(), "is not JSON"),
    "a list with one less": (
        "a.json",
        f'[{_LINE}, {{"q": 1}}]'.encode(),
        "record 2 has no field",
    ),
    "brackets in .json": ("a.json", b"[" * _DEEP, "has brackets in brackets"),
    "no parquet": ("a.parquet", b"PAR1PAR1", "cannot be read as parquet"),
    "text as parquet": ("a.parquet", _LINE.encode(), "cannot be read as parq"),
    "an empty parquet": ("a.parquet", b"", "cannot be read as parquet"),
    "csv": ("a.csv", b"question\nHow many?\n", "of a kind that is not read"),
    "text": ("a.txt", b"How many?\n", "of a kind that is not read"),
    "compressed": ("a.jsonl.gz", b"\x1f\x8b", "of a kind that is not read"),
    "UTF-16 without a mark": (
        "a.jsonl",
        _LINE.encode("utf-16-le"),
        "line 1 is not JSON",
    ),
    "UTF-32": ("a.jsonl", _LINE.encode("utf-32"), "cannot be read as jsonl"),
    "surrogates as bytes": (
        "a.jsonl",
        b'{"question": "\xed\xa0\xbd"}',
        "cannot be read as jsonl",
    ),
    "a mark in line 2": (
        "a.jsonl",
        f"{_LINE}\n\ufeff{_LINE}".encode(),
        "line 2 is not JSON",
    ),
    "a comma behind": ("a.jsonl", f"{_LINE},\n".encode(), "line 1 is not JSON"),
    "an end of DOS": (
        "a.jsonl",
        f"{_LINE}\n\x1a".encode(),
        "line 2 is not JSON",
    ),
    "a control character": (
        "a.jsonl",
        b'{"question": "a\x01b"}',
        "line 1 is not JSON",
    ),
    "150 brackets": (
        "a.jsonl",
        f'{_LINE[:-1]}, "n": {"[" * 150}{"]" * 150}}}'.encode(),
        "line 1 is not JSON (it has brackets",
    ),
    "records within": (
        "a.json",
        json.dumps({"data": [record()]}).encode(),
        "line 1 has no field 'question'; it has data",
    ),
    "a list of lists": (
        "a.json",
        f"[[{_LINE}]]".encode(),
        "record 1 is not a JSON object",
    ),
    "a list of null": ("a.json", b"[null]", "record 1 is not a JSON object"),
    "two lists": ("a.json", f"[{_LINE}][{_LINE}]".encode(), "is not JSON"),
    "a list in UTF-16": (
        "a.json",
        f"[{_LINE}]".encode("utf-16"),
        "cannot be read as json",
    ),
    "an empty .json": ("a.json", b"", "has no records"),
    "a number in .json": ("a.json", b"7", "line 1 is not a JSON object"),
    "no suffix": ("prompts", _LINE.encode(), "of a kind that is not read"),
}

_READ_FILES = {
    "a mark": ("a.jsonl", b"\xef\xbb\xbf" + _LINE.encode()),
    "CRLF": ("a.jsonl", (_LINE + "\r\n").encode()),
    "CR": ("a.jsonl", (_LINE + "\r").encode()),
    "a mark and CRLF": ("a.jsonl", b"\xef\xbb\xbf" + _LINE.encode() + b"\r\n"),
    "blank lines between": ("a.jsonl", f"\n\n  {_LINE}\n\n".encode()),
    "a list": ("a.json", f"[{_LINE}]".encode()),
    "a list over lines": ("a.json", json.dumps([record()], indent=2).encode()),
    "a list with a mark": ("a.json", f"\ufeff[{_LINE}]".encode()),
    "lines in .json": ("a.json", f"{_LINE}\n".encode()),
    "capitals": ("A.JSONL", _LINE.encode()),
    "a line break of Unicode": (
        "a.jsonl",
        json.dumps(record(note="\u2028\x85"), ensure_ascii=False).encode(),
    ),
    "the same field twice": (
        "a.jsonl",
        ('{"question": "Old?", ' + _LINE[1:]).encode(),
    ),
    "a list with a mark and CRLF": (
        "a.json",
        f"\ufeff\r\n[{_LINE}]\r\n".encode(),
    ),
    "a zero character": ("a.jsonl", line(note="\0").encode()),
    "a large number": ("a.jsonl", f'{_LINE[:-1]}, "n": 1e999}}'.encode()),
    "two halves of a character": (
        "a.jsonl",
        line(note="\ud83d\ude00").encode(),
    ),
    "no numbers": ("a.jsonl", (_LINE[:-1] + ', "n": NaN}').encode()),
}

# What is no text, wherever text is wanted.
_NO_TEXT = {
    "a list of texts": [QUESTION],
    "an empty list": [],
    "a dictionary": {"text": QUESTION},
    "an empty dictionary": {},
    "a float": 7.5,
    "true": True,
    "null": None,
    "a list of lists": [[QUESTION]],
    "a list of numbers": [7, 8],
    "infinity": float("inf"),
    "turns of another form": [{"from": "human", "value": QUESTION}],
    "messages without content": [{"role": "user"}],
    "content that is null": messages(("user", None)),
    "content that is a number": messages(("user", 7)),
    "content of no parts": messages(("user", [])),
    "content of bare texts": messages(("user", [QUESTION])),
    "an image": messages(("user", [{"type": "image", "url": "a.png"}])),
    "a part of a number": messages(("user", [part(7)])),
    "a role of its own": messages(("human", QUESTION)),
    "a role that is null": messages((None, QUESTION)),
    "a tool": messages(("tool", QUESTION)),
    "the assistant last": messages(("user", QUESTION), ("assistant", ANSWER)),
    "the system last": messages(("user", QUESTION), ("system", "Be brief.")),
    "the system alone": messages(("system", "Be brief.")),
    "the system twice": messages(
        ("system", "a"), ("system", "b"), ("user", QUESTION)
    ),
    "the system late": messages(
        ("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")
    ),
    "a call of a tool": [
        *messages(("user", "a")),
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]},
        *messages(("user", QUESTION)),
    ],
    "a text among messages": [*messages(("user", QUESTION)), "text"],
    "a message without a role": [
        *messages(("user", QUESTION)),
        {"content": QUESTION},
    ],
    "a role in capitals": messages(("User", QUESTION)),
    "a developer": messages(("developer", "Be brief."), ("user", QUESTION)),
    "a function": messages(("function", "7"), ("user", QUESTION)),
    "content that is a dictionary": messages(("user", part(QUESTION))),
    "a part without text": messages(("user", [{"type": "text"}])),
    "an image beside text": messages(
        ("user", [part(QUESTION), {"type": "image_url"}])
    ),
    "images beside the content": [
        {"role": "user", "content": QUESTION, "images": ["a.png"]}
    ],
    "thoughts beside the content": [
        {"role": "assistant", "content": ANSWER, "reasoning_content": "We add."}
    ],
    "a dictionary of a message": {"role": "user", "content": QUESTION},
}

_READ_QUESTIONS = {
    "the assistant first": messages(("assistant", "Hi."), ("user", QUESTION)),
    "an empty system prompt": messages(("system", ""), ("user", QUESTION)),
    "no thoughts and no images": [
        {"role": "user", "content": QUESTION, "thinking": None, "images": []}
    ],
    "a message": messages(("user", QUESTION)),
    "a part": messages(("user", [part(QUESTION)])),
    "two parts": messages(("user", [part("How many "), part("pens?")])),
    "a system prompt": messages(("system", "Be brief."), ("user", QUESTION)),
    "turns": messages(
        ("user", "Hello."), ("assistant", "Hi."), ("user", QUESTION)
    ),
    "more fields": [
        {"role": "user", "content": QUESTION, "name": "Ann", "tool_calls": None}
    ],
}


def _files() -> Iterator[Case]:
  for name, (file, content, says) in _REFUSED_FILES.items():
    yield Case(f"file/{name}", _file(file, content), (file, says))
  for name, (file, content) in _READ_FILES.items():
    yield Case(f"file/{name}", _file(file, content), reads=[QUESTION])
  yield Case("file/none", lambda d: d / "a.jsonl", ("a.jsonl", "not exist"))
  yield Case("file/none, .json", lambda d: d / "a.json", ("does not exist",))

  def folder(directory):
    (directory / "empty").mkdir()
    return directory / "empty"

  yield Case("file/an empty folder", folder, ("cannot be loaded",))


def _fields() -> Iterator[Case]:
  for name, value in _NO_TEXT.items():
    for field in ("question", "completion", "answer"):
      yield Case(
          f"{field}/{name}",
          _jsonl(record(), record(**{field: value})),
          ("line 2", field),
      )
  yield Case("question/a number", _jsonl(record(question=7)), ("7 (int)",))
  yield Case("completion/a number", _jsonl(record(completion=7)), ("7 (int)",))
  for name, value in _READ_QUESTIONS.items():
    yield Case(
        f"question/{name}", _jsonl(record(question=value)), reads=[QUESTION]
    )
  yield Case(
      "completion/a message",
      _jsonl(record(completion=messages(("assistant", COMPLETION)))),
      reads=[QUESTION],
  )
  yield Case("answer/a number", _jsonl(record(answer=7)), reads=[QUESTION])
  for name, value in (
      ("blank", " \n"),
      ("half a character", "\ud800"),
      ("of no width", "\u200b\ufeff"),
      ("two halves, swapped", "7\ude00\ud83d"),
      ("of wide spaces", "\u3000\u00a0"),
  ):
    yield Case(
        f"answer/{name}",
        _jsonl(record(), record(answer=value)),
        ("record 2", "'answer'"),
    )
    yield Case(
        f"question/{name}",
        _jsonl(record(), record(question=value)),
        ("record 2", "repair it"),
    )
  yield Case(
      "question/blank, all",
      _jsonl(record(question=" ")),
      ("none can be used", "empty"),
  )
  for name, text in (("a stop alone", "<|im_end|>"), ("a tag", "<think>")):
    yield Case(
        f"completion/{name}",
        _jsonl(record(completion=text)),
        ("none can be used", "empty"),
    )
  for name, text in (("the system", "\udc00"), ("a turn before", "a\ud801")):
    role = "system" if name == "the system" else "assistant"
    turns = [{"role": role, "content": text}, *messages(("user", QUESTION))]
    yield Case(
        f"question/half a character of {name}",
        _jsonl(record(question=turns)),
        ("none can be used", "surrogate"),
    )
  yield Case(
      "completion/blank, all",
      _jsonl(record(completion=" ")),
      ("none can be used", "empty"),
  )
  yield Case(
      "question/long, all",
      _jsonl(record(question="How many? " * 99)),
      ("data.max_prompt_len is", "longer"),
  )


def _columns() -> Iterator[Case]:
  day = datetime.date(2026, 1, 1)
  for name, value, kind in (
      ("bytes", QUESTION.encode(), None),
      ("a date", day, None),
      ("a moment", datetime.datetime(2026, 1, 1), None),
      ("a duration", datetime.timedelta(1), None),
      ("a struct", {"value": QUESTION}, None),
      ("a decimal", decimal.Decimal("7.50"), None),
      ("a float", 7.5, None),
      ("a boolean", True, None),
      ("texts", [QUESTION], None),
      ("a map", [("a", QUESTION)], pa.map_(pa.string(), pa.string())),
      ("an image", {"bytes": b"\x89PNG", "path": "a.png"}, None),
  ):
    for column in ("question", "answer"):
      yield Case(
          f"parquet/{column} of {name}",
          _parquet(column, [value, value], kind),
          ("a.parquet record 1", column),
      )
  yield Case(
      "parquet/a null",
      _parquet("question", [QUESTION, None]),
      ("a.parquet record 2", "nothing"),
  )
  yield Case(
      "parquet/messages",
      _parquet("question", [_READ_QUESTIONS["turns"]]),
      reads=[QUESTION],
  )
  yield Case(
      "parquet/long text",
      _parquet("question", [QUESTION], pa.large_string()),
      reads=[QUESTION],
  )
  yield Case(
      "parquet/a dictionary of texts",
      _parquet(
          "question",
          pa.array([QUESTION]).dictionary_encode().to_pylist(),
          pa.dictionary(pa.int8(), pa.string()),
      ),
      reads=[QUESTION],
  )


def _choices() -> Iterator[Case]:
  fields = {"choices": ("options",)}
  for name, value in (
      ("one", ["a"]),
      ("none", []),
      ("numbers", [1, 2]),
      ("a text", "a, b"),
      ("too many", ["a"] * 27),
      ("with null", ["a", None]),
      ("a blank one", ["a", " "]),
      ("half a character", ["a", "\udfff"]),
  ):
    yield Case(
        f"choices/{name}",
        _jsonl(record(options=value, answer="A")),
        ("record 1", "options"),
        fields=fields,
    )
  for name, value in (("a number", 2), ("of none", "C"), ("a word", "first")):
    yield Case(
        f"choices/the letter is {name}",
        _jsonl(record(options=["a", "b"], answer=value)),
        ("record 1", "answer", "letters"),
        fields=fields,
    )
  fields = {"choices": ("answer", "other")}
  for name, value in (("a number", 7), ("a list", ["7"]), ("null", None)):
    yield Case(
        f"choices/an option is {name}",
        _jsonl(record(other=value)),
        ("line 1", "other"),
        fields=fields,
    )


def _tokenizer(
    edit: Callable[[pathlib.Path], None], name: str = "teacher"
) -> Callable[[pathlib.Path], pathlib.Path]:
  def write(directory):
    target = directory / "model"
    shutil.copytree(assets.path(name), target)
    edit(target)
    return target

  return write


def _put(name: str, content: str | bytes | None) -> Callable:
  def edit(directory):
    if content is None:
      (directory / name).unlink()
    elif isinstance(content, bytes):
      (directory / name).write_bytes(content)
    else:
      (directory / name).write_text(content)

  return edit


def _set(name: str, **changes: Any) -> Callable:
  def edit(directory):
    settings = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(settings | changes))

  return edit


def _both(*edits: Callable) -> Callable:
  def edit(directory):
    for one in edits:
      one(directory)

  return edit


_TEMPLATE = (assets.path("teacher") / "chat_template.jinja").read_text()
_STOPS, _GENERATION = (468,), "generation_config.json"

_TEMPLATES = {
    "that raises": ("{{ raise_exception('No.') }}", "fails on messages"),
    "that does not parse": ("{% for m in messages %}", "fails on messages"),
    "with a stray brace": ("{{ messages[0", "fails on messages"),
    "with an unknown filter": ("{{ messages | nothing }}", "fails on messages"),
    "that divides by zero": ("{{ 1 / 0 }}", "fails on messages"),
    "that is empty": ("", "no chat template"),
    "that is constant": ("<|im_start|>user\n", "leaves the question out"),
    "without the question": (
        _TEMPLATE.replace("message.content", "''"),
        "leaves the question out",
    ),
    "with a cut question": (
        _TEMPLATE.replace("message.content", "message.content[:4]"),
        "leaves the question out",
    ),
    "without an end": (
        _TEMPLATE.replace("add_generation_prompt", "false"),
        "does not open the assistant's turn",
    ),
    "for the first message": (
        "{{ messages[3].content }}",
        "fails on messages",
    ),
    "that asks for too much": (
        "{% for i in range(10**9) %}a{% endfor %}",
        "fails on messages",
    ),
    "that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "fails on messages",
    ),
    "in capitals": (
        _TEMPLATE.replace("message.content", "message.content|upper"),
        "leaves the question out",
    ),
    "turned round": (
        _TEMPLATE.replace("message.content", "message.content|reverse"),
        "leaves the question out",
    ),
    "that ends the assistant's turn": (
        _TEMPLATE.replace("assistant\\n' }}", "assistant\\n<|im_end|>' }}"),
        "ends it at once",
    ),
    "that reaches out": (
        "{{ ().__class__.__base__.__subclasses__() }}",
        "fails on messages",
    ),
}


def _tokenizers() -> Iterator[Case]:
  for name, (text, says) in _TEMPLATES.items():
    yield Case(
        f"tokenizer/a template {name}",
        _tokenizer(_put("chat_template.jinja", text)),
        ("model", says),
    )
  listed = [{"name": "tool_use", "template": _TEMPLATE}]
  drop = _put("chat_template.jinja", None)
  setting = "tokenizer_config.json"
  yield Case(
      "tokenizer/templates without a default",
      _tokenizer(_both(drop, _set(setting, chat_template=listed))),
      ("tool_use", "none is called default"),
  )
  listed = [*listed, {"name": "default", "template": _TEMPLATE}]
  yield Case(
      "tokenizer/templates with a default",
      _tokenizer(_both(drop, _set(setting, chat_template=listed))),
      reads=_STOPS,
  )
  yield Case("tokenizer/no template", _tokenizer(drop), ("no chat template",))
  for file, says in (
      ("tokenizer.json", "tokenizer.json"),
      ("tokenizer_config.json", "tokenizer_config.json"),
      ("config.json", "config.json cannot be read"),
      (_GENERATION, "generation_config.json cannot be read"),
  ):
    for name, content in (
        ("cut", '{"model": '),
        ("empty", ""),
        ("binary", b"\xff\xfe\0\1"),
        ("nested", "[" * _DEEP),
    ):
      yield Case(
          f"tokenizer/{file} {name}", _tokenizer(_put(file, content)), (says,)
      )
  for name, listed in (
      ("texts", ["a"]),
      ("no names", [{"template": _TEMPLATE}]),
      ("no templates", [{"name": "default"}]),
  ):
    yield Case(
        f"tokenizer/templates of {name}",
        _tokenizer(_both(drop, _set(setting, chat_template=listed))),
        (setting, "without a name or a template"),
    )
  for name, listed in (
      ("a number", 7),
      ("none", []),
      ("a mapping", {"rag": _TEMPLATE}),
  ):
    yield Case(
        f"tokenizer/a template that is {name}",
        _tokenizer(_both(drop, _set(setting, chat_template=listed))),
        ("model", "template"),
    )
  yield Case(
      "tokenizer/a template of Latin-1",
      _tokenizer(_put("chat_template.jinja", b"\xe9")),
      ("chat_template.jinja is not UTF-8",),
  )
  yield Case(
      "tokenizer/an end that is no token",
      _tokenizer(_set(setting, eos_token="<|nope|>")),
      ("eos_token '<|nope|>'", "tokenizer.json does not have"),
  )
  for name, text in (
      ("a number", "468"),
      ("null", "null"),
      ("in UTF-16", "\ufeff{}"),
      ("a text", '"468"'),
  ):
    encoding = "utf-16" if "UTF" in name else "utf-8"
    yield Case(
        f"tokenizer/a generation config that is {name}",
        _tokenizer(_put(_GENERATION, text.encode(encoding))),
        (_GENERATION,),
    )
  yield Case(
      "tokenizer/a generation config that is a list",
      _tokenizer(_put(_GENERATION, "[468]")),
      ("not a JSON object",),
  )
  for name, value in (
      ("a text", "468"),
      ("texts", ["<|im_end|>"]),
      ("a float", 468.0),
      ("true", True),
      ("a list in a list", [[468]]),
      ("a dictionary", {"id": 468}),
      ("negative", -1),
      ("no number", float("nan")),
      ("a list of dictionaries", [{"id": 468}]),
      ("of many digits", 10**30),
      ("a padded row", 471),
      ("beyond all rows", [468, 10**9]),
  ):
    yield Case(
        f"tokenizer/a stop token that is {name}",
        _tokenizer(_set(_GENERATION, eos_token_id=value)),
        (_GENERATION, "eos_token_id"),
    )
    yield Case(
        f"tokenizer/config.json's stop token is {name}",
        _tokenizer(
            _both(
                _put(_GENERATION, None), _set("config.json", eos_token_id=value)
            )
        ),
        ("config.json", "eos_token_id"),
    )
  mark = "\ufeff" + json.dumps({"eos_token_id": [466, 468]})
  yield Case(
      "tokenizer/a generation config with a mark",
      _tokenizer(_put(_GENERATION, mark)),
      (_GENERATION, "byte order mark"),
  )
  yield Case(
      "tokenizer/stop tokens listed in config.json",
      _tokenizer(
          _both(
              _put(_GENERATION, None),
              _set("config.json", eos_token_id=[466, 468]),
          )
      ),
      reads=(466, 468),
  )
  yield Case(
      "tokenizer/a generation config without stop tokens",
      _tokenizer(_put(_GENERATION, "{}")),
      reads=_STOPS,
  )
  for file in ("tokenizer.json", setting):
    yield Case(
        f"tokenizer/{file} a list",
        _tokenizer(_put(file, "[]")),
        (f"{file} is no JSON object",),
    )
  yield Case(
      "tokenizer/no tokenizer.json",
      _tokenizer(_put("tokenizer.json", None)),
      ("model", "tokenizer"),
  )
  yield Case(
      "tokenizer/a vocabulary of nothing",
      _tokenizer(
          _set(
              "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}
          )
      ),
      ("model", "tokenizer"),
  )
  start = "{{- '<|endoftext|><|endoftext|>' }}" + _TEMPLATE
  yield Case(
      "tokenizer/two beginnings",
      _tokenizer(
          _both(
              _put("chat_template.jinja", start),
              _set(setting, bos_token="<|endoftext|>"),
          )
      ),
      ("begins with '<|endoftext|>' twice",),
  )


def cases() -> list[Case]:
  return [*_files(), *_fields(), *_columns(), *_choices(), *_tokenizers()]


def main() -> None:
  root = pathlib.Path(sys.argv[1])
  for number, case in enumerate(cases()):
    directory = root / f"{number:03}"
    directory.mkdir(parents=True)
    print(case.write(directory), case.name, case.says or case.reads, sep="\t")


if __name__ == "__main__":
  main()
