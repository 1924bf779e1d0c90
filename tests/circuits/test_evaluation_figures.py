"""Figures of an evaluation show what it found, on a real one of a small model: points, whiskers, counts, words."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from helpers import FOUND, SPLITS, SmallModel

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import circuits_by_size, complements, random_baselines
from kc_lib.circuits.criteria import Minimality, Stability, jaccard_matrix, minimality, resampled_circuits, stability
from kc_lib.circuits.criteria_figures import method_bars, minimality_figure, overlap_figure
from kc_lib.circuits.evaluate import Evaluation, evaluate
from kc_lib.circuits.evaluation_figures import area_curves, baseline_figure, completeness_figure
from kc_lib.circuits.figures import verdict_table
from kc_lib.circuits.scores import FactScores
from kc_lib.circuits.selection import select
from kc_lib.circuits.smallest import areas
from kc_lib.circuits.verdict import verdict
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.plotting import NEUTRAL, TEMPLATE
from kc_lib.stats import empirical_p

SIZES = (0.001, 0.05, 0.2, 0.5)  # the smallest is too small for any path: a circuit without edges
N_DRAWS, N_EDGES = 3, 8
DEFINED = list(SPLITS)
UNDEFINED = [replace(pair, corrupted=pair.clean) for pair in FOUND]  # corruption does nothing
KINDS = ("random baseline", "layer-matched baseline")


@pytest.fixture(scope="module")
def fact_scores(small_model: SmallModel) -> FactScores:
    return score_edges(small_model("llama"), FOUND, steps=2, per="fact")


@pytest.fixture(scope="module")
def circuit(fact_scores: FactScores) -> Circuit:
    return select(fact_scores.mean(), size=60)


@pytest.fixture(scope="module")
def evaluation(small_model: SmallModel, fact_scores: FactScores, circuit: Circuit) -> Evaluation:
    named = {"circuit": circuit} | random_baselines(circuit, N_DRAWS)
    named |= random_baselines(circuit, N_DRAWS, kind="layer-matched")
    sizes = circuits_by_size(fact_scores.mean(), "absolute", SIZES, n_random=2)
    sizes |= circuits_by_size(fact_scores.mean(), "signed", SIZES, n_random=0, label="by <sign>")
    circuits = named | complements(named) | sizes
    return evaluate(small_model("llama"), circuits, SPLITS | {"same": UNDEFINED})


@pytest.fixture(scope="module")
def taken_out(small_model: SmallModel, circuit: Circuit) -> Minimality:
    return minimality(small_model("llama"), circuit, SPLITS | {"same": UNDEFINED}, n=N_EDGES)


@pytest.fixture(scope="module")
def resamples(fact_scores: FactScores) -> dict[str, Circuit]:
    return resampled_circuits(fact_scores, 4, size=40)


def only(evaluation: Evaluation, keep: Callable[[pd.DataFrame], pd.Series]) -> Evaluation:
    """The evaluation of some circuits or splits."""
    parts = (frame[keep(frame)] for frame in (evaluation.table, evaluation.examples))
    return Evaluation(*parts, evaluation.metric)


def panel(figure: go.Figure, column: int, row: int = 1) -> list[go.Scatter]:
    return list(figure.select_traces(row=row, col=column))


def named(traces: list[go.Scatter], meta: str) -> list[go.Scatter]:
    return [trace for trace in traces if trace.meta == meta]


def subtitle(figure: go.Figure) -> str:
    return html.unescape(figure.layout.title.subtitle.text)


def annotations(figure: go.Figure) -> list[str]:
    return [html.unescape(annotation.text) for annotation in figure.layout.annotations]


def whisker(trace: go.Scatter, axis: str = "y") -> list[tuple[float, float]]:
    """Lower and upper end of every point's whisker."""
    values, error = getattr(trace, axis), getattr(trace, f"error_{axis}")
    return [(v - down, v + up) for v, up, down in zip(values, error.array, error.arrayminus, strict=True)]


