"""Integrals over the neurons of one position, and runs with them changed, against hooks on the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, inner
from oracles import neurons as oracle

from kc_lib.errors import MethodError, ModelError
from kc_lib.models.model import Model
from kc_lib.neurons.integrate import (
    AnswerStates,
    Paths,
    adaptive_gradients,
    answer_states,
    changed_logits,
    integrated_gradients,
    quadrature,
)
from kc_lib.residual.encoder import Residual

KINDS = [kind for kind in CONFIGS if kind != "olmo2"]
TOKENS = [[1, 30, 41, 52, 63], [1, 77, 8, 19, 110], [1, 30, 41, 7, 63]]
TARGETS = [5, 120, 33]


def positions_of(kind: str) -> list[int]:
    return [2, 0, 3] if kind == "bert" else [4, 4, 4]


def changes_of_layer(decoder: Residual, states: AnswerStates, layer: int, targets: torch.Tensor) -> torch.Tensor:
    """p(w) - p(0)."""
    nothing = changed_logits(decoder, states, lambda at, x: 0 * x if at == layer else x, layer)
    return (states.logits.softmax(-1) - nothing.softmax(-1))[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_probability", [False, True])
def test_attributions_equal_a_plain_loop(
    kind: str,
    log_probability: bool,
    small_folder: Callable[[str], Path],
    small_model: Callable[[str], Model],
) -> None:
    decoder, positions = small_model(kind).mlp_residual, positions_of(kind)
    states = answer_states(decoder, torch.tensor(TOKENS), torch.tensor(positions))
    plain = inner(small_folder(kind), kind)
    points, weights = quadrature(3, "trapezoid")
    scores = integrated_gradients(Paths(decoder, states, torch.tensor(TARGETS), log_probability, max_rows=7), 3)
    for layer, found in enumerate(scores):
        for row, (tokens, position, target) in enumerate(zip(TOKENS, positions, TARGETS, strict=True)):
            expected = oracle.attribution(plain, kind, tokens, position, target, layer, points, weights, log_probability)
            scale = expected.abs().max()
            assert scale > 1e-9
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4 * float(scale))
            neurons = oracle.neurons_of(plain, kind, tokens, position, layer)
            torch.testing.assert_close(states.neurons[layer, row], neurons, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "gemma2", "bert"])
def test_batches_and_rows_at_once_change_nothing(kind: str, small_model: Callable[[str], Model]) -> None:
    decoder, positions, targets = small_model(kind).mlp_residual, torch.tensor(positions_of(kind)), torch.tensor(TARGETS)
    together = answer_states(decoder, torch.tensor(TOKENS), positions)
    alone = answer_states(decoder, torch.tensor(TOKENS[1:2]), positions[1:2])
    torch.testing.assert_close(together.logits[1:2], alone.logits, rtol=1e-4, atol=1e-5)
    scores = [integrated_gradients(Paths(decoder, together, targets, max_rows=rows), 5) for rows in (1, 7, 512)]
    for other in scores[1:]:
        torch.testing.assert_close(scores[0], other, rtol=1e-4, atol=1e-8)
    single = integrated_gradients(Paths(decoder, alone, targets[1:2]), 5)
    torch.testing.assert_close(scores[0][:, 1:2], single, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_scores_of_a_layer_sum_to_what_its_neurons_do(kind: str, small_model: Callable[[str], Model]) -> None:
    """Completeness (Sundararajan et al. 2017): the sum tends to p(w) - p(0); trapezoid fastest."""
    decoder, positions = small_model(kind).mlp_residual, torch.tensor(positions_of(kind))
    states = answer_states(decoder, torch.tensor(TOKENS), positions)
    targets = states.logits.argmax(-1)
    layer = 1
    effect = changes_of_layer(decoder, states, layer, targets)
    paths = Paths(decoder, states, targets)
    gaps = {
        (rule, m): float((integrated_gradients(paths, m, rule)[layer].sum(-1) - effect).abs().max())
        for rule in ("right", "left", "trapezoid")
        for m in (20, 200)
    }
    assert effect.abs().max() > 1e-3
    for rule in ("right", "left"):
        assert gaps[rule, 200] < gaps[rule, 20] / 5
    assert gaps["trapezoid", 200] < 1e-4
    assert gaps["trapezoid", 20] < gaps["right", 20]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "bert"])
def test_adaptive_points_reach_the_limit(kind: str, small_model: Callable[[str], Model]) -> None:
    decoder, positions = small_model(kind).mlp_residual, torch.tensor(positions_of(kind))
    states = answer_states(decoder, torch.tensor(TOKENS), positions)
    targets = states.logits.argmax(-1)
    limits = integrated_gradients(Paths(decoder, states, targets), 4000)
    scores = adaptive_gradients(Paths(decoder, states, targets, max_rows=50), 1e-4)
    for layer, (found, limit) in enumerate(zip(scores, limits, strict=True)):
        # halving stops when the sum is right; single scores, some of them large and opposite, are nearly so
        torch.testing.assert_close(found, limit, rtol=0.0, atol=5e-3 * float(limit.abs().max()))
        effect = changes_of_layer(decoder, states, layer, targets)
        torch.testing.assert_close(found.sum(-1), effect, rtol=0.0, atol=1e-3)


def test_adaptive_points_of_log_probabilities(small_model: Callable[[str], Model]) -> None:
    decoder, positions = small_model("llama").mlp_residual, torch.tensor(positions_of("llama"))
    states = answer_states(decoder, torch.tensor(TOKENS), positions)
    targets = torch.tensor(TARGETS)
    paths = Paths(decoder, states, targets, log_probability=True)
    limit, found = integrated_gradients(paths, 2000), adaptive_gradients(paths, 1e-3)
    torch.testing.assert_close(found, limit, rtol=0.0, atol=5e-3 * float(limit.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_changed_neurons_equal_hooks(
    kind: str, small_folder: Callable[[str], Path], small_model: Callable[[str], Model]
) -> None:
    """In several layers at once: those above see what those below became."""
    decoder, positions = small_model(kind).mlp_residual, positions_of(kind)
    states = answer_states(decoder, torch.tensor(TOKENS), torch.tensor(positions))
    plain = inner(small_folder(kind), kind)
    mask = torch.ones(decoder.n_layers, decoder.parts(0).W_out.shape[0])
    mask[:, ::3] = 2.0
    mask[-1, 1::5] = 0.0
    for first in (0, 1):
        found = changed_logits(decoder, states, lambda layer, x: x * mask[layer], first)
        for row, (tokens, position) in enumerate(zip(TOKENS, positions, strict=True)):
            changes = {layer: lambda x, m=mask[layer]: x * m for layer in range(first, decoder.n_layers)}
            expected = oracle.logits_with(plain, kind, tokens, position, changes)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    same = changed_logits(decoder, states, lambda layer, x: x)
    torch.testing.assert_close(same, states.logits, rtol=1e-4, atol=1e-4)


def test_quadrature() -> None:
    assert quadrature(4, "right") == ([0.25, 0.5, 0.75, 1.0], [0.25] * 4)
    assert quadrature(4, "left") == ([0.0, 0.25, 0.5, 0.75], [0.25] * 4)
    assert quadrature(2, "trapezoid") == ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    with pytest.raises(MethodError, match="rule 'simpson'"):
        quadrature(4, "simpson")
    with pytest.raises(MethodError, match="at least 1"):
        quadrature(0, "left")


def test_masked_models_have_neurons_and_no_circuits(small_model: Callable[[str], Model]) -> None:
    decoder = small_model("bert").mlp_residual
    assert not decoder.causal
    with pytest.raises(ModelError, match="both directions"):
        _ = small_model("bert").residual


def test_a_causal_prompt_ends_where_it_is_read(small_model: Callable[[str], Model]) -> None:
    with pytest.raises(MethodError, match="must end at the position"):
        answer_states(small_model("gpt2").mlp_residual, torch.tensor(TOKENS), torch.tensor([4, 3, 4]))
