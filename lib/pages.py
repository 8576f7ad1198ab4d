"""Reports as HTML pages of one file: figures are embedded, nothing is loaded from elsewhere.

Templates (Jinja) extend `page.html.j2`, which has the looks of all of them: blocks `title`, `style` and `body`. Figures are drawn
on matplotlib's Agg canvas directly: no window system, no global state, safe in any thread.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, LIGHT, RED, GREY, INK = "#2f6db3", "#b9d3ee", "#c9374b", "#9aa5b1", "#22303c"


def render(template: Path, **values: Any) -> str:
    """The page of a template. Texts and labels are a user's: whatever they hold is shown, never run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template.name).render(**values)


def embedded(image: bytes) -> str:
    """A PNG as it stands in a page: base64."""
    return base64.b64encode(image).decode()


def figure(width: float, height: float) -> Figure:
    """An empty one of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def plain(*axes: Axes) -> None:
    """No frame where nothing is read off."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)


def png(drawn: Figure) -> bytes:
    """A figure's bytes: without the software's name and the date, equal figures are equal files."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None}
    drawn.savefig(buffer, format="png", dpi=120, metadata=metadata)
    return buffer.getvalue()
