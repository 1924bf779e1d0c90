"""Which facts the model knows: the rank of an answer's token among all tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.models.model import Model
from kc_lib.tasks.relations import SLOT, Relation, load_relation, relation_files
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of


@torch.no_grad()
def last_logits(model: Model, prompts: Sequence[tuple[int, ...]], batch_size: int = 16) -> Iterator[Float[Tensor, " vocab"]]:
    """Logits at each prompt's last token, in the order given."""
    device = model.device
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(map(len, rows))
        tokens = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = model.bridge(tokens)
        for row, tokens_of_row in zip(logits, rows, strict=True):
            yield row[len(tokens_of_row) - 1].float()


@torch.no_grad()
def ranks_at(
    model: Model,
    prompts: Sequence[tuple[int, ...]],
    positions: Sequence[int],
    targets: Sequence[int],
    batch_size: int = 16,
) -> list[int]:
    """Rank of each target token at a position of its prompt, 1 for the most probable.

    Prompts of equal length share a batch, so nothing is padded: a model that attends in both directions would see pads.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    ranks = [0] * len(prompts)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            logits = model.bridge(torch.tensor([prompts[i] for i in rows], device=model.device))
            at = logits[torch.arange(len(rows)), torch.tensor([positions[i] for i in rows])].float()
            of_target = at.gather(1, torch.tensor([[targets[i]] for i in rows], device=at.device))
            for i, rank in zip(rows, (at >= of_target).sum(1).tolist(), strict=True):
                ranks[i] = rank
    return ranks


def answer_ranks(
    model: Model, prompts: Sequence[tuple[int, ...]], answers: Sequence[int], batch_size: int = 16
) -> list[int]:
    """Rank of each answer's first token at its prompt's last position, 1 for the most probable."""
    return ranks_at(model, prompts, [len(prompt) - 1 for prompt in prompts], answers, batch_size)


@torch.no_grad()
def best_ranks(
    model: Model, prompts: Sequence[tuple[int, ...]], right: Sequence[Sequence[int]], batch_size: int = 16
) -> list[int]:
    """Rank of the best of each prompt's right tokens among all that are not right, at its last position, 1 for the first."""
    ranks = []
    for logits, tokens in zip(last_logits(model, prompts, batch_size), right, strict=True):
        best = logits[list(tokens)].max()
        logits[list(tokens)] = -float("inf")
        ranks.append(1 + int((logits >= best).sum()))
    return ranks


def known_facts(model: Model, relation: Relation, template: str, known_rank: int = 1) -> int:
    """How many of a relation's facts the model knows when asked with a template."""
    tokenizer = tokenizer_of(model)
    texts = [template.replace(SLOT, fact.subject) for fact in relation.facts]
    prompts = [tokenizer.encode(text) for text in texts]
    answers = [tokenizer.answer(text, fact.object)[0] for text, fact in zip(texts, relation.facts, strict=True)]
    return sum(rank <= known_rank for rank in answer_ranks(model, prompts, answers))


def answer_tokens(tokenizer: Tokenizer, without: Collection[str] = ()) -> list[int]:
    """First tokens of all answers of the project's relations ``without`` some, each once."""
    found = set()
    for name in relation_files():
        if name not in without:
            relation = load_relation(name)
            template = relation.templates[0]
            found |= {tokenizer.answer(template.replace(SLOT, fact.subject), fact.object)[0] for fact in relation.facts}
    return sorted(found)
