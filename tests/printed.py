"""A figure at its final size, as it is written into a file."""

from matplotlib.figure import Figure
from matplotlib.text import Text

from jaxpg.lab.studies.estimators import ESTIMATORS
from jaxpg.stats.figures import TEXT, WIDTHS, drawn

TYPED = {name for name in ESTIMATORS if "_" in name}


def printed(draw, width: str) -> Figure:
    """The figure, after a look at its width, its letters, and whether they stay inside it."""
    figure = drawn(draw, width)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    assert figure.get_figwidth() == WIDTHS[width]
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text().strip():
            continue
        assert text.get_fontsize() == TEXT, text
        assert not TYPED & {*text.get_text().replace(",", " ").split()}, text
        if not any(letter.isalpha() for letter in text.get_text().replace("mathdefault", "")):
            continue  # a number of an axis: those outside its limits are not drawn
        box = text.get_window_extent(renderer)
        assert box.x0 >= -2 and box.x1 <= figure.bbox.width + 2, text
    for axis in figure.axes:
        if axis.get_legend() is not None and axis.get_legend().get_texts():
            # Legends lie outside the data.
            assert not axis.get_legend().get_window_extent(renderer).overlaps(axis.bbox), axis
    return figure
