"""The component analysis in words: where the answer appears, who writes it, what of a circuit stays unexplained."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from kc_lib.components.circuit_table import CircuitTable
from kc_lib.components.direct import DIRECTIONS, DirectAttribution
from kc_lib.components.lens import NORMS, LayerLens
from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, batches

NEAR = 10  # a rank that counts as near the top
WHAT = {"answer": "answer's logit", "difference": "logit difference"}


def check_reading(norm: str, direction: str, **counts: int) -> None:
    """Refuse what the analysis would refuse, before a model is loaded.

    Raises:
        MethodError: an unknown norm or direction, or a number of things to show below 1.
    """
    for what, value, known in (("norm", norm, NORMS), ("direction", direction, DIRECTIONS)):
        if value not in known:
            raise MethodError(f"unknown {what} {value!r}: use one of {', '.join(known)}")
    for name, count in counts.items():
        if count < 1:
            raise MethodError(f"{name} is {count}; it must be at least 1")


@torch.no_grad()
def largest_error(model: Model, pairs: Sequence[TokenPair], direct: DirectAttribution, *, batch_size: int = 8) -> float:
    """The largest distance between contributions summed over components and the model's own logits, before any soft cap."""
    decoder, own = model.residual, []
    for batch in batches(pairs, batch_size, device=decoder.device):
        rows, last = torch.arange(len(batch), device=decoder.device), batch.answer_positions[:, 0]
        logits = model.bridge(batch.clean)[rows, last].double()
        if (cap := decoder.logit_soft_cap) is not None:
            logits = cap * torch.atanh(logits / cap)
        value = logits[rows, batch.answers[:, 0]]
        against = direct.provenance["direction"] == "difference"
        own.append(value - logits[rows, batch.distractors] if against else value)
    return float((torch.cat(own).cpu() - direct.totals).abs().max())


def strongest_components(direct: DirectAttribution, kind: str, n: int) -> list[str]:
    """Names of the n heads ("head") or MLPs ("mlp") whose mean direct contribution is largest in size."""
    effects = direct.to_frame()
    own = effects[effects["kind"] == kind].set_index("component")["contribution"]
    return own.abs().sort_values(ascending=False, kind="stable").index[:n].tolist()


def heads_of(components: list[str]) -> list[tuple[int, int]]:
    """(layer, head) of heads' names like "a8.h3"."""
    return [(int(layer), int(head)) for layer, head in (name[1:].split(".h") for name in components)]


def reading_headline(lens: LayerLens, direct: DirectAttribution, table: CircuitTable, seed: int = 0) -> dict[str, str]:
    """The figures that matter: where the answer comes near the top, what writes it, and how much of a circuit that tells."""
    what, kinds = _what(direct), _by_kind(direct, seed)
    heads = direct.to_frame(seed).query("kind == 'head'").sort_values("contribution")
    figures = {
        f"answer among the first {NEAR}": _arrival(lens, NEAR),
        "answer first": _arrival(lens, 1),
        f"{what}": f"{direct.totals.mean():.2f} logits (n = {len(direct.values)} facts)",
        f"{what}, attention": kinds["head"],
        f"{what}, MLPs": kinds["mlp"],
        "head that adds most": _effect(heads.iloc[-1]),
        "head that takes most": _effect(heads.iloc[0]),
    }
    direct_only, through, neither = _counts(table)
    text = f"{direct_only} with a direct effect, {through} through others only, {neither} with none"
    return figures | {"nodes of the circuit": f"{len(table.nodes)}: {text}"}


