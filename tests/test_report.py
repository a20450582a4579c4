import json

import pytest

from prefix_distill.report import plots
from prefix_distill.report import report


def update(step: int, **changes) -> dict:
  return {
      "step": step,
      "prefix_len": 4 * step,
      "rollout_len": 3.5 * step,
      "tokens": 100 * step,
      "flops": 1e9 * step,
      "flops_full_estimate": 3e9 * step,
      "seconds": 2.0 * step,
      "compilations_sample": 1,
      "compilations_score": 1,
      "compilations_update": 1,
      "kl": 1 / step,
      "kl_at_0": 1 / step,
      "finish_rate": 0.25,
      "cut": 0.75,
      "rollout_len_p95": 4 * step,
      "repetition": 0.01,
      **changes,
  }


def evaluation(step: int, finish: float = 1.0, **changes) -> dict:
  return {
      "step": step,
      "model": "student",
      "set": "heldout",
      "mode": "sampled",
      "flops": 1e9 * step,
      "accuracy": 0.5 * finish,
      "accuracy_low": 0.4 * finish,
      "accuracy_high": 0.6 * finish,
      "accuracy_finished": 0.5 if finish else 0.0,
      "finish_rate": finish,
      "cut": 1 - finish,
      "mean_length": 120.4,
      "length_p95": 231,
      "repetition": 0.125,
      "problems": 480,
      "samples": 1,
      **changes,
  }


RUN = [
    evaluation(0),
    evaluation(0, mode="greedy"),
    *(update(step) for step in (1, 2)),
    evaluation(2),
    evaluation(2, mode="greedy"),
    evaluation(2, model="teacher"),
    evaluation(2, model="teacher", mode="greedy"),
]


def write(lines: list[dict], workdir, best: str = "") -> str:
  """Writes a run's report; returns its text."""
  config = {
      "method": "prefix", "evaluation": {"sets": {"heldout": {}}},
      "checkpoint": {"best": best},
  }  # fmt: skip
  (workdir / "config.json").write_text(json.dumps(config))
  (workdir / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
  )
  report.write(workdir)
  return (workdir / "report" / "report.md").read_text()


def test_what_was_spent_is_told_by_both_accountings():
  text = report.spent([update(1), update(2, flops_paper=5e9)])
  assert text.startswith("2e+09 FLOPs in 2 updates")
  assert "compilations), 5e+09 by the paper's formula; full" in text
  # A run of before that was counted.
  assert "formula" not in report.spent(RUN)


def test_the_reasons_of_what_was_dropped_are_told(tmp_path):
  assert "dropped" not in write([update(1, dropped=0)], tmp_path)
  some = {"dropped": 1, "dropped_long": 1}
  more = {"dropped": 5, "dropped_empty": 2, "dropped_long": 3}
  text = write([update(1, **some), update(2, **more)], tmp_path)
  assert "5 training records were dropped (2 empty, 3 long)." in text


def test_a_set_that_chose_the_checkpoint_is_no_held_out_score(tmp_path):
  lines = [
      *RUN, update(3), update(4), evaluation(4, accuracy=0.75), update(5),
      evaluation(6, accuracy=0.7), evaluation(6, mode="greedy", accuracy=0.9),
      evaluation(6, set="other", accuracy=0.99),
  ]  # fmt: skip
  text = write(lines, tmp_path, best="heldout")
  assert "heldout chose update 4 of 3 that were evaluated: 75.0%" in text
  assert "no held-out score" in text and "--step=best" in text
  assert "chose" not in write(lines, tmp_path)
  # The first evaluation is of no checkpoint.
  assert "chose" not in write(RUN[:2], tmp_path, best="heldout")


