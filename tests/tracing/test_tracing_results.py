"""Averages of traced facts, their figures from the file alone, and the notebook on bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import assert_one_line_and_code_2, assert_refused, kc, known, run_cells, visible_runs, written

from kc_lib import runs
from kc_lib.errors import MethodError
from kc_lib.tasks.options import POSITION_CLASSES
from kc_lib.tracing.effects import TracingResult, average_effects, peaks, severing, total_effect, tracing_headline
from kc_lib.tracing.figures import class_heatmap, fact_heatmap, severing_bars, tracing_figure

FIRST, MIDDLE, LAST_SUBJECT, AFTER, FURTHER, LAST = POSITION_CLASSES
N_LAYERS = 6
NOTEBOOK = runs.NOTEBOOKS / "causal_tracing.ipynb"


def made(n_facts: int = 8, effect: float = 1.0, seed: int = 0) -> TracingResult:
    """A result whose state peaks at layer 2 of the last subject token; fact 0 has a subject of one token."""
    generator = np.random.default_rng(seed)
    rows, facts = [], []
    for fact in range(n_facts):
        classes = [LAST_SUBJECT, LAST] if fact == 0 else [FIRST, MIDDLE, MIDDLE, LAST_SUBJECT, AFTER, FURTHER, FURTHER, LAST]
        p_corrupted = 0.1
        p_clean = p_corrupted + effect * generator.uniform(0.4, 0.6)
        facts.append((fact, f"prompt {fact}", "subject", "answer", 3, p_clean, p_corrupted, p_clean - p_corrupted))
        for mediator, size in (("state", 0.3), ("attention_severed", 0.24), ("mlp_severed", 0.06), ("mlp", 0.2)):
            for layer in range(N_LAYERS):
                for position, name in enumerate(classes, start=1):
                    at = {LAST_SUBJECT: size / (1 + abs(layer - 2)), LAST: 0.1 * layer * size}.get(name, 0.0)
                    p = p_corrupted + effect * (at + 0.01 * generator.normal())
                    about = (fact, mediator, layer, position, f" t{position}", name)
                    rows.append((*about, p, 0.01, p_clean, p_corrupted))
    names = ["fact", "mediator", "layer", "position", "token", "position_class", "p", "std", "p_clean", "p_corrupted"]
    about = ["fact", "prompt", "subject", "answer", "n_samples", "p_clean", "p_corrupted", "total_effect"]
    provenance = {"model": "tiny", "noise": "gaussian", "scale": 0.3, "window": 10, "n_given": 10, "n_traced": n_facts}
    return TracingResult(
        pd.DataFrame(rows, columns=names),
        pd.DataFrame(facts, columns=about),
        provenance | {"dropped": {"answer not known": 2}},
    )


@pytest.fixture
def result(tmp_path: Path) -> TracingResult:
    """As read from its file, which is all that averages and figures may need."""
    return TracingResult.load(made().save(tmp_path / "tracing.parquet"))


def by_hand(result: TracingResult, mediator: str, name: str, layer: int) -> tuple[float, int]:
    """Average over a fact's positions of a class, then over the facts that have one."""
    means = []
    for _, fact in result.frame.groupby("fact"):
        rows = fact[(fact["mediator"] == mediator) & (fact["position_class"] == name) & (fact["layer"] == layer)]
        if len(rows):
            means.append((rows["p"] - rows["p_corrupted"]).mean())
    return float(np.mean(means)), len(means)


def test_averages_count_facts_and_not_positions(result: TracingResult) -> None:
    table = average_effects(result, seed=1)
    assert len(table) == 4 * N_LAYERS * len(POSITION_CLASSES)
    for row in table.to_dict("records"):
        mean, n = by_hand(result, row["mediator"], row["position_class"], row["layer"])
        assert row["aie"] == pytest.approx(mean, abs=1e-12)
        assert row["n"] == n == (8 if row["position_class"] in (LAST_SUBJECT, LAST) else 7)
        assert row["aie_low"] <= row["aie"] <= row["aie_high"]
        assert 0 < row["aie_high"] - row["aie_low"] < 0.03  # eight facts of spread 0.01
    total = total_effect(result)
    assert total["n"] == 8
    assert total["ate"] == pytest.approx(result.facts["total_effect"].mean())
    assert total["ate_low"] < total["ate"] < total["ate_high"]
    assert total["p_clean"] - total["p_corrupted"] == pytest.approx(total["ate"])


