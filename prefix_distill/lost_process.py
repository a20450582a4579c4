"""One sentence instead of JAX's C++ stack trace when another process is lost.

If a process of a run dies or freezes, a C++ thread of JAX aborts the others
with a stack trace. Python cannot step in: a callback for that is there, and
aborts as well, since its argument has no Python type. So a small process, this
file as a program, reads what C++ writes to standard error. It passes lines on,
but for those of the coordination service, whose dump it turns into a sentence.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import os
import re
import subprocess
import sys

# How a line begins that C++ logs.
_LOGGED = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
_FATAL = b"Terminating process because the JAX distributed service"
_SERVICE = b"coordination_service"
# Followed by the numbers of the dead, one a line.
_SILENT = re.compile(rb"stopped sending heartbeats\):\s*((?:\d+\s+)*\d+)\s")


def _sentence(dump: bytes, heartbeat: str) -> str:
  """Says which processes were lost; process 0 is the one that names others."""
  found = _SILENT.search(dump)
  numbers = sorted({int(x) for x in found[1].split()}) if found else [0]
  one = len(numbers) == 1
  names = ", ".join(map(str, numbers))
  return (
      f"error: {'Process' if one else 'Processes'} {names} died, or gave no"
      f" sign of life for {heartbeat} s (--distributed_heartbeat); see what"
      f" {'it' if one else 'they'} printed. The same command goes on from the"
      " last checkpoint.\n"
  )


def passed_on(lines: Iterable[bytes], heartbeat: str) -> Iterator[bytes]:
  """Yields what is shown of the lines that this process writes.

  Args:
    lines: of standard error.
    heartbeat: seconds, for the sentence.
  """
  dump, hides, fatal, said = [], False, False, False
  for line in lines:
    if line.startswith(b"error: "):  # Another thread's; the dump may go on.
      said = True
      yield line
      continue
    if _LOGGED.match(line):
      fatal |= _FATAL in line
      hides = fatal or _SERVICE in line
    if hides:
      dump.append(line)
    else:
      yield line
  if fatal and not said:
    # On a line of its own: a progress bar may have begun one.
    yield f"\n{_sentence(b''.join(dump), heartbeat)}".encode()


def watch_errors(heartbeat: int) -> None:
  """Has a small process read what C++ writes to standard error.

  What Python prints goes where it went before.

  Args:
    heartbeat: seconds after which a silent process counts as dead.
  """
  try:
    python = sys.stderr.fileno() == 2
    read, write = os.pipe()
    subprocess.Popen(
        [sys.executable, "-IS", __file__, str(heartbeat)],
        stdin=read,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # A Ctrl-C is for the run.
    )
  except (OSError, ValueError):
    return  # Without it, only the message is a worse one.
  os.close(read)
  if python:
    sys.stderr = os.fdopen(
        os.dup(2), "w", buffering=1, errors="backslashreplace"
    )
  os.dup2(write, 2)
  os.close(write)


def _main() -> None:
  for line in passed_on(sys.stdin.buffer, sys.argv[1]):
    os.write(2, line)


if __name__ == "__main__":
  _main()
