"""Hooks of mkdocs: README is the landing page; links out of `docs/` become plain text."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_LINK = re.compile(r"(?<!!)\[((?:[^\]`]|`[^`]*`)+)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add README as the landing page."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    text = _LINK.sub(lambda link: f"[{link[1]}]({link[2].removeprefix('docs/')})", readme)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Remove links to files of the repository that are no pages."""

    def resolve(link: re.Match[str]) -> str:
        target, _, anchor = link[2].partition("#")
        if "://" in target or not target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), target))
        if files.get_file_from_path(path) is None:
            path = posixpath.join(path, "README.md")
            if files.get_file_from_path(path) is None:
                return link[1]
            target = posixpath.join(target, "README.md")
        return f"[{link[1]}]({target}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(resolve, markdown)
