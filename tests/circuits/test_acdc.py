"""ACDC against the loop that runs the full model once per edge: the same edges stay, for the same reasons."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import SmallFolder, SmallModel, hf_model, random_pairs, relative_gap, views
from oracles.acdc import Found, loss_of_edges, plain_acdc, read_decoder, read_prompts, run_edges
from oracles.patching import oracle_circuit_logits, writer_outputs
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kc_lib.circuits.acdc.edge_tests import chance_to_stand, how_many
from kc_lib.circuits.acdc.plans import rows_of
from kc_lib.circuits.acdc.search import acdc
from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.run import run_circuit
from kc_lib.circuits.selection import top_edges
from kc_lib.errors import KnowledgeCircuitsError, MethodError, TaskError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS, Metric
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.models.smollm2 import cached_smollm2
from kc_lib.residual.activations import ablation
from kc_lib.tasks.batches import Batch, TokenPair, make_batch

# --- the oracle --------------------------------------------------------------------------------------------------


@views
@pytest.mark.parametrize("intervention", ["zero", "patching"])
def test_the_oracle_runs_circuits_as_the_other_oracle(
    small_folder: SmallFolder, kind: str, grouped: bool, intervention: str
) -> None:
    """Two hand-written runs: readers one by one from lists of tensors, and all of a kind from a stack."""
    hf, prompts = hf_model(small_folder(kind)), read_prompts(random_pairs())
    decoder = read_decoder(hf)
    ablated = writer_outputs(hf, prompts.corrupted)
    if intervention == "zero":
        ablated = torch.zeros_like(ablated)
    kv_readers = decoder.kv_heads if grouped else decoder.heads
    last = torch.tensor(prompts.lengths) - 1
    n_readers = len(decoder.layers) * (decoder.heads + 2 * kv_readers + 1) + 1
    for seed, share in enumerate((0.1, 0.5, 0.9)):
        mask = torch.rand(len(ablated), n_readers, generator=torch.Generator().manual_seed(seed)) < share
        mask[0, -1] = True  # a norm of nothing at all is no test
        expected = oracle_circuit_logits(hf, prompts.clean, prompts.corrupted, last, mask, not grouped, ablated)
        found = run_edges(decoder, prompts.clean, mask, ablated, kv_readers, (list(range(len(last))), last.tolist()))
        assert relative_gap(found, expected) <= 1e-5


@pytest.mark.parametrize("metric", ["match_nll", "kl", "logit_difference", "log_probability", "probability"])
def test_the_oracles_loss_is_the_mean_over_pairs_each_on_its_own(small_folder: SmallFolder, metric: str) -> None:
    """Alone there is no padding; and the full model's loss is the metric of its own logits."""
    hf, pairs = hf_model(small_folder("llama")), random_pairs()
    mask = torch.rand(16, 28, generator=torch.Generator().manual_seed(0)) < 0.7
    for options in ({}, {"full_answer": True}, {"full_answer": True, "normalize": "positions"}):
        together = loss_of_edges(hf, pairs, metric, **options)
        alone = [loss_of_edges(hf, [pair], metric, **options) for pair in pairs]
        assert together(mask) == pytest.approx(sum(loss(mask) for loss in alone) / len(pairs), rel=1e-4, abs=1e-6)
    full = torch.ones_like(mask)
    values = []
    for pair in pairs:
        logits = hf(torch.tensor([pair.clean])).logits[0, -1].detach()
        p = logits.softmax(-1)[pair.answer[0]]
        values.append(
            {
                "match_nll": 0.0,
                "kl": 0.0,
                "logit_difference": (logits[pair.distractor] - logits[pair.answer[0]]).item(),
                "log_probability": -p.log().item(),
                "probability": -p.item(),
            }[metric]
        )
    assert loss_of_edges(hf, pairs, metric)(full) == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-5)


# --- against the oracle ------------------------------------------------------------------------------------------


def oracle(hf: PreTrainedModel, pairs: Sequence[TokenPair], tau: float, **options: Any) -> Found:
    """The plain loop's answer, which must not hang on a rounding error."""
    options = {"ungrouped": not options.pop("grouped", True)} | options
    found = plain_acdc(hf, pairs, tau, **options)
    measured = found.effects[~found.effects.isnan()]
    measured = measured.abs() if options.get("absolute") else measured
    assert found.n_tests == len(measured)
    assert (measured - tau).abs().min() > 1e-5, "a near-tie: choose another tau or seed"
    return found