def reading(lens: LayerLens, direct: DirectAttribution, table: CircuitTable, seed: int = 0) -> str:
    """A few sentences (Markdown) on what was read, and on what such readings do not say."""
    what, kinds, layers = _what(direct), _by_kind(direct, seed), direct.by_layer(seed)
    top = layers.sort_values("contribution").iloc[-1]
    heads = direct.to_frame(seed).query("kind == 'head'").sort_values("contribution")
    summary = lens.summary()
    subject = "No subject is named, so nothing is read over it."
    if "answer_rank_at_subject_median" in summary:
        best = summary.sort_values("answer_rank_at_subject_median").iloc[0]
        subject = (
            f"Over the subject's own tokens its best median rank is {best['answer_rank_at_subject_median']:,.0f}, "
            f"{_place(best['layer'])}."
        )
    direct_only, through, neither = _counts(table)
    return (
        f"**Layers.** Read at the last position, the answer is among the first {NEAR} tokens for good "
        f"{_arrival(lens, NEAR)}, and the first of all {_arrival(lens, 1)} (median of {_n(lens)} facts). {subject}\n\n"
        f"**Components.** Of the {what} of {direct.totals.mean():.2f}, attention writes {kinds['head']} and the MLPs write "
        f"{kinds['mlp']} directly; the largest single part is that of {_part(top)} ({top['contribution']:+.2f}). The head "
        f"that adds most is {_effect(heads.iloc[-1])}, the one that takes most {_effect(heads.iloc[0])}.\n\n"
        f"**Circuit.** Of its {len(table.nodes)} nodes {direct_only} have a direct effect whose interval leaves out 0, and "
        f"{through} have none but are missed when they are replaced: they work through others. For the other {neither} "
        f"neither could be shown. {_costliest(table)}\n\n"
        "A lens reads early layers in a code that they need not use; a direct contribution leaves out all that a component "
        "does through others; attention says where a head looks, not what it takes from there."
    )


def _arrival(lens: LayerLens, rank: int) -> str:
    """From where on the median rank stays within ``rank``."""
    summary = lens.summary()
    beyond = (summary["answer_rank_median"] > rank).to_numpy().nonzero()[0]
    first = int(beyond[-1]) + 1 if len(beyond) else 0
    return "never" if first == len(summary) else _place(summary["layer"].iloc[first])


def _place(layer: float) -> str:
    """A point of the stream in words: blocks passed, as ``LayerLens`` counts them."""
    if layer == 0:
        return "at the embedding"
    return f"after layer {int(layer)}'s attention" if layer % 1 else f"after layer {int(layer) - 1}"


def _by_kind(direct: DirectAttribution, seed: int) -> dict[str, str]:
    """What heads and MLPs add together, with intervals over facts."""
    kinds, found = direct.to_frame(seed)["kind"], {}
    for kind in ("head", "mlp"):
        values = direct.values[:, (kinds == kind).tolist()].sum(1).double().numpy()
        low, high = interval(resampled_means(values[:, None], seed))
        found[kind] = f"{values.mean():.2f} [{low[0]:.2f}, {high[0]:.2f}]"
    return found


def _counts(table: CircuitTable, seed: int = 0) -> tuple[int, int, int]:
    """Nodes with a direct effect, with a total effect but no direct one, and with neither, by their intervals."""
    rows = table.nodes
    direct, total = ((rows[f"{name}_low"] > 0) | (rows[f"{name}_high"] < 0) for name in ("direct", "total"))
    return int(direct.sum()), int((total & ~direct).sum()), int((~total & ~direct).sum())


def _costliest(table: CircuitTable) -> str:
    """The head whose replacement costs most."""
    heads = table.nodes[table.nodes["node"].str.startswith("a")].sort_values("total")
    if heads.empty:
        return "It has no heads."
    row = heads.iloc[-1]
    low, high = row["total_low"], row["total_high"]
    return f"The head whose replacement costs most is {row['node']} ({row['total']:.2f} [{low:.2f}, {high:.2f}])."


def _effect(row: pd.Series) -> str:
    return f"{row['component']} ({row['contribution']:+.2f} [{row['contribution_low']:.2f}, {row['contribution_high']:.2f}])"


def _part(row: pd.Series) -> str:
    kind = {"mlp": "the MLP", "bias": "a bias"}.get(row["kind"], f"the {row['kind']}")
    return kind if pd.isna(row["layer"]) else f"{kind} of layer {row['layer']:.0f}"


def _what(direct: DirectAttribution) -> str:
    return WHAT.get(str(direct.provenance.get("direction")), "logit")


def _n(lens: LayerLens) -> int:
    return int(lens.facts["fact"].nunique())
