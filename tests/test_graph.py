"""Graphs by count and by name, pruning against paths found by brute force, circuits as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import Tensor

from kc_lib.errors import GraphError
from kc_lib.graph import Circuit, Graph, edge_frame, scores_from_frame

SMOLLM2 = Graph(30, 9, 3, 576)
SMALL_GRAPHS = [
    Graph(2, 2, 2, 8),
    Graph(3, 2, 2, 8, parallel=True),
    Graph(2, 4, 2, 8),
    Graph(2, 4, 2, 8, grouped=False),
    Graph(3, 4, 1, 8, parallel=True),
]
small_graphs = pytest.mark.parametrize("graph", SMALL_GRAPHS, ids=str)


def random_mask(graph: Graph, share: float, seed: int) -> Tensor:
    return graph.edges & (torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(seed)) < share)


# --- counts and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "heads", "edges"),
    [
        (12, 12, 32491),
        (24, 16, 231877),
        (36, 20, 810703),
        (48, 25, 2235025),
        (26, 8, 74218),
        (24, 14, 179749),
        (16, 32, 386713),
        (32, 32, 1592881),
        (30, 9, 123211),
    ],
)
def test_edge_counts_of_known_models(layers: int, heads: int, edges: int) -> None:
    assert Graph(layers, heads, 1, 7, grouped=False).n_edges == edges


def test_smollm2_has_fewer_readers_with_shared_keys_and_values() -> None:
    assert (len(SMOLLM2.writers), len(SMOLLM2.readers)) == (301, 481)
    assert SMOLLM2.n_edges < replace(SMOLLM2, grouped=False).n_edges == 123211


def test_names_and_order_by_hand() -> None:
    graph = Graph(2, 2, 1, 8)
    assert graph.writers == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    names = ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h0<v>", "m0"]
    names += ["a1.h0<q>", "a1.h1<q>", "a1.h0<k>", "a1.h0<v>", "m1", "logits"]
    assert [reader.name for reader in graph.readers] == names
    assert [reader.n_writers for reader in graph.readers] == [1, 1, 1, 1, 3, 4, 4, 4, 4, 6, 7]
    assert [reader.n_writers for reader in replace(graph, parallel=True).readers] == [1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 7]
    serving = graph.serves[graph.writer_index["a1.h1"]]
    assert [names[column] for column in serving.nonzero()[:, 0]] == ["a1.h1<q>", "a1.h0<k>", "a1.h0<v>"]
    for column, reader in enumerate(graph.readers[:-1]):
        assert graph.reader_columns(reader.layer, reader.kind).start + reader.index == column
    with pytest.raises(GraphError, match="unknown reader kind 'o'"):
        graph.reader_columns(0, "o")


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("a0.h7->m1", r"no 'a0\.h7'"),
        ("m0->a1.h9<q>", r"no 'a1\.h9<q>'"),
        ("m0->a1.h0", r"no 'a1\.h0'"),
        ("m0", "no 'm0'|m0"),
        ("m1->a0.h0<q>", "against the flow"),
        ("m0->m0", "against the flow"),
        ("a0.h0->a0.h1<q>", "against the flow"),
    ],
)
def test_edges_a_graph_does_not_have(edge: str, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        Graph(2, 2, 2, 8).edge_positions(edge)
    assert "\n" not in str(caught.value)


def test_parallel_blocks_have_no_edge_from_attention_to_their_own_mlp() -> None:
    assert Graph(1, 2, 2, 8).edge_positions("a0.h1->m0") == (2, 6)
    with pytest.raises(GraphError, match="against the flow"):
        Graph(1, 2, 2, 8, parallel=True).edge_positions("a0.h1->m0")


# --- pruning -----------------------------------------------------------------------------------------------------


def prune_by_paths(graph: Graph, mask: Tensor) -> Tensor:
    """Keep the edges between nodes that the input reaches and that reach the logits, with an input of the reader's."""
    flow = nx.DiGraph()
    flow.add_nodes_from(["input", "logits"])
    edges = [(int(u), int(v)) for u, v in mask.nonzero()]
    readers_of = {w: [r.name for r in inputs_of(graph, w)] for w in graph.writers}
    for row, column in edges:
        flow.add_edge(graph.writers[row], f"in {graph.readers[column].name}")
    for writer, names in readers_of.items():
        for name in names:
            flow.add_edge(f"in {name}", writer)
    flow.add_edge("in logits", "logits")
    forward = nx.descendants(flow, "input") | {"input"}
    backward = nx.ancestors(flow, "logits")
    kept = torch.zeros_like(mask)
    for row, column in edges:
        kept[row, column] = graph.writers[row] in forward and f"in {graph.readers[column].name}" in backward
    return kept