def test_area_curves_go_through_every_size(evaluation: Evaluation) -> None:
    figure = area_curves(evaluation)
    table = areas(evaluation).set_index(["split", "ranking", "draw"])
    for column, split in enumerate(DEFINED, start=1):
        traces = panel(figure, column)
        for ranking, circuit_name in {
            "top": "top {}",
            "by <sign>": "by <sign> {}",
            "top, random 1": "random baseline 1 of top {}",
            "top, random 2": "random baseline 2 of top {}",
        }.items():
            (curve,), (band,) = named(traces, ranking), named(traces, f"band of {ranking}")
            rows = [evaluation.row(circuit_name.format(share), split) for share in SIZES]
            rows.append(evaluation.row("full", split))
            assert curve.x == (*SIZES, 1.0)
            assert curve.y == pytest.approx([row["faithfulness"] for row in rows], abs=1e-12)
            ends = [row["faithfulness_low"] for row in rows] + [row["faithfulness_high"] for row in rows[::-1]]
            assert band.x == (*SIZES, 1.0, 1.0, *SIZES[::-1])
            assert band.y == pytest.approx(ends, abs=1e-12)
            name, _, draw = ranking.partition(", random ")
            own = table.loc[(split, name, int(draw or 0))]
            for shown_as, key in (("CPR", "cpr"), ("CMD", "cmd"), ("log area", "log_area")):
                text = f"{shown_as} {own[key]:.3f} [{own[f'{key}_low']:.3f}, {own[f'{key}_high']:.3f}]"
                assert all(text.replace("-0.000", "0.000") in hover for hover in curve.hovertext)
            assert (curve.line.color == NEUTRAL) == bool(draw)
            if not draw:
                entry = f"CPR {own.cpr:.2f} [{own.cpr_low:.2f}, {own.cpr_high:.2f}], CMD {own.cmd:.2f} ["
                assert html.unescape(curve.name).startswith(f"{ranking}: {entry}")
                assert curve.showlegend
        (first,), (second,) = named(traces, "top, random 1"), named(traces, "top, random 2")
        means = table.loc[[(split, "top", 1), (split, "top", 2)]].mean(numeric_only=True)
        assert first.name == f"top, random: CPR {means.cpr:.2f}, CMD {means.cmd:.2f} (mean of 2 draws)"
        assert (first.showlegend, second.showlegend) == (True, False)
        assert {trace.legend for trace in traces} == {"legend" if column == 1 else f"legend{column}"}
    assert evaluation.row("top 0.001", "discovery")["n_edges"] == 0
    assert figure.layout.xaxis.type == "log"
    assert sorted({shape.y0 for shape in figure.layout.shapes}) == [0, 1]
    assert annotations(figure) == ["discovery, n = 5 facts", "held-out, n = 4 facts"]
    assert "undefined on same" in subtitle(figure)
    assert "logit_difference (logits)" in subtitle(figure)


def test_baselines_are_drawn_one_by_one(evaluation: Evaluation) -> None:
    figure = baseline_figure(evaluation)
    table = evaluation.table
    for column, split in enumerate(DEFINED, start=1):
        (own,), baselines = named(panel(figure, column), "circuit"), named(panel(figure, column), "baseline")
        row = evaluation.row("circuit", split)
        assert own.x == pytest.approx([row["faithfulness"]])
        assert whisker(own, "x")[0] == pytest.approx((row["faithfulness_low"], row["faithfulness_high"]))
        assert [trace.name for trace in baselines] == list(KINDS)
        for trace, kind in zip(baselines, KINDS, strict=True):
            draws = table[(table["kind"] == kind) & (table["of"] == "circuit") & (table["split"] == split)]["faithfulness"]
            assert len(draws) == N_DRAWS
            assert trace.x == pytest.approx(draws.tolist(), abs=1e-12)
            assert trace.marker.color == NEUTRAL
            label = dict(zip(KINDS, ("random<br>circuits", "heads<br>shuffled<br>in layers"), strict=True))[kind]
            assert {figure.layout.yaxis.ticktext[round(y)] for y in trace.y} == {label}
            mean, best = (f"{round(value, 2) + 0.0:.2f}" for value in (draws.mean(), draws.max()))
            p = empirical_p(row["faithfulness"], draws.tolist())
            assert f"mean {mean}, best {best}, p = {p:.2g} (3 draws)" in annotations(figure)
    boxes = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
    rows = [evaluation.row("circuit", split) for split in DEFINED]
    assert boxes == [pytest.approx((row["faithfulness_low"], row["faithfulness_high"])) for row in rows]


