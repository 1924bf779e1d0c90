"""What heads do, against slow oracles on every kind of decoder: patterns, copies, CSPA, path patching."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles.heads import oracle_copied, oracle_cspa, oracle_path_patch, oracle_readout, oracle_result
from transformer_lens.head_detector import detect_head
from transformer_lens.patching import get_act_patch_direct_path

from kc_lib.components.head_runs import copied, copies_in_top, mean_pattern_by_offset, run_layers
from kc_lib.errors import MethodError, first_line
from kc_lib.heads.copying import names_after_block_0
from kc_lib.heads.general import repeat_scores, repeated_tokens
from kc_lib.heads.path_patching import Paths, patch_queries
from kc_lib.heads.successor import successor_choices
from kc_lib.heads.suppression_runs import mean_head_outputs, suppression_divergences
from kc_lib.models.model import Model
from kc_lib.residual.activations import writer_outputs

KINDS = ("gpt2", "neox", "gptj", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi")
Models = Callable[[str], Model]
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, 200, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- attention


@every_kind
def test_patterns_are_the_models_own(small_model: Models, kind: str) -> None:
    model, tokens = small_model(kind), draw(0, 2, 11)
    _, cache = model.bridge.run_with_cache(tokens)
    for run in run_layers(model.residual, tokens):
        torch.testing.assert_close(run.pattern, cache[f"blocks.{run.layer}.attn.hook_pattern"], atol=1e-5, rtol=0)
        torch.testing.assert_close(run.resid_pre, cache[f"blocks.{run.layer}.hook_resid_pre"], atol=1e-3, rtol=1e-4)


@every_kind
def test_repeat_scores_are_means_over_the_second_half(small_model: Models, kind: str) -> None:
    model, n = small_model(kind), 8
    found = repeat_scores(model, n_tokens=n, n_sequences=3, batch_size=2, seed=5)
    tokens = repeated_tokens(model, n, 3, 5)
    assert (tokens[:, -n:] == tokens[:, -2 * n : -n]).all()
    assert all(len(set(row[-n:].tolist())) == n for row in tokens)
    _, cache = model.bridge.run_with_cache(tokens)
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        n_pos = tokens.shape[1]
        for name, back in (("previous_token", 1), ("duplicate_token", n), ("induction", n - 1)):
            expected = [float(pattern[row, q, q - back]) for row in range(3) for q in range(n_pos - n, n_pos)]
            assert float(found[name].scores[layer, head]) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_detect_head_has_the_same_sums(small_model: Models) -> None:
    """On words that survive the way through text, TransformerLens's score is ours times the share of rows it covers."""
    model, n = small_model("gpt2"), 9
    tokens = repeated_tokens(model, n, 1, 0)
    text = model.tokenizer.decode(tokens[0, -2 * n :])
    assert model.bridge.to_tokens(text).tolist() == tokens.tolist()
    by_offset = mean_pattern_by_offset(model.residual, tokens, tokens.shape[1] - n)
    rows = n / tokens.shape[1]
    theirs = detect_head(model.bridge, text, "duplicate_token_head")
    torch.testing.assert_close(theirs, by_offset[:, :, n] * rows, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- weights


@every_kind
def test_copied_is_what_the_head_writes_of_one_token(small_model: Models, kind: str) -> None:
    """Under norms on outputs up to a positive factor for each row, which is all that scores use."""
    model = small_model(kind)
    decoder = model.residual
    vectors = torch.randn(5, decoder.W_U.shape[0], generator=torch.Generator().manual_seed(1))
    for layer in (0, 2):
        attention = decoder.blocks[layer].attention
        ours = copied(attention, vectors)
        for head in range(decoder.n_heads):
            expected = oracle_copied(model, layer, head, vectors)
            if attention.post_norm is not None:
                ours[head] *= (expected.norm(dim=-1) / ours[head].norm(dim=-1))[:, None]
            torch.testing.assert_close(ours[head], expected, atol=1e-4, rtol=1e-3)


@every_kind
def test_names_in_the_top_are_those_of_the_models_own_readout(small_model: Models, kind: str) -> None:
    model = small_model(kind)
    decoder = model.residual
    prompts = [tuple(row) for row in draw(2, 4, 9).tolist()]
    resid, tokens = names_after_block_0(decoder, prompts, [{prompt[3], prompt[7]} for prompt in prompts])
    after = [model.bridge.run_with_cache(torch.tensor([prompt]))[1]["blocks.0.hook_resid_post"][0] for prompt in prompts]
    torch.testing.assert_close(resid[:2], after[0][[3, 7]], atol=1e-4, rtol=1e-4)
    assert tokens[:2].tolist() == [prompts[0][3], prompts[0][7]]
    found = copies_in_top(decoder, 1, resid, tokens, 20)
    for head in range(decoder.n_heads):
        written = copied(decoder.blocks[1].attention, resid)[head]
        for sign in (0, 1):
            stream = written * (-1) ** sign
            top = oracle_readout(model, stream, stream).topk(20).indices
            expected = torch.tensor([[int(token) in row.tolist() for token in tokens] for row in top])
            assert (found[sign, head] == expected).float().mean() > 0.98  # a rounding may exchange the last two


@every_kind
def test_successor_choices_follow_the_first_mlp(small_model: Models, kind: str) -> None:
    """The token embedding, the first block's MLP by the model's own modules, the head, the model's readout."""
    model = small_model(kind)
    decoder = model.residual
    words, targets = torch.tensor([5, 9, 30]), torch.tensor([6, 10, 31, 77])
    block = model.bridge.blocks[0]
    embedding = model.bridge.embed.W_E[words][:, None].detach()
    norm = getattr(block, "ln2", None) or block.ln1
    with torch.no_grad():
        seen = block.mlp(norm(embedding))
        seen = (block.ln2_post(seen) if hasattr(block, "ln2_post") else seen)[:, 0]
    choices = successor_choices(decoder, words, targets)
    for layer in range(decoder.n_layers):
        for head in range(decoder.n_heads):
            stream = oracle_copied(model, layer, head, seen)
            if decoder.blocks[layer].attention.post_norm is not None:
                stream = copied(decoder.blocks[layer].attention, seen)[head]  # held to the oracle above
            logits = oracle_readout(model, stream, stream)[:, targets]
            assert choices[layer, head].tolist() == targets[logits.argmax(-1)].tolist()


# ---------------------------------------------------------------------------------------------------- copy suppression


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen2", "gemma2", "phi"])
def test_cspa_is_that_of_the_slow_loop(small_model: Models, kind: str) -> None:
    model = small_model(kind)
    decoder = model.residual
    text = draw(3, 3, 12) % 14 + 3  # few words, so that tokens repeat
    sources = torch.arange(200) % 5 != 0
    share = 0.2
    means = mean_head_outputs(decoder, text.split(2))
    found = suppression_divergences(decoder, text[:2], means, sources, share, torch.Generator().manual_seed(0))
    kept = []
    for layer, head in ((0, 1), (1, 2), (2, 3)):
        ablated, preserved = oracle_cspa(model, text, text[:2], layer, head, sources, share)
        assert float(found.ablated[layer, head].mean()) == pytest.approx(ablated, rel=2e-3, abs=1e-6)
        assert float(found.preserved[layer, head].mean()) == pytest.approx(preserved, rel=2e-3, abs=1e-6)
        kept.append(1 - preserved / ablated)
    assert max(map(abs, kept)) > 5e-3  # something was preserved, or the test says nothing


def test_cspa_keeps_every_source_at_share_one(small_model: Models) -> None:
    """Then the predicted tokens and random ones are the same, all of them."""
    model = small_model("llama")
    decoder = model.residual
    text = draw(3, 2, 12) % 14 + 3
    means = mean_head_outputs(decoder, [text])
    every = torch.ones(200, dtype=torch.bool)
    found = suppression_divergences(decoder, text, means, every, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.preserved, found.chance)
    none = suppression_divergences(decoder, text, means, ~every, 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(none.preserved, none.ablated)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_means_are_those_of_what_heads_add(small_model: Models, kind: str) -> None:
    model = small_model(kind)
    text = draw(4, 3, 7)
    _, cache = model.bridge.run_with_cache(text)
    means = mean_head_outputs(model.residual, text.split(2))
    expected = sum(sum(oracle_result(model, cache, 1, 2, row, place)) for row in range(3) for place in range(1, 7)) / 18
    torch.testing.assert_close(means[1, 2].double(), expected, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- path patching


def sender_difference(model: Model, clean: torch.Tensor, other: torch.Tensor, sender: tuple[int, int]) -> torch.Tensor:
    """From the caches of two runs, place by place."""
    rows = []
    caches = [model.bridge.run_with_cache(tokens)[1] for tokens in (other, clean)]
    for row in range(len(clean)):
        places = []
        for place in range(clean.shape[1]):
            there, here = (sum(oracle_result(model, cache, *sender, row, place)) for cache in caches)
            places.append(there - here)
        rows.append(torch.stack(places))
    return torch.stack(rows).float()


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize(("start", "through_mlps"), [(8, True), (8, False), (0, True)])
def test_path_patching_is_that_of_hooks(small_model: Models, kind: str, start: int, through_mlps: bool) -> None:
    model = small_model(kind)
    clean, other = draw(6, 2, 9), draw(7, 2, 9)
    senders, receivers = [(0, 1), (1, 2)], [(1, 0), (2, 1), (2, 3)]
    tokens = torch.tensor([4, 9, 120])
    patched = patch_queries(model.residual, clean, other, Paths(senders, receivers, start, through_mlps), tokens)
    plain = model.bridge(clean)[:, -1, tokens]
    assert (patched.logits - plain).abs().max() > 1e-3
    for i, sender in enumerate(senders):
        difference = sender_difference(model, clean, other, sender)
        logits, attention = oracle_path_patch(model, clean, difference, sender, receivers, start, through_mlps)
        torch.testing.assert_close(patched.logits[i], logits[:, tokens], atol=1e-4, rtol=1e-4)
        for j, receiver in enumerate(receivers):
            torch.testing.assert_close(patched.attention[i, j], attention[receiver], atol=1e-5, rtol=0)


def direct_path_obstacle(model: Model) -> str | None:
    """Why TransformerLens's direct path patching into queries has no exact result for this model; None where it has.

    Grouped queries and parallel blocks are no obstacle. Norms on outputs (Gemma) are: what a head adds to the stream is not
    ``z W_O`` there. So are attention modules without an input of its own for every head (GPT-J).
    """
    if any(block.attention.post_norm is not None for block in model.residual.blocks):
        return "a layer normalises its attention output, so a head's write is not z W_O"
    before = bool(getattr(model.cfg, "use_split_qkv_input", False))
    try:
        model.bridge.set_use_split_qkv_input(True)
    except (NotImplementedError, ValueError) as error:
        return first_line(error)
    finally:
        model.bridge.set_use_split_qkv_input(before)
    return None


@every_kind
def test_transformer_lens_agrees_where_it_is_said_to_be_exact(small_model: Models, kind: str) -> None:
    model = small_model(kind)
    clean, other = draw(6, 2, 9), draw(7, 2, 9)
    caches = [model.bridge.run_with_cache(tokens)[1] for tokens in (other, clean)]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, 5] - logits[:, -1, 7]).mean()

    def theirs() -> torch.Tensor:
        return get_act_patch_direct_path(model.bridge, clean, *caches, metric, 0, 1, "q", verbose=False)

    assert (direct_path_obstacle(model) is not None) == (kind in ("gptj", "gemma2", "gemma3"))
    if direct_path_obstacle(model) is not None:
        with pytest.raises((ValueError, NotImplementedError)):
            theirs()
        return
    expected = theirs()
    assert (expected[1:] - metric(model.bridge(clean))).abs().max() > 1e-3
    for layer in (1, 2):
        for head in range(4):
            patched = patch_queries(
                model.residual, clean, other, Paths([(0, 1)], [(layer, head)], through_mlps=False), torch.tensor([5, 7])
            )
            ours = (patched.logits[0, :, 0] - patched.logits[0, :, 1]).mean()
            torch.testing.assert_close(ours, expected[layer, head], atol=1e-5, rtol=1e-5)


def test_a_sender_in_the_receivers_layer_changes_nothing(small_model: Models) -> None:
    model = small_model("llama")
    clean, other = draw(6, 2, 9), draw(7, 2, 9)
    tokens = torch.tensor([4, 9])
    patched = patch_queries(model.residual, clean, other, Paths([(1, 0), (2, 1)], [(1, 3)], 8), tokens)
    torch.testing.assert_close(patched.logits[0], model.bridge(clean)[:, -1, tokens], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patched.logits[1], patched.logits[0])


def test_oracle_results_are_the_writers_outputs(small_model: Models) -> None:
    """The oracle and the library agree on what a head adds under norms on outputs."""
    model, tokens = small_model("gemma2"), draw(6, 1, 5)
    _, cache = model.bridge.run_with_cache(tokens)
    decoder = model.residual
    outputs = writer_outputs(decoder, tokens)
    place = list(decoder.graph().writers).index("a1.h2")
    torch.testing.assert_close(
        outputs[place, 0, 4].double(), sum(oracle_result(model, cache, 1, 2, 0, 4)), atol=1e-5, rtol=1e-4
    )


def test_too_long_for_the_context(small_model: Models) -> None:
    with pytest.raises(MethodError, match=r"context of 64: use n_tokens=3[12] or less"):
        repeat_scores(small_model("gpt2"), n_tokens=100)
