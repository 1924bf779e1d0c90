"""Successor heads: from Monday to Tuesday by weights alone (Gould et al. 2023, arXiv:2312.09230).

A word's token embedding goes through the first MLP, and what that writes goes through a head's norm, W_V and W_O, the final
norm and the unembedding. The score is the share of pairs whose true successor has the highest logit among the successors
of its list. The lists are ordinal categories, each in lower case and with an initial capital, each with and without a
leading space; Roman numerals in capitals only. A pair counts where both words are single tokens. Weekdays and months go
around. Published code leaves the head's norm out, its weights being folded into W_V; we apply it, scale and all.

The paper ranks heads and draws no line. Ours: more than half of the pairs. The null gives each word of a list the successor
of another.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_lowercase

import torch
from jaxtyping import Int
from torch import Tensor

from kc_lib.components.head_runs import copied
from kc_lib.errors import TaskError
from kc_lib.heads.head_scores import HeadScores, best_by_chance, described
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of

THRESHOLD = 0.5
LEAST_PAIRS = 5
# fmt: off
ORDINALS = {
    "numbers": tuple(str(number) for number in range(1, 201)),
    "number words": (
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
        "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
    ),
    "ordinals": (
        "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    ),
    "days": (
        "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday",
    ),
    "short days": (
        "mon", "tue", "wed", "thu", "fri", "sat", "sun",
    ),
    "months": (
        "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
        "december",
    ),
    "short months": (
        "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
    ),
    "letters": tuple(ascii_lowercase),
    "roman numerals": (
        "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii", "xiii", "xiv", "xv", "xvi", "xvii",
        "xviii", "xix", "xx",
    ),
}
# fmt: on
CYCLIC = {"days", "short days", "months", "short months"}
CAPITALS: dict[str, tuple[Callable[[str], str], ...]] = {"numbers": (str,), "roman numerals": (str.upper,)}


def successor_scores(model: Model, *, seed: int = 0) -> HeadScores:
    """Share of ordinal words that a head's weights map to their successor; see the head of this file.

    Raises:
        TaskError: a tokenizer that has hardly a pair of single tokens.
        ModelError: a model that is no decoder with an MLP in its first block.
    """
    decoder = model.residual
    lists = successor_pairs(tokenizer_of(model))
    n_pairs = sum(len(pairs) for pairs in lists.values())
    if n_pairs < LEAST_PAIRS:
        raise TaskError(
            f"successor scores need ordinal words that are single tokens: this tokenizer has {n_pairs} such pairs, fewer "
            f"than {LEAST_PAIRS}; use a model whose vocabulary has numbers, weekdays or months"
        )
    right, chosen, targets = [], [], []
    for pairs in lists.values():
        source, target = torch.tensor(pairs).T
        best = successor_choices(decoder, source, target.unique())
        right.append(best == target)
        chosen.append(best)
        targets.append(target)
    scores = torch.cat(right, -1).float().mean(-1)
    by_list = {f"{name} ({len(lists[name])})": part.float().mean(-1) for name, part in zip(lists, right, strict=True)}
    criterion, shuffle = "more than half of the pairs (ours)", "successors shuffled within their list"
    provenance = described(model, seed, criterion, shuffle, n_pairs=n_pairs)
    null = _null(chosen, targets, seed)
    return HeadScores.of("successor", scores, THRESHOLD, null, detail=by_list, provenance=provenance)


def successor_pairs(tokenizer: Tokenizer) -> dict[str, list[tuple[int, int]]]:
    """Pairs of single tokens, word and successor, by list; a list whose tokens repeat an earlier list's is left out."""
    lists: dict[str, list[tuple[int, int]]] = {}
    for category, words in ORDINALS.items():
        following = (*words[1:], words[0]) if category in CYCLIC else words[1:]
        for change in CAPITALS.get(category, (str, str.capitalize)):
            for space in ("", " "):
                pairs = [
                    (_token(tokenizer, space + change(word)), _token(tokenizer, space + change(after)))
                    for word, after in zip(words, following, strict=False)
                ]
                single = [(word, after) for word, after in pairs if word is not None and after is not None]
                if len(single) > 1 and single not in lists.values():
                    lists[repr(space + change(words[0]))] = single
    return lists


def _token(tokenizer: Tokenizer, word: str) -> int | None:
    """The word's token if it is one token, and a word of the vocabulary."""
    ids = tokenizer.inner(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 and ids[0] not in tokenizer.inner.all_special_ids else None


@torch.no_grad()
def successor_choices(
    decoder: Decoder, words: Int[Tensor, " word"], targets: Int[Tensor, " target"]
) -> Int[Tensor, "layer head word"]:
    """The target with the highest logit after each head, from the words' embeddings through the first MLP."""
    first = decoder.blocks[0]
    embedding = decoder.token_embedding(words)
    seen = first.mlp_output(first.mlp_norm(embedding[:, None]))[:, 0]
    choices = []
    for block in decoder.blocks:
        logits = decoder.unembed(copied(block.attention, seen), tokens=targets.to(decoder.device))
        choices.append(targets[logits.argmax(-1).cpu()])
    return torch.stack(choices)


def _null(chosen: list[Tensor], targets: list[Tensor], seed: int) -> float:
    """What the best head's score is by chance: every word has the successor of another of its list."""

    def shuffled(generator: torch.Generator) -> Tensor:
        others = [target[torch.randperm(len(target), generator=generator)] for target in targets]
        hits = [(choice == target).float() for choice, target in zip(chosen, others, strict=True)]
        return torch.cat(hits, -1).mean(-1)

    return best_by_chance(shuffled, seed)