def test_one_kind_of_baseline_on_one_split(evaluation: Evaluation) -> None:
    part = only(evaluation, lambda frame: (frame["split"] == "discovery") & ~frame["circuit"].str.contains("matched"))
    figure = baseline_figure(part)
    assert [trace.name for trace in named(list(figure.data), "baseline")] == ["random baseline"]
    assert annotations(figure)[0] == "discovery, n = 5 facts"
    assert "undefined" not in subtitle(figure)
    assert {trace.xaxis for trace in completeness_figure(part).data} == {"x"}
    assert {trace.xaxis for trace in area_curves(part).data} == {"x"}


def test_the_circuit_alone_beside_the_model_without_it(evaluation: Evaluation) -> None:
    figure = completeness_figure(evaluation)
    table = evaluation.table
    for column, split in enumerate(DEFINED, start=1):
        for run, prefix in (("the circuit alone", ""), ("the model without it", "without ")):
            traces = [trace for trace in panel(figure, column) if trace.name == run]
            (means,), draws = named(traces, "means"), named(traces, "baseline")
            row = evaluation.row(f"{prefix}circuit", split)
            expected = [row["faithfulness"]]
            for trace, kind in zip(draws, KINDS, strict=True):
                names = [f"{prefix}{kind} {draw} of circuit" for draw in range(1, N_DRAWS + 1)]
                found = table[table["circuit"].isin(names) & (table["split"] == split)]["faithfulness"]
                assert trace.y == pytest.approx(found.tolist(), abs=1e-12)
                expected.append(found.mean())
            assert means.y == pytest.approx(expected, abs=1e-12)
            ends = whisker(means)
            assert ends[0] == pytest.approx((row["faithfulness_low"], row["faithfulness_high"]), abs=1e-12)
            assert all(low == high for low, high in ends[1:])
            assert [text.strip() for text in means.text] == [f"{round(value, 2) + 0.0:.2f}" for value in expected]
            assert means.showlegend == (column == 1)
    alone, without = (named(list(figure.data), "means")[i] for i in (0, 1))
    assert all(left < right for left, right in zip(alone.x, without.x, strict=True))
    assert figure.layout.xaxis.ticktext[0] == "circuit"


def test_completeness_without_baselines(evaluation: Evaluation) -> None:
    figure = completeness_figure(only(evaluation, lambda frame: ~frame["circuit"].str.contains("baseline")))
    assert all(len(trace.y) == 1 for trace in named(list(figure.data), "means"))
    assert not named(list(figure.data), "baseline")
    no_complement = only(evaluation, lambda frame: frame["circuit"] != "without circuit")
    with pytest.raises(MethodError, match="complement of 'circuit' was not evaluated"):
        completeness_figure(no_complement)


def test_every_sampled_edge_has_its_drop(taken_out: Minimality) -> None:
    figure = minimality_figure(taken_out)
    summary = taken_out.totals.set_index(["split", "kind"])
    titles = annotations(figure)
    for row, split in enumerate(DEFINED, start=1):
        for column, kind in enumerate(("circuit", "random"), start=1):
            edges = taken_out.edges[(taken_out.edges["split"] == split) & (taken_out.edges["kind"] == kind)]
            edges = edges.sort_values("drop", ascending=False).reset_index(drop=True)
            seen = {}
            for trace in panel(figure, column, row):
                ends = whisker(trace)
                for x, y, text, (low, high) in zip(trace.x, trace.y, trace.hovertext, ends, strict=True):
                    seen[x] = (y, low, high)
                    edge = edges.iloc[x - 1]
                    assert html.unescape(text).startswith(f"<b>{edge['writer']} → {edge['reader']}</b>")
                    outcome = "needed" if low > 1e-12 else "works" if high < -1e-12 else "not told"
                    assert trace.name.startswith(outcome)
            expected = edges[["drop", "drop_low", "drop_high"]].to_numpy()
            assert np.array([seen[x] for x in range(1, N_EDGES + 1)]) == pytest.approx(expected, abs=1e-9)
            about = summary.loc[(split, kind)]
            differ = f"{about['share'] * N_EDGES:.0f} differ from 0"
            title = f"(n = {about['n']:.0f} facts), {N_EDGES} of {about['n_edges']:.0f} {kind} edges: {differ}"
            assert any(title in text for text in titles)
    labels = [text for text in titles if " → " in text]
    largest = taken_out.edges[taken_out.edges["kind"] == "circuit"].sort_values("drop", ascending=False)
    tops = [largest[largest["split"] == split].head(3) for split in DEFINED]
    assert labels == [f"{edge.writer} → {edge.reader}" for top in tops for edge in top.itertuples()]
    assert "undefined on same" in subtitle(figure)
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(shown) == sorted({trace.name for trace in figure.data})


