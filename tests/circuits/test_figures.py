"""Figures show what is in the results: the right edges, signs, names, counts and units."""

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from kc_lib.circuits.baselines import RANDOM, random_circuit
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.evaluation_figures import PANELS, comparison_bars, faithfulness_figure
from kc_lib.circuits.figures import circuit_graph, score_distribution, top_edges_table, top_nodes_table
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import top_edges
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.metrics import METRICS
from kc_lib.plotting import NEGATIVE, NEUTRAL, POSITIVE, TEMPLATE

GRAPH = Graph(n_layers=3, n_heads=4, n_kv_heads=2, d_model=8)
PROVENANCE = {"model": "tiny", "method": "eap_ig", "metric": "logit_difference", "unit": "logits", "n_pairs": 12}
EDGES = {  # a0.h2 and a0.h3 share key-value head 1
    "input->a0.h1<k>": 0.4,
    "input->a0.h2<q>": 0.3,
    "a0.h2->m1": -0.5,
    "a0.h3->m1": 0.05,
    "m1->a2.h0<v>": 0.1,
    "a2.h0->logits": 0.9,
    "m1->logits": -0.02,
}


def circuit_of(edges: dict[str, float], scored: bool = True, **provenance: object) -> Circuit:
    mask, scores = torch.zeros_like(GRAPH.edges), torch.zeros(GRAPH.edges.shape)
    for edge, score in edges.items():
        mask[GRAPH.edge_positions(edge)], scores[GRAPH.edge_positions(edge)] = True, score
    return Circuit(GRAPH, mask, scores if scored else None, PROVENANCE | provenance if scored else {})


@pytest.fixture(scope="module")
def large() -> tuple[EdgeScores, Circuit]:
    """A model of 30 layers with heavy-tailed scores, and the 350 largest."""
    graph = Graph(n_layers=30, n_heads=9, n_kv_heads=3, d_model=576)
    normal = torch.randn(2, *graph.edges.shape, generator=torch.Generator().manual_seed(0))
    scores = EdgeScores(graph, normal[0].sign() * normal[1].mul(2).exp() * graph.edges / 100, PROVENANCE)
    return scores, Circuit(graph, top_edges(graph, scores.scores.abs(), 350), scores.scores, PROVENANCE)


@pytest.fixture
def evaluation() -> Evaluation:
    rows = []
    for split, n in (("discovery", 20), ("held_out", 11)):
        circuits = {
            "full": (500, 1.0, {"kind": "full"}),
            "empty": (0, 0.0, {"kind": "empty"}),
            "circuit": (30, 0.7, {"kind": "circuit"}),
        }
        for size, edges, value in ((0.1, 50, 0.8), (0.02, 10, 0.5), (0.001, 0, 0.0)):
            circuits[f"top {size}"] = (edges, value, {"kind": "ranking", "ranking": "top", "size": size})
        draws = [("top 0.1", "top", 50, (0.01, 0.02, 0.03)), ("top 0.02", "top", 10, (0.01, 0.02, 0.03))]
        for of, ranking, edges, values in [*draws, ("circuit", "", 30, (0.04, 0.06))]:
            for draw, value in enumerate(values, start=1):
                label = {"kind": RANDOM, "ranking": ranking, "draw": draw, "of": of}
                circuits[f"random baseline {draw} of {of}"] = (edges, value, label)
        for name, (n_edges, value, label) in circuits.items():
            value = value if split == "discovery" or name == "full" else 0.9 * value
            rows.append(
                {
                    "circuit": name,
                    **{"ranking": "", "size": np.nan, "draw": 0, "of": ""},
                    **label,
                    "split": split,
                    "n_edges": n_edges,
                    "share": n_edges / 500,
                    "n": n,
                    "metric": "logit_difference",
                    "value": value,
                    "faithfulness": value,
                    "faithfulness_low": value - 0.1,
                    "faithfulness_high": value + 0.1,
                    "hit_at_10": value,
                    "rank_median": 1 + 100 * (1 - value),
                    "probability": value / 2,
                    "kl": 1 - value,
                }
            )
    return Evaluation(pd.DataFrame(rows), pd.DataFrame(), METRICS["logit_difference"])


def of(figure: go.Figure, meta: str) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.meta == meta]


def heading(figure: go.Figure) -> str:
    return f"{figure.layout.title.text} | {figure.layout.title.subtitle.text}"


def hovers(figure: go.Figure, meta: str) -> list[str]:
    return [text for trace in of(figure, meta) for text in trace.hovertext]


