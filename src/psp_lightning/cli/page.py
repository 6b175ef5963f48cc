"""HTML pages that the commands write: templates next to this module, and plots as inline SVG in the page's colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError

INK = "#222222"  # replaced by the colour of the page's text


def check_packages(command: str) -> None:
    """Raise a UserError if matplotlib or jinja2 is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"{command} needs {error.name}: pip install 'psp-lightning[demo]'") from None


def write_page(path: Path, template: str, filters: dict[str, Callable[..., Any]], **values: Any) -> None:
    """Render a template in this folder to `path`, completely or not at all.

    Args:
        path: the HTML file.
        template: name of the template; it may use `filters` and `values`.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters |= filters
    page = environment.get_template(template).render(**values)
    with replacing(path) as part:
        part.write_bytes(page.encode("utf-8", "backslashreplace"))


def plot(draw: Callable[[Any], None], label: str, size: tuple[float, float] = (7.2, 2.7)) -> Any:
    """Return what `draw` plots into matplotlib axes as an inline SVG element; equal plots give equal bytes.

    Args:
        draw: called with the axes.
        label: describes the plot for screen readers.
        size: width and height in inches.
    """
    from markupsafe import Markup, escape
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    style: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context({**style, "svg.fonttype": "none", "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    svg = buffer.getvalue().replace(INK, "currentColor")
    return Markup(svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