def test_minimality_without_random_edges_or_intervals(taken_out: Minimality) -> None:
    own = Minimality(*(frame[frame["kind"] == "circuit"] for frame in (taken_out.edges, taken_out.totals)))
    figure = minimality_figure(own, n_labels=0)
    assert sum(len(trace.x) for trace in figure.data) == 2 * N_EDGES
    assert not any("→" in text for text in annotations(figure))
    single = taken_out.edges.assign(drop_low=np.nan, drop_high=np.nan)
    figure = minimality_figure(Minimality(single, taken_out.totals.assign(share=np.nan)))
    assert {trace.name for trace in figure.data} == {"not told from 0"}
    assert not any("differ" in text for text in annotations(figure))
    with pytest.raises(MethodError, match="no edge with a defined drop"):
        minimality_figure(Minimality(taken_out.edges[taken_out.edges["split"] == "same"], taken_out.totals))
    with pytest.raises(MethodError, match="no edge with a defined drop"):
        minimality_figure(Minimality(pd.DataFrame(), pd.DataFrame()))


def test_overlaps_of_a_matrix(resamples: dict[str, Circuit]) -> None:
    matrix = jaccard_matrix(resamples)
    figure = overlap_figure(matrix, "Resamples")
    (heat,) = figure.select_traces({"type": "heatmap"})
    assert np.array(heat.z) == pytest.approx(matrix.to_numpy())
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == list(resamples)
    numbers = {
        (x, y): text
        for trace in named(list(figure.data), "numbers")
        for x, y, text in zip(trace.x, trace.y, trace.text, strict=True)
    }
    assert numbers == {(j, i): f"{matrix.iloc[i, j]:.2f}" for i in range(4) for j in range(4)}
    others = [matrix.iloc[i, j] for i in range(4) for j in range(i)]
    assert f"mean of 6 pairs {np.mean(others):.2f}, lowest {min(others):.2f}" in subtitle(figure)


def test_overlaps_of_a_stability(resamples: dict[str, Circuit], circuit: Circuit) -> None:
    found = stability(resamples, circuit)
    figure = overlap_figure(found)
    (heat,) = figure.select_traces({"type": "heatmap"})
    expected = jaccard_matrix(resamples | {"reference": circuit})
    assert np.array(heat.z) == pytest.approx(expected.to_numpy())
    assert figure.layout.yaxis.ticktext[-1] == "reference"
    mean = found.summary().set_index("against").loc["each other", "jaccard"]
    assert f"found on n = {len(FOUND)} facts · mean overlap {mean:.2f} [" in subtitle(figure)


def test_overlaps_that_are_many_undefined_or_wrong() -> None:
    many = [f"template {i}: {'a long sentence about it ' * 3}" for i in range(30)]
    figure = overlap_figure(pd.DataFrame(np.eye(30), index=many, columns=many))
    assert not named(list(figure.data), "numbers")  # no room
    assert max(map(len, figure.layout.xaxis.ticktext)) <= 36
    blank = pd.DataFrame([[np.nan, 0.0], [0.0, 1.0]], index=["a", "b"], columns=["a", "b"])
    figure = overlap_figure(blank)
    assert sum(len(trace.text) for trace in named(list(figure.data), "numbers")) == 3
    assert "NaN" not in figure.to_json()
    (heat,) = overlap_figure(
        Stability(pd.DataFrame({"a": ["x"], "b": ["reference"], "against": ["reference"], "jaccard": [0.0]}))
    ).select_traces({"type": "heatmap"})
    assert np.array(heat.z).tolist() == [[1, 0], [0, 1]]
    with pytest.raises(MethodError, match="2 by 1"):
        overlap_figure(blank[["a"]])
    with pytest.raises(MethodError, match="0 by 0"):
        overlap_figure(pd.DataFrame())
    with pytest.raises(MethodError, match=r"from 0 to 1, not 1\.5"):
        overlap_figure(blank.replace(0.0, 1.5))


