"""What is shown of standard error when another process is lost."""

import pytest

from prefix_distill import lost_process

_POLLED = (
    b"E1129 17:46:19.058167   21499 coordination_service_agent.cc:289] Polled"
    b" an error from coordination service.\n"
)
_UNHEALTHY = (
    b"E1129 17:46:19.057667   21481 coordination_service.cc:1549] Use error"
    b" polling: The following tasks are unhealthy (stopped sending"
    b" heartbeats):\n",
    b"2\n",
    b"1\n",
    b"The tasks have crashed. Check the task logs.\n",
)
_FATAL = (
    b"F1129 17:46:19.058318   21499 client.h:80] Terminating process because"
    b" the JAX distributed service detected fatal errors.\n",
    b"\n",
    b"*** Check failure stack trace: ***\n",
    b"    @     0x7fa268040634  absl::LogMessage::SendToLog()\n",
)


def _shown(*lines):
  return [x.decode() for x in lost_process.passed_on(lines, "10")]


@pytest.mark.parametrize(
    "dump, names",
    [((_POLLED,), "Process 0 "), ((*_UNHEALTHY, _POLLED), "Processes 1, 2 ")],
)
def test_a_dump_becomes_a_sentence_that_names_the_lost(dump, names):
  (sentence,) = _shown(*dump, *_FATAL)
  assert sentence.startswith(f"\nerror: {names}died, or gave no sign of life")
  assert "10 s (--distributed_heartbeat)" in sentence
  assert sentence.count("\n") == 2


def test_a_sentence_that_was_said_is_the_only_one():
  said = b"error: process 1 on a host: It is gone.\n"
  assert _shown(said, _POLLED, *_FATAL) == [said.decode()]
  assert _shown(_POLLED, *_FATAL[:2], said, *_FATAL[2:]) == [said.decode()]


def test_other_lines_are_passed_on():
  lines = (
      b"W1129 17:46:19.058318   21499 other.cc:80] Slow.\n",
      b"and more\n",
      b"F1129 17:46:19.058318   21499 cuda.cc:1] Check failed.\n",
      b"*** Check failure stack trace: ***\n",
  )
  assert _shown(*lines) == [x.decode() for x in lines]
  # And those after one of the coordination service.
  assert _shown(_POLLED, *lines) == [x.decode() for x in lines]
