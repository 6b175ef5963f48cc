"""MkDocs hooks: add the generated pages and files of the repository, and translate links that only a forge follows.

`docs/` and `README.md` are written for reading on a forge. Nothing here changes them.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from docs_site import reference, settings

ROOT = Path(__file__).parents[1]
# Pages outside docs/: file in the repository -> place in the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
STYLE = "assets/extra.css"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, before its last entry."""
    config.nav[-1:-1] = [{"Settings": settings.nav()}, {"API reference": reference.nav()}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, the pages outside docs/ and the files that any page links to."""
    for place, text in {**settings.pages(), **reference.pages()}.items():
        files.append(File.generated(config, place, content=text))
    files.append(File.generated(config, STYLE, abs_src_path=str(ROOT / "docs_site" / "extra.css")))
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    sources = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]
    for source in sources:
        for target in linked(source):
            place = place_of(target)
            if files.get_file_from_path(place) is None:
                if not (ROOT / target).is_file():
                    raise PluginError(f"{source} links to {target}, which is no file of the repository.")
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Translate a page's links and the file names of its code blocks."""
    places = {place: source for source, place in PAGES.items()}
    if page.file.generated_by and page.file.src_uri not in places:
        return markdown
    return translate(markdown, places.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def translate(text: str, source: str) -> str:
    """Return the Markdown of a file of the repository as MkDocs needs it.

    Args:
        text: the Markdown.
        source: the file, relative to the repository.
    """
    here = posixpath.dirname(place_of(source))
    lines: list[str] = []
    for line, is_code in _lines(text):
        if is_code:
            # ```python my_losses.py -> ```python title="my_losses.py"
            line = re.sub(r"^```(\w+) ([\w./]+)$", r'```\1 title="\2"', line)
        else:
            line = LINK.sub(lambda m: m[1] if _external(m[1]) else posixpath.relpath(
                place_of(_target(source, m[1])), here or "."), line)  # fmt: skip
            if re.match(r"(- |\d+\. |\|)", line) and lines and re.match(r"[^\s|\-\d]", lines[-1]):
                lines.append("")  # Python-Markdown begins a list or a table only after an empty line
        lines.append(line)
    return "\n".join(lines) + "\n"


def linked(source: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to, relative to the repository."""
    for line, is_code in _lines((ROOT / source).read_text(encoding="utf-8")):
        if not is_code:
            yield from (_target(source, link) for link in LINK.findall(line) if not _external(link))


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each line, and whether it belongs to a fenced block."""
    inside = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        yield line, inside or fence
        inside ^= fence


def _external(link: str) -> bool:
    return ":" in link.split("/")[0]


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def place_of(target: str) -> str:
    """Return where a file of the repository is in the site."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    # other Markdown is no page of the site
    return f"files/{target}" + (".txt" if os.path.splitext(target)[1] in ("", ".md") else "")