def test_peaks_are_where_effects_are_largest(result: TracingResult) -> None:
    found = peaks(result).set_index(["mediator", "position_class"])
    for mediator in ("state", "attention_severed"):
        row = found.loc[(mediator, LAST_SUBJECT)]
        assert (row["layer"], row["layer_low"], row["layer_high"]) == (2, 2, 2)
        assert row["aie"] == pytest.approx(by_hand(result, mediator, LAST_SUBJECT, 2)[0])
    assert found.loc[("state", LAST), "layer"] == N_LAYERS - 1
    row = found.loc[("state", AFTER)]  # noise alone: the peak could be anywhere
    assert row["layer_high"] - row["layer_low"] >= 2


def test_what_severing_costs(result: TracingResult) -> None:
    rows = severing(result)
    row = rows[(rows["position_class"] == LAST_SUBJECT) & (rows["mediator"] == "mlp_severed")].iloc[0]
    state, severed = (by_hand(result, name, LAST_SUBJECT, 2)[0] for name in ("state", "mlp_severed"))
    assert row["layer"] == 2
    assert (row["state"], row["severed"]) == pytest.approx((state, severed))
    assert (row["cost"], row["kept"]) == pytest.approx((state - severed, severed / state))
    assert row["kept"] == pytest.approx(0.2, abs=0.05)
    assert row["kept_low"] < row["kept"] < row["kept_high"] < 0.3
    with pytest.raises(MethodError, match="trace both"):
        severing(TracingResult(result.frame[result.frame["mediator"] == "state"], result.facts))


@pytest.mark.parametrize("effect", [0.0, 1e-9])  # the second is rounding: its quotients would look like findings
def test_no_total_effect_is_told_and_not_divided_by(effect: float) -> None:
    nothing = made(effect=effect)
    with np.errstate(all="raise"):
        rows = severing(nothing)
        summary = nothing.summary()
    assert rows[["kept", "peak_kept"]].isna().all(axis=None)
    assert summary[["kept", "peak_kept"]].isna().all(axis=None)
    assert summary["note"].str.contains("the corruption changes nothing").all()
    assert tracing_headline(nothing)["ATE"] == 0
    for figure in (class_heatmap(nothing), severing_bars(nothing), fact_heatmap(nothing)):
        assert figure.to_json()


def test_a_single_fact_has_no_intervals() -> None:
    one = made(1)
    table = average_effects(one)
    assert table[["aie_low", "aie_high"]].isna().all(axis=None)
    assert one.summary()[["aie_low", "aie_high", "layer_low", "layer_high", "kept_low"]].isna().all(axis=None)
    assert tracing_figure(one).to_json()


def test_the_summary_says_what_was_found(result: TracingResult) -> None:
    summary = result.summary().set_index(["mediator", "position_class"])
    assert len(summary) == 8  # four mediators at two classes of tokens
    assert (result.provenance["n_traced"], result.provenance["n_given"]) == (8, 10)
    assert result.provenance["dropped"] == {"answer not known": 2}
    state, severed = (summary.loc[(name, LAST_SUBJECT)] for name in ("state", "mlp_severed"))
    highest = peaks(result).set_index(["mediator", "position_class"]).loc[("state", LAST_SUBJECT)]
    assert state[highest.index].to_dict() == highest.to_dict()
    assert state["layer"] == 2
    assert pd.isna(state["kept"])
    costs = severing(result).set_index(["mediator", "position_class"]).loc[("mlp_severed", LAST_SUBJECT)]
    shares = ["kept", "kept_low", "kept_high", "peak_kept", "peak_kept_low", "peak_kept_high"]
    assert severed[shares].to_dict() == costs[shares].to_dict()
    assert (summary["ate"] == total_effect(result)["ate"]).all()
    assert (summary["note"] == "").all()
    told = tracing_headline(result)
    assert told["facts"] == 8
    assert told["state, last subject token"].endswith("at layer 2")


