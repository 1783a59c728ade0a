"""How a reader gets hf_galore: what README and the notebooks say, from one constant.

`python -m tests.support.installing` writes it into them.
"""

from __future__ import annotations

import re
import shlex

from rich.console import Console

from tests.support.notebooks import FOLDER, NAMES, ROOT

README = ROOT / "README.md"

PUBLISHED = False
"""Whether `pip install hf-galore` gets this project.

Until it does, a line with that name fails, or gets what somebody else has put there. What works is a checkout. (Where
hf_galore is installed, `pip install "hf-galore[tracking]"` works, published or not: pip takes the one that is there.)
"""

README_EXTRAS = "cli"
NOTEBOOK_EXTRAS = "notebooks"


def requirement(checkout: str, extras: str = "", *, published: bool = PUBLISHED) -> str:
    """What pip is given: `hf-galore[extras]`, or, until it is published, the path of a checkout with the extras."""
    return f"{'hf-galore' if published else checkout}{f'[{extras}]' if extras else ''}"


def readme_line(*, published: bool = PUBLISHED) -> str:
    """The line of README, which is read in a checkout."""
    wanted, here = (shlex.quote(requirement(".", README_EXTRAS, published=index)) for index in (published, False))
    remark = f"or, in a checkout: pip install {here}" if published else "in a checkout; it is on no package index yet"
    return f"$ pip install {wanted:<16} # {remark}"


def notebook_line(*, published: bool = PUBLISHED) -> str:
    """The line of a notebook, which Jupyter runs in the folder of that: `notebooks/` of a checkout."""
    return f'%pip install --quiet "{requirement("..", NOTEBOOK_EXTRAS, published=published)}"'


def with_readme_line(readme: str, *, published: bool = PUBLISHED) -> str:
    """The text of README with its line for installing.

    Raises:
        ValueError: it has no such line, or several.
    """
    return _with_line(
        readme, r"^\$ pip install ['\"]?(?:\.|hf-galore)[\[ ].*$", readme_line(published=published), "README"
    )


def with_notebook_line(notebook: str, *, published: bool = PUBLISHED) -> str:
    """The text of a notebook's file with its line for installing; its outputs and all else stay as they are.

    Raises:
        ValueError: it has no such line, or several.
    """
    line = notebook_line(published=published).replace('"', r"\"")
    return _with_line(notebook, r"%pip install --quiet (?:[^\"\\\n]|\\.)*", line, "the notebook")


def _with_line(text: str, pattern: str, line: str, name: str) -> str:
    written, count = re.subn(pattern, lambda _: line, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{name} has {count} lines that install hf_galore, as {pattern!r} finds them; it needs 1.")
    return written


def main() -> None:
    """Write the lines into README and the notebooks."""
    README.write_text(with_readme_line(README.read_text("utf-8")), "utf-8")
    for path in (FOLDER / name for name in NAMES):
        path.write_text(with_notebook_line(path.read_text("utf-8")), "utf-8")
    Console().print(f"{readme_line()}\n{notebook_line()}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