def columns_of(figure: go.Figure) -> list[list[str]]:
    (table,) = figure.data
    return [[cell.removeprefix("<span>").removesuffix("</span>") for cell in column] for column in table.cells.values]


def lines_of(trace: go.Scatter) -> int:
    """Curves of a trace: each ends with None, in both coordinates."""
    assert [value is None for value in trace.x] == [value is None for value in trace.y]
    return sum(value is None for value in trace.x)


def test_every_edge_is_drawn_once_in_the_colour_of_its_sign() -> None:
    figure = circuit_graph(circuit_of(EDGES))
    drawn = {POSITIVE: 0, NEGATIVE: 0}
    for trace in of(figure, "edges"):
        drawn[trace.line.color] += lines_of(trace)
    # input->a0.h1<k> goes into both heads that share the key
    assert drawn == {POSITIVE: 6, NEGATIVE: 2}
    texts = hovers(figure, "edge hover")
    assert "<b>a0.h2 → m1</b>: -0.5 logits" in texts
    assert "<b>a2.h0 → logits</b>: +0.9 logits" in texts
    assert "<b>m1 → a2.h0&lt;v&gt;</b>: +0.1 logits<br>value of a2.h0" in texts
    assert sum("query of a0.h2" in text for text in texts) == 1
    assert [text[-5:] for text in texts if "key of" in text] == ["a0.h2", "a0.h3"]
    assert "7 of 7 edges drawn" in heading(figure)
    assert "n = 12 pairs" in heading(figure)
    assert "logits" in heading(figure)


def test_strong_edges_are_wider_and_darker() -> None:
    figure = circuit_graph(circuit_of(EDGES))
    strength = {float(trace.name.split(" to ")[1]): (trace.line.width, trace.opacity) for trace in of(figure, "edges")}
    assert len(set(strength.values())) > 2
    assert [strength[score] for score in sorted(strength)] == sorted(strength.values())


