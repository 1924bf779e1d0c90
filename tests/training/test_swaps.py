"""Component swap: against Hugging Face models with slices copied by hand, untouched models, nulls, and its grid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from helpers import frame_of, refused, values_of
from torch import Tensor, nn

from kc_lib.errors import MethodError, ModelError
from kc_lib.models.checkpoints import checkpoints_of, load_checkpoint
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, make_batch
from kc_lib.training.drawn import DrawnTasks, draw_tasks
from kc_lib.training.figures import swap_grid
from kc_lib.training.measures import direct_rows
from kc_lib.training.over_training import over_training
from kc_lib.training.result import TrainingResult
from kc_lib.training.swapped import check_exchangeable, component_place, swapped, swapped_logits
from kc_lib.training.swaps import (
    null_components,
    strongest_heads,
    strongest_swaps,
    swap_changes,
    swap_measure,
    swap_measures,
    swap_rows,
)

KINDS = ("neox", "gpt2", "llama", "qwen2", "qwen3", "gemma2")
N_LAYERS, N_HEADS, D_HEAD, D_MODEL = 3, 4, 8, 32  # of the small models
TOKENS = torch.tensor([[1, 17, 42, 5, 99, 17, 8], [1, 3, 150, 61, 20, 7, 33]])
Plain = tf.PreTrainedModel


@pytest.fixture(scope="module")
def folders(small_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """A small model and another of its shape: every parameter's values in another order."""
    root = tmp_path_factory.mktemp("donors")

    def folders_of(kind: str) -> list[Path]:
        folder = root / kind
        if not folder.exists():
            model = tf.AutoModelForCausalLM.from_pretrained(small_folder(kind))
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    order = torch.randperm(parameter.numel(), generator=generator)
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
            model.save_pretrained(folder)
            tf.AutoTokenizer.from_pretrained(small_folder(kind)).save_pretrained(folder)
        return [small_folder(kind), folder]

    return folders_of


def loaded(folders: list[Path]) -> list[Model]:
    return [load_model(str(folder), device="cpu") for folder in folders]


def plain_models(folders: list[Path]) -> list[Plain]:
    return [ungrouped(tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()) for folder in folders]