def assert_same(circuit: Circuit, expected: Found) -> None:
    """Same edges, same tests, effects to 1e-4."""
    assert circuit.scores is not None
    assert torch.equal(circuit.mask, expected.mask)
    assert torch.equal(circuit.scores.isnan(), expected.effects.isnan())
    assert (circuit.scores - expected.effects).nan_to_num().abs().max() <= 1e-4
    assert circuit.provenance["n_tested"] == expected.n_tests
    assert circuit.provenance["loss_full"] == pytest.approx(expected.loss_full, abs=1e-4)
    assert circuit.provenance["loss"] == pytest.approx(expected.loss, abs=1e-4)


def sharing_pairs() -> list[TokenPair]:
    """Prompts that start alike and part at different places, as those of a relation do; one is the start of another."""
    prompts = ((1, 7, 9, 4, 20, 5), (1, 7, 9, 4, 30, 31, 5), (1, 7, 9, 8, 6), (1, 7, 9, 4, 30), (1, 7, 9, 4, 20, 40, 41, 42))
    return [TokenPair(clean, (*clean[:-1], 99), (100 + i,), 110 + i, {}, {}) for i, clean in enumerate(prompts)]


@views
def test_prompts_that_start_alike_share_rows(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool
) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), sharing_pairs()
    assert len(rows_of(make_batch(pairs), "zero")) < sum(len(pair.clean) for pair in pairs)
    expected = oracle(hf, pairs, 0.05, intervention="zero", grouped=grouped)
    assert 0 < expected.mask.sum() < expected.n_tests
    assert_same(acdc(model, pairs, tau=0.05, intervention="zero", grouped=grouped), expected)


@views
def test_the_edges_are_the_plain_loops(small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), random_pairs()
    sizes = {}
    for intervention, tau in (("zero", 0.01), ("zero", 0.2), ("patching", 0.02)):
        expected = oracle(hf, pairs, tau, intervention=intervention, grouped=grouped)
        circuit = acdc(model, pairs, tau=tau, intervention=intervention, grouped=grouped)
        assert_same(circuit, expected)
        assert circuit.graph == model.residual.graph(grouped)
        sizes[intervention, tau] = circuit.share
    assert 0 < sizes["zero", 0.2] < 0.3 * sizes["zero", 0.01]
    assert 0.1 < sizes["zero", 0.01] < 0.6
    assert 0 < sizes["patching", 0.02] < 0.5


OPTIONS: dict[str, dict] = {
    "normal": {"order": "normal", "tau": 0.01},
    "random": {"order": "random", "seed": 3, "tau": 0.015},
    "absolute": {"absolute": True, "tau": 0.025},
    "absolute-patching": {"absolute": True, "intervention": "patching", "order": "random", "tau": 0.025},
    "mean": {"intervention": "mean", "tau": 0.015},
    "positional_mean": {"intervention": "positional_mean", "tau": 0.01},
    "kl": {"metric": "kl", "tau": 0.01},
    "kl-patching": {"metric": "kl", "intervention": "patching", "order": "normal", "tau": 0.0035},
    "logit_difference": {"metric": "logit_difference", "intervention": "patching", "tau": 0.05},
    "log_probability": {"metric": "log_probability", "intervention": "mean", "tau": 0.025},
    "positions": {"normalize": "positions", "tau": 0.00625},
    "full_answer": {"full_answer": True, "tau": 0.015},
    "full_answer-patching": {"full_answer": True, "intervention": "patching", "metric": "kl", "tau": 0.0035},
    "full_answer-mean": {"full_answer": True, "intervention": "mean", "tau": 0.01},
    "full_answer-positions": {"full_answer": True, "normalize": "positions", "tau": 0.0025},
    "skip": {"skip": ("m1", "a2.h1", "logits"), "tau": 0.025},
    "skip-patching": {"skip": ("a0.h0", "a1.h3", "m2"), "intervention": "patching", "tau": 0.015},
}


def option_cases() -> list:
    """Every option on every one of three kinds; the quick ones are each option on one kind, in turn."""
    kinds = (("gpt2", True), ("gemma2", True), ("llama", False))
    return [
        pytest.param(kind, grouped, name, marks=() if i % 3 == j else pytest.mark.slow)
        for i, name in enumerate(OPTIONS)
        for j, (kind, grouped) in enumerate(kinds)
    ]


