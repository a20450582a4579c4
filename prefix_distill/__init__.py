"""On-policy distillation from reasoning prefixes (arXiv 2602.15260)."""

import os

# Only tokenizers and configs of transformers are used here, so its advice to
# install torch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
