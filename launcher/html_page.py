"""What every page that flglm writes has around its body: no scripts, nothing from elsewhere, one style."""

from html import escape
from pathlib import Path
from string import Template

FRAME = Path(__file__).with_name("page.html")
STYLE = Path(__file__).with_name("style.css")


def html_page(title: str, body: Path, /, **parts: str) -> str:
    """The page with `body`, a template, filled with `parts`, which are markup. The title is text, and escaped."""
    filled = _template(body).substitute(parts)
    return _template(FRAME).substitute(title=escape(title), style=STYLE.read_text(encoding="utf-8"), body=filled)


def _template(path: Path) -> Template:
    return Template(path.read_text(encoding="utf-8"))
