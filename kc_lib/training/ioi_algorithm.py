"""Is IOI done by the published algorithm? Three steps of path patching (Tigges et al. 2024, arXiv:2407.10827, section 4).

Of what all heads of the circuit do at a step, which share do heads of the published kind do?

1. to the logits: name movers, negative name movers and copy-suppression heads;
2. to the name movers' queries: S-inhibition heads;
3. to the S-inhibition heads' values: duplicate-token and induction heads.

An effect is what the logit difference loses when the receiver alone reads what the sender writes on the corrupted prompt, in
which three other names stand (ABC): single edges of the graph, measured, and summed over the receivers of a step. Published
path patching lets the change pass through MLPs on the way as well (``path_patching.py``); edges do not, which
keeps a head's effect from what MLPs make of it. Shares are of absolute effects, and signed (of the sum of effects).

Kinds are those of the general head scores; receivers are the heads of a kind in the circuit. Where a step has no receivers
its share is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kc_lib.circuits.scoring.exact import patch_single_edges
from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.heads.head_scores import HeadScores
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair

Head = tuple[int, int]  # layer, head
STEPS = {
    "logits": ("name_mover", "negative_name_mover", "copy_suppression"),
    "name movers' queries": ("s_inhibition",),
    "S-inhibition values": ("duplicate_token", "induction"),
}
RECEIVERS = {"name movers' queries": ("name_mover", "q"), "S-inhibition values": ("s_inhibition", "v")}


@dataclass(frozen=True)
class StepShare:
    """One step: the share that heads of the published kind explain, of absolute effects and signed; NaN where undefined."""

    step: str
    absolute: float
    signed: float
    n_kind: int  # heads of the kind among the candidates
    n_candidates: int
    note: str = ""


def algorithm_shares(
    model: Model,
    pairs: Sequence[TokenPair],
    candidates: Sequence[Head],
    scores: Mapping[str, HeadScores],
    *,
    batch_size: int = 32,
) -> list[StepShare]:
    """The three steps' shares; see the head of this file.

    Args:
        pairs: IOI prompts, corrupted by strangers (task ``ioi_abc``).
        candidates: the heads that count, those of the circuit.
        scores: head scores by name; those that are missing have no heads.

    Raises:
        MethodError: no candidates.
    """
    if not candidates:
        raise MethodError("there are no heads to share an effect among: the circuit has none")
    graph = model.residual.graph()
    heads = {name: set(head_scores.heads()) for name, head_scores in scores.items()}
    shares = []
    for step, kinds in STEPS.items():
        readers = ["logits"]
        if step in RECEIVERS:
            kind, port = RECEIVERS[step]
            receivers = [head for head in candidates if head in heads.get(kind, ())]
            readers = _readers(graph, receivers, port)
        if not readers:
            why = f"no {kind.replace('_', ' ')} head passes in the circuit"
            shares.append(StepShare(step, float("nan"), float("nan"), 0, 0, why))
            continue
        effects = edge_effects(model, pairs, candidates, readers, batch_size)
        of_kind = {head for name in kinds for head in heads.get(name, ())} & effects.keys()
        shares.append(_share(step, effects, of_kind))
    return shares


def edge_effects(
    model: Model,
    pairs: Sequence[TokenPair],
    senders: Sequence[Head],
    readers: Sequence[str],
    batch_size: int = 32,
) -> dict[Head, float]:
    """What the logit difference loses by each sender's edges into the readers, one at a time, summed.

    Senders that are below none of the readers are left out.
    """
    graph = model.residual.graph()
    columns = [graph.reader_index[name] for name in readers]
    edges = {
        f"a{layer}.h{head}->{graph.readers[column].name}": (layer, head)
        for layer, head in senders
        for column in columns
        if graph.edges[graph.writer_index[f"a{layer}.h{head}"], column]
    }
    if not edges:
        return {}
    losses = patch_single_edges(model, pairs, list(edges), batch_size=batch_size)["score"]
    effects: dict[Head, float] = {}
    for sender, loss in zip(edges.values(), losses, strict=True):
        effects[sender] = effects.get(sender, 0.0) + float(loss)
    return effects


def _readers(graph: Graph, heads: Sequence[Head], port: str) -> list[str]:
    """The readers that serve the heads: under grouped queries several have one for keys and values."""
    group = 1 if port == "q" else graph.n_heads // graph.n_kv_readers
    return sorted({f"a{layer}.h{head // group}<{port}>" for layer, head in heads})


def _share(step: str, effects: Mapping[Head, float], of_kind: set[Head]) -> StepShare:
    total, absolute = sum(effects.values()), sum(abs(effect) for effect in effects.values())
    if not absolute:
        return StepShare(step, float("nan"), float("nan"), len(of_kind), len(effects), "no head has an effect")
    kind_effects = [effects[head] for head in of_kind]
    signed = sum(kind_effects) / total if total else float("nan")
    return StepShare(step, sum(map(abs, kind_effects)) / absolute, signed, len(of_kind), len(effects))
