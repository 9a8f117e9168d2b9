"""The negative control of the look at figures, and the words that stand in them."""

from contextlib import nullcontext

import pytest
from printed import printed

from jaxpg.lab.studies.estimators import ESTIMATORS
from jaxpg.stats.figures import TEXT, line, panels
from jaxpg.stats.words import WORDS, words


@pytest.mark.parametrize(
    "spoil",
    [
        lambda figure: figure.axes[0].set_title("Bias", fontsize=TEXT - 1),
        lambda figure: figure.axes[0].set_title("rtg_value, measured"),
        lambda figure: figure.text(0.9, 0.5, "a name that is cut off at the edge"),
        lambda figure: figure.axes[0].legend(["a line"], loc="center"),
        lambda figure: figure.set_figwidth(14),
        lambda figure: None,
    ],
)
def test_what_is_not_fit_for_print_is_found(spoil, request):
    def draw(figure):
        line(*panels(figure), [0, 1], [0, 1], 0, "a line")
        spoil(figure)

    with (
        nullcontext()
        if request.node.callspec.indices["spoil"] == 5
        else pytest.raises(AssertionError)
    ):
        printed(draw, "page")


def test_every_estimator_has_words_that_fit_into_a_legend():
    named = [words(name) for name in ESTIMATORS]
    assert all(name in WORDS or name.startswith("gae_") for name in ESTIMATORS)
    assert len({*named}) == len(named) and max(map(len, named)) <= 32