def test_the_table_holds_accuracy_and_how_answers_end(tmp_path):
  text = write(RUN, tmp_path)
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert rows[0] == (
      "|  | sampled (95 %) | greedy (95 %) | finish | right if finished |"
      " tokens (mean / p95) | repetition |"
  )
  assert rows[3] == (
      "| student before | 50.0 % (40.0-60.0) | 50.0 % (40.0-60.0) | 100.0% |"
      " 50.0% | 120 / 231 | 12.5% |"
  )
  assert [row.split("|")[1].strip() for row in rows[2:]] == [
      "teacher", "student before", "student after",
  ]  # fmt: skip


def test_what_was_not_measured_is_a_dash(tmp_path):
  text = write([evaluation(0, finish=0.0)], tmp_path)
  row = next(x for x in text.splitlines() if "student before" in x)
  _, sampled, greedy, finish, right, *_ = row.strip("| ").split(" | ")
  assert (sampled, finish) == ("0.0 % (0.0-0.0)", "0.0%")
  assert greedy == right == "-"


def test_the_widest_table_fits_a_terminal(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  widest = {
      "accuracy": 1.0,
      "accuracy_low": 0.9921,
      "accuracy_high": 1.0,
      "accuracy_finished": 1.0,
      "mean_length": 12_345.6,
      "length_p95": 16_384,
      "repetition": 1.0,
  }
  write([line | widest if "mode" in line else line for line in RUN], tmp_path)
  printed = capsys.readouterr().out
  assert max(len(line) for line in printed.splitlines()[:-1]) <= 80
  # Nothing was cut or broken.
  for cell in (
      "repetition", "(mean / p95)", "12346 / 16384", "(99.2-100.0)", "100.0%",
      "student",
  ):  # fmt: skip
    assert cell in printed
  assert "…" not in printed


def test_answers_that_end_less_often_are_warned_of(tmp_path, capsys):
  lines = [
      *RUN[:4],
      evaluation(2, finish=0.827),
      evaluation(2, finish=0.5, mode="greedy"),
  ]
  text = write(lines, tmp_path)
  printed = " ".join(capsys.readouterr().out.split())
  for where in (text, printed):
    assert where.count("Warning") == 1
    assert "82.7% sampled, 100.0% before" in where
    assert "50.0% greedy, 100.0% before" in where
    assert "loss.merge_stop_tokens" in where and "termination.png" in where
  assert text.index("| student after") < text.index("Warning")
  assert text.index("Warning") < text.index("![")


@pytest.mark.parametrize("mode", ["sampled", "greedy"])
@pytest.mark.parametrize(
    "first, last, warned", [(1.0, 0.94, True), (1.0, 0.96, False),
                            (0.6, 0.5, True), (0.5, 0.9, False)],
)  # fmt: skip
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


def test_an_evaluation_is_one_short_line():
  line = report.evaluation_line("student", 1000, evaluation(1000))
  assert "\n" not in line and len(line) <= 100


AGREEMENT = {
    "entropy_student": 0.5,
    "entropy_teacher": 0.25,
    "top1_agreement": 0.9,
    "kl_special": 2.0,
}
ALWAYS = {"accuracy_flops.png", "termination.png"}
KL = {"kl_step.png", "kl_position.png"}


@pytest.mark.parametrize(
    "lines, pictures",
    [
        ([], set()),
        (RUN, ALWAYS | KL),
        ([x for x in RUN if "mode" in x], ALWAYS),
        ([x for x in RUN if "kl" in x], KL | {"termination.png"}),
        ([update(1, **AGREEMENT), *RUN], ALWAYS | KL | {"agreement.png"}),
        ([{"step": 1, "rollout_len": 3.0, "cross_entropy": 0.5}],
         {"loss_step.png"}),
        *(([{"step": 1, name: value}], {"agreement.png"})
          for name, value in AGREEMENT.items() if name != "entropy_teacher"),
    ],
)  # fmt: skip
def test_pictures_are_drawn_of_what_was_measured(lines, pictures, tmp_path):
  names = plots.draw(lines, tmp_path, "prefix")
  assert set(names) == pictures
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