# --- figures -----------------------------------------------------------------------------------------------------


def test_heatmaps_hold_the_effects(result: TracingResult) -> None:
    figure = fact_heatmap(result, 3, ["state", "mlp"])
    effects = result.indirect_effects()
    effects = effects[(effects["fact"] == 3) & (effects["mediator"] == "mlp")]
    expected = effects.pivot_table(index="position", columns="layer", values="indirect_effect").to_numpy()
    assert np.array(figure.data[1].z) == pytest.approx(expected)
    labels = figure.layout.yaxis.ticktext
    assert [label.endswith("*") for label in labels] == [True] * 4 + [False] * 4
    assert labels[0] == "t1*"
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert "prompt 3" in figure.layout.title.text
    assert "window of 10" in figure.layout.annotations[1].text
    average = class_heatmap(result, ["mlp_severed"])
    table = average_effects(result)
    rows = table[(table["mediator"] == "mlp_severed") & (table["position_class"] == FURTHER)]
    assert average.data[0].z[4] == pytest.approx(rows["aie"].tolist())
    assert average.layout.yaxis.ticktext == tuple(
        f"{name} ({8 if name in (LAST_SUBJECT, LAST) else 7})" for name in POSITION_CLASSES
    )


def test_lines_and_bars_hold_averages_and_intervals(result: TracingResult) -> None:
    table = average_effects(result)
    figure = tracing_figure(result)
    rows = table[(table["mediator"] == "attention_severed") & (table["position_class"] == LAST)]
    line, band = (
        [trace for trace in figure.data if trace.mode == mode and LAST in trace.name and trace.xaxis == "x2"]
        for mode in ("lines", "none")
    )
    line, band = line[-1], band[-1]
    assert list(line.y) == pytest.approx(rows["aie"].tolist())
    assert list(band.y) == pytest.approx([*rows["aie_low"], *rows["aie_high"][::-1]])
    bars = severing_bars(result, LAST_SUBJECT)
    assert [bar.name for bar in bars.data] == ["hidden state", "attention severed", "MLP severed"]
    rows = table[(table["mediator"] == "mlp_severed") & (table["position_class"] == LAST_SUBJECT)]
    assert list(bars.data[2].y) == pytest.approx(rows["aie"].tolist())
    assert list(bars.data[2].error_y.array) == pytest.approx((rows["aie_high"] - rows["aie"]).tolist())
    assert "n = 8 facts" in bars.layout.title.subtitle.text


def test_what_was_not_traced_cannot_be_drawn(result: TracingResult) -> None:
    for draw in (fact_heatmap, class_heatmap, tracing_figure):
        with pytest.raises(MethodError, match="'attention' was not traced"):
            draw(result, mediators=["attention"])
    with pytest.raises(MethodError, match="fact 99 was not traced: facts are 0 to 7"):
        fact_heatmap(result, 99)
    only = TracingResult(result.frame[result.frame["position_class"] == LAST], result.facts, result.provenance)
    with pytest.raises(MethodError, match="'last subject token' was not traced"):
        severing_bars(only, LAST_SUBJECT)
    assert severing_bars(only).layout.title.text.endswith(LAST)  # the first class that was traced
    severed = TracingResult(result.frame[result.frame["mediator"] == "mlp_severed"], result.facts, result.provenance)
    (note,) = severing_bars(severed).layout.annotations
    assert "nothing to compare: trace state and attention_severed or mlp_severed" in note.text


# --- the notebook on bad input -----------------------------------------------------------------------------------