def test_edges_start_and_end_at_their_nodes() -> None:
    figure = circuit_graph(circuit_of({"input->m0": 1.0, "m0->logits": 1.0}))
    at = {
        name: (x, y) for trace in of(figure, "nodes") for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    (trace,) = of(figure, "edges")
    ends = [(trace.x[i], trace.y[i]) for i in (0, trace.x.index(None) - 1, trace.x.index(None) + 1, -2)]
    assert ends == [pytest.approx(at[name]) for name in ("input", "m0", "m0", "logits")]
    assert at["input"][1] < at["m0"][1] < at["logits"][1]


def test_nodes_say_what_goes_in_and_out() -> None:
    figure = circuit_graph(circuit_of(EDGES))
    names = [name for trace in of(figure, "nodes") for name in trace.customdata]
    assert sorted(names) == ["a0.h2", "a0.h3", "a2.h0", "input", "logits", "m1"]
    text = dict(zip(names, hovers(figure, "nodes"), strict=True))
    assert "2 edges in, total |score| 0.55 logits" in text["m1"]
    assert "2 edges out, total |score| 0.12 logits" in text["m1"]
    assert text["m1"].index("a0.h2 → m1: -0.5 logits") < text["m1"].index("a0.h3 → m1: +0.05 logits")
    assert "1 edge in, total |score| 0.4 logits" in text["a0.h3"]  # through the shared key alone
    assert "2 edges in, total |score| 0.7 logits" in text["a0.h2"]
    assert {annotation.text for annotation in figure.layout.annotations} == set(names)


def test_heads_are_ordered_and_the_mlp_is_at_the_right() -> None:
    edges = {f"a1.h{head}->logits": 1.0 for head in range(4)} | {"m1->logits": 1.0}
    figure = circuit_graph(circuit_of(edges))
    x = {name: x for trace in of(figure, "nodes") for name, x in zip(trace.customdata, trace.x, strict=True)}
    assert x["a1.h0"] < x["a1.h1"] < x["a1.h2"] < x["a1.h3"] < x["m1"]


def test_only_the_strongest_edges_are_drawn_and_the_title_says_so() -> None:
    figure = circuit_graph(circuit_of(EDGES), title="Capitals", max_edges=2)
    assert heading(figure).startswith("Capitals: 2 of 7 edges drawn")
    assert sorted(text.partition(":")[0] for text in hovers(figure, "edge hover")) == [
        "<b>a0.h2 → m1</b>",
        "<b>a2.h0 → logits</b>",
    ]
    assert sum(map(lines_of, of(figure, "edges"))) == 2
    assert {name for trace in of(figure, "nodes") for name in trace.customdata} == {"a0.h2", "m1", "a2.h0", "logits"}


def test_a_large_circuit_stays_light(large: tuple[EdgeScores, Circuit]) -> None:
    figure = circuit_graph(large[1])
    assert "300 of 350 edges drawn" in heading(figure)
    drawn = {text.partition("</b>")[0] for text in hovers(figure, "edge hover")}
    strongest = large[1].to_frame().head(300)
    assert len(drawn) == 300
    expected = zip(strongest["writer"], strongest["reader"].map(html.escape), strict=True)
    assert drawn == {f"<b>{writer} → {reader}" for writer, reader in expected}
    assert len(figure.data) < 20
    assert len(figure.to_json()) < 1_500_000
    assert {annotation.text for annotation in figure.layout.annotations} <= {"input", "logits"}  # too many to label


@pytest.mark.parametrize("zeros", [False, True], ids=["none", "zeros"])
def test_a_circuit_without_scores_is_grey(zeros: bool) -> None:
    circuit = circuit_of(dict.fromkeys(EDGES, 0.0), scored=zeros)
    figure = circuit_graph(circuit)
    (trace,) = of(figure, "edges")
    assert trace.line.color == NEUTRAL
    assert lines_of(trace) == 8
    assert "no scores" in heading(figure) or zeros
    assert not any("score" in text or "+" in text for text in hovers(figure, "nodes") + hovers(figure, "edge hover"))
    assert len(circuit_graph(random_circuit(GRAPH, 20, 0)).data) > 2


def test_empty_and_broken_circuits_are_refused() -> None:
    for function in (circuit_graph, top_edges_table, top_nodes_table):
        with pytest.raises(MethodError, match="no edges"):
            function(circuit_of({}))
        with pytest.raises(MethodError, match="1 of 1 edges have a score that is no finite number"):
            function(circuit_of({"m1->logits": float("nan")}))
        with pytest.raises(MethodError, match="is 0"):
            function(circuit_of(EDGES), **{"max_edges" if function is circuit_graph else "n": 0})
    for function in (top_edges_table, top_nodes_table):
        with pytest.raises(MethodError, match="no scores"):
            function(circuit_of(EDGES, scored=False))


def test_edge_table() -> None:
    figure = top_edges_table(circuit_of(EDGES), n=3)
    (table,) = figure.data
    writers, readers, scores, shares = columns_of(figure)
    assert table.header["values"][2] == "<b>score (logits)</b>"
    assert list(writers) == ["a2.h0", "a0.h2", "input"]
    assert list(readers) == ["logits", "m1", "a0.h1&lt;k&gt;"]
    assert list(scores) == ["+0.900", "-0.500", "+0.400"]
    assert shares[0] == f"{0.9 / 2.27:.1%}"
    assert list(table.cells.font.color[2]) == [POSITIVE, NEGATIVE, POSITIVE]
    assert "3 of 7" in heading(figure)


def test_tiny_scores_are_not_shown_as_zero() -> None:
    figure = top_edges_table(circuit_of({"m1->logits": 2e-5}))
    assert columns_of(figure)[2] == ["+2.00e-05"]


def test_node_table() -> None:
    figure = top_nodes_table(circuit_of(EDGES))
    rows = {row[0]: row[1:] for row in zip(*columns_of(figure), strict=True)}
    assert rows["m1"] == ("2", "2", "-0.450", "+0.080")
    assert rows["input"] == ("0", "2", "", "+0.700")
    assert rows["a0.h3"] == ("1", "1", "+0.400", "+0.050")
    assert next(iter(rows)) == "a0.h2"  # 0.4 + 0.3 in, 0.5 out
    assert "(logits)" in figure.data[0].header["values"][3]
    assert len(columns_of(top_nodes_table(circuit_of(EDGES), n=2))[0]) == 2


def test_score_distribution(large: tuple[EdgeScores, Circuit]) -> None:
    scores, circuit = large
    figure = score_distribution(scores, circuit)
    values = scores.scores[scores.graph.edges]
    lines = {trace.line.color: trace for trace in figure.data if trace.mode == "lines"}
    assert lines[POSITIVE].y[0] == pytest.approx(values.max().item())
    assert lines[NEGATIVE].y[0] == pytest.approx(-values.min().item())
    assert lines[POSITIVE].x[-1] == int((values > 0).sum())
    assert all(np.all(np.diff(trace.y) <= 0) for trace in figure.data)
    circles = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in circles) == 350
    assert min(min(trace.y) for trace in circles) == pytest.approx(circuit.to_frame()["score"].abs().min())
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert figure.layout.yaxis.title.text == "|score| (logits)"
    assert "n = 12 pairs" in heading(figure)
    assert len(figure.to_json()) < 200_000
    assert len(score_distribution(scores).data) == 2


