"""Which facts the model knows: the rank of the answer's first token among all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.tasks.relations import SLOT, Relation
from kc_lib.tasks.tokens import tokenizer_of


@torch.no_grad()
def last_logits(
    model: TransformerBridge, prompts: Sequence[tuple[int, ...]], batch_size: int = 16
) -> Iterator[Float[Tensor, " vocab"]]:
    """Logits at each prompt's last token, in the order given."""
    device = model.cfg.device
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(map(len, rows))
        tokens = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = model(tokens)
        for row, tokens_of_row in zip(logits, rows, strict=True):
            yield row[len(tokens_of_row) - 1].float()


def answer_ranks(
    model: TransformerBridge, prompts: Sequence[tuple[int, ...]], answers: Sequence[int], batch_size: int = 16
) -> list[int]:
    """Rank of each answer's first token at its prompt's last position, 1 for the most probable."""
    logits = last_logits(model, prompts, batch_size)
    return [int((row >= row[answer]).sum()) for row, answer in zip(logits, answers, strict=True)]


def known_facts(model: TransformerBridge, relation: Relation, template: str, known_rank: int = 1) -> int:
    """How many of a relation's facts the model knows when asked with a template."""
    tokenizer = tokenizer_of(model)
    texts = [template.replace(SLOT, fact.subject) for fact in relation.facts]
    prompts = [tokenizer.encode(text) for text in texts]
    answers = [tokenizer.answer(text, fact.object)[0] for text, fact in zip(texts, relation.facts, strict=True)]
    return sum(rank <= known_rank for rank in answer_ranks(model, prompts, answers))
