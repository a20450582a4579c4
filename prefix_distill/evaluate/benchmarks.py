r"""The paper's benchmarks: where each data set is, and how it is graded.

The protocol (arXiv 2602.15260): zero-shot, temperature 1, top-p 1, up to 16,384
new tokens. MATH500, GPQA and MMLU-Pro are means of 4 samples a problem, AIME24
and AIME25 of 16. GPQA (diamond) and MATH500 are taken whole, of MMLU-Pro 500
questions at random. AIME24 also chose the paper's checkpoint, so its score is
biased upwards. Free-form answers are graded by math-verify, multiple choice by
the letter in \boxed{}.

Not stated in the paper, and chosen here: which 500 questions (those that
`records.lot` draws with seed 0), the order of GPQA's options (the same seed;
the data set has the right one first), the prompt of multiple choice
(`data/records.py`), and the room for its prompts, some of which are long.
HMMT (February 2025) and AMC (AMC 23) are not the paper's; they are sampled as
AIME is.

Each set is read through `datasets` from the hub. A local copy can take its
place, `--config.evaluation.sets.gpqa.source=PATH`: a clone of the data set's
repository, or a .jsonl or .parquet file with the same fields. A directory of
bare files knows no subset, so it needs `...gpqa.subset=''` as well. GPQA asks
for an account on the hub: accept its terms there and log in.
"""

from collections.abc import Mapping

from prefix_distill.config import DatasetSpec

# Settings of EvaluationSpec.
PROTOCOL = {
    "max_len": 16_384,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "greedy": False,
}

# No set should lose a problem that is long (figures in MATH500 are drawn by
# code, and GPQA has sequences of bases). Rows are only as long as the longest
# prompt that there is.
_ROOM = 8192


def _math(
    source: str, split: str, samples: int, question: str = "problem"
) -> DatasetSpec:
  return DatasetSpec(
      source,
      split,
      question=question,
      answer="answer",
      samples=samples,
      max_prompt_len=_ROOM,
  )


# Problems of a set, by its source, for those who cannot look.
PROBLEMS: Mapping[str, int] = {
    "HuggingFaceH4/MATH-500": 500,
    "HuggingFaceH4/aime_2024": 30,
    "math-ai/aime25": 30,
    "Idavidrein/gpqa": 198,
    "MathArena/hmmt_feb_2025": 30,
    "math-ai/amc23": 40,
}

SETS: Mapping[str, DatasetSpec] = {
    "math500": _math("HuggingFaceH4/MATH-500", "test", 4),
    "aime24": _math("HuggingFaceH4/aime_2024", "train", 16),
    "aime25": _math("math-ai/aime25", "test", 16),
    "gpqa": DatasetSpec(
        "Idavidrein/gpqa",
        "train",
        subset="gpqa_diamond",
        question="Question",
        answer="Correct Answer",
        choices=(
            "Correct Answer",
            "Incorrect Answer 1",
            "Incorrect Answer 2",
            "Incorrect Answer 3",
        ),
        samples=4,
        max_prompt_len=_ROOM,
    ),
    "mmlu_pro": DatasetSpec(
        "TIGER-Lab/MMLU-Pro",
        "test",
        question="question",
        answer="answer",
        choices=("options",),
        size=500,
        random=True,
        samples=4,
        max_prompt_len=_ROOM,
    ),
    "hmmt": _math("MathArena/hmmt_feb_2025", "train", 16),
    "amc": _math("math-ai/amc23", "test", 16, question="question"),
}
