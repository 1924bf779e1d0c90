"""Attention views: what heads look at from the answer position, by group of tokens, and whole patterns of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.components.head_runs import run_layers, value_weighted
from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair, batches

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
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        (batch,) = batches(some, len(some), device=decoder.device)
        groups = torch.zeros(len(SOURCES), *batch.clean.shape, device=decoder.device)
        for i, pair in enumerate(some):
            for source, positions in zip(SOURCES, sources_of(pair).values(), strict=True):
                groups[SOURCES.index(source), i, list(positions)] = 1.0
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
    model: Model, pair: TokenPair, heads: Sequence[tuple[int, int]]
) -> tuple[list[str], Float[Tensor, "head query key"]]:
    """The tokens of a clean prompt and the patterns of some heads, given as (layer, head).

    Raises:
        MethodError: a head the model does not have.
    """
    decoder = model.residual
    check_heads(decoder.n_layers, decoder.n_heads, heads)
    patterns = [run.pattern[0] for run in run_layers(decoder, torch.tensor([pair.clean], device=decoder.device))]
    tokens = [str(model.tokenizer.decode([token])) for token in pair.clean]
    return tokens, torch.stack([patterns[layer][head] for layer, head in heads]).cpu()


def check_heads(n_layers: int, n_heads: int, heads: Sequence[tuple[int, int]]) -> None:
    """Refuse heads out of range.

    Raises:
        MethodError: a layer or head the model does not have.
    """
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise MethodError(
                f"head {head} of layer {layer}: the model has layers 0 to {n_layers - 1} with heads 0 to {n_heads - 1}"
            )


def sources_frame(shares: Float[Tensor, "source layer head fact"]) -> pd.DataFrame:
    """Mean attention mass per head as a table: layer, head and one column per source."""
    n_layers, n_heads = shares.shape[1:3]
    frame = pd.DataFrame(
        {
            "layer": torch.arange(n_layers).repeat_interleave(n_heads).numpy(),
            "head": torch.arange(n_heads).repeat(n_layers).numpy(),
        }
    )
    for source, mass in zip(SOURCES, shares.mean(-1), strict=True):
        frame[source] = mass.flatten().double().numpy()
    return frame
