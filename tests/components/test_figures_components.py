"""Figures of what parts read and write show what was measured: values, signs, names, intervals, and what is left out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from helpers import SmallModel, random_pairs

from kc_lib.components.attention import attention_pattern, attention_sources, sources_frame
from kc_lib.components.direct import DirectAttribution, direct_attribution, promoted_tokens
from kc_lib.components.figures import (
    attention_bundle,
    attention_heatmap,
    attention_view,
    direct_by_layer,
    direct_heatmap,
    lens_figure,
    neuron_bars,
    promoted_table,
)
from kc_lib.components.lens import LogitLens, logit_lens
from kc_lib.components.neuron_readout import top_neurons
from kc_lib.errors import MethodError
from kc_lib.heads.ablation import HeadAblation
from kc_lib.heads.classes import HeadClasses
from kc_lib.heads.figures import ablation_figure, attention_sources_heatmap, head_class_figure
from kc_lib.tasks.batches import TokenPair

HOSTILE = "</script><b>"  # a token that would end a script, or be taken for a tag


def named(pairs: list[TokenPair]) -> list[TokenPair]:
    return [replace(pair, positions={"subject": (1, 2)}) for pair in pairs]


PAIRS = named(random_pairs((5, 7, 6, 8), seed=3))


def traces(figure: go.Figure, meta: str) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.meta == meta]


def said_in_panel(figure: go.Figure) -> str:
    assert not figure.data
    return figure.layout.annotations[0].text


def said(figure: go.Figure) -> str:
    return f"{figure.layout.title.text} {figure.layout.title.subtitle.text}"


@pytest.fixture(scope="module")
def lens(small_model: SmallModel) -> LogitLens:
    return logit_lens(small_model("llama"), PAIRS, "own")


@pytest.fixture(scope="module")
def direct(small_model: SmallModel) -> DirectAttribution:
    return direct_attribution(small_model("phi"), PAIRS, "difference")  # biases, parallel blocks


def test_the_lens_figure_draws_means_bands_and_medians_on_an_axis_with_the_best_rank_on_top(lens: LogitLens) -> None:
    figure, summary = lens_figure(lens), lens.summary()
    for measure in ("answer_rank", "answer_rank_at_subject", "answer_probability", "subject_probability"):
        band, mean, median = traces(figure, measure)
        assert list(mean.x) == summary["layer"].tolist()
        assert list(mean.y) == summary[measure].tolist()
        assert list(median.y) == summary[f"{measure}_median"].tolist()
        assert list(band.y) == [*summary[f"{measure}_low"], *summary[f"{measure}_high"][::-1]]
        assert summary["point"].iloc[3] in mean.hovertext[3]
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.yaxis2.type != "log"
    assert "own scale" in said(figure)
    assert f"n = {len(PAIRS)} facts" in said(figure)


def test_the_lens_figure_says_which_norm_and_that_no_subject_is_named(small_model: SmallModel) -> None:
    figure = lens_figure(logit_lens(small_model("llama"), random_pairs(seed=4), "final"))
    assert "final stream's scale" in said(figure).replace("&#x27;", "'")
    assert "no subject" in said(figure)
    assert traces(figure, "answer_rank")
    assert not traces(figure, "subject_probability") + traces(figure, "answer_rank_at_subject")


def test_a_lens_without_facts_is_refused(lens: LogitLens) -> None:
    with pytest.raises(MethodError, match="no facts"):
        lens_figure(LogitLens(lens.facts.iloc[:0], lens.provenance))


def test_the_heatmap_holds_every_head_and_mlp_centred_on_zero(direct: DirectAttribution) -> None:
    figure = direct_heatmap(direct)
    means = dict(zip(direct.components, direct.values.double().mean(0).tolist(), strict=True))
    heads, mlps = figure.data
    for layer in range(3):
        assert mlps.z[0][layer] == pytest.approx(means[f"m{layer}"])
        for head in range(4):
            assert heads.z[head][layer] == pytest.approx(means[f"a{layer}.h{head}"])
            assert f"a{layer}.h{head}<" in heads.customdata[head][layer]
    for trace in figure.data:
        assert trace.zmid == 0
        assert trace.zmin == -trace.zmax
        assert trace.zmax == pytest.approx(max(map(abs, means.values())))
    assert f"attention biases {means['attention biases']:+.2f}" in said(figure)


def test_bars_by_layer_and_their_running_total_end_at_the_logit_difference(direct: DirectAttribution) -> None:
    figure = direct_by_layer(direct)
    total = float(direct.totals.mean())
    (line,) = [trace for trace in figure.data if trace.type == "scatter"]
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert sum(sum(bar.y) for bar in bars) == pytest.approx(total, abs=1e-4)
    assert line.y[-1] == pytest.approx(total, abs=1e-4)
    assert {bar.name: len(bar.y) for bar in bars} == {"attention": 3, "MLP": 3, "embedding, biases": 3}
    after_first = direct.values[:, [direct.components.index(f"a0.h{head}") for head in range(4)]].sum(1)
    assert bars[0].y[0] == pytest.approx(float(after_first.mean()), abs=1e-5)
    assert max(bars[0].error_y.array) > 0
    assert any(f"total {total:.2f}" in note.text for note in figure.layout.annotations)


def test_promoted_tokens_are_listed_by_component_and_shown_as_they_are(small_model: SmallModel) -> None:
    frame = promoted_tokens(small_model("llama"), PAIRS, ["a1.h2", "m0"], k=4)
    frame.loc[0, "token"] = HOSTILE
    table = promoted_table(frame).data[0]
    components, raises, lowers = table.cells.values
    assert list(components) == ["<b>a1.h2</b>", "<b>m0</b>"]
    assert "&lt;/script&gt;&lt;b&gt;" in raises[0]
    for column, end in ((raises, "top"), (lowers, "bottom")):
        for cell, component in zip(column, ["a1.h2", "m0"], strict=True):
            own = frame[(frame["end"] == end) & (frame["component"] == component)]
            for value in own["value"]:
                assert f"{value:+.2f}" in cell
    with pytest.raises(MethodError, match="no components"):
        promoted_table(frame.iloc[:0])


def test_neurons_have_their_contribution_and_their_words(small_model: SmallModel) -> None:
    frame = top_neurons(small_model("llama"), PAIRS, n=5, k=3)
    figure = neuron_bars(frame)
    assert list(figure.data[0].x) == frame["contribution"].tolist()
    assert list(figure.data[0].y) == [f"m{row.layer}.n{row.neuron}" for row in frame.itertuples()]
    words = [note.text for note in figure.layout.annotations]
    assert all(tokens in words for tokens in frame["tokens"])
    with pytest.raises(MethodError, match="no neurons"):
        neuron_bars(frame.iloc[:0])


def test_attention_to_a_source_is_laid_out_by_layer_and_head(small_model: SmallModel) -> None:
    shares = attention_sources(small_model("llama"), PAIRS)
    figure = attention_sources_heatmap(sources_frame(shares), "relation")
    expected = shares[1].mean(-1)  # layer, head
    assert np.allclose(np.array(figure.data[0].z, dtype=float), expected.T.numpy(), atol=1e-6)
    layer, head = divmod(int(expected.flatten().argmax()), expected.shape[1])
    assert f"a{layer}.h{head} with {expected.max():.2f}" in said(figure)
    with pytest.raises(MethodError, match=r"unknown source 'object'.*subject"):
        attention_sources_heatmap(sources_frame(shares), "object")


@pytest.fixture
def classes() -> HeadClasses:
    rows = []
    for layer in range(4):
        for head in range(3):
            of_class = {(3, 1): "mover", (3, 2): "mixture", (0, 0): "relation"}.get((layer, head), "")
            row = {"layer": layer, "head": head, "class": of_class, "subject": 0.5, "relation_tokens": 0.2}
            for score, shift in (("mover", 0.01), ("relation", 0.02)):
                row |= {
                    f"{score}_score": shift * (layer + head),
                    f"{score}_null_99": shift / (1 + layer),
                    f"{score}_p": 0.003,
                }
            rows.append(row | {"contribution": 0.1 * layer})
    return HeadClasses(pd.DataFrame(rows), {"model": "tiny", "level": 0.01, "least_attention": 0.1, "n_pairs": 20})


def test_heads_stand_by_layer_beside_their_null_with_the_classified_ones_named(classes: HeadClasses) -> None:
    figure = head_class_figure(classes)
    heads = classes.heads
    for ticks, score in zip(traces(figure, "null"), ("mover", "relation"), strict=True):
        assert list(ticks.y) == heads[f"{score}_null_99"].tolist()
        assert (np.array(ticks.x).round() == heads["layer"]).all()
        assert (np.diff(ticks.x) > 0).all()
    for name, labels in {
        "mover": (" a3.h1 ", None),
        "relation": (None, " a0.h0 "),
        "mixture": (" a3.h2 ", " a3.h2 "),
    }.items():
        for trace, score, label in zip(traces(figure, name), ("mover", "relation"), labels, strict=True):
            assert list(trace.y) == heads.loc[heads["class"] == name, f"{score}_score"].tolist()
            assert (trace.text or (None,)) == (label,)
    shown = [trace.marker.color for name in ("none", "mover", "relation", "mixture") for trace in traces(figure, name)[:1]]
    assert len(set(shown)) == 4
    assert "at most 0.01" in said(figure)
    assert "n = 20" in said(figure)
    with pytest.raises(MethodError, match="no heads"):
        head_class_figure(HeadClasses(heads.iloc[:0]))


def ablation(seed: int, metric: str = "probability") -> HeadAblation:
    values = np.random.default_rng(seed).uniform(size=(9, 5))
    return HeadAblation(pd.DataFrame(values, columns=["full", "heads", "random #1", "random #2", "random #3"]), 2, metric)


def test_a_classs_drop_stands_beside_that_of_random_heads() -> None:
    given = {"a: movers": ablation(0), "b: <none>": ablation(1)}
    figure = ablation_figure(given)
    for name, own, null, draws in zip(
        reversed(given), traces(figure, "heads"), traces(figure, "random"), traces(figure, "draws"), strict=True
    ):
        summary = given[name].summary().set_index("ablated")
        values = given[name].values
        assert own.x[0] == summary.loc["heads", "drop"]
        assert own.x[0] + own.error_x.array[0] == pytest.approx(summary.loc["heads", "drop_high"])
        assert null.x[0] - null.error_x.arrayminus[0] == pytest.approx(summary.loc["random", "drop_low"])
        means = [(values["full"] - values[f"random #{i}"]).mean() for i in (1, 2, 3)]
        assert list(draws.x) == pytest.approx(means)
        notes = [note.text for note in figure.layout.annotations]
        assert any(note.endswith(f"p = {summary.loc['heads', 'p']:.2f}") for note in notes)
    assert "drop in probability" in figure.layout.xaxis.title.text
    assert "b: &lt;none&gt;" in figure.layout.yaxis.ticktext[0]
    assert "2 heads, n = 9 facts" in figure.layout.yaxis.ticktext[0]
    with pytest.raises(MethodError, match="no common axis"):
        ablation_figure(given | {"c": ablation(2, "logit_difference")})
    assert "no class has heads" in said_in_panel(ablation_figure({}))


HEADS = [(0, 1), (2, 3), (1, 0), (1, 2)]


@pytest.fixture(scope="module")
def pattern(small_model: SmallModel) -> tuple[list[str], torch.Tensor]:
    return attention_pattern(small_model("llama"), PAIRS[1], HEADS)


@pytest.mark.parametrize("with_bos", [True, False])
def test_patterns_are_drawn_per_head_with_or_without_the_first_token(
    pattern: tuple[list[str], torch.Tensor], with_bos: bool
) -> None:
    tokens, shares = pattern
    figure = attention_heatmap(tokens, shares, HEADS, with_bos)
    first = 0 if with_bos else 1
    assert [note.text for note in figure.layout.annotations] == ["a0.h1", "a2.h3", "a1.h0", "a1.h2"]
    for trace, own in zip(figure.data, shares[:, first:, first:], strict=True):
        z = np.array(trace.z, dtype=float)
        assert np.allclose(np.nan_to_num(z), own.numpy())
        assert np.isnan(z[np.triu_indices(len(z), 1)]).all()
        assert trace.zmax == (1 if with_bos else pytest.approx(float(own.max())))
    assert next(iter(figure.layout.xaxis.ticktext)) == ("&lt;s&gt;" if with_bos else tokens[1])
    assert ("without the first token" in said(figure)) is not with_bos


def test_a_pattern_of_other_tokens_or_heads_is_refused(pattern: tuple[list[str], torch.Tensor]) -> None:
    tokens, shares = pattern
    for draw in (attention_heatmap, attention_view):
        with pytest.raises(MethodError, match=r"shape \(4, 7, 7\).*3 heads"):
            draw(tokens, shares, HEADS[:3])
        with pytest.raises(MethodError, match="on 6 tokens"):
            draw(tokens[1:], shares, HEADS)
        with pytest.raises(MethodError, match="no heads"):
            draw(tokens, shares[:0], [])


def test_the_script_of_views_is_the_installed_one_and_only_in_the_bundle(pattern: tuple[list[str], torch.Tensor]) -> None:
    tokens, shares = pattern
    bundle = attention_bundle().data
    assert bundle.startswith("<script>")
    assert bundle.count("</script") == 1  # its own end
    assert len(bundle) > 1_000_000
    view = attention_view([HOSTILE, *tokens[1:]], shares, ["a0.h1", "a2.h3", "a1.h0", "a1.h2"]).data
    assert "http" not in view
    place, props = re.search(r'render\("(.*?)", CircuitsVis.AttentionHeads, (.*)\)</script>$', view).groups()
    assert f'id="{place}"' in view
    assert "</script" not in props
    given = json.loads(props)
    assert given["tokens"] == [HOSTILE, *tokens[1:]]
    assert given["attentionHeadNames"] == ["a0.h1", "a2.h3", "a1.h0", "a1.h2"]
    assert np.allclose(given["attention"], shares)
    assert attention_view(tokens, shares, list("abcd")).data.split('"')[1] != place


@pytest.mark.parametrize(("heads", "tokens"), [(13, 5), (2, 65)])
def test_views_too_large_for_a_browser_are_refused(heads: int, tokens: int) -> None:
    with pytest.raises(MethodError, match=rf"{heads} heads and {tokens} tokens.*at most 12 heads"):
        attention_view(["w3"] * tokens, torch.zeros(heads, tokens, tokens), ["a0.h0"] * heads)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look with")
def test_a_browser_without_network_shows_the_view(pattern: tuple[list[str], torch.Tensor], tmp_path: Path) -> None:
    tokens, shares = pattern
    parts = (attention_bundle(), attention_view([HOSTILE, *tokens[1:]], shares, ["first", "b", "c", "d"]))
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'><body>{''.join(part.data for part in parts)}</body>")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    browser += ["--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*browser, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    shown = done.stdout.split("</script>")[1]  # after the bundle
    assert "Head Selector" in shown
    assert "first Zoomed" in shown
