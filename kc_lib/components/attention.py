"""Attention views: what heads look at from the answer position, by group of tokens, and whole patterns of one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.components.head_runs import run_layers, value_weighted
from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import TokenPair, batches

Head = tuple[int, int]  # layer, head
SOURCES = ("subject", "relation", "first", "last")


def attention_sources(
    model: Model, pairs: Sequence[TokenPair], *, weighted: bool = False, batch_size: int = 8
) -> Float[Tensor, "source layer head fact"]:
    """Attention mass from the answer position to each group of ``SOURCES``, on the clean prompts.

    "subject" and "relation" are the pair's named positions, "relation" without the last one; "last" is the answer position
    itself, "first" the first token (as a rule BOS, where heads rest). ``weighted`` weighs by what is sent (value-weighted
    attention) instead.

    Raises:
        MethodError: a pair that names no subject.
    """
    decoder = model.residual
    shares = []
    sources = [list(sources_of(pair).values()) for pair in pairs]
    for i, batch in enumerate(batches(pairs, batch_size, device=decoder.device)):
        groups = torch.zeros(len(SOURCES), *batch.clean.shape, device=decoder.device)
        for row, positions in enumerate(sources[i * batch_size : i * batch_size + len(batch)]):
            for source, places in enumerate(positions):
                groups[source, row, list(places)] = 1.0
        rows, answers = torch.arange(len(batch), device=decoder.device), batch.answer_positions[:, 0]
        at_answer = torch.stack(
            [
                (value_weighted(decoder, run) if weighted else run.pattern)[rows, :, answers]
                for run in run_layers(decoder, batch.clean)
            ]
        )
        shares.append(torch.einsum("lbhk,sbk->slhb", at_answer, groups).cpu())
    return torch.cat(shares, -1)


def sources_of(pair: TokenPair) -> dict[str, tuple[int, ...]]:
    """The positions of each group of ``SOURCES`` in a pair's clean prompt.

    Raises:
        MethodError: the pair names no subject.
    """
    subject = pair.positions.get("subject", ())
    if not subject:
        raise MethodError(
            f"the prompt {pair.text.get('clean', '')!r} names no subject: give a relation, or a file of pairs with a column "
            "'subject'"
        )
    last = len(pair.clean) - 1
    others = pair.positions.get("relation") or tuple(i for i in range(1, last + 1) if i not in subject)
    first = () if 0 in subject or last == 0 else (0,)
    relation = tuple(i for i in others if i != last and i not in first)
    return {"subject": tuple(subject), "relation": relation, "first": first, "last": (last,)}


def attention_pattern(
    model: Model, pair: TokenPair, heads: Sequence[Head]
) -> tuple[list[str], Float[Tensor, "head query key"]]:
    """The tokens of a clean prompt and the patterns of some heads, given as (layer, head).

    Raises:
        MethodError: a head the model does not have.
    """
    decoder = model.residual
    check_heads(decoder, heads)
    patterns = [run.pattern[0] for run in run_layers(decoder, torch.tensor([pair.clean], device=decoder.device))]
    tokens = [str(model.tokenizer.decode([token])) for token in pair.clean]
    return tokens, torch.stack([patterns[layer][head] for layer, head in heads]).cpu()


def check_heads(decoder: Decoder, heads: Iterable[Head]) -> None:
    """Raises MethodError for a layer or head that the model does not have."""
    for layer, head in heads:
        if not (0 <= layer < decoder.n_layers and 0 <= head < decoder.n_heads):
            raise MethodError(
                f"the model has no head ({layer}, {head}): layers are 0 to {decoder.n_layers - 1}, heads 0 to "
                f"{decoder.n_heads - 1}"
            )


def head_names(heads: Iterable[Head]) -> list[str]:
    """Heads as nodes of the graph: "a8.h3" for (8, 3)."""
    return [f"a{layer}.h{head}" for layer, head in heads]


def heads_of(names: Iterable[str]) -> list[Head]:
    """The (layer, head) of heads' names like "a8.h3"."""
    return [(int(layer), int(head)) for layer, head in (name[1:].split(".h") for name in names)]


def head_table(n_layers: int, n_heads: int) -> pd.DataFrame:
    """Every head as a row: layer, head."""
    layers, heads = np.indices((n_layers, n_heads))
    return pd.DataFrame({"layer": layers.ravel(), "head": heads.ravel()})


def sources_frame(shares: Float[Tensor, "source layer head fact"]) -> pd.DataFrame:
    """Mean attention mass per head as a table: layer, head and one column per source."""
    means = {source: mass.flatten().double().numpy() for source, mass in zip(SOURCES, shares.mean(-1), strict=True)}
    return head_table(*shares.shape[1:3]).assign(**means)


def source_table(model: Model, pairs: Sequence[TokenPair], *, weighted: bool = False, batch_size: int = 8) -> pd.DataFrame:
    """``attention_sources`` as a table; options and errors as there."""
    return sources_frame(attention_sources(model, pairs, weighted=weighted, batch_size=batch_size))