def inputs_of(graph: Graph, writer: str) -> list:
    """The readers of a node, by name and not by the matrix that is under test."""
    if writer == "input":
        return []
    if writer.startswith("m"):
        return [reader for reader in graph.readers if reader.name == writer]
    layer, head = (int(part) for part in writer[1:].split(".h"))
    shared = head // (graph.n_heads // (graph.n_kv_heads if graph.grouped else graph.n_heads))
    names = [f"a{layer}.h{head}<q>", f"a{layer}.h{shared}<k>", f"a{layer}.h{shared}<v>"]
    return [reader for reader in graph.readers if reader.name in names]


@small_graphs
def test_pruning_keeps_what_lies_on_a_path(graph: Graph) -> None:
    changed = 0
    for seed in range(25):
        mask = random_mask(graph, (0.05, 0.1, 0.2, 0.4, 0.8)[seed % 5], seed)
        pruned = graph.prune(mask)
        assert torch.equal(pruned, prune_by_paths(graph, mask))
        assert torch.equal(graph.prune(pruned), pruned)
        changed += not torch.equal(pruned, mask)
    assert changed >= 10
    assert torch.equal(graph.prune(graph.edges), graph.edges)
    assert not graph.prune(torch.zeros_like(graph.edges)).any()


def test_pruning_by_hand() -> None:
    graph = Graph(2, 2, 1, 8)

    def pruned(*edges: str) -> set[str]:
        mask = torch.zeros_like(graph.edges)
        for edge in edges:
            mask[graph.edge_positions(edge)] = True
        kept = edge_frame(graph, None, graph.prune(mask))
        return set(kept["writer"] + "->" + kept["reader"])

    assert pruned("input->m0", "m0->logits") == {"input->m0", "m0->logits"}
    assert pruned("input->m0", "m1->logits") == set()
    assert pruned("input->logits", "input->m0", "a0.h0->m1") == {"input->logits"}
    # a head that is fed at its query alone is alive, and so is an edge into the value it shares
    query = {"input->a1.h1<q>", "a1.h1->logits"}
    assert pruned(*query) == query
    shared = {"input->a1.h0<v>", "a1.h1->logits", "a1.h0->logits"}
    assert pruned(*shared) == shared
    # the other head of the group is not there, but this one reads the shared key
    assert pruned("input->a0.h0<k>", "a0.h1->logits") == {"input->a0.h0<k>", "a0.h1->logits"}
    assert pruned("input->a0.h1<q>", "a0.h0->logits") == set()


# --- circuits as files -------------------------------------------------------------------------------------------


def example(graph: Graph, seed: int = 0) -> Circuit:
    scores = torch.randn(graph.edges.shape, generator=torch.Generator().manual_seed(seed)) * graph.edges
    return Circuit(graph, random_mask(graph, 0.3, seed), scores, {"method": "eap", "n_pairs": 4})


