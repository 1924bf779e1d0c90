"""The verdict follows from the figures, on made-up results on either side of every bar, and from a real evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from helpers import FOUND, SPLITS, SmallModel

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import LAYER_MATCHED, RANDOM, complements, random_baselines
from kc_lib.circuits.criteria import Minimality, Stability, completeness, minimality, resampled_circuits, stability
from kc_lib.circuits.evaluate import Evaluation, evaluate
from kc_lib.circuits.selection import select
from kc_lib.circuits.verdict import COLUMNS, verdict
from kc_lib.errors import MethodError
from kc_lib.metrics import METRICS

FULL = np.array([4.0, 5.0, 6.0, 5.0])
CRITERIA = [
    "faithful",
    "held-out",
    "complete",
    "minimal",
    "stable",
    "better than random",
    "better than its heads shuffled",
]


def evaluated(
    faithfulness: float,
    spread: float = 0.0,
    splits: tuple[str, ...] = ("discovery", "held_out"),
    baselines: Mapping[str, Sequence[float]] = {},  # read only
    without: Mapping[str, float] = {},
) -> Evaluation:
    """A circuit of a given faithfulness on every fact, give or take ``spread`` on alternate facts.

    Beside it are its baselines by kind, and complements by the name of what is left out.
    """
    shares = {"full": (1.0, {}), "empty": (0.0, {}), "circuit": (faithfulness, {"kind": "circuit"})}
    for kind, values in baselines.items():
        for draw, share in enumerate(values, start=1):
            shares[f"{kind} {draw} of circuit"] = (share, {"kind": kind, "draw": draw, "of": "circuit"})
    for name, share in without.items():
        shares[f"without {name}"] = (share, {"kind": "complement", "of": name})
    examples, table = [], []
    for split in splits:
        for name, (share, label) in shares.items():
            value = FULL * (share + (spread * np.array([1, -1, 1, -1]) if label else np.zeros(4)))
            examples.append(pd.DataFrame({"circuit": name, "split": split, "fact": range(4), "value": value}))
            row = {"circuit": name, "kind": name, "draw": 0, "of": "", "split": split, "n": 4} | label
            row |= {"faithfulness": share, "faithfulness_low": share - spread, "faithfulness_high": share + spread}
            table.append(row)
    return Evaluation(pd.DataFrame(table), pd.concat(examples, ignore_index=True), METRICS["logit_difference"])


def sampled(share: float, low: float, random: float) -> Minimality:
    rows = [
        {"split": split, "kind": kind, "share": value, "share_low": value + low - share, "share_high": value + share - low}
        for split in ("discovery", "held_out")
        for kind, value in {"circuit": share, "random": random}.items()
    ]
    return Minimality(pd.DataFrame(), pd.DataFrame(rows))


def overlapping(value: float, n_facts: int | None) -> Stability:
    pairs = pd.DataFrame({"a": "x", "b": "y", "against": "each other", "jaccard": [value - 0.1, value, value + 0.1]})
    return Stability(pairs, n_facts)


def verdict_of(criterion: str, *results: object, **bars: float) -> tuple[str, str]:
    row = verdict(*results, **bars).set_index("criterion").loc[criterion]
    return row["verdict"], row["note"]


@pytest.mark.parametrize(
    ("share", "spread", "bars", "expected"),
    [
        (0.9, 0.05, {}, "yes"),
        (0.82, 0.05, {}, "no"),  # the interval reaches below 0.8
        (1.15, 0.1, {}, "no"),  # ... or above 1.2
        (1.3, 0.0, {}, "no"),
        (0.82, 0.05, {"faithful_within": 0.3}, "yes"),
        (0.9, float("nan"), {}, "undefined"),
        (float("nan"), 0.0, {}, "undefined"),
    ],
)
def test_faithful_and_held_out(share: float, spread: float, bars: dict[str, float], expected: str) -> None:
    for criterion in ("faithful", "held-out"):
        assert verdict_of(criterion, evaluated(share, spread), **bars)[0] == expected


def test_without_held_out_facts_there_is_no_verdict_on_them() -> None:
    found = verdict(evaluated(0.9, splits=("discovery",))).set_index("criterion")
    assert found.loc["faithful", "verdict"] == "yes"
    assert found.loc["held-out", "verdict"] == "undefined"
    assert found.loc["held-out", "note"]
    assert found.loc["complete", "split"] == "discovery"
    assert verdict_of("faithful", evaluated(0.9, splits=("held_out",)))[0] == "undefined"


@pytest.mark.parametrize(
    ("left", "spread", "bars", "expected"),
    [
        (0.1, 0.02, {}, "yes"),
        (0.3, 0.02, {}, "no"),
        (0.19, 0.1, {}, "no"),
        (-0.5, 0.1, {}, "yes"),
        (0.3, 0.02, {"complete_below": 0.5}, "yes"),
    ],
)
def test_complete(left: float, spread: float, bars: dict[str, float], expected: str) -> None:
    evaluation = evaluated(0.9, spread, baselines={RANDOM: [0.5]}, without={"circuit": left, f"{RANDOM} 1 of circuit": 0.7})
    assert verdict_of("complete", evaluation, **bars)[0] == expected
    row = verdict(evaluation).set_index("criterion").loc["complete"]
    own = completeness(evaluation).query("circuit == 'circuit' and split == 'held_out'").iloc[0]
    assert row[["figure", "low", "high"]].tolist() == pytest.approx(
        own[["completeness", "completeness_low", "completeness_high"]].tolist()
    )
    assert row["baseline"] == pytest.approx(0.7)


def test_complete_without_the_complement_is_not_measured() -> None:
    assert verdict_of("complete", evaluated(0.9)) == ("undefined", "the circuit's complement was not run")


@pytest.mark.parametrize(
    ("share", "low", "random", "bars", "expected"),
    [
        (0.9, 0.7, 0.1, {}, "yes"),
        (0.6, 0.4, 0.1, {}, "no"),
        (0.9, 0.7, 0.75, {}, "no"),  # random edges matter as often
        (0.6, 0.4, 0.1, {"minimal_share": 0.3}, "yes"),
        (0.9, 0.7, float("nan"), {}, "yes"),  # no edge to add
        (float("nan"), 0.7, 0.1, {}, "undefined"),
    ],
)
def test_minimal(share: float, low: float, random: float, bars: dict[str, float], expected: str) -> None:
    assert verdict_of("minimal", evaluated(0.9), sampled(share, low, random), **bars)[0] == expected


@pytest.mark.parametrize(
    ("value", "n_facts", "bars", "expected"),
    [
        (0.85, 100, {}, "yes"),
        (0.75, 100, {}, "no"),
        (0.75, 24, {}, "no"),
        (0.85, 99, {}, "undefined"),
        (0.85, None, {}, "undefined"),
        (0.85, 24, {"stable_facts": 20}, "yes"),
        (0.75, 100, {"stable_from": 0.7}, "yes"),
        (float("nan"), 100, {}, "undefined"),
    ],
)
def test_stable(value: float, n_facts: int | None, bars: dict[str, float], expected: str) -> None:
    assert verdict_of("stable", evaluated(0.9), None, overlapping(value, n_facts), **bars)[0] == expected


@pytest.mark.parametrize(
    ("criterion", "kind"), [("better than random", RANDOM), ("better than its heads shuffled", LAYER_MATCHED)]
)
def test_better_than_baselines(criterion: str, kind: str) -> None:
    def evaluated_beside(*draws: float, faithfulness: float = 0.9) -> Evaluation:
        return evaluated(faithfulness, baselines={kind: draws})

    assert verdict_of(criterion, evaluated_beside()) == ("undefined", "none drawn")
    assert verdict_of(criterion, evaluated_beside(*[0.5] * 19))[0] == "yes"
    assert verdict_of(criterion, evaluated_beside(*[0.5] * 18))[0] == "undefined"  # p = 1/19
    assert "too few" in verdict_of(criterion, evaluated_beside(*[0.5] * 18))[1]
    beaten = evaluated_beside(*[0.5] * 40, 0.95, 0.96)
    assert verdict_of(criterion, beaten)[0] == "no"  # p = 3/43
    assert verdict_of(criterion, beaten, significance=0.1)[0] == "yes"
    assert verdict_of(criterion, evaluated_beside(*[0.5] * 19, faithfulness=float("nan")))[0] == "undefined"
    row = verdict(evaluated_beside(*[0.5] * 19)).set_index("criterion").loc[criterion]
    assert (row["figure"], row["baseline"]) == pytest.approx((1 / 20, 0.5))


@pytest.mark.parametrize("bars", [{"faithful_within": -0.1}, {"minimal_share": 2.0}, {"stable_facts": 0}, {"bar": 0.5}])
def test_bars_that_do_not_exist_are_refused(bars: dict[str, float]) -> None:
    with pytest.raises(MethodError, match=next(iter(bars))):
        verdict(evaluated(0.9), **bars)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    found = verdict(evaluated(0.9))
    assert list(found.columns) == COLUMNS
    assert found["criterion"].tolist() == CRITERIA
    assert found["verdict"].tolist() == ["yes", "yes", *["undefined"] * 5]
    assert (found["note"][2:] != "").all()
    assert (found["bar"] != "").all()


def test_a_whole_evaluation(small_model: SmallModel) -> None:
    model = small_model("qwen2")
    fact_scores = score_edges(model, FOUND, steps=2, per="fact")
    circuit = select(fact_scores.mean(), size=0.5)
    named = {"mine": circuit} | random_baselines(circuit, 3, of="mine")
    named |= random_baselines(circuit, 3, kind="layer-matched", of="mine")
    evaluation = evaluate(model, named | complements(named), SPLITS)
    removed = minimality(model, circuit, SPLITS, n=5)
    resampled = stability(resampled_circuits(fact_scores, n=4, size=0.5), circuit)
    found = verdict(evaluation, removed, resampled, circuit="mine").set_index("criterion")
    for criterion, split in {"faithful": "discovery", "held-out": "held_out"}.items():
        own = evaluation.row("mine", split)
        columns = ["faithfulness", "faithfulness_low", "faithfulness_high"]
        assert found.loc[criterion, ["figure", "low", "high"]].tolist() == own[columns].tolist()
        drawn = [evaluation.row(f"{RANDOM} {i} of mine", split)["faithfulness"] for i in (1, 2, 3)]
        assert found.loc[criterion, "baseline"] == pytest.approx(np.mean(drawn))
    shares = removed.totals.query("split == 'held_out'").set_index("kind")
    assert found.loc["minimal", "figure"] == shares.loc["circuit", "share"]
    assert found.loc["minimal", "baseline"] == shares.loc["random", "share"]
    assert found.loc["stable", "figure"] == resampled.summary()["jaccard"][0]
    assert set(found["verdict"]) <= {"yes", "no", "undefined"}
