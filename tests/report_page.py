"""Pages of reports, without what depends on the machine."""

import re
from pathlib import Path


def without_costs(path: Path) -> str:
    """Return a file; of a page, all but what its stages recorded about time."""
    text = re.sub(r'<section id="cost">.*?</section>\n', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return text.replace('<li><a href="#cost">Cost</a></li>\n', "")
