"""Writes the repository's address into all that opens or cites it.

  python colab/address.py https://github.com/OWNER/NAME

Whoever publishes the code runs this once. The notebooks then clone from there,
the README gets its "Open in Colab" badges, and setup.py, CITATION.cff and
mkdocs.yml name the address.
"""

from collections.abc import Callable
import pathlib
import re
import sys

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
_COLAB = "https://colab.research.google.com"


def badge(repository: str, notebook: str) -> str:
  """Returns the Markdown of a notebook's badge; `repository` is OWNER/NAME."""
  target = f"{_COLAB}/github/{repository}/blob/main/colab/{notebook}"
  return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({target})"


def _edit(
    path: pathlib.Path, pattern: str, new: str | Callable[[re.Match], str]
) -> None:
  text, found = re.subn(pattern, new, path.read_text(), flags=re.MULTILINE)
  if not found:
    sys.exit(f"error: {path} does not match {pattern!r}; edit it by hand.")
  path.write_text(text)


def write(address: str, root: pathlib.Path = _ROOT) -> None:
  """Writes an address; a second one takes the first one's place."""
  match = _ADDRESS.fullmatch(address)
  if match is None:
    sys.exit(
        f"error: Colab cannot open {address!r}; give"
        " https://github.com/OWNER/NAME."
    )
  repository = match[1]
  address = f"https://github.com/{repository}"
  for notebook in sorted((root / "colab").glob("*.ipynb")):
    _edit(notebook, r"REPOSITORY=[^\\\"\n]*", f"REPOSITORY={address}")
  _edit(
      root / "README.md",
      r"^- (?:\[!.*\) )?\[(.+?)\]\(colab/(\w+\.ipynb)\)",
      lambda m: f"- {badge(repository, m[2])} [{m[1]}](colab/{m[2]})",
  )
  _edit(
      root / "setup.py",
      r'project_urls={(?:"Source": "[^"]*", )?',
      f'project_urls={{"Source": "{address}", ',
  )
  _edit(
      root / "CITATION.cff",
      r"^license: (.*)\n(?:repository-code: .*\n)?",
      rf'license: \1\nrepository-code: "{address}"\n',
  )
  _edit(
      root / "mkdocs.yml",
      r"^docs_dir: (.*)\n(?:repo_url: .*\n)?",
      rf"docs_dir: \1\nrepo_url: {address}\n",
  )


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(f"usage:{__doc__.splitlines()[2]}")
  write(sys.argv[1])