@small_graphs
def test_circuits_survive_a_file(tmp_path: Path, graph: Graph) -> None:
    circuit = example(graph)
    loaded = Circuit.load(circuit.save(tmp_path / "circuit.json"), graph)
    assert loaded.graph == graph
    assert torch.equal(loaded.mask, circuit.mask)
    assert loaded.scores is not None
    assert (loaded.scores - circuit.scores).abs().max() <= 1e-6
    assert dict(loaded.provenance) == dict(circuit.provenance)
    assert loaded.n_edges == circuit.n_edges
    assert torch.equal(Circuit.load(tmp_path / "circuit.json").mask, circuit.mask)


def test_a_file_is_eap_igs_format_with_shared_readers_expanded(tmp_path: Path) -> None:
    graph = Graph(2, 4, 2, 8)
    scores = torch.zeros(graph.edges.shape)
    mask = torch.zeros_like(graph.edges)
    for edge, score in {"input->a1.h1<v>": 3.0, "a0.h1->m1": -2.0, "m0->a1.h3<q>": 0.5}.items():
        mask[graph.edge_positions(edge)], scores[graph.edge_positions(edge)] = True, score
    document = json.loads(Circuit(graph, mask, scores).save(tmp_path / "circuit.json").read_text())
    assert {key: document["cfg"][key] for key in ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")} == {
        "n_layers": 2,
        "n_heads": 4,
        "parallel_attn_mlp": False,
        "d_model": 8,
    }
    assert len(document["edges"]) == replace(graph, grouped=False).n_edges
    kept = {name: edge["score"] for name, edge in document["edges"].items() if edge["in_graph"]}
    assert kept == {"input->a1.h2<v>": 1.5, "input->a1.h3<v>": 1.5, "a0.h1->m1": -2.0, "m0->a1.h3<q>": 0.5}
    alive = {name for name, node in document["nodes"].items() if node["in_graph"]}
    assert alive == {"input", "a0.h1", "m0", "logits"}
    assert set(document["nodes"]) == {*graph.writers, "logits"}


def foreign(**changes: object) -> dict:
    """A file as EAP-IG writes it: no key of ours."""
    document = {
        "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 4},
        "nodes": {"input": {"in_graph": True}, "a0.h0": {"in_graph": True}, "logits": {"in_graph": True}},
        "edges": {
            "input->a0.h0<v>": {"score": 0.5, "in_graph": True},
            "a0.h0->logits": {"score": -1.0, "in_graph": True},
            "input->m0": {"score": 0.25, "in_graph": False},
        },
    }
    return document | changes


def test_a_foreign_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(foreign()))
    circuit = Circuit.load(path, Graph(1, 1, 1, 4))
    assert circuit.graph == Graph(1, 1, 1, 4, grouped=False)
    frame = circuit.to_frame()
    assert (frame["writer"] + "->" + frame["reader"]).tolist() == ["a0.h0->logits", "input->a0.h0<v>"]
    assert frame["score"].tolist() == [-1.0, 0.5]
    assert circuit.scores is not None
    assert circuit.scores[circuit.graph.edge_positions("input->m0")] == 0.25


EDGE = {"score": 1.0, "in_graph": True}


def with_cfg(**changes: object) -> dict:
    return foreign(cfg=foreign()["cfg"] | changes)


def with_edge(name: str = "input->m0", **changes: object) -> dict:
    return foreign(edges=foreign()["edges"] | {name: EDGE | changes})


