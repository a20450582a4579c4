"""Settings of all tests, and of the processes that they start."""

import os

# Before JAX is imported: compiling takes most of the time, and toys gain
# nothing from better machine code. XLA's own passes run all the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
