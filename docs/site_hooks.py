"""What the docs site takes from beside docs/: recipes and notebooks as files, and two pages of the checkout.

Pages link to them as they lie in a checkout (`../recipes/x.yaml`), which is right on disk and in a repository's
browser; on the site they lie beside the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
FILES = ("recipes/**/*.yaml", "notebooks/*.ipynb", "notebooks/pictures/*.png", "SECURITY.md", "CITATION.cff")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    for path in sorted(path for pattern in FILES for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        # A page of Markdown would be one more page; what is linked to as a file stays one.
        files.append(File.generated(config, name.replace(".md", ".txt"), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the checkout into links to where they lie on the site."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\((?!https?:|#)(?:docs/)?", "](../", markdown)
        markdown = markdown.replace("](../", "](")
    else:
        markdown = markdown.replace("](../", "](")
    for name, target in PAGES.items():
        markdown = markdown.replace(f"]({name}", f"]({target}")
    return markdown.replace("](SECURITY.md", "](SECURITY.txt")