@pytest.mark.parametrize(("kind", "grouped", "name"), option_cases())
def test_under_every_option(small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool, name: str) -> None:
    options = {"grouped": grouped, **OPTIONS[name]}
    pairs = random_pairs(seed=2)
    expected = oracle(hf_model(small_folder(kind)), pairs, **options)
    circuit = acdc(small_model(kind), pairs, **options)
    assert_same(circuit, expected)
    assert 0 < circuit.n_edges < circuit.graph.n_edges


@pytest.mark.parametrize("kind", ["neox", "qwen2", "gemma2"])
@pytest.mark.parametrize("seed", [5, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
def test_on_other_pairs(small_model: SmallModel, small_folder: SmallFolder, kind: str, seed: int) -> None:
    for lengths, intervention in (((6,), "zero"), ((4, 11, 6), "zero"), ((7, 7, 7, 7, 7), "patching")):
        pairs = random_pairs(lengths, seed)
        expected = oracle(hf_model(small_folder(kind)), pairs, 0.03, intervention=intervention)
        assert_same(acdc(small_model(kind), pairs, tau=0.03, intervention=intervention), expected)


@pytest.mark.parametrize(("kind", "intervention"), [("neox", "patching"), ("gemma2", "zero"), ("qwen2", "zero")])
def test_the_width_of_a_batch_changes_nothing(small_model: SmallModel, kind: str, intervention: str) -> None:
    pairs = random_pairs(seed=2)
    one, seven, many = (
        acdc(small_model(kind), pairs, tau=0.02, intervention=intervention, edges_at_once=width) for width in (1, 7, 32)
    )
    for circuit in (seven, many):
        assert torch.equal(circuit.mask, one.mask)
        assert torch.equal(circuit.scores.isnan(), one.scores.isnan())
        assert (circuit.scores - one.scores).nan_to_num().abs().max() <= 1e-5
        assert circuit.provenance["n_tested"] == one.provenance["n_tested"]


def test_a_reader_that_loses_every_edge_reads_exactly_nothing(small_model: SmallModel, small_folder: SmallFolder) -> None:
    """Norms of queries and keys blow up whatever rounding leaves of a zero input."""
    expected = oracle(hf_model(small_folder("gemma3")), random_pairs(), 0.01)
    assert_same(acdc(small_model("gemma3"), random_pairs(), tau=0.01), expected)


def test_what_it_reports(small_model: SmallModel) -> None:
    model, pairs = small_model("llama"), random_pairs()
    circuit = acdc(model, pairs, tau=0.05)
    assert circuit.scores is not None
    tested = ~circuit.scores.isnan()
    assert circuit.provenance["n_tested"] == int(tested.sum())
    assert circuit.provenance["loss_full"] == pytest.approx(0, abs=1e-5)  # of match_nll
    assert not (circuit.mask & ~tested).any()
    assert (circuit.scores[circuit.mask] >= 0.05).all()
    assert (circuit.scores[tested & ~circuit.mask] < 0.05).all()
    decoder, batch = model.residual, make_batch(pairs)
    full, own = (
        run_circuit(decoder, circuit.graph, mask, batch, ablation(decoder, "zero", batch))
        for mask in (circuit.graph.edges, circuit.mask)
    )
    loss = METRICS["match_nll"].loss(own, batch, full).mean().item()
    assert circuit.provenance["loss"] == pytest.approx(loss, abs=1e-5)


def test_orders_differ_and_random_ones_by_seed(small_model: SmallModel) -> None:
    model, pairs = small_model("llama"), random_pairs()
    reverse, normal, drawn, redrawn, again = (
        acdc(model, pairs, tau=0.02, order=order, seed=seed).scores.nan_to_num()
        for order, seed in (("reverse", 0), ("normal", 0), ("random", 0), ("random", 1), ("random", 0))
    )
    assert torch.equal(drawn, again)
    for one, other in ((reverse, normal), (normal, drawn), (drawn, redrawn)):
        assert not torch.equal(one, other)


# --- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_layers_of_smollm2(smollm2: Model, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(cached_smollm2(), dtype=torch.float32)
    whole.model.layers = whole.model.layers[:3]
    whole.config.num_hidden_layers = 3
    if getattr(whole.config, "layer_types", None) is not None:
        whole.config.layer_types = whole.config.layer_types[:3]
    whole.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(model.tokenizer(text, add_special_tokens=False).input_ids)

    facts = (("Germany", "Italy", " Berlin", " Rome"), ("Sweden", "Japan", " Stockholm", " Tokyo"))
    facts += (("France", "Spain", " Paris", " Madrid"),)
    pairs = [
        TokenPair(
            tokens(f"The capital city of {subject} is"),
            tokens(f"The capital city of {other} is"),
            tokens(answer),
            tokens(distractor)[0],
            {},
            {},
        )
        for subject, other, answer, distractor in facts
    ]
    hf = hf_model(tmp_path)
    expected = oracle(hf, pairs, 0.05)
    circuit = acdc(model, pairs, tau=0.05)
    assert_same(circuit, expected)
    assert 0 < circuit.share < 0.3


# --- prefilter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "grouped", "intervention"), [("gpt2", True, "zero"), ("gemma2", True, "patching"), ("llama", False, "zero")]
)
def test_a_prefilter_is_where_the_loop_starts(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool, intervention: str
) -> None:
    model, pairs = small_model(kind), random_pairs(seed=2)
    shared = {"intervention": intervention, "grouped": grouped}
    # the rule that leaves out the ablated end of the path, where a norm of nothing at all has no gradient
    scores = score_edges(model, pairs, "eap_ig", ig_rule="right", metric="match_nll", **shared)
    start = scores.graph.prune(top_edges(scores.graph, scores.scores.abs(), 120))
    expected = oracle(hf_model(small_folder(kind)), pairs, 0.02, start=start, **shared)
    circuit = acdc(model, pairs, tau=0.02, prefilter=120, **shared)
    assert_same(circuit, expected)
    assert not (circuit.mask & ~start).any()
    assert 0 < circuit.n_edges < int(start.sum()) < scores.graph.n_edges
    assert circuit.provenance["prefilter"] == 120
    assert acdc(model, pairs, tau=0.02, **shared).provenance["prefilter"] is None


def test_a_prefilter_takes_the_metric_of_the_run(small_model: SmallModel) -> None:
    """One of the user's own, known by no name."""
    model, pairs = small_model("llama"), random_pairs(seed=2)
    own = Metric("own", "nats", METRICS["match_nll"].function, higher_is_better=False, needs_reference=True)
    named, given = (acdc(model, pairs, tau=0.02, metric=metric, prefilter=120) for metric in ("match_nll", own))
    assert torch.equal(named.mask, given.mask)


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def small_models_are_written_often_too() -> Iterator[None]:
    """Some layers begin with a checkpoint, some follow others without one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("kc_lib.circuits.acdc.search"), "TESTS_PER_CHECKPOINT", 30)
        yield


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def failing_after(limit: int, calls: list[int]) -> Metric:
    """match_nll that works so many times, and notes every call."""

    def function(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
        if len(calls) >= limit:
            raise Interrupted
        calls.append(len(logits))
        return METRICS["match_nll"].function(logits, batch, reference)

    return Metric("failing", "nats", function, higher_is_better=False, needs_reference=True)


@pytest.mark.parametrize(("kind", "intervention"), [("gpt2", "zero"), ("gemma2", "patching")])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_an_interrupted_run_goes_on_to_the_identical_result(
    small_model: SmallModel, tmp_path: Path, kind: str, intervention: str, share: float
) -> None:
    model, pairs, checkpoint = small_model(kind), random_pairs(seed=2), tmp_path / "checkpoint"
    options = {"tau": 0.02, "intervention": intervention, "order": "random", "edges_at_once": 4}
    all_calls: list[int] = []
    uninterrupted = acdc(model, pairs, metric=failing_after(10**9, all_calls), **options)
    limit = 1 + int(share * len(all_calls))
    with pytest.raises(Interrupted):
        acdc(model, pairs, metric=failing_after(limit, []), checkpoint=checkpoint, **options)
    calls: list[int] = []
    resumed = acdc(model, pairs, metric=failing_after(10**9, calls), checkpoint=checkpoint, **options)
    assert torch.equal(resumed.mask, uninterrupted.mask)
    assert torch.equal(resumed.scores.nan_to_num(nan=9.0), uninterrupted.scores.nan_to_num(nan=9.0))
    assert resumed.provenance == uninterrupted.provenance
    if share == 0.9:  # what was done is not done again
        assert len(calls) < 0.6 * len(all_calls)


CHANGES: dict[str, dict] = {
    "tau": {"tau": 0.03},
    "metric": {"metric": "kl"},
    "intervention": {"intervention": "patching"},
    "order": {"order": "normal"},
    "absolute": {"absolute": True},
    "normalize": {"normalize": "positions"},
    "skip": {"skip": ("m1",)},
    "prefilter": {"prefilter": 150},
    "grouped": {"grouped": False},
    "full_answer": {"full_answer": True},
    "pairs": {"pairs": random_pairs(seed=3)},
    "model": {"kind": "qwen2"},
}


@pytest.fixture(scope="module")
def written_checkpoint(small_model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run with tau = 0.02 leaves behind."""
    path = tmp_path_factory.mktemp("acdc") / "checkpoint"
    acdc(small_model("llama"), random_pairs(seed=2), tau=0.02, checkpoint=path)
    return path.read_bytes()


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_run_is_refused(
    small_model: SmallModel, written_checkpoint: bytes, tmp_path: Path, change: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(written_checkpoint)
    options = {"kind": "llama", "pairs": random_pairs(seed=2), "tau": 0.02, "checkpoint": checkpoint} | CHANGES[change]
    model, pairs = small_model(options.pop("kind")), options.pop("pairs")
    line = refusal(model, pairs, MethodError, **options)
    assert str(checkpoint) in line
    assert checkpoint.read_bytes() == written_checkpoint


def test_a_file_that_is_no_checkpoint_is_refused(small_model: SmallModel, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a checkpoint")
    assert str(path) in refusal(small_model("llama"), random_pairs(), MethodError, checkpoint=path)
    assert path.read_text() == "not a checkpoint"


# --- bad input ---------------------------------------------------------------------------------------------------


def refusal(model: Model, pairs: Sequence[TokenPair], kind: type[KnowledgeCircuitsError], **options: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(kind) as error:
        acdc(model, pairs, **options)
    assert str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": -0.1}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"order": "sideways"}, "'sideways'"),
        ({"normalize": "tokens"}, "'tokens'"),
        ({"metric": "accuracy"}, "'accuracy'"),
        ({"intervention": "noise"}, "'noise'"),
        ({"skip": ("m9",)}, "'m9'"),
        ({"skip": ("a0.h0<q>",)}, "'a0.h0<q>'"),
        ({"prefilter": 0}, "prefilter"),
        ({"prefilter": -5}, "prefilter"),
        ({"prefilter": 10**6}, "prefilter"),
        ({"edges_at_once": 0}, "edges_at_once"),
    ],
    ids=str,
)
def test_bad_options_are_refused(small_model: SmallModel, options: dict, said: str) -> None:
    line = refusal(small_model("llama"), random_pairs(), MethodError, **options)
    assert said in line
    if "sideways" in line:
        assert "reverse" in line
    if "tokens" in line:
        assert "positions" in line


def test_no_pairs_are_refused(small_model: SmallModel) -> None:
    refusal(small_model("llama"), [], TaskError)


# --- predictions, which may cost time and change nothing ------------------------------------------------------------


def test_chances_are_shares_of_past_effects() -> None:
    ratios = (-0.01, 0.0, 0.01)
    for size, stand in ((1.0, 2), (0.2, 3), (50.0, 2)):
        assert chance_to_stand(size, ratios, 0.01, False) == pytest.approx((stand + 0.5) / 4)
    assert chance_to_stand(50.0, ratios, 0.01, True) == pytest.approx(1.5 / 4)


def test_as_many_tests_are_batched_as_pay() -> None:
    assert how_many([0.5] * 20) == 2  # 1 of 1, 1.5 of 2, 1.75 of 3 expected to count
    assert how_many([0.999] * 20) == how_many([0.001] * 20) == 20  # kept for sure is as good as removed for sure
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chances = torch.rand(12, generator=generator).tolist()
        likely = [max(chance, 1 - chance) for chance in chances]
        counting = [sum(math.prod(likely[:place]) for place in range(n)) for n in range(1, 13)]
        worth = [count / (n + 1) for n, count in enumerate(counting, start=1)]
        assert how_many(chances) == 1 + worth.index(max(worth))
