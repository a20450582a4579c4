import base64
import functools
import hashlib
import html
import html.parser
import io
import json
import re

import numpy as np
import pages
from pages import evaluation
from pages import EVIL
from pages import RUN
from pages import update
from pages import write
import pytest
import rich.console

from prefix_distill.report import plots
from prefix_distill.report import report


class _Reader(html.parser.HTMLParser):
  """Reads the rows of tables, all addresses, and what scripts hold."""

  def __init__(self, text: str):
    super().__init__()
    self.rows, self.addresses, self.scripts, self._open = [], [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self._open = tag
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    if tag == "script":
      self.scripts.append("")
    self.addresses += [v for k, v in attrs if k in ("src", "href")]

  def handle_data(self, data):
    if self._open in ("td", "th"):
      self.rows[-1][-1] += data
    if self._open == "script":
      self.scripts[-1] += data

  def handle_endtag(self, tag):
    self._open = ""


def test_what_was_spent_is_told_by_both_accountings():
  text = report.spent([update(1), update(2, flops_paper=5e9)])
  assert text.startswith("2e+09 FLOPs in 2 updates")
  # A process counts the programs that it compiled, and a run may have several.
  assert "s, 200 tokens, 3 compilations since the last start), 5e+09" in text
  assert "5e+09 by the paper's formula; full" in text
  # A run of before that was counted.
  assert "formula" not in report.spent(RUN)


def test_the_reasons_of_what_was_dropped_are_told(tmp_path):
  text = write([update(1, dropped=0)], tmp_path)
  assert "Dropped" not in text
  some = {"dropped": 1, "dropped_long": 1}
  more = {"dropped": 5, "dropped_empty": 2, "dropped_long": 3}
  text = write([update(1, **some), update(2, **more)], tmp_path)
  assert "Dropped 5 training records (2 empty, 3 long)." in text


def test_one_is_not_many(tmp_path, monkeypatch):
  line = update(1, dropped=1, dropped_long=1, skipped=1, tokens=1)
  text = write([line], tmp_path)
  for part in (
      "1e+09 FLOPs in 1 update (",
      "1 token,",
      "Dropped 1 training record (1 long).",
      "skipped 1 update because",
      "1 of 1 update, in numbers",
  ):
    assert part in text
  axes = drawn(monkeypatch, [line], tmp_path, plots.kl_against_position)
  assert [*curves(axes[0])] == ["update 1"]
  lines = [update(step) for step in range(1, 9)]
  axes = drawn(monkeypatch, lines, tmp_path, plots.kl_against_position)
  assert "updates 1-2" in curves(axes[0])


def test_a_set_that_chose_the_checkpoint_is_no_held_out_score(tmp_path):
  lines = [
      *RUN,
      update(3),
      update(4),
      evaluation(4, accuracy=0.75),
      update(5),
      evaluation(6, accuracy=0.7),
      evaluation(6, mode="greedy", accuracy=0.9),
      evaluation(6, set="other", accuracy=0.99),
  ]
  text = write(lines, tmp_path, best="heldout")
  assert "heldout chose update 4 of 3 that were evaluated: 75.0%" in text
  assert "no held-out score" in text and "--step=best" in text
  assert "heldout chose" not in write(lines, tmp_path)
  # The first evaluation is of no checkpoint.
  assert "heldout chose" not in write(RUN[:2], tmp_path, best="heldout")


def test_the_table_holds_accuracy_and_how_answers_end(tmp_path):
  rows = _Reader(write(RUN, tmp_path)).rows
  assert rows[:4] == [
      [
          "",
          "sampled (95 %)",
          "greedy (95 %)",
          "finish",
          "right if finished",
          "tokens (p95)",
          "repeats",
      ],
      *(
          [
              name,
              "50.0 % (40.0-60.0)",
              "50.0 % (40.0-60.0)",
              "100.0%",
              "50.0%",
              "120 (231)",
              "12.5%",
          ]
          for name in ("teacher", "student before", "student after")
      ),
  ]
  # And the updates, with what they have.
  assert rows[4:] == [
      ["update", "KL", "cap", "mean tokens", "finished", "FLOPs"],
      ["1", "1", "4", "3.5", "25.0%", "1e+09"],
      ["2", "0.5", "8", "7.0", "25.0%", "2e+09"],
  ]


def test_what_was_not_measured_is_a_dash(tmp_path):
  rows = _Reader(write([evaluation(0, finish=0.0)], tmp_path)).rows
  row = next(x for x in rows if x[0] == "student before")
  _, sampled, greedy, finish, right, *_ = row
  assert (sampled, finish) == ("0.0 % (0.0-0.0)", "0.0%")
  assert greedy == right == "-"


def test_many_updates_are_a_few_rows_with_both_ends(tmp_path):
  text = write([update(step) for step in range(1, 201)], tmp_path)
  rows = [x for x in _Reader(text).rows if x[0].isdigit()]
  assert len(rows) == 50
  assert (rows[0][0], rows[-1][0]) == ("1", "200")
  assert "50 of 200 updates" in text


def test_the_page_says_what_the_run_was(tmp_path):
  text = write(RUN, tmp_path / "my & run")
  for part in (
      "<h1>my &amp; run</h1>",
      "bundled:teacher",
      "exact reverse KL",
      "3 of 8 prompts x 2 rollouts",
      "math_task",
      "fixed",
  ):
    assert part in text
  assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", text)
  for name in ("accuracy_flops", "termination", "kl_step", "kl_position"):
    assert html.escape(plots.CAPTIONS[f"{name}.svg"]) in text.replace(
        "&#39;", "&#x27;"
    )


def test_the_page_needs_no_network(tmp_path):
  read = _Reader(write(RUN, tmp_path, pages.ROLLOUTS, pages.ANSWERS))
  assert len(read.addresses) >= 5
  assert all(x.startswith(("data:", "#")) for x in read.addresses)


def test_texts_come_into_the_page_as_they_are_and_only_as_data(tmp_path):
  text = write(RUN, tmp_path, pages.ROLLOUTS, pages.ANSWERS)
  assert EVIL not in text and "<b>" not in text
  samples, script = _Reader(text).scripts
  found = json.loads(samples)
  assert found["answers"] == pages.ANSWERS
  assert [x | {"ids": [5, 6, 7, 8, 9]} for x in found["rollouts"]] == (
      pages.ROLLOUTS
  )
  # The policy allows this script and no other.
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"script-src 'sha256-{digest}'" in html.unescape(text)
  assert "innerHTML" not in script


@pytest.mark.parametrize("more", [{}, {"answer_kl": 1234.5}])
def test_the_widest_table_fits_a_terminal(more, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  widest = {
      "accuracy": 1.0,
      "accuracy_low": 0.9921,
      "accuracy_high": 1.0,
      "accuracy_finished": 1.0,
      "mean_length": 12_345.6,
      "length_p95": 16_384,
      "repetition": 1.0,
      **more,
  }
  write([line | widest if "mode" in line else line for line in RUN], tmp_path)
  printed = capsys.readouterr().out
  assert max(len(line) for line in printed.splitlines()[:-1]) <= 80
  # Nothing was cut or broken.
  for cell in (
      "repeats",
      "12346",
      "(16384)",
      "(99.2-100.0)",
      "100.0%",
      "student",
  ):
    assert cell in printed
  assert "…" not in printed


def test_answers_that_end_less_often_are_warned_of(tmp_path, capsys):
  lines = [
      *RUN[:4],
      evaluation(2, finish=0.827),
      evaluation(2, finish=0.5, mode="greedy"),
  ]
  text = html.unescape(write(lines, tmp_path))
  printed = " ".join(capsys.readouterr().out.split())
  for where in (text, printed):
    assert where.count("Warning") == 1
    assert "82.7% sampled, 100.0% before" in where
    assert "50.0% greedy, 100.0% before" in where
    assert "loss.merge_stop_tokens" in where and "how answers end" in where
  assert text.index("Warning") < text.index("<table")


@pytest.mark.parametrize("mode", ["sampled", "greedy"])
@pytest.mark.parametrize(
    "first, last, warned", [(1.0, 0.94, True), (1.0, 0.96, False),
                            (0.6, 0.5, True), (0.5, 0.9, False)],
)
def test_more_than_five_points_fewer_are_warned_of(mode, first, last, warned):
  between = [evaluation(1, finish=0.3, mode=mode)]
  ends = [evaluation(0, first, mode=mode), evaluation(2, last, mode=mode)]
  lines = [ends[0], *between, ends[1]]
  others = [
      evaluation(2, finish=0.1, mode=mode, model="teacher"),
      evaluation(0, finish=1.0, mode=mode, set="other"),
      evaluation(2, finish=1.0, mode=mode, set="other"),
  ]
  text = report.warning([*lines, *others], "heldout")
  assert (mode in text) is warned
  assert bool(text) is warned
  assert not report.warning([*lines, *others], "other")


def test_a_run_that_was_evaluated_once_has_no_warning():
  assert not report.warning([evaluation(0, finish=0.2)], "heldout")
  assert not report.warning([], "heldout")


def test_the_closing_table_tells_how_far_answers_are_if_it_was_measured():
  lines = [evaluation(0), evaluation(3), evaluation(3, model="teacher")]
  plain, rows = report.closing_table(lines, "heldout")
  assert "nats" not in " ".join(plain)
  assert {len(row) for row in rows} == {len(plain)}
  lines[0]["answer_kl"], lines[1]["answer_kl"] = 62.33, 4.527
  header, rows = report.closing_table(lines, "heldout")
  assert header == (*plain, "nats to\nteacher")
  assert [row[-1] for row in rows] == ["", "62.3", "4.53"]


def test_nats_that_are_not_finite_lose_no_evaluation(tmp_path):
  """The line can be read, and says that they are unknown."""
  nats = report.divergence([np.ones(20), np.array([1.0, np.nan])])
  assert nats["answer_kls"] == [20, None] and nats["answer_kl"] is None
  assert nats["answer_kl_positions"] == [None, 2.0]
  writer = report.MetricsWriter(tmp_path / "metrics.jsonl", None)
  writer.write(evaluation(0) | SCORED)
  writer.write(evaluation(3) | nats)
  lines = report.read_metrics(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines] == [0, 3]
  assert [x[-1] for x in report.closing_table(lines, "heldout")[1]] == [
      "9.5",
      "-",
  ]
  assert report.evaluation_line("student", 3, lines[1]).count(", - nats") == 1
  drawn = plots.draw(lines, tmp_path, "prefix")
  assert "answers_kl.svg" in drawn


def test_a_loss_that_json_lacks_leaves_a_gap(monkeypatch, tmp_path):
  lines = [update(1), update(2, kl=None), update(3)]
  picture = functools.partial(
      plots.loss_against_step, name="kl", title="Reverse KL"
  )
  axes, _ = drawn(monkeypatch, lines, tmp_path, picture)
  assert np.isnan(curves(axes)["Reverse KL"]).tolist() == [False, True, False]


def test_an_evaluation_is_one_short_line():
  line = report.evaluation_line("student", 1000, evaluation(1000))
  assert "\n" not in line and len(line) <= 100


AGREEMENT = {
    "entropy_student": 0.5,
    "entropy_teacher": 0.25,
    "top1_agreement": 0.9,
    "kl_special": 2.0,
}
ALWAYS = {"accuracy_flops.svg", "termination.svg"}
KL = {"kl_step.svg", "kl_position.svg"}
SCORED = {"answer_kl": 9.5, "answer_kls": [9, 10], "answer_kl_positions": [9.5]}


@pytest.mark.parametrize(
    "lines, pictures",
    [
        ([], set()),
        (RUN, ALWAYS | KL),
        ([x for x in RUN if "mode" in x], ALWAYS),
        ([x | SCORED if "mode" in x else x for x in RUN],
         ALWAYS | KL | {"answers_kl.svg"}),
        ([x for x in RUN if "kl" in x], KL | {"termination.svg"}),
        ([update(1, **AGREEMENT), *RUN], ALWAYS | KL | {"agreement.svg"}),
        ([{"step": 1, "rollout_len": 3.0, "cross_entropy": 0.5}],
         {"loss_step.svg"}),
        *(([{"step": 1, name: value}], {"agreement.svg"})
          for name, value in AGREEMENT.items() if name != "entropy_teacher"),
    ],
)
def test_pictures_are_drawn_of_what_was_measured(
    lines, pictures, tmp_path, capsys
):
  names = plots.draw(lines, tmp_path, "prefix")
  assert set(names) == pictures
  assert "could not be drawn" not in capsys.readouterr().out
  assert {x.name for x in tmp_path.iterdir()} == pictures


def drawn(monkeypatch, lines, path, picture):
  """Returns the axes of a picture, which are otherwise closed."""
  kept = []
  monkeypatch.setattr(plots, "_save", lambda figure, _: kept.append(figure))
  picture(lines, path)
  return kept[0].axes


def curves(axes) -> dict[str, list[float]]:
  return {x.get_label(): list(x.get_ydata()) for x in axes.get_lines()}


def test_termination_shows_evaluations_and_caps(monkeypatch, tmp_path):
  axes = drawn(monkeypatch, RUN, tmp_path, plots.termination)
  assert curves(axes[0]) == {
      "heldout: end by themselves": [1.0, 1.0],
      "training: cut at the cap": [0.75, 0.75],
  }
  assert curves(axes[1]) == {
      "heldout: mean": [120.4, 120.4],
      "heldout: 95th percentile": [231, 231],
      "training: cap": [4, 8],
  }


def test_a_number_that_json_lacks_leaves_a_gap(monkeypatch, tmp_path):
  lines = [
      update(1, **AGREEMENT | {"kl_special": None}),
      update(2, **AGREEMENT),
  ]
  axes = drawn(monkeypatch, lines, tmp_path, plots.agreement)
  found = [curves(x) for x in axes]
  assert found[0] == {"student and teacher": [0.9, 0.9]}
  assert found[1] == {"student": [0.5, 0.5], "teacher": [0.25, 0.25]}
  assert found[2]["all tokens"] == [1.0, 0.5]
  gap, value = found[2]["special tokens"]
  assert gap != gap and value == 2.0


@pytest.mark.parametrize(
    "kl, scale", [([8, 4, 2, 1], "linear"), ([9, 0.1, 0.02, 0.01], "log"),
                  ([0, 0], "linear"), ([9, 0, 0.01, 0.01], "log")],
)
def test_curves_that_would_lie_on_zero_have_a_log_scale(
    monkeypatch, tmp_path, kl, scale
):
  lines = [update(i + 1, kl=x, kl_at_0=x) for i, x in enumerate(kl)]
  axes = drawn(monkeypatch, lines, tmp_path, plots.kl_against_position)
  assert axes[0].get_yscale() == scale
  if scale == "linear":
    assert axes[0].get_ylim()[0] == 0


def test_ticks_of_updates_are_whole_numbers(monkeypatch, tmp_path):
  lines = [update(1, **AGREEMENT), update(2, **AGREEMENT), *RUN]
  for picture in (
      plots.termination, plots.agreement, plots.kl_against_position
  ):
    axes = drawn(monkeypatch, lines, tmp_path, picture)[-1]
    assert all(x == int(x) for x in axes.get_xticks())


def test_no_legend_lies_on_a_curve(monkeypatch, tmp_path):
  lines = [update(1, **AGREEMENT), update(2, **AGREEMENT), *RUN]
  for picture in (
      plots.termination,
      plots.agreement,
      plots.kl_against_position,
  ):
    for axes in drawn(monkeypatch, lines, tmp_path, picture):
      axes.figure.draw_without_rendering()
      legend = axes.get_legend().get_window_extent()
      assert legend.y1 <= axes.get_window_extent().y0


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_cuts_no_number(width):
  header = ("run", "FLOPs", "before, %", "last, %", "time", "minus the first's")
  row = ("1.98e+10", "25.0\n(21.3-29.1)", "56.9\n(52.4-61.2)", "3,056")
  rows = [(name * 30, *row, "+15.2 (+11.2 to +19.3)") for name in "ab"]
  console = rich.console.Console(width=width, file=io.StringIO())
  console.print(report.table(header, rows, width, "heldout"))
  text = console.file.getvalue()
  assert max(map(len, text.splitlines())) <= width
  for word in " ".join([*header[1:], *rows[0][1:]]).split():
    assert word in text
  assert text.count("a") >= 30 and text.count("b") >= 30