def ungrouped(model: Plain) -> Plain:
    """The same model in which every query head has keys and values of its own."""
    n_kv = getattr(model.config, "num_key_value_heads", None)
    if n_kv in (None, model.config.num_attention_heads):
        return model
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = config.num_attention_heads
    wide = tf.AutoModelForCausalLM.from_config(config).eval()
    state = model.state_dict()
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            by_head = value.view(n_kv, D_HEAD, *value.shape[1:])
            state[name] = by_head.repeat_interleave(config.num_attention_heads // n_kv, 0).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


def blocks_of(model: Plain) -> nn.ModuleList:
    inner = model.base_model
    return inner.h if hasattr(inner, "h") else inner.layers


@torch.no_grad()
def transplant_head(host: Plain, donor: Plain, layer: int, head: int, from_head: int | None = None) -> None:
    """One head's slices of the modules' own tensors, copied in place."""
    to, source = (slice(i * D_HEAD, (i + 1) * D_HEAD) for i in (head, head if from_head is None else from_head))
    into, out_of = blocks_of(host)[layer], blocks_of(donor)[layer]
    if hasattr(into, "attention"):  # GPT-NeoX: rows are head, then query, key and value
        a, b = into.attention, out_of.attention
        rows, other = (slice(3 * own.start, 3 * own.stop) for own in (to, source))
        a.query_key_value.weight[rows] = b.query_key_value.weight[other]
        a.query_key_value.bias[rows] = b.query_key_value.bias[other]
        a.dense.weight[:, to] = b.dense.weight[:, source]
    elif hasattr(into, "attn"):  # GPT-2: columns are query, key and value, then head
        a, b = into.attn, out_of.attn
        for start in (0, D_MODEL, 2 * D_MODEL):
            columns, other = (slice(start + own.start, start + own.stop) for own in (to, source))
            a.c_attn.weight[:, columns] = b.c_attn.weight[:, other]
            a.c_attn.bias[columns] = b.c_attn.bias[other]
        a.c_proj.weight[to] = b.c_proj.weight[source]
    else:
        a, b = into.self_attn, out_of.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(a, name).weight[to] = getattr(b, name).weight[source]
            if getattr(a, name).bias is not None:
                getattr(a, name).bias[to] = getattr(b, name).bias[source]
        a.o_proj.weight[:, to] = b.o_proj.weight[:, source]


@torch.no_grad()
def transplant_mlp(host: Plain, donor: Plain, layer: int, from_layer: int | None = None) -> None:
    source = blocks_of(donor)[layer if from_layer is None else from_layer]
    blocks_of(host)[layer].mlp.load_state_dict(source.mlp.state_dict())


@torch.no_grad()
def logits_of(decoder: Decoder) -> Tensor:
    return decoder.unembed(decoder.run(decoder.embed(TOKENS)))


@torch.no_grad()
def plain_logits(model: Plain) -> Tensor:
    return model(TOKENS).logits


# ---------------------------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_is_the_model_with_these_slices_copied(kind: str, folders: Callable[[str], list[Path]]) -> None:
    models, plain = loaded(folders(kind)), plain_models(folders(kind))
    before = [model.hash for model in models]
    host, donor = (model.residual for model in models)
    check_exchangeable(host, donor)
    for component in ("a0.h0", "a1.h3", "a2.h1", "a2.h2", "m0", "m2"):
        expected = copy.deepcopy(plain[0])
        layer, head = component_place(host.graph(), component)
        if head is None:
            transplant_mlp(expected, plain[1], layer)
        else:
            transplant_head(expected, plain[1], layer, head)
        found = logits_of(swapped(host, donor, component))
        torch.testing.assert_close(found, plain_logits(expected), rtol=1e-4, atol=1e-4)
        assert (found - plain_logits(plain[0])).abs().max() > 1e-2  # it does something
        torch.testing.assert_close(logits_of(swapped(host, host, component)), logits_of(host), rtol=1e-5, atol=1e-5)
    assert [model.hash for model in models] == before
    torch.testing.assert_close(logits_of(host), plain_logits(plain[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_components_one_after_the_other(kind: str, folders: Callable[[str], list[Path]]) -> None:
    """Every head and MLP is the donor's; embeddings, norms and the bias of attention's output are the host's."""
    models, plain = loaded(folders(kind)), plain_models(folders(kind))
    decoder, donor = (model.residual for model in models)
    expected = copy.deepcopy(plain[0])
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            decoder = swapped(decoder, donor, f"a{layer}.h{head}")
        decoder = swapped(decoder, donor, f"m{layer}")
    state, theirs = expected.state_dict(), plain[1].state_dict()
    kept = ("emb", "wte", "wpe", "norm", "ln_", "lm_head", "dense.bias", "attn.c_proj.bias")
    moved = {name: theirs[name] for name in state if not any(part in name for part in kept)}
    expected.load_state_dict(state | moved)
    assert len(moved) >= 4 * N_LAYERS
    torch.testing.assert_close(logits_of(decoder), plain_logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["neox", "gpt2", "llama"])
def test_another_component_in_a_place(kind: str, folders: Callable[[str], list[Path]]) -> None:
    models, plain = loaded(folders(kind)), plain_models(folders(kind))
    host, donor = (model.residual for model in models)
    expected = copy.deepcopy(plain[0])
    transplant_head(expected, plain[1], 1, 0, from_head=3)  # of another group of keys and values
    torch.testing.assert_close(
        logits_of(swapped(host, donor, "a1.h0", "a1.h3")), plain_logits(expected), rtol=1e-4, atol=1e-4
    )
    expected = copy.deepcopy(plain[0])
    transplant_mlp(expected, plain[1], 0, from_layer=2)
    torch.testing.assert_close(logits_of(swapped(host, donor, "m0", "m2")), plain_logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_runs_that_start_at_the_components_layer(kind: str, folders: Callable[[str], list[Path]]) -> None:
    host, donor = (model.residual for model in loaded(folders(kind)))
    pairs = [TokenPair(tuple(row), tuple(row), (5,), 6, {}, {}) for row in (TOKENS[0].tolist(), TOKENS[1, :4].tolist())]
    swaps = [("a2.h1", "a2.h1"), ("m0", "m0"), ("a1.h0", "a1.h2")]
    found = list(swapped_logits(host, donor, swaps, make_batch(pairs)))
    expected = [host, *(swapped(host, donor, *swap) for swap in swaps)]
    for logits, decoder in zip(found, expected, strict=True):
        for row, pair in zip(logits, pairs, strict=True):
            alone = decoder.unembed(decoder.run(decoder.embed(torch.tensor([pair.clean]))))[0, -1]
            torch.testing.assert_close(row[0], alone, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exchanged(folders: Callable[[str], list[Path]]) -> None:
    host, donor = (model.residual for model in loaded(folders("llama")))
    for name in ("a3.h0", "a0.h4", "m3", "input", "logits", "a0.h0<q>", "", "a-1.h0"):
        message = refused(MethodError, swapped, host, donor, name)
        assert repr(name) in message
        assert "a2.h3" in message
    assert "MLP for an MLP" in refused(MethodError, swapped, host, donor, "m0", "a0.h1")
    other = loaded(folders("neox"))[0].residual
    assert "one training" in refused(ModelError, check_exchangeable, host, other)
    wide = load_model(str(folders("llama")[1]), device="cpu", dtype="float64").residual
    message = refused(ModelError, check_exchangeable, host, wide)
    assert "float32" in message
    assert "float64" in message
    config = copy.deepcopy(host.blocks[1].attention)
    object.__setattr__(config, "window", 4)
    object.__setattr__(host.blocks[1], "attention", config)
    assert "window None" in refused(ModelError, check_exchangeable, donor, host)


# ---------------------------------------------------------------------------------------------------- the measure


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_model("nano", device="cpu")


@pytest.fixture(scope="module")
def drawn(nano: Model) -> DrawnTasks:
    return draw_tasks(["ioi", "agreement"], nano, seeds=2, n_prompts=8)


def right_of(logits: Tensor, pair: TokenPair) -> float:
    right, wrong = pair.right or pair.answer[:1], pair.wrong or (pair.distractor,)
    return float(logits[list(right)].max() > logits[list(wrong)].max())


def test_swaps_into_a_checkpoint_of_nano(nano: Model, drawn: DrawnTasks) -> None:
    checkpoints = checkpoints_of("nano")
    host_at = checkpoints[-4]
    host = load_checkpoint(host_at, device="cpu")
    before = host.hash, nano.hash
    found = swap_rows(host, drawn, donor=nano, components=("a3.h2", "m1"), n_null=2, batch_size=3)
    assert (host.hash, nano.hash) == before
    early, late = (
        tf.AutoModelForCausalLM.from_pretrained(c.source, dtype=torch.float32).eval() for c in (host_at, checkpoints[-1])
    )
    d_head = early.config.hidden_size // early.config.num_attention_heads

    def with_head(source: int) -> Plain:
        model = copy.deepcopy(early)
        a, b = (own.gpt_neox.layers[3].attention for own in (model, late))
        with torch.no_grad():
            for i in range(3 * d_head):
                a.query_key_value.weight[2 * 3 * d_head + i] = b.query_key_value.weight[source * 3 * d_head + i]
                a.query_key_value.bias[2 * 3 * d_head + i] = b.query_key_value.bias[source * 3 * d_head + i]
            for i in range(d_head):
                a.dense.weight[:, 2 * d_head + i] = b.dense.weight[:, source * d_head + i]
        return model

    def with_mlp(source: int) -> Plain:
        model = copy.deepcopy(early)
        model.gpt_neox.layers[1].mlp.load_state_dict(late.gpt_neox.layers[source].mlp.state_dict())
        return model

    graph = nano.residual.graph()
    for draw in drawn.draws:
        pairs = (*draw.task.discovery, *draw.task.test)

        def measured(model: Plain, pairs: tuple[TokenPair, ...] = pairs) -> np.ndarray:
            with torch.no_grad():
                logits = [model(torch.tensor([pair.clean])).logits[0, -1] for pair in pairs]
            return np.array([[values_of(row, p), right_of(row, p)] for row, p in zip(logits, pairs, strict=True)])

        metric = "probability_difference" if pairs[0].right else "logit_difference"
        own = found[(found["task"] == draw.name) & (found["seed"] == draw.seed)].set_index(["of", "quantity", "part"])
        ours, theirs = measured(early), measured(late)
        for column, of in enumerate((metric, "accuracy")):
            assert own.loc[(of, "host", ""), "value"] == pytest.approx(ours[:, column].mean(), abs=1e-4)
            assert own.loc[(of, "donor", ""), "value"] == pytest.approx(theirs[:, column].mean(), abs=1e-4)
        for component, build in (("a3.h2", with_head), ("m1", with_mlp)):
            index = {f"a3.h{i}": i for i in range(4)} | {f"m{i}": i for i in range(4)}
            change = measured(build(index[component])) - ours
            null = np.stack(
                [(measured(build(index[name])) - ours).mean(0) for name in null_components(graph, component, 2, draw.seed)]
            )
            for column, of in enumerate((metric, "accuracy")):
                row = own.loc[(of, "change", component)]
                assert row["value"] == pytest.approx(change[:, column].mean(), abs=1e-4)
                low, high = interval(resampled_means(change[:, [column]], draw.seed)[:, 0])
                assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-4)
                row = own.loc[(of, "null_change", component)]
                ends = null[:, column]
                assert (row["value"], row["low"], row["high"]) == pytest.approx(
                    (ends.mean(), ends.min(), ends.max()), abs=1e-4
                )
    assert len(found) == len(drawn.draws) * 2 * (2 + 2 * 2)


def test_the_donor_into_itself_changes_nothing(nano: Model, drawn: DrawnTasks) -> None:
    every = [f"a{layer}.h{head}" for layer in range(4) for head in range(4)] + [f"m{layer}" for layer in range(4)]
    found = swap_rows(nano, drawn, donor=nano, components=every, n_null=1)
    changes = found[found["quantity"] == "change"]
    assert set(changes["of"]) == {"logit_difference", "probability_difference", "accuracy"}
    assert len(changes) == len(drawn.draws) * 2 * 20
    assert changes["value"].abs().max() < 1e-4
    means = found[found["of"] == "logit_difference"].groupby("quantity")["value"].mean()
    assert means["host"] == pytest.approx(means["donor"], abs=1e-5)
    nulls = found[(found["of"] == "logit_difference") & (found["quantity"] == "null_change")]
    assert nulls["value"].abs().max() > 0.1


def test_weights_stay_when_a_swap_fails(nano: Model, drawn: DrawnTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    host = load_checkpoint(checkpoints_of("nano")[-4], device="cpu")
    before = [{name: p.clone() for name, p in model.bridge.named_parameters()} for model in (host, nano)]
    calls = []

    def fails(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 4:  # in the midst of the swaps
            raise MethodError("it fails here")
        return torch.zeros(8)

    monkeypatch.setattr("kc_lib.training.swaps.is_right", fails)
    assert "fails here" in refused(MethodError, swap_rows, host, drawn, donor=nano, components=("a3.h2", "m0"))
    for model, kept in zip((host, nano), before, strict=True):
        for name, parameter in model.bridge.named_parameters():
            assert torch.equal(parameter, kept[name])


def test_nulls_are_others_of_the_kind(nano: Model) -> None:
    graph = nano.residual.graph()
    assert sorted(null_components(graph, "a2.h1", 9)) == ["a2.h0", "a2.h2", "a2.h3"]
    assert sorted(null_components(graph, "m1", 9)) == ["m0", "m2", "m3"]
    drawn = {tuple(null_components(graph, "a2.h1", 2, seed)) for seed in range(20)}
    assert len(drawn) > 3
    assert all(len(set(names)) == 2 for names in drawn)
    assert null_components(graph, "a2.h1", 2, 5) == null_components(graph, "a2.h1", 2, 5)


def test_the_strongest_heads_are_those_of_every_task_in_turn(nano: Model, drawn: DrawnTasks) -> None:
    effects = direct_rows(nano, drawn)
    ranked = {}
    for task in ("ioi", "agreement"):
        rows = effects[effects["task"] == task]
        size = {head: abs(rows.loc[rows["part"] == head, "value"].mean()) for head in rows["part"].unique()}
        ranked[task] = sorted(size, key=lambda head: -size[head])
    expected: list[str] = []
    for place in range(16):
        for task in ("ioi", "agreement"):
            if ranked[task][place] not in expected:
                expected.append(ranked[task][place])
    for n in (1, 5, 16):
        assert list(strongest_heads(nano, drawn, n)) == expected[:n]
    measure = swap_measure(nano, drawn, 3)
    assert isinstance(measure, partial)
    assert measure.keywords["components"] == tuple(expected[:3])


@pytest.mark.parametrize(
    ("components", "options", "said"),
    [
        (0, {}, "n is 0"),
        (17, {}, "17 heads"),
        (True, {}, "n is True"),
        ((), {}, "none"),
        (("a3.h1", "a3.h1"), {}, "each once"),
        (("a3.h1", "a4.h0"), {}, "'a4.h0'"),
        (("m9",), {}, "'m9'"),
        (("input",), {}, "'input'"),
        (("a3.h1",), {"n_null": 0}, "n_null is 0"),
        (("a3.h1",), {"batch_size": 0}, "batch_size is 0"),
        (("a3.h1",), {"metric": "magic"}, "'magic'"),
    ],
)
def test_swaps_that_cannot_be(
    components: object, options: Mapping[str, object], said: str, nano: Model, drawn: DrawnTasks
) -> None:
    assert said in refused(MethodError, swap_measure, nano, drawn, components, **options)


def test_no_swaps_are_no_measure(nano: Model, drawn: DrawnTasks) -> None:
    assert swap_measures(nano, drawn, swap_heads=0) == {}
    named = swap_measures(nano, drawn, swap_heads=0, components="m1 a0.h2", n_null=1)["swap"]
    assert isinstance(named, partial)
    assert (named.keywords["components"], named.keywords["n_null"]) == (("m1", "a0.h2"), 1)
    assert "none" in refused(MethodError, swap_measures, nano, drawn, components=" ")
    assert "swap_heads is -1" in refused(MethodError, swap_measures, nano, drawn, swap_heads=-1)


def test_checkpoints_of_another_shape(nano: Model, drawn: DrawnTasks, small_model: Callable[[str], Model]) -> None:
    message = refused(ModelError, swap_rows, small_model("neox"), drawn, donor=nano, components=("a0.h0",))
    assert "nano" in message
    assert "one training" in message


# ---------------------------------------------------------------------------------------------------- over training


def test_swaps_over_a_training_are_kept_by_donor(nano: Model, drawn: DrawnTasks, tmp_path: Path) -> None:
    checkpoints, file = checkpoints_of("nano"), tmp_path / "partial.parquet"
    hosts = [checkpoints[-4], checkpoints[-1]]
    measure = swap_measure(nano, drawn, ("a3.h2",), n_null=1)
    run = partial(over_training, tasks=drawn, device="cpu", partial_file=file)
    result = run(hosts, measures={"swap": measure})
    expected = swap_rows(load_checkpoint(hosts[0], device="cpu"), drawn, donor=nano, components=("a3.h2",), n_null=1)
    own = result.frame[result.frame["step"] == hosts[0].step]
    by = ["task", "seed", "of", "quantity", "part"]
    pd.testing.assert_frame_equal(
        own[[*by, "value", "low", "high"]].sort_values(by, ignore_index=True),
        expected[[*by, "value", "low", "high"]].sort_values(by, ignore_index=True),
        check_dtype=False,
    )
    told = result.provenance["measures"]["swap"]
    assert told["donor"] == ["nano", nano.hash]
    loaded_again = TrainingResult.load(result.save(tmp_path / "result.parquet"))
    assert loaded_again.provenance["measures"]["swap"]["components"] == ["a3.h2"]

    again = swap_measure(load_model("nano", device="cpu"), drawn, ("a3.h2",), n_null=1)  # another object, the same weights
    pd.testing.assert_frame_equal(run(hosts, measures={"swap": again}).frame, result.frame)
    earlier = swap_measure(load_checkpoint(checkpoints[-2], device="cpu"), drawn, ("a3.h2",), n_null=1)
    others = (earlier, swap_measure(nano, drawn, ("a3.h1",), n_null=1), swap_measure(nano, drawn, ("a3.h2",), n_null=2))
    for other in others:
        assert "another model, task or set" in refused(MethodError, run, hosts, measures={"swap": other})


def swaps(values: Mapping[tuple[int, str, int], tuple[float, ...]], of: str = "logit_difference") -> TrainingResult:
    """A result of (change, low, null, null_low, null_high) by step, part and seed; hosts are at step / 10, donors at 5."""
    rows, ends = [], []
    for (step, part, seed), (change, low, null, null_low, null_high) in values.items():
        rows += [(step, "swap", "t", seed, "change", part, change)]
        rows += [(step, "swap", "t", seed, "null_change", part, null)]
        ends += [(low, change + 1), (null_low, null_high)]
    for step, seed in {(step, seed) for step, _, seed in values}:
        rows += [(step, "swap", "t", seed, "host", "", step / 10), (step, "swap", "t", seed, "donor", "", 5.0)]
        ends += [(0.0, 0.0)] * 2
    result = frame_of(rows)
    return TrainingResult(result.frame.assign(of=of, low=[low for low, _ in ends], high=[high for _, high in ends]))


HAND = {
    (1, "a0.h0", 0): (0.5, 0.1, 0.2, 0.1, 0.3),
    (1, "a0.h0", 1): (0.7, 0.2, -0.2, -0.4, 0.6),
    (2, "a0.h0", 0): (0.9, 0.1, 0.2, 0.1, 0.3),
    (2, "a0.h0", 1): (0.5, 0.1, 0.2, 0.1, 0.6),  # below a null of its draw
    (1, "m1", 0): (-0.5, -0.9, -0.2, -0.3, -0.1),
    (1, "m1", 1): (-0.3, -0.8, -0.2, -0.2, -0.1),
    (2, "m1", 0): (0.1, -0.1, -0.2, -0.3, -0.1),  # above its nulls, and not surely above 0
    (2, "m1", 1): (0.3, 0.1, -0.2, -0.3, -0.1),
}


def test_changes_by_hand() -> None:
    found = swap_changes(swaps(HAND)).set_index(["part", "step"])
    row = found.loc[("a0.h0", 1)]
    assert (row["change"], row["change_low"], row["change_high"]) == pytest.approx((0.6, 0.5, 0.7))
    assert (row["null"], row["null_low"], row["null_high"]) == pytest.approx((0.0, -0.4, 0.6))
    assert (row["host"], row["donor"], row["n"], row["of"]) == (pytest.approx(0.1), 5.0, 2, "logit_difference")
    assert found["beats_nulls"].to_dict() == {
        ("a0.h0", 1): True,
        ("a0.h0", 2): False,
        ("m1", 1): False,
        ("m1", 2): False,
    }
    best = strongest_swaps(swaps(HAND)).set_index("part")
    assert best["step"].to_dict() == {"a0.h0": 2, "m1": 2}
    assert found["beats_nulls"].sum() == 1
    row = best.loc["a0.h0"]
    assert (row["change"], row["change_low"], row["change_high"]) == pytest.approx((0.7, 0.5, 0.9))
    assert row["donor"] - row["host"] == pytest.approx(4.8)
    assert not row["beats_nulls"]
    accuracy = swaps(HAND, of="accuracy")
    assert set(swap_changes(accuracy)["of"]) == {"accuracy"}
    heads = frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)])
    assert "no swaps" in refused(MethodError, swap_changes, heads)
    assert strongest_swaps(heads).empty


def test_the_grid_draws_the_changes_around_zero() -> None:
    figure = swap_grid(swaps(HAND))
    change, null = (trace for trace in figure.data if trace.type == "heatmap")
    assert list(change.y) == list(null.y) == ["a0.h0", "m1"]
    assert np.asarray(change.z) == pytest.approx(np.array([[0.6, 0.7], [-0.4, 0.2]]))
    assert np.asarray(null.z) == pytest.approx(np.array([[0.0, 0.2], [-0.2, -0.2]]))
    axis = figure.layout.coloraxis
    assert (axis.cmid, axis.cmin, axis.cmax) == (0, pytest.approx(-0.7), pytest.approx(0.7))
    assert change.coloraxis == null.coloraxis
    assert "logits" in axis.colorbar.title.text
    (dots,) = (trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers")
    assert (list(dots.x), list(dots.y)) == ([0], ["a0.h0"])
    lines = {trace.name: list(trace.y) for trace in figure.data if trace.type == "scatter" and trace.mode == "lines"}
    assert lines == {"host": pytest.approx([0.1, 0.2]), "donor": [5.0, 5.0]}
    assert "2 draws" in figure.layout.title.subtitle.text
    assert list(figure.layout.xaxis.ticktext) == ["1", "2"]
    (note,) = swap_grid(frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)])).layout.annotations
    assert note.text == "nothing to show: measure swap as well"
