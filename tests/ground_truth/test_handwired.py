"""Hand-wired models do what they are said to do: answers, norms, the true edge sets, and the effect of every edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch

from ground_truth.circuits import HAND_WIRED, HandWired, edge_set, hand_wired
from ground_truth.wires import noisy_gpt2
from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.evaluate import evaluate
from kc_lib.circuits.scoring.exact import patch_single_edges
from kc_lib.errors import ModelError
from kc_lib.graph import Circuit
from kc_lib.residual.parts import Norm
from kc_lib.tasks.tokens import tokenizer_of

TOLERANCE = 0.03  # of the full effect: what the random heads and MLPs are worth together
NAMES = tuple(HAND_WIRED)
THIRD = 1 / 3  # an edge of which one of three kinds of corrupted prompts depends
ENDS, PATHS = {"input->m0": 1.0, "m3->logits": 1.0}, ("m0->a1.h2<v>", "a1.h2->m3", "m0->a2.h1<v>", "a2.h1->m3")
PATTERN = {"input->a0.h2<v>": THIRD, "a0.h2->a1.h1<k>": THIRD, "input->a1.h1<q>": THIRD}
# what patching each true edge alone takes away, as a share of the full effect
TRUE_EDGES: Mapping[str, Mapping[str, float]] = {
    "induction": {**PATTERN, "input->a1.h1<v>": THIRD, "a1.h1->logits": 1.0},
    "saturated": {**PATTERN, "input->a1.h1<v>": THIRD, "a1.h1->logits": 1.0},
    "fact": {"input->m1": 1.0, "m1->a2.h0<v>": 1.0, "a2.h0->logits": 1.0},
    "cancelling": {"input->m0": 1.0, "m0->a2.h0<v>": 1.0, "a2.h0->logits": 1.0},
    "redundant": {**ENDS, **dict.fromkeys(PATHS, 0.0)},
}
CANCELLING = {"m0->a1.h1<v>": 2.5, "a1.h1->logits": 2.5, "m0->a1.h3<v>": -2.5, "a1.h3->logits": -2.5}
UNSEEN = {
    "induction": ["input->a0.h2<q>", "input->a0.h2<k>"],
    "saturated": ["input->a0.h2<q>", "input->a0.h2<k>"],
    "fact": ["input->a2.h0<q>", "input->a2.h0<k>"],
    "cancelling": [f"input->{head}<{kind}>" for head in ("a2.h0", "a1.h1", "a1.h3") for kind in "qk"],
    "redundant": [f"input->{head}<{kind}>" for head in ("a1.h2", "a2.h1") for kind in "qk"],
}
every_model = pytest.mark.parametrize("name", NAMES)


@cache
def built(name: str) -> HandWired:
    return hand_wired(name)


def edges_of(circuit: Circuit) -> set[str]:
    graph = circuit.graph
    return {f"{graph.writers[u]}->{graph.readers[v].name}" for u, v in circuit.mask.nonzero().tolist()}


def without(circuit: Circuit, edge: str) -> Circuit:
    mask = circuit.mask.clone()
    mask[circuit.graph.edge_positions(edge)] = False
    return replace(circuit, mask=mask)


def faithfulness(wired: HandWired, circuits: Mapping[str, Circuit]) -> dict[str, float]:
    summary = evaluate(wired.model, circuits, {"all": wired.pairs}).table.set_index("circuit")
    return {name: float(summary.loc[name, "faithfulness"]) for name in circuits}


def full_effect(wired: HandWired) -> float:
    """Logit difference of the full model minus that on the corrupted prompts, mean over pairs."""
    values = evaluate(wired.model, {}, {"all": wired.pairs}).table.set_index("circuit")["value"]
    return float(values["full"] - values["empty"])


# --------------------------------------------------------------------------------------------------------- the models


@every_model
def test_it_answers_right_by_far(name: str) -> None:
    wired = built(name)
    for pair in wired.pairs:
        clean = wired.model.bridge(torch.tensor([pair.clean]))[0, -1]
        corrupted = wired.model.bridge(torch.tensor([pair.corrupted]))[0, -1]
        others = torch.arange(len(clean)) != pair.answer[0]
        assert clean[pair.answer[0]] > clean[others].max() + 4.0
        assert corrupted[pair.answer[0]] - corrupted[pair.distractor] < 1.0
    assert full_effect(wired) > 9.0


@every_model
def test_pairs_are_their_texts(name: str) -> None:
    wired = built(name)
    tokenizer = tokenizer_of(wired.model)
    assert len({(pair.clean, pair.corrupted) for pair in wired.pairs}) >= 12
    for pair in wired.pairs:
        assert tokenizer.encode(pair.text["clean"]) == pair.clean
        assert tokenizer.encode(pair.text["corrupted"]) == pair.corrupted
        assert tokenizer.answer(pair.text["clean"], pair.text["answer"]) == pair.answer
        assert tokenizer.inner.decode(pair.distractor) == pair.text["distractor"]


@every_model
def test_norms_are_harmless(name: str) -> None:
    wired = built(name)
    decoder, identity = wired.model.residual, Norm("none")
    blocks = [
        replace(block, attention=replace(block.attention, norm=identity), mlp_norm=identity) for block in decoder.blocks
    ]
    plain = replace(decoder, blocks=blocks, final_norm=identity)
    for pair in wired.pairs:
        tokens = torch.tensor([pair.clean, pair.corrupted])
        bare = plain.unembed(plain.run(plain.embed(tokens)))
        torch.testing.assert_close(wired.model.bridge(tokens), bare, rtol=1e-3, atol=1e-3)


@every_model
def test_random_parts_write_everywhere_and_little(name: str) -> None:
    wired = built(name)
    scores = score_edges(wired.model, wired.pairs, "exact").scores / full_effect(wired)
    for circuit in (wired.circuit, *wired.others.values()):
        scores = scores.masked_fill(circuit.mask, 0.0)
    rest = scores[wired.circuit.graph.edges].abs()
    assert rest.max() < TOLERANCE
    assert (rest > 1e-6).float().mean() > 0.5


def test_building_leaves_no_trace_and_repeats() -> None:
    state = torch.random.get_rng_state()
    again = hand_wired("fact")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.model.hash == built("fact").model.hash
    assert again.pairs == built("fact").pairs
    assert again.model is not built("fact").model
    assert again.model.name == "handwired/fact"
    assert not any(parameter.requires_grad for parameter in again.model.bridge.parameters())


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ModelError, match=r"unknown hand-wired model 'copying': use one of induction, saturated"):
        hand_wired("copying")
    with pytest.raises(ModelError, match=r"30 words in 2 spaces do not fit"):
        noisy_gpt2([str(i) for i in range(30)], (), seed=0)


# ----------------------------------------------------------------------------------------------------- the true edges


@every_model
def test_the_edge_sets_are_the_documented_ones(name: str) -> None:
    wired = built(name)
    assert wired.name == name
    assert edges_of(wired.circuit) == set(TRUE_EDGES[name])
    assert set().union(*(edges_of(circuit) for circuit in wired.minimal)) == set(TRUE_EDGES[name])
    assert edges_of(wired.others["unseen"]) == set(UNSEEN[name])
    if name == "cancelling":
        assert edges_of(wired.others["cancelling"]) == set(CANCELLING)
    assert set(wired.others) == ({"unseen", "cancelling"} if name == "cancelling" else {"unseen"})


@every_model
def test_minimal_circuits_are_faithful_and_minimal(name: str) -> None:
    wired = built(name)
    circuits = {"circuit": wired.circuit}
    for i, circuit in enumerate(wired.minimal):
        assert torch.equal(circuit.mask, circuit.pruned().mask)
        circuits |= {f"minimal {i}": circuit} | {f"{i} without {edge}": without(circuit, edge) for edge in edges_of(circuit)}
    for what, share in faithfulness(wired, circuits).items():
        if "without" in what:
            assert share < 1 - 0.9 * THIRD, what
        else:
            assert share == pytest.approx(1.0, abs=TOLERANCE), what


@every_model
def test_no_other_set_of_named_edges_is_a_minimal_circuit(name: str) -> None:
    """All subsets of the edges with a part in the model, run one by one; unseen edges carry nothing and are left out."""
    wired = built(name)
    named = sorted(edges_of(wired.circuit).union(*(edges_of(v) for k, v in wired.others.items() if k != "unseen")))
    subsets = [frozenset(edges) for n in range(len(named) + 1) for edges in combinations(named, n)]
    circuits = {" ".join(sorted(edges)): edge_set(wired.circuit.graph, list(edges)) for edges in subsets}
    shares = faithfulness(wired, circuits)
    faithful = [edges for edges in subsets if abs(shares[" ".join(sorted(edges))] - 1) < 0.1]
    smallest = {edges for edges in faithful if not any(other < edges for other in faithful)}
    assert smallest == {frozenset(edges_of(circuit)) for circuit in wired.minimal}


@every_model
def test_patching_one_edge_does_what_is_claimed(name: str) -> None:
    wired = built(name)
    claims = TRUE_EDGES[name] | (CANCELLING if name == "cancelling" else {})
    effects = patch_single_edges(wired.model, wired.pairs, list(claims))["score"] / full_effect(wired)
    assert effects.tolist() == pytest.approx(list(claims.values()), abs=0.06)
    unseen = patch_single_edges(wired.model, wired.pairs, UNSEEN[name])["score"]
    assert unseen.abs().max() < 1e-3
    if name != "redundant":  # there, the other path makes up for it
        zeroed = patch_single_edges(wired.model, wired.pairs, UNSEEN[name], intervention="zero")["score"]
        assert (zeroed.abs() > 0.2 * full_effect(wired)).all()


def test_cancelling_edges_together_do_nothing() -> None:
    wired = built("cancelling")
    graph = wired.circuit.graph
    rest = replace(wired.circuit, mask=graph.edges & ~wired.others["cancelling"].mask)
    one_left = replace(rest, mask=rest.mask | edge_set(graph, ["m0->a1.h1<v>", "a1.h1->logits"]).mask)
    shares = faithfulness(wired, {"rest": rest, "one left": one_left})
    assert shares["rest"] == pytest.approx(1.0, abs=TOLERANCE)
    assert shares["one left"] == pytest.approx(3.5, abs=0.1)


def test_swapped_followers_alone_do_not_show_the_previous_token_head() -> None:
    wired = built("induction")
    kinds = {"followers": wired.pairs[0::3], "predecessors": wired.pairs[1::3], "last": wired.pairs[2::3]}
    seen = {
        "followers": {"input->a1.h1<v>", "a1.h1->logits"},
        "predecessors": {"input->a0.h2<v>", "a0.h2->a1.h1<k>", "a1.h1->logits"},
        "last": {"input->a1.h1<q>", "a1.h1->logits"},
    }
    for kind, pairs in kinds.items():
        frame = patch_single_edges(wired.model, pairs, list(TRUE_EDGES["induction"]))
        assert set(frame.loc[frame["score"] > 0.5 * full_effect(wired), "edge"]) == seen[kind]
        assert frame.loc[~frame["edge"].isin(seen[kind]), "score"].abs().max() < 0.03 * full_effect(wired)
