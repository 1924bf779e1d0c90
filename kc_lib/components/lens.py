"""Logit lens: where along the model the answer becomes readable (Yao et al. 2024, arXiv:2405.17969, section 4).

The stream at every point is read through the final norm and the unembedding, as if the model stopped there (logit lens,
nostalgebraist 2020). Two readings differ, and the result says which it is. norm="own" normalises each stream by itself, as
TransformerLens's ``logit_readout`` does, which computes it here. norm="final" uses the final stream's scale at every point,
so that readings are on one scale and differences between points are direct contributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis.logit_lens import logit_readout

from kc_lib.components.options import LensOptions
from kc_lib.errors import checked
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.results import Result
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, make_batch

MEASURES = ("answer_rank", "answer_probability", "answer_rank_at_subject", "subject_probability")


@dataclass(frozen=True)
class LogitLens(Result):
    """One row per fact and point of the stream; ranks start at 1, probabilities are shares of 1.

    Columns: fact, subject, answer, point (TransformerLens's hook name), layer, and the measures: ``answer_rank`` and
    ``answer_probability`` at the last position, ``answer_rank_at_subject`` the best rank of the answer over the subject's
    tokens, ``subject_probability`` that of the subject's last token at the last position (NaN where no subject is named).
    """

    columns = ("fact", "point", "layer", *MEASURES)

    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Median rank and mean probability at every point, with 95% bootstrap intervals over facts (of the mean)."""
        rows = []
        for point, readings in self.facts.groupby("point", sort=False):
            row: dict[str, Any] = {"point": point, "layer": float(readings["layer"].iloc[0]), "n": len(readings)}
            for measure in MEASURES:
                values = readings[measure].dropna().to_numpy(dtype=float)
                if len(values):
                    low, high = interval(resampled_means(values[:, None], seed))
                    row |= {measure: values.mean(), f"{measure}_low": low[0], f"{measure}_high": high[0]}
                    row[f"{measure}_median"] = float(np.median(values))
            rows.append(row)
        return pd.DataFrame(rows)


def logit_lens(
    model: Model, pairs: Sequence[TokenPair], norm: str = "own", *, batch_size: int = 8, progress: bool = False
) -> LogitLens:
    """Read the clean prompts' answer at every point of the stream, at the last position and over the subject.

    Args:
        norm: "own": each stream on its own scale; "final": every stream on the final stream's.

    Example:
        >>> lens = kc.logit_lens(model, task.test)
        >>> kc.lens_figure(lens)

    Raises:
        MethodError: an unknown norm.
        ModelError: a model whose stream cannot be taken apart.
    """
    LensOptions(norm=norm, batch_size=batch_size)
    decoder = model.residual
    frames = []
    with tqdm(total=len(pairs), desc="logit lens", unit="fact", disable=not progress) as bar:
        for start in range(0, len(pairs), batch_size):
            frames.append(_read_batch(model, decoder, pairs[start : start + batch_size], norm).assign(start=start))
            bar.update(min(batch_size, len(pairs) - start))
    facts = pd.concat(frames, ignore_index=True)
    facts["fact"] += facts.pop("start")
    provenance = {"model": model.name, "method": "logit_lens", "norm": norm, "n_pairs": len(pairs)}
    return LogitLens(facts, provenance)


def _read_batch(model: Model, decoder: Decoder, pairs: Sequence[TokenPair], norm: str) -> pd.DataFrame:
    """The readings of some facts, counted from 0."""
    batch, final_norm, n = make_batch(pairs, device=decoder.device), decoder.final_norm, len(pairs)
    points, streams = residual_streams(decoder, batch.clean)

    def read(facts: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks and probabilities of tokens, one for each place (fact, position): point x place."""
        vectors = streams[:, facts, positions]
        if norm == "final":
            vectors = final_norm.weighted(final_norm.centre(vectors) * final_norm.scale(vectors[-1]))
            vectors = vectors if final_norm.bias is None else vectors + final_norm.bias
        readout = logit_readout(model.bridge, vectors, apply_ln=norm == "own", targets=tokens, return_type="probs")
        return torch.as_tensor(readout.target_ranks)[..., 0].cpu() + 1, readout.values[..., 0].double().cpu()

    spans = [pair.positions.get("subject", ()) for pair in pairs]
    every, answers, last = torch.arange(n, device=decoder.device), batch.answers[:, 0], batch.answer_positions[:, 0]
    rank, probability = read(every, last, answers)
    over_subject, of_subject = (torch.full((len(points), n), float("nan"), dtype=torch.float64) for _ in range(2))
    if named := [fact for fact, span in enumerate(spans) if span]:
        places = torch.tensor([(fact, position) for fact in named for position in spans[fact]], device=decoder.device).T
        ranks, _ = read(places[0], places[1], answers[places[0]])
        of_fact = ranks.double().split([len(spans[fact]) for fact in named], 1)
        over_subject[:, named] = torch.stack([some.amin(1) for some in of_fact], 1)
        ends = batch.clean[named, [spans[fact][-1] for fact in named]]
        of_subject[:, named] = read(every[named], last[named], ends)[1]
    columns = {
        "fact": np.repeat(np.arange(n), len(points)),
        "subject": np.repeat([pair.text.get("subject", "") for pair in pairs], len(points)),
        "answer": np.repeat([pair.text.get("answer", "") for pair in pairs], len(points)),
        "point": [*points] * n,
        "layer": [*points.values()] * n,
    }
    measured = zip(MEASURES, (rank, probability, over_subject, of_subject), strict=True)
    return pd.DataFrame(columns | {name: values.T.flatten().numpy() for name, values in measured})


@torch.no_grad()
@checked
def residual_streams(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"]
) -> tuple[dict[str, float], Float[Tensor, "point batch pos d_model"]]:
    """The stream along the model, and its points: TransformerLens's names with the number of blocks passed.

    ``blocks.0.hook_resid_pre``, then ``hook_resid_mid`` (after attention; blocks with parallel MLPs have none) and
    ``hook_resid_post`` of every block; n + 0.5 blocks are passed between attention and MLP of block n.
    """
    resid = decoder.embed(tokens)
    points, streams = {"blocks.0.hook_resid_pre": 0.0}, [resid]
    for layer, block in enumerate(decoder.blocks):
        after_attention = decoder.run_attention(layer, resid)
        if not block.parallel:
            points[f"blocks.{layer}.hook_resid_mid"] = layer + 0.5
            streams.append(after_attention)
        resid = after_attention + block.mlp_output(decoder.mlp_input(layer, resid, after_attention))
        points[f"blocks.{layer}.hook_resid_post"] = layer + 1.0
        streams.append(resid)
    return points, torch.stack(streams)