def test_the_table_of_verdicts(
    evaluation: Evaluation, taken_out: Minimality, resamples: dict[str, Circuit], circuit: Circuit
) -> None:
    found = verdict(evaluation, taken_out, stability(resamples, circuit))
    figure = verdict_table(found)
    (table,) = figure.data
    headers = [text.removeprefix("<b>").removesuffix("</b>") for text in table.header["values"]]
    assert headers == ["criterion", "split", "figure [95%]", "baseline", "bar", "verdict", "note"]
    cells = [[plain(cell) for cell in column] for column in table.cells["values"]]
    fills = table.cells.fill.color[5]
    colours = {"yes": "#C6E2F2", "no": "#F9D3BC", "undefined": "#E4E4E4"}
    for i, row in enumerate(found.itertuples()):
        criterion, split, value, baseline, bar, word, note = (column[i] for column in cells)
        assert criterion == f"{row.criterion} {row.measure}"
        assert split == row.split.replace("_", "-")
        interval = f" [{shown(row.low)}, {shown(row.high)}]" if not np.isnan(row.low) else ""
        assert value == f"{shown(row.figure)}{interval}"
        assert baseline == ("none" if np.isnan(row.baseline) else shown(row.baseline))
        assert (bar, note) == (row.bar, row.note)
        assert word.split()[-1] == row.verdict
        assert fills[i] == colours[row.verdict]
    assert f"{(found['verdict'] == 'yes').sum()} of 7 criteria met" in figure.layout.title.text
    assert len(set(fills)) > 1


def plain(cell: str) -> str:
    for tag in ("<span>", "</span>", "<b>", "</b>"):
        cell = cell.replace(tag, "")
    return html.unescape(cell.replace("<br>", " ")).strip()


