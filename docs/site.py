"""Hook of mkdocs: README.md as the first page, and other files of the repository's root that pages link to."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("MODEL_CARD.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {"README.md": "index.md"} | {name: name for name in LINKED}
OTHERS = ("LICENSE", "NOTICE", "CITATION.cff", "examples/passreid.ipynb")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the root."""
    for name, page in [*PAGES.items(), *((name, name) for name in OTHERS)]:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links lead from the root to docs/ and back; on the site all pages are in one folder."""
    link = r"\]\((?:\.\./|docs/)" if page.file.generated_by else r"\]\(\.\./"
    markdown = re.sub(link, "](", markdown)
    return re.sub(r"\]\(README\.md\b", "](index.md", markdown)
