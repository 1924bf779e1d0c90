"""Name movers and negative name movers, by whether a head's W_V W_O copies names (Wang et al. 2023, arXiv:2211.00593).

The stream after block 0 at a name's position goes through a head's norm, W_V and W_O, the final norm and the unembedding.
The copy score is the share of (prompt, name) for which the name is among the five highest logits; with the sign of W_O
flipped it is the negative copy score. A head counts above 10% (Tigges et al. 2024, arXiv:2407.10827). The score is one of
weights: it says what a head does where it attends to a name, not whether it attends there (``inhibition.name_movers``).

A prompt of the IOI task has three names: indirect object, first and second mention of the subject. Published code folds the
head's norm into W_V and leaves its scale out; we apply the norm.

The null is the same share for names that are not in that place: other names of the task, shuffled over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.components.head_runs import copies_in_top
from kc_lib.errors import MethodError
from kc_lib.heads.head_scores import HeadScores, best_by_chance, described
from kc_lib.heads.options import COPIES
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.generated import ioi_pairs
from kc_lib.tasks.tokens import tokenizer_of

THRESHOLD, TOP = 0.10, 5


def copy_scores(model: Model, *, n_prompts: int = 50, top: int = TOP, seed: int = 0) -> dict[str, HeadScores]:
    """Name-mover and negative name-mover scores by name, from one pass over the heads; see the head of this file.

    Raises:
        TaskError: a tokenizer that splits almost every name.
        ModelError: a model that is no decoder.
    """
    decoder, tokenizer = model.residual, tokenizer_of(model)
    if n_prompts < 1 or not 0 < top < int(model.cfg.d_vocab):
        raise MethodError(f"n_prompts is {n_prompts} and top is {top}; both must be at least 1, top below the vocabulary")
    pairs = ioi_pairs(tokenizer, n_prompts, seed)
    resid, names = names_after_block_0(
        decoder,
        [tokenizer.encode(pair.clean) for pair in pairs],
        [{tokenizer.answer("and", name)[0] for name in (pair.answer, str(pair.distractor))} for pair in pairs],
    )
    vocabulary, row_names = names.unique(return_inverse=True)
    layers = [copies_in_top(decoder, layer, resid, vocabulary, top).cpu() for layer in range(decoder.n_layers)]
    criterion, null = "above 10% (Tigges et al. 2024)", "other names of the task, shuffled over the rows"
    provenance = described(model, seed, criterion, null, n_prompts=n_prompts, top=top, n_names=len(names))
    result = {}
    for name, in_top in zip(COPIES, torch.stack(layers, 1), strict=True):
        scores = in_top[..., torch.arange(len(row_names)), row_names].float().mean(-1)
        result[name] = HeadScores.of(name, scores, THRESHOLD, _null(in_top, row_names, seed), provenance=provenance)
    return result


@torch.no_grad()
def names_after_block_0(
    decoder: Decoder, prompts: Sequence[Sequence[int]], names: Sequence[set[int]]
) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, " row"]]:
    """The stream after block 0 wherever a prompt has one of its names, and the name's token."""
    rows, tokens = [], []
    for prompt, wanted in zip(prompts, names, strict=True):
        ids = torch.tensor(prompt, device=decoder.device)
        after = decoder.run_block(0, decoder.embed(ids[None]))[0]
        places = [place for place, token in enumerate(prompt) if token in wanted]
        rows.append(after[places])
        tokens.append(ids[places])
    return torch.cat(rows), torch.cat(tokens)


def _null(in_top: Bool[Tensor, "layer head row name"], row_names: Int[Tensor, " row"], seed: int) -> float:
    """What the best head's score is by chance: every row asks for another row's name."""
    row_names = row_names.cpu()

    def shuffled(generator: torch.Generator) -> Tensor:
        others = row_names[torch.randperm(len(row_names), generator=generator)]
        rows = (others != row_names).nonzero()[:, 0]
        return in_top[..., rows, others[rows]].float().mean(-1)  # NaN where no row has another name

    return best_by_chance(shuffled, seed)