def without(document: dict, key: str) -> dict:
    return {name: value for name, value in document.items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "it is not JSON"),
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"PK\x03\x04\x00\x00\x08\x08circuit/data.pkl\x80\x02}q\x00", "it is not JSON"),  # a .pt file
        ("[]", r"it is \[\], not an object"),
        (json.dumps([foreign()]), "not an object"),
        ("3", "it is 3, not an object"),
        ("null", "it is null, not an object"),
        ({"edges": {}}, "the file has no 'cfg'"),
        (without(foreign(), "edges"), "the file has no 'edges'"),
        (foreign(cfg={"n_layers": 1}), "cfg has no 'n_heads'"),
        (foreign(cfg=None), "'cfg' of the file is null, not an object"),
        (with_cfg(n_layers="many"), "'n_layers' of cfg is \"many\", not a whole number"),
        (with_cfg(n_layers=1.5), "'n_layers' of cfg is 1.5, not a whole number"),
        (with_cfg(n_layers=True), "'n_layers' of cfg is true, not a whole number"),
        (with_cfg(n_heads=0), "cfg is of no model: n_layers 1, n_heads 0"),
        (with_cfg(n_layers=-1), "cfg is of no model"),
        (with_cfg(d_model=0), "cfg is of no model"),
        (with_cfg(n_layers=10**9), "cfg is of no model"),  # no attempt to build its graph
        (with_cfg(parallel_attn_mlp="false"), "'parallel_attn_mlp' of cfg is \"false\", not true or false"),
        (with_cfg(grouped="false"), "'grouped' of cfg is \"false\", not true or false"),
        (with_cfg(scored=0), "'scored' of cfg is 0, not true or false"),
        (with_cfg(n_heads=4, n_key_value_heads=0, grouped=True), "4 heads cannot share 0 key-value heads"),
        (with_cfg(n_heads=4, n_key_value_heads=3, grouped=True), "4 heads cannot share 3 key-value heads"),
        (foreign(edges={}), "it lists no edges"),
        (foreign(edges=["input->m0"]), "'edges' of the file is .*, not an object"),
        (foreign(edges={"input->m0": 1.0}), "edge 'input->m0' is 1.0, not an object"),
        (foreign(edges={"input->m0": {"score": 1.0}}), "edge 'input->m0' has no 'in_graph'"),
        (foreign(edges={"input->m0": {"in_graph": True}}), "edge 'input->m0' has no 'score'"),
        (with_edge(in_graph="false"), "'in_graph' of edge 'input->m0' is \"false\", not true or false"),
        (with_edge(in_graph=1), "'in_graph' of edge 'input->m0' is 1, not true or false"),
        (with_edge(in_graph=None), "'in_graph' of edge 'input->m0' is null, not true or false"),
        (with_edge(score="high"), "'score' of edge 'input->m0' is \"high\", not a number"),
        (with_edge(score="1.0"), "'score' of edge 'input->m0' is \"1.0\", not a number"),
        (with_edge(score=None), "'score' of edge 'input->m0' is null, not a number"),
        (with_edge(score=True), "'score' of edge 'input->m0' is true, not a number"),
        (with_edge(score=[1.0]), r"'score' of edge 'input->m0' is \[1.0\], not a number"),
        (with_edge(score=10**400), "score of edge 'input->m0' is 1000.*, too large"),
        (with_edge("input->m7"), "edge 'input->m7': the graph has no 'm7'"),
        (with_edge("a5.h0->logits"), "edge 'a5.h0->logits': the graph has no 'a5.h0'"),
        (with_edge("input->a0.h0"), "edge 'input->a0.h0': the graph has no 'a0.h0'"),
        (with_edge("m0->a0.h0<q>"), "edge 'm0->a0.h0<q>' runs against the flow"),
        (with_edge("m0"), "edge 'm0': the graph has no 'm0'"),
        (foreign(nodes={"m3": {"in_graph": False}}), "node 'm3' of the section nodes is none of a model with its cfg"),
        (foreign(nodes={"a0.h0<q>": True}), "node 'a0.h0<q>' of the section nodes"),
        (foreign(nodes={"m0": {}}), "node 'm0' has no 'in_graph'"),
        (foreign(nodes={"m0": {"in_graph": "no"}}), "'in_graph' of node 'm0' is \"no\", not true or false"),
        (foreign(nodes={"m0": "yes"}), "node 'm0' is \"yes\", not an object"),
        (foreign(nodes=["m0"]), "'nodes' of the file is .*, not an object"),
        (foreign(nodes={"m0": {"in_graph": True, "neurons": [True, False]}}), "node 'm0' lacks some of its neurons"),
        (foreign(provenance="mine"), "'provenance' of the file is \"mine\", not an object"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "broken.json"
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GraphError, match=message) as caught:
        Circuit.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) < 400 + len(str(path))
    assert any(remedy in said for remedy in ("; give a", ": give a", "; correct the file", ": load the circuit's model"))