def test_score_distribution_refuses_what_it_cannot_show(large: tuple[EdgeScores, Circuit]) -> None:
    nothing = EdgeScores(GRAPH, torch.zeros(GRAPH.edges.shape), PROVENANCE)
    with pytest.raises(MethodError, match="every edge scores 0"):
        score_distribution(nothing)
    with pytest.raises(MethodError, match="another graph"):
        score_distribution(large[0], circuit_of(EDGES))


def test_faithfulness_figure(evaluation: Evaluation) -> None:
    figure = faithfulness_figure(evaluation)
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["top, discovery"].x) == [10, 50]
    assert list(traces["top, held-out"].y) == pytest.approx([0.45, 0.72])
    assert min(traces["95% band, held-out"].y) == pytest.approx(0.35)
    assert max(traces["95% band, discovery"].y) == pytest.approx(0.9)
    assert list(traces["mean of random"].y) == pytest.approx([0.018, 0.018])
    random = next(trace for name, trace in traces.items() if name.startswith("random, held-out"))
    assert len(random.x) == 6
    assert random.marker.color == NEUTRAL
    assert "Hit@10 45.0%" in traces["top, held-out"].hovertext[0]
    assert "share 2.00%" in traces["top, held-out"].hovertext[0]
    assert "probability 0.225" in traces["top, held-out"].hovertext[0]
    assert "discovery n = 20, held-out n = 11" in heading(figure)
    assert "logit_difference (logits)" in heading(figure)
    assert "not shown (no edges, or undefined): top 0.001" in heading(figure)
    assert figure.layout.xaxis.type == "log"
    assert [shape.y0 for shape in figure.layout.shapes] == [0, 1]
    only_random = evaluation.table[evaluation.table["kind"] != "ranking"]
    with pytest.raises(MethodError, match="no 'top' circuit"):
        faithfulness_figure(Evaluation(only_random, pd.DataFrame(), evaluation.metric))


def bars_of(figure: go.Figure, panel: str) -> dict[str, float]:
    (trace,) = [trace for trace in figure.data if trace.type == "bar" and trace.name == PANELS[panel]]
    return dict(zip(trace.x, trace.y, strict=True))


def test_comparison_bars(evaluation: Evaluation) -> None:
    figure = comparison_bars(evaluation, ["top 0.1"])
    bars = bars_of(figure, "faithfulness")
    assert list(bars) == ["empty<br>circuit", "random<br>0.1", "top<br>0.1", "full<br>model"]
    assert list(bars.values()) == pytest.approx([0, 0.018, 0.72, 1])
    assert bars_of(figure, "rank_median")["top<br>0.1"] == pytest.approx(29)
    whiskers = next(trace for trace in figure.data if trace.name == "range" and trace.yaxis == "y")
    assert list(whiskers.x) == ["random<br>0.1", "random<br>0.1", None]
    assert list(whiskers.y[:2]) == pytest.approx([0.009, 0.027])  # of Hit@10, the first panel
    assert "held-out n = 11" in heading(figure)
    assert "mean and range of 3 draws" in heading(figure)
    assert {annotation.text for annotation in figure.layout.annotations} == set(PANELS.values())


def test_comparison_bars_take_the_circuit_and_its_baselines_by_default(evaluation: Evaluation) -> None:
    bars = bars_of(comparison_bars(evaluation), "hit_at_10")
    assert bars == pytest.approx({"empty<br>circuit": 0, "random<br>circuits": 0.045, "circuit": 0.63, "full<br>model": 1})
    without = Evaluation(evaluation.table[evaluation.table["kind"] != "circuit"], pd.DataFrame(), evaluation.metric)
    assert {"top<br>0.1", "top<br>0.02"} < set(bars_of(comparison_bars(without), "hit_at_10"))
    with pytest.raises(MethodError, match=r"no circuit 'top 0\.3'"):
        comparison_bars(evaluation, ["top 0.3"])


def test_every_figure_uses_the_template_and_serialises(evaluation: Evaluation, large: tuple[EdgeScores, Circuit]) -> None:
    every = [
        circuit_graph(circuit_of(EDGES)),
        top_edges_table(circuit_of(EDGES)),
        top_nodes_table(circuit_of(EDGES)),
        score_distribution(*large),
        faithfulness_figure(evaluation),
        comparison_bars(evaluation),
    ]
    for figure in every:
        assert figure.layout.template.layout.font.family == TEMPLATE.layout.font.family
        assert "NaN" not in figure.to_json()