def shown(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"


def test_verdicts_that_were_not_reached(evaluation: Evaluation) -> None:
    found = verdict(only(evaluation, lambda frame: frame["split"] == "discovery"))
    (table,) = verdict_table(found).data
    rows = {plain(row[0]).split()[0]: [plain(cell) for cell in row] for row in zip(*table.cells["values"], strict=True)}
    assert rows["held-out"][1:4] == ["none", "not measured", "none"]
    assert rows["minimal"][2] == "not measured"
    assert rows["stable"][5] == "? undefined"
    (table,) = verdict_table(found.assign(note="")).data
    assert len(table.header["values"]) == 6
    with pytest.raises(MethodError, match="no verdicts"):
        verdict_table(found.iloc[:0])
    with pytest.raises(MethodError, match="no column 'bar'"):
        verdict_table(found.drop(columns="bar"))
    with pytest.raises(MethodError, match="unknown verdict 'maybe'"):
        verdict_table(found.assign(verdict="maybe"))


def methods() -> pd.DataFrame:
    cpr = {"eap": 0.9, "eap_ig": 1.2, "gim": np.nan, "random": 0.25}
    rows = []
    for task, n, shift in (("capitals", 23, 0.0), ("ioi", 50, -0.5)):
        for i, (method, value) in enumerate(cpr.items()):
            value = value + shift * i
            row = {"task": task, "method": method, "cpr": value, "cpr_low": value - 0.1, "cpr_high": value + 0.05}
            cmd = abs(1 - value)
            row |= {"cmd": cmd, "cmd_low": cmd - 0.02, "cmd_high": cmd + 0.04, "seconds": 10.0**i, "n": n}
            rows.append(row)
    rows[1]["seconds"], rows[0]["cpr_low"], rows[0]["cpr_high"] = np.nan, np.nan, np.nan
    return pd.DataFrame(rows)


def test_methods_are_sorted_within_their_task() -> None:
    frame = methods()
    figure = method_bars(frame)
    orders = {"capitals": ["gim", "random", "eap", "eap_ig"], "ioi": ["gim", "random", "eap_ig", "eap"]}  # from below
    for row, (task, order) in enumerate(orders.items(), start=1):
        own = frame[frame["task"] == task].set_index("method").loc[order]
        axis = next(figure.select_yaxes(row=row, col=1))
        assert list(axis.ticktext) == order
        for column, measure in enumerate(("cpr", "cmd", "seconds"), start=1):
            (trace,) = named(panel(figure, column, row), measure)
            assert trace.y == tuple(axis.tickvals)
            assert np.array(trace.x, dtype=float) == pytest.approx(own[measure].to_numpy(), nan_ok=True)
            if measure != "seconds":
                ends = np.array(whisker(trace, "x"))
                expected = own[[f"{measure}_low", f"{measure}_high"]].to_numpy()
                known = ~np.isnan(expected).any(axis=1)
                assert ends[known] == pytest.approx(expected[known])
                assert all(end[0] == end[1] or np.isnan(end).all() for end in ends[~known])
            (numbers,) = named(panel(figure, column, row), "numbers")
            told = dict(zip(order, map(str.strip, numbers.text), strict=True))
            assert told["gim"] == ("undefined" if measure != "seconds" else "100 s")
            if measure != "seconds" or row == 2:
                assert told["eap"] == {"cpr": "0.90", "cmd": "0.10", "seconds": "1 s"}[measure]
    assert named(panel(figure, 3, 1), "numbers")[0].text[3].strip() == "not timed"
    assert named(panel(figure, 1, 1), "cpr")[0].marker.color[1] == NEUTRAL
    assert [plain(text) for text in annotations(figure)] == ["capitals (n = 23 facts)", "ioi (n = 50 facts)"]
    assert "NaN" not in figure.to_json()


def test_method_tables_that_cannot_be_shown() -> None:
    frame = methods()
    for broken, message in (
        (frame.drop(columns="cmd_low"), "no column 'cmd_low'"),
        (frame.iloc[:0], "no methods"),
        (pd.concat([frame, frame.iloc[:1]]), "'eap' is there twice for task 'capitals'"),
        (frame.assign(seconds=0.0), "above 0"),
    ):
        with pytest.raises(MethodError, match=message):
            method_bars(broken)
    nothing = frame.assign(cpr=np.nan, cmd=np.nan, cpr_low=np.nan, cpr_high=np.nan, cmd_low=np.nan, cmd_high=np.nan)
    figure = method_bars(nothing.assign(seconds=np.nan).drop(columns="n"))
    assert [plain(text) for text in annotations(figure)] == ["capitals", "ioi"]


def test_what_an_evaluation_lacks_is_said_in_one_line(evaluation: Evaluation) -> None:
    undefined = only(evaluation, lambda frame: frame["split"] == "same")
    empty = Evaluation(evaluation.table.iloc[:0], evaluation.examples.iloc[:0], evaluation.metric)
    for function in (area_curves, baseline_figure, completeness_figure):
        with pytest.raises(MethodError, match="undefined on every split"):
            function(undefined)
        with pytest.raises(MethodError, match="is empty"):
            function(empty)
    named_only = only(evaluation, lambda frame: frame["circuit"].isin(["full", "empty", "circuit"]))
    with pytest.raises(MethodError, match="no baselines of 'circuit'"):
        baseline_figure(named_only)
    with pytest.raises(MethodError, match="no ranking was evaluated"):
        area_curves(named_only)
    with pytest.raises(MethodError, match="no complement was evaluated"):
        completeness_figure(named_only)
    with pytest.raises(MethodError, match="'other' was not evaluated"):
        baseline_figure(evaluation, "other")


def test_one_fact_has_no_intervals_and_is_shown(small_model: SmallModel, fact_scores: FactScores, circuit: Circuit) -> None:
    circuits = {"circuit": circuit} | random_baselines(circuit, 1)
    circuits |= complements(circuits) | circuits_by_size(fact_scores.mean(), shares=(0.1,), n_random=0)
    evaluation = evaluate(small_model("llama"), circuits, {"discovery": FOUND[:1]})
    curves, nulls = area_curves(evaluation), baseline_figure(evaluation)
    assert not named(list(curves.data), "band of top")[0].x
    assert "[" not in named(list(curves.data), "top")[0].name
    (own,) = named(list(nulls.data), "circuit")
    assert whisker(own, "x") == [(own.x[0], own.x[0])]
    for figure in (curves, nulls, completeness_figure(evaluation)):
        assert "NaN" not in figure.to_json()
        assert annotations(figure)[0] == "discovery, n = 1 facts"


def test_every_figure_has_the_template_and_a_printable_size(
    evaluation: Evaluation, taken_out: Minimality, resamples: dict[str, Circuit]
) -> None:
    every = [
        area_curves(evaluation),
        baseline_figure(evaluation),
        completeness_figure(evaluation),
        minimality_figure(taken_out),
        overlap_figure(jaccard_matrix(resamples)),
        verdict_table(verdict(evaluation, taken_out)),
        method_bars(methods()),
    ]
    for figure in every:
        assert figure.layout.template.layout.font.family == TEMPLATE.layout.font.family
        assert "NaN" not in figure.to_json()
        assert 500 <= figure.layout.width <= 1000
        assert len(subtitle(figure)) * 6 < figure.layout.width  # at 13 px: one line
