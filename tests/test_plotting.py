"""What figures are drawn with: bands that break, whiskers where there are intervals, and figures with nothing to show."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from kc_lib import plotting as plot


def test_a_figure_with_nothing_to_show_says_why() -> None:
    figure = plot.empty("no fact has <neurons>", "Neurons")
    assert [note.text for note in figure.layout.annotations] == ["no fact has &lt;neurons&gt;"]
    assert figure.layout.title.text == "Neurons"
    assert not figure.layout.xaxis.visible


def test_a_band_breaks_where_its_interval_is_undefined() -> None:
    ends = {"y_low": [0.0, 1.0, np.nan, 3.0, 4.0], "y_high": [1.0, 2.0, 3.0, 4.0, 5.0]}
    figure = go.Figure()
    plot.band(figure, pd.DataFrame({"x": [1, 2, 3, 4, 5]} | ends), "x", "y", plot.POSITIVE)
    plot.band(figure, pd.DataFrame({"x": [1], "y_low": [np.nan], "y_high": [1.0]}), "x", "y", plot.POSITIVE)
    broken, nothing = figure.data
    assert list(broken.x) == [1, 2, 2, 1, None, 4, 5, 5, 4]
    assert list(broken.y) == [0, 1, 2, 1, None, 3, 4, 5, 4]
    assert not nothing.x


@pytest.mark.parametrize("orientation", ["v", "h"])
def test_bars_have_whiskers_where_there_are_intervals(orientation: str) -> None:
    rows = pd.DataFrame({"name": ["a", "b"], "y": [1.0, 2.0], "y_low": [0.5, np.nan], "y_high": [2.5, np.nan]})
    figure = go.Figure()
    plot.bars(figure, rows, "name", "y", plot.POSITIVE, ["first", "second"], orientation=orientation)
    (bar,) = figure.data
    error = bar.error_x if orientation == "h" else bar.error_y
    assert (list(error.array), list(error.arrayminus)) == ([1.5, 0.0], [0.5, 0.0])
    assert list(bar.hovertext) == ["first", "second"]


def test_a_table_is_as_high_as_its_rows() -> None:
    low, high = plot.table({"a": ["x", "y"]}), plot.table({"a": ["x<br>x<br>x", "y"]})
    assert high.layout.height - low.layout.height == 2 * 17
    assert low.data[0].cells.height == 31