FILES: dict[str, Any] = {
    "good.json": [known(subject=f"w{10 + i}", prompt=f"w5 w{10 + i} w6") for i in range(4)],
    "absent_subject.json": [known(), known(subject="w99")],
    "whole_prompt.json": [known(), known(prompt="w10 w11")],
    "spoiled.json": "[{",
}
BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"task": "absent_subject.json"}, ("absent_subject.json: row 1", "'w99'", "not in the prompt")),
    ({"task": "whole_prompt.json"}, ("whole_prompt.json: row 1", "whole prompt")),
    ({"task": "spoiled.json"}, ("spoiled.json", "JSON")),
    ({"task": "good.json", "options": {"task.template": 2}}, ("good.json", "no relation")),
    ({"options": {"trace.known_only": True}}, ("no known fact left", "4 answers")),
    ({"options": {"trace.known_rank": 0}}, ("known_rank is 0",)),
    ({"options": {"trace.magic": 0}}, ("'trace.magic'", "trace.known_rank")),
    ({"mediators": "state magic"}, ("'magic'", "mlp_severed")),
    ({"mediators": ""}, ("mediators are none", "state")),
    ({"positions": "last token, magic"}, ("'magic'", "last subject token")),
    ({"noise": "magic"}, ("'magic'", "gaussian")),
    ({"level": -1}, ("level is -1",)),
    ({"options": {"trace.sigma": "much"}}, ("sigma is 'much'",)),
    ({"noise": "covariance", "options": {"trace.sigma": 0.1}}, ("sigma=0.1", "covariance")),
    ({"n_samples": 0}, ("n_samples is 0",)),
    ({"window": 0}, ("window is 0",)),
    ({"max_facts": 0}, ("max_facts is 0",)),
    ({"fact": 77}, ("fact 77",)),
]


def prepared(monkeypatch: pytest.MonkeyPatch, folder: Path, small_folder: Callable[[str], Path]) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    for name, content in FILES.items():
        written(Path(name), content)
    options = {"trace.known_only": False, "model.device": "cpu"}
    return {"model": str(small_folder("llama")), "task": "good.json", "options": options, "out": "out"}


@pytest.mark.parametrize(("given", "parts"), BAD_VALUES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_values_in_the_notebook_are_ours_and_leave_no_run(
    given: dict[str, Any],
    parts: tuple[str, ...],
    small_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    usual = prepared(monkeypatch, tmp_path, small_folder)
    options = usual["options"] | given.get("options", {})
    assert_refused(NOTEBOOK, parts, **(usual | {"n_samples": 2, "mediators": "state"} | given | {"options": options}))


@pytest.mark.parametrize(
    "given",
    [{}, {"mediators": "mlp attention", "window": 1}, {"positions": "last token"}, {"level": 0.0}, {"noise": "replacement"}],
    ids=str,
)
def test_every_way_to_trace_runs_to_the_end_and_is_found_again(
    given: dict[str, Any], small_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = prepared(monkeypatch, tmp_path, small_folder)
    if "noise" in given:  # the subjects of one answer cannot stand for each other
        written(Path("good.json"), [row | {"attribute": f"w{20 + i}"} for i, row in enumerate(FILES["good.json"])])
    for _ in range(2):
        run_cells(NOTEBOOK, **(usual | {"n_samples": 2} | given))
    (folder,) = visible_runs(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "tracing.parquet"]
    result = TracingResult.load(folder / "tracing.parquet")
    assert len(result.facts) == 4
    assert runs.read_record(folder)["headline"]["facts"] == 4


@pytest.mark.slow
def test_kc_says_so_in_one_line(
    small_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared(monkeypatch, tmp_path, small_folder)
    arguments = ["-p", f"model={small_folder('llama')}", "-p", "task", "absent_subject.json", "--out", "out"]
    done = kc("run", "causal_tracing", *arguments, cwd=tmp_path)
    assert_one_line_and_code_2(done, "absent_subject.json: row 1", "'w99'")
    assert visible_runs(tmp_path / "out") == []