def test_foreign_files_of_all_ages_are_read(tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    whole = {"in_graph": True, "score": 0.5, "neurons": [True, True], "neurons_scores": [0.1, 0.2]}
    left_out = {"in_graph": False, "neurons": [False, False]}
    for nodes in ({}, {"input": True, "m0": False, "logits": True}, {"a0.h0": whole, "m0": left_out}):
        path.write_text(json.dumps(foreign(nodes=nodes)))
        assert Circuit.load(path).n_edges == 2
    path.write_text(json.dumps(without(foreign(), "nodes")))
    assert Circuit.load(path).n_edges == 2
    path.write_text(json.dumps(with_edge(score=3)).replace("-1.0", "NaN"))
    circuit = Circuit.load(path)
    assert circuit.n_edges == 3
    assert circuit.to_frame()["score"].tolist() == [3.0, 0.5, 0.0]  # what is not finite ranks last


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"nowhere\.json"):
        Circuit.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "other", [Graph(3, 4, 2, 8), Graph(2, 2, 2, 8), Graph(2, 4, 2, 16), Graph(2, 4, 2, 8, parallel=True)], ids=str
)
def test_another_models_circuit_is_refused(tmp_path: Path, other: Graph) -> None:
    path = example(Graph(2, 4, 2, 8)).save(tmp_path / "circuit.json")
    with pytest.raises(GraphError, match="another model") as caught:
        Circuit.load(path, other)
    assert str(path) in str(caught.value)
    assert "load that model" in str(caught.value)


@pytest.mark.parametrize("other", [Graph(1, 4, 2, 4), Graph(1, 2, 2, 4), Graph(2, 1, 1, 4), Graph(1, 1, 1, 8)], ids=str)
def test_another_models_foreign_circuit_is_refused(tmp_path: Path, other: Graph) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(foreign()))
    with pytest.raises(GraphError, match="another model"):
        Circuit.load(path, other)


def test_a_foreign_circuit_of_a_model_with_shared_keys_is_read(tmp_path: Path) -> None:
    """EAP-IG writes one key and value reader per query head and no number of key-value heads."""
    ungrouped = Graph(2, 4, 2, 8, grouped=False)
    path = example(ungrouped).save(tmp_path / "circuit.json")
    document = json.loads(path.read_text())
    for key in ("n_key_value_heads", "grouped"):
        del document["cfg"][key]
    path.write_text(json.dumps(document))
    loaded = Circuit.load(path, Graph(2, 4, 2, 8))
    assert torch.equal(loaded.mask, example(ungrouped).mask)


def test_masks_that_do_not_fit_are_refused() -> None:
    graph = Graph(1, 1, 1, 4)
    with pytest.raises(GraphError, match="does not fit"):
        Circuit(graph, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(GraphError, match=r"'a0.h0->a0.h0<q>' runs against the flow"):
        Circuit(graph, torch.ones_like(graph.edges))


def test_tables_and_scores_are_each_others_inverse() -> None:
    graph = Graph(2, 2, 1, 8)
    circuit = example(graph)
    frame = edge_frame(graph, circuit.scores)
    assert len(frame) == graph.n_edges
    assert circuit.scores is not None
    assert torch.equal(scores_from_frame(graph, frame), circuit.scores)
    listed = circuit.to_frame()
    assert len(listed) == circuit.n_edges == int(circuit.mask.sum())
    assert listed["score"].abs().is_monotonic_decreasing
    assert circuit.share == circuit.n_edges / graph.n_edges
    assert circuit.nodes[-1] == "logits"
    assert set(circuit.nodes[:-1]) == set(listed["writer"])
