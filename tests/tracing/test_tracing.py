"""Causal tracing against one plain forward pass per cell, and what a user can ask of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import KINDS, NAMED, SmallFolder, SmallModel, hf_model
from oracles.tracing import kept_run, oracle_restored
from torch import Tensor

from kc_lib.errors import KnowledgeCircuitsError, MethodError, ModelError, TaskError
from kc_lib.models.model import Model
from kc_lib.models.smollm2 import cached_smollm2
from kc_lib.tasks.facts import FactPrompt, load_facts
from kc_lib.tasks.options import POSITION_CLASSES
from kc_lib.tracing.effects import TracingResult
from kc_lib.tracing.noise import noise_scale, noised, replaced
from kc_lib.tracing.options import MEDIATORS, NOISES
from kc_lib.tracing.restore import Cells, answer_probabilities, fact_runs, restored_probabilities
from kc_lib.tracing.trace import self_checks, trace

CLOSE = 1e-5
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in NAMED else pytest.mark.slow) for kind in KINDS]
)


def random_fact(model: Model, n_tokens: int, subject: tuple[int, ...], seed: int = 0) -> FactPrompt:
    """A prompt of random tokens, BOS first, whose answer is what the model says."""
    rng = random.Random(seed)
    tokens = (1, *(rng.randrange(3, 200) for _ in range(n_tokens - 1)))
    with torch.no_grad():
        answer = int(model.bridge(torch.tensor([tokens]))[0, -1].argmax())
    words = [f"w{token}" for token in tokens[1:]]
    text = {"prompt": " ".join(words), "subject": " ".join(words[i - 1] for i in subject), "answer": f"w{answer}"}
    return FactPrompt(tokens, subject, answer, text)


def random_facts(model: Model) -> list[FactPrompt]:
    """Facts of all shapes: subject right after BOS and not, of one to three tokens, one or more tokens after it."""
    shapes = ((8, (2, 3, 4)), (6, (1,)), (7, (4, 5)), (6, (2, 3)), (5, (1, 2, 3)), (6, (2, 3)))
    return [random_fact(model, n, subject, seed) for seed, (n, subject) in enumerate(shapes)]


def random_noise(fact: FactPrompt, d_model: int, n_samples: int = 3, size: float = 1.0, seed: int = 0) -> Tensor:
    return size * torch.randn(n_samples, len(fact.subject), d_model, generator=torch.Generator().manual_seed(seed))


def drawn_noise(model: Model, fact: FactPrompt, corrupted: Tensor) -> Tensor:
    """The noise in corrupted embeddings, as the oracle takes it."""
    embedded = model.residual.embed(torch.tensor([fact.tokens]))[:, fact.subject[0] :]
    difference = corrupted - embedded
    assert not difference[:, len(fact.subject) :].any()
    return difference[:, : len(fact.subject)]


# --- against plain forward passes --------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("mediator", MEDIATORS)
def test_every_cell_is_a_plain_forward_pass(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, mediator: str
) -> None:
    model, reference = small_model(kind), hf_model(small_folder(kind))
    decoder = model.residual
    moved = 0.0
    for fact in random_facts(model)[:3]:
        start, tokens = fact.subject[0], torch.tensor(fact.tokens)
        noise = random_noise(fact, decoder.W_U.shape[0])
        corrupted = decoder.embed(tokens[None])[:, start:].repeat(len(noise), 1, 1)
        corrupted[:, : len(fact.subject)] += noise
        runs = fact_runs(decoder, tokens, start, corrupted, fact.answer)
        given = (tokens[None], fact.subject, noise, fact.answer)
        with torch.no_grad():
            clean, p_clean = kept_run(reference, *given[:2], torch.zeros_like(noise), fact.answer)
            kept, p_corrupted = kept_run(reference, *given)
        assert (answer_probabilities(decoder, runs, runs.clean) - p_clean[:1]).abs().max() <= CLOSE
        assert (answer_probabilities(decoder, runs, runs.corrupted) - p_corrupted).abs().max() <= CLOSE
        n = len(tokens) - start
        grid = torch.cartesian_prod(torch.arange(decoder.n_layers), torch.arange(n))
        restored = torch.eye(n, dtype=torch.bool)[grid[:, 1]]
        for window in (1, 2, 10) if mediator in ("attention", "mlp") else (10,):
            expected = torch.stack(
                [
                    oracle_restored(reference, *given, mediator, layer, [start + p], window, (clean, kept))
                    for layer, p in grid.tolist()
                ]
            )
            for at_once in (2, 5, 1000):
                found = restored_probabilities(decoder, runs, Cells(mediator, grid[:, 0], restored, window), at_once)
                assert (found - expected).abs().max() <= CLOSE
        moved = max(moved, (expected - p_corrupted).abs().max().item())
    assert moved > 0.01  # or the test could not tell


def test_several_positions_at_once(small_model: SmallModel, small_folder: SmallFolder) -> None:
    model, reference = small_model("gemma2"), hf_model(small_folder("gemma2"))
    decoder, fact = model.residual, random_facts(model)[0]
    tokens, noise = torch.tensor(fact.tokens), random_noise(fact, decoder.W_U.shape[0])
    corrupted = decoder.embed(tokens[None])[:, 2:].repeat(3, 1, 1)
    corrupted[:, :3] += noise
    runs = fact_runs(decoder, tokens, 2, corrupted, fact.answer)
    sets = [(0, 2), (1, 2, 5), (2,), (3, 4)]
    restored = torch.tensor([[p in chosen for p in range(6)] for chosen in sets])
    for mediator in MEDIATORS:
        found = restored_probabilities(decoder, runs, Cells(mediator, torch.tensor([0, 1, 2, 0]), restored, 2))
        for p, layer, chosen in zip(found, (0, 1, 2, 0), sets, strict=True):
            positions = [2 + i for i in chosen]
            expected = oracle_restored(
                reference, tokens[None], fact.subject, noise, fact.answer, mediator, layer, positions, 2
            )
            assert (p - expected).abs().max() <= CLOSE


@every_kind
def test_trace_gives_the_oracles_means(small_model: SmallModel, small_folder: SmallFolder, kind: str) -> None:
    """From facts to frame: every row is the mean over one and the same noise, for all mediators."""
    model, reference = small_model(kind), hf_model(small_folder(kind))
    decoder, facts = model.residual, random_facts(model)
    result = trace(model, facts, mediators=MEDIATORS, window=2, n_samples=2, seed=3, batch_size=4)
    assert len(result.facts) == len(facts)
    scale = noise_scale(decoder, facts, "gaussian")
    for number in (1, 2):
        fact = facts[number]
        noise = drawn_noise(model, fact, noised(decoder, fact, "gaussian", scale, 2, 3))
        given = (torch.tensor([fact.tokens]), fact.subject, noise, fact.answer)
        with torch.no_grad():
            clean, p_clean = kept_run(reference, *given[:2], torch.zeros_like(noise), fact.answer)
            kept, p_corrupted = kept_run(reference, *given)
        rows = result.frame[result.frame["fact"] == number]
        assert len(rows) == len(MEDIATORS) * decoder.n_layers * (len(fact.tokens) - fact.subject[0])
        assert rows["p_clean"].to_numpy() == pytest.approx(float(p_clean[0]), abs=CLOSE)
        assert rows["p_corrupted"].to_numpy() == pytest.approx(float(p_corrupted.mean()), abs=CLOSE)
        for row in rows.to_dict("records"):
            p = oracle_restored(reference, *given, row["mediator"], row["layer"], [row["position"]], 2, (clean, kept))
            assert row["p"] == pytest.approx(float(p.mean()), abs=CLOSE)
            assert row["std"] == pytest.approx(float(p.std()), abs=CLOSE)
            assert row["token"] == f"w{fact.tokens[row['position']]}"
            assert row["position_class"] == fact.position_class(row["position"])


def test_no_result_depends_on_the_batch_or_on_other_facts(small_model: SmallModel) -> None:
    model = small_model("qwen2")
    facts = random_facts(model)
    options = {"mediators": MEDIATORS, "window": 2, "sigma": 1.0, "n_samples": 2}
    whole = trace(model, facts, batch_size=1000, **options)
    small = trace(model, facts, batch_size=1, **options)
    compare(whole.frame, small.frame)
    alone = trace(model, facts[2:3], **options)
    compare(whole.frame[whole.frame["fact"] == 2].assign(fact=0).reset_index(drop=True), alone.frame)
    other = trace(model, facts, seed=1, **options)
    assert (other.frame["p"] - whole.frame["p"]).abs().max() > 1e-3
    one = trace(model, facts, **(options | {"n_samples": 1}))
    assert one.frame["std"].isna().all()


def compare(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=False, atol=1e-6, rtol=0)


# --- noise -------------------------------------------------------------------------------------------------------


@every_kind
def test_the_noise_is_measured_on_the_tokens_own_part_of_the_stream(
    small_model: SmallModel, small_folder: SmallFolder, kind: str
) -> None:
    """Three standard deviations of scaled token embeddings, without learned positions; and of the whole vocabulary."""
    model, embedding = small_model(kind), hf_model(small_folder(kind)).get_input_embeddings().weight.detach()
    scaled = embedding * 32**0.5 if kind.startswith("gemma") else embedding
    decoder, facts = model.residual, random_facts(model)
    tokens = [fact.tokens[i] for fact in facts for i in fact.subject]
    assert float(noise_scale(decoder, facts, "gaussian")) == pytest.approx(3 * float(scaled[tokens].std()), rel=1e-5)
    assert float(noise_scale(decoder, facts, "uniform", 2.0)) == pytest.approx(2 * float(scaled[tokens].std()), rel=1e-5)
    assert float(noise_scale(decoder, facts, "gaussian", sigma=0.25)) == 0.25
    root = noise_scale(decoder, facts, "covariance", 2.0)
    assert (root @ root - 4 * scaled.T.cov()).abs().max() <= 1e-4 * scaled.var()


def test_draws_have_the_distribution_they_are_named_for(small_model: SmallModel) -> None:
    model = small_model("gpt2")
    decoder, fact = model.residual, random_facts(model)[0]

    def drawn(noise: str, scale: Tensor) -> Tensor:
        return drawn_noise(model, fact, noised(decoder, fact, noise, scale, 4000, 0)).flatten(0, 1).double()

    gaussian, uniform = drawn("gaussian", torch.tensor(0.5)), drawn("uniform", torch.tensor(0.5))
    assert float(gaussian.std()) == pytest.approx(0.5, rel=0.01)
    assert float(gaussian.abs().max()) > 1.5
    assert float(uniform.abs().max()) == pytest.approx(0.5, rel=0.01)
    assert float(uniform.std()) == pytest.approx(0.5 / 3**0.5, rel=0.01)
    root = noise_scale(decoder, [fact], "covariance", 1.0)
    expected = (root @ root).double()
    assert (drawn("covariance", root).T.cov() - expected).norm() / expected.norm() < 0.06


@pytest.mark.parametrize("noise", NOISES)
def test_every_noise_runs(small_model: SmallModel, noise: str) -> None:
    model = small_model("llama")
    result = trace(model, random_facts(model), noise=noise, n_samples=2, mediators=("state",))
    assert (result.facts["total_effect"].abs() > 1e-3).any()
    checks = self_checks(model, [random_fact(model, 6, (2, 3), seed) for seed in (1, 2)], noise=noise, n_samples=2)
    assert checks["gap"].max() <= CLOSE


def test_replacement_is_another_subject_of_equal_length(small_model: SmallModel, small_folder: SmallFolder) -> None:
    model, reference = small_model("neox"), hf_model(small_folder("neox"))
    facts = random_facts(model)
    subject_of = [tuple(fact.tokens[i] for i in fact.subject) for fact in facts]
    tokens = replaced(facts[3], facts, 10, seed=0)
    assert tokens is not None
    assert {tuple(row[2:4].tolist()) for row in tokens} <= {subject_of[2], subject_of[5]}
    assert replaced(facts[1], facts, 10, seed=0) is None
    same = replace(facts[2], answer=facts[3].answer)
    assert replaced(facts[3], [facts[3], same], 10, seed=0) is None
    result = trace(model, facts, noise="replacement", n_samples=10, mediators=("state",))
    assert "no other subject of equal token length" in result.provenance["dropped"]
    with torch.no_grad():
        expected = reference(tokens).logits[:, -1].softmax(-1)[:, facts[3].answer].mean()
    row = result.facts[result.facts["prompt"] == facts[3].text["prompt"]].iloc[0]
    assert row["p_corrupted"] == pytest.approx(float(expected), abs=CLOSE)
    assert row["n_samples"] == len(tokens)


# --- self-checks -------------------------------------------------------------------------------------------------


@every_kind
def test_the_self_checks_hold(small_model: SmallModel, kind: str) -> None:
    model = small_model(kind)
    checks = self_checks(model, random_facts(model), n_samples=3)
    assert set(checks["check"]) == {"everything", "last layer, last token", "nothing"}
    assert len(checks) == 3 * len(random_facts(model))
    assert checks["gap"].max() <= CLOSE


def test_the_self_checks_can_fail(small_model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("gpt2")
    spans = Cells.spans
    monkeypatch.setattr(Cells, "spans", lambda cells, n: (spans(cells, n)[0].clamp(max=n - 1), spans(cells, n)[1]))
    assert self_checks(model, random_facts(model)[:1], n_samples=1)["gap"].max() > 1e-3


# --- what is traced ----------------------------------------------------------------------------------------------


def test_unknown_facts_are_dropped_and_counted(small_model: SmallModel) -> None:
    model = small_model("gpt2")
    facts = random_facts(model)
    facts[1] = replace(facts[1], answer=(facts[1].answer + 1) % 200)
    result = trace(model, facts, n_samples=1, mediators=("state",))
    assert result.facts["prompt"].tolist() == [fact.text["prompt"] for i, fact in enumerate(facts) if i != 1]
    assert result.provenance["dropped"] == {"answer not known (rank above 1)": 1}
    assert (result.provenance["n_given"], result.provenance["n_traced"]) == (6, 5)
    few = trace(model, facts, n_samples=1, mediators=("state",), max_facts=2)
    assert few.provenance["dropped"] == {"answer not known (rank above 1)": 1, "beyond max_facts": 3}
    assert len(few.facts) == 2
    assert trace(model, facts, n_samples=1, mediators=("state",), known_only=False).provenance["n_traced"] == 6


def test_noise_of_size_zero_has_no_effect_and_divides_nothing(small_model: SmallModel) -> None:
    model = small_model("llama")
    result = trace(model, random_facts(model), level=0.0, n_samples=2, mediators=MEDIATORS)
    assert result.facts["total_effect"].abs().max() <= 1e-6
    assert result.indirect_effects()["indirect_effect"].abs().max() <= 1e-6
    assert np.isfinite(result.frame["p"]).all()


def test_a_traced_file_is_read_back(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("llama")
    result = trace(model, random_facts(model), n_samples=2, window=3)
    again = TracingResult.load(result.save(tmp_path / "tracing.parquet"))
    pd.testing.assert_frame_equal(again.frame, result.frame)
    pd.testing.assert_frame_equal(again.facts, result.facts)
    assert again.provenance == result.provenance
    assert again.provenance["window"] == 3
    (tmp_path / "spoiled.parquet").write_text("no parquet")
    for name in ("spoiled.parquet", "absent.parquet"):
        with pytest.raises(MethodError, match=name):
            TracingResult.load(tmp_path / name)


class _Interrupted(Exception):
    pass


def test_an_interrupted_trace_goes_on(small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kc_lib.tracing import trace as tracing

    model, file = small_model("gpt2"), tmp_path / "partial.parquet"
    facts, options = random_facts(model), {"n_samples": 2, "mediators": ("state", "mlp")}
    whole = trace(model, facts, **options)
    runs, counted = tracing._runs, itertools.count()

    def failing(*arguments: object) -> object:
        if next(counted) == 3:
            raise _Interrupted
        return runs(*arguments)

    monkeypatch.setattr(tracing, "_runs", failing)
    with pytest.raises(_Interrupted):
        trace(model, facts, checkpoint=file, **options)
    assert TracingResult.load(file).frame["fact"].nunique() == 3
    counted = itertools.count(10)
    resumed = trace(model, facts, checkpoint=file, **options)
    assert next(counted) == 13  # three facts were left, and only these were run
    pd.testing.assert_frame_equal(resumed.frame, whole.frame)
    pd.testing.assert_frame_equal(resumed.facts, whole.facts)
    again = trace(model, facts, checkpoint=file, batch_size=3, **options)
    assert next(counted) == 14
    pd.testing.assert_frame_equal(again.frame, whole.frame)
    for changed in ({"seed": 1}, {"level": 2.0}, {"mediators": ("state",)}):
        with pytest.raises(MethodError, match="another model, task or set of parameters"):
            trace(model, facts, checkpoint=file, **(options | changed))
    file.write_text("spoiled")
    with pytest.raises(MethodError, match="delete it"):
        trace(model, facts, checkpoint=file, **options)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"mediators": ("state", "magic")}, ("'magic'", "mlp_severed")),
        ({"mediators": ()}, ("mediators are none", "state")),
        ({"positions": "last token, magic"}, ("'magic'", "last subject token")),
        ({"window": 0}, ("window is 0",)),
        ({"n_samples": 0}, ("n_samples is 0",)),
        ({"n_samples": 2.5}, ("n_samples is 2.5",)),
        ({"batch_size": 0}, ("batch_size is 0",)),
        ({"max_facts": 0}, ("max_facts is 0",)),
        ({"noise": "magic"}, ("'magic'", "gaussian")),
        ({"level": -1}, ("level is -1",)),
        ({"level": float("nan")}, ("level is nan",)),
        ({"sigma": "much"}, ("sigma is 'much'",)),
        ({"noise": "covariance", "sigma": 0.1}, ("sigma=0.1", "covariance")),
        ({"known_rank": 0}, ("known_rank is 0",)),
        ({"magic": 1}, ("'magic'", "n_samples")),
    ],
    ids=str,
)
def test_bad_values_are_ours_and_one_line(small_model: SmallModel, given: dict, parts: tuple[str, ...]) -> None:
    model = small_model("gpt2")
    with pytest.raises(KnowledgeCircuitsError) as error:
        trace(model, random_facts(model), **given)
    for part in parts:
        assert part in str(error.value)


def test_nothing_to_trace(small_model: SmallModel) -> None:
    model = small_model("gpt2")
    with pytest.raises(TaskError, match="no facts to trace"):
        trace(model, [])
    unknown = [replace(fact, answer=(fact.answer + 1) % 200) for fact in random_facts(model)]
    with pytest.raises(TaskError, match=r"no known fact left.* 6 answers"):
        trace(model, unknown)
    facts = [random_fact(model, 6, (2,)), random_fact(model, 6, (2, 3))]
    with pytest.raises(TaskError, match="equal token length"):
        trace(model, facts, noise="replacement")
    with pytest.raises(MethodError, match="equal token length"):
        self_checks(model, facts, noise="replacement")


def test_masked_models_are_refused(small_model: SmallModel) -> None:
    facts = random_facts(small_model("gpt2"))
    with pytest.raises(ModelError, match="attends in both directions"):
        trace(small_model("bert"), facts)


# --- the embedded real model -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_exact_too(smollm2: Model) -> None:
    reference = hf_model(cached_smollm2())
    facts = load_facts("landmark_country", smollm2, template=1).facts
    fact = next(fact for fact in facts if len(fact.subject) == 3)
    decoder = smollm2.residual
    tokens, start = torch.tensor(fact.tokens), fact.subject[0]
    scale = noise_scale(decoder, facts, "gaussian")
    corrupted = noised(decoder, fact, "gaussian", scale, 2, 0)
    noise = drawn_noise(smollm2, fact, corrupted)
    runs = fact_runs(decoder, tokens, start, corrupted, fact.answer)
    given = (tokens[None], fact.subject, noise, fact.answer)
    with torch.no_grad():
        kept = (kept_run(reference, *given[:2], torch.zeros_like(noise), fact.answer)[0], kept_run(reference, *given)[0])
    last = len(tokens) - 1
    for mediator, cells in itertools.product(MEDIATORS, ([(0, start), (7, start + 2)], [(3, start + 1), (20, last)])):
        layers, positions = (torch.tensor(part) for part in zip(*cells, strict=True))
        restored = torch.eye(last + 1, dtype=torch.bool)[positions][:, start:]
        found = restored_probabilities(decoder, runs, Cells(mediator, layers, restored))
        expected = torch.stack([oracle_restored(reference, *given, mediator, layer, [p], 10, kept) for layer, p in cells])
        assert (found - expected).abs().max() <= CLOSE


def test_position_classes(small_model: SmallModel) -> None:
    classes = {name: name for name in POSITION_CLASSES}

    def of(fact: FactPrompt) -> list[str | None]:
        return [fact.position_class(i) for i in range(len(fact.tokens))]

    model = small_model("gpt2")
    first, middle, last, after, further, end = classes
    assert of(random_fact(model, 9, (2, 3, 4, 5))) == [None, None, first, middle, middle, last, after, further, end]
    assert of(random_fact(model, 5, (1, 2))) == [None, first, last, after, end]
    assert of(random_fact(model, 3, (1,))) == [None, last, end]
    assert of(random_fact(model, 4, (2, 3))) == [None, None, first, last]
    for subject in ((), (2, 4), (7,)):
        with pytest.raises(TaskError, match="no run of its tokens"):
            random_fact(model, 5, (1,)) and FactPrompt((1, 2, 3, 4, 5), subject, 7, {"prompt": "a", "subject": "b"})
