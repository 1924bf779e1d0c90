"""What a nano model has learned: facts by split, and every other behaviour it was given sentences for."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kc_lib.tasks.generated import PLURAL, SINGULAR, ioi_pairs
from kc_lib.tasks.tokens import Tokenizer
from tools.train_nano.corpus import NEW_COMBINATION, NEW_FACT, NEW_TEMPLATE, TRAINED, Sentence, fact_sentences
from tools.train_nano.examples import encoded, padded
from tools.train_nano.generated import agreement_sentences, pronoun_sentences, surname_sentences, year_sentences

N_PROMPTS = 200
BATCH = 128


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence], prepend_bos: bool = False
) -> list[tuple[Float[Tensor, "token vocab"], list[int]]]:
    """Per sentence the logits where each token of its answer is predicted, given those before it, and the answer's tokens.

    A masked model reads one mask for the token and one for each after it, and then the sentence's end.
    """
    rows: list[tuple[list[int], list[int]]] = []  # tokens, and where they are read out
    owners, answers = [], []
    for owner, example in enumerate(encoded(tokenizer, sentences)):
        tokens, ((start, end),) = list(example.tokens), example.answers
        answers.append(tokens[start:end])
        if tokenizer.mask_token_id is None:
            bos = [tokenizer.bos_token_id] if prepend_bos else []
            rows.append(([*bos, *tokens[:end]], list(range(len(bos) + start - 1, len(bos) + end - 1))))
            owners.append(owner)
            continue
        for first in range(start, end):
            hidden = [*tokens[:first], *[tokenizer.mask_token_id] * (end - first), *tokens[end:]]
            rows.append(([tokenizer.cls_token_id, *hidden, tokenizer.sep_token_id], [first + 1]))
            owners.append(owner)
    found: list[list[Tensor]] = [[] for _ in sentences]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    read: dict[int, Tensor] = {}
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        batch, real = padded([rows[row][0] for row in chosen], tokenizer.pad_token_id)
        logits = model(batch, attention_mask=real.long()).logits.float()
        for i, row in enumerate(chosen):
            read[row] = logits[i, rows[row][1]].clone()
    for row, owner in enumerate(owners):
        found[owner].append(read[row])
    return [(torch.cat(parts), answer) for parts, answer in zip(found, answers, strict=True)]


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence], prepend_bos: bool = False
) -> list[bool]:
    """Whether every token of a sentence's answer ranks first."""
    found = answer_logits(model, tokenizer, sentences, prepend_bos)
    return [logits.argmax(-1).tolist() == answer for logits, answer in found]


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> dict[str, float]:
    """Accuracies between 0 and 1 by behaviour.

    A fact counts if every token of its answer ranks first; of ``TRAINED`` a quarter is taken. Facts of other splits,
    agreement and pronouns are of sentences that are never read; the others are drawn anew, as the read ones were drawn.
    """
    was_training = model.training
    model.eval()
    splits = fact_sentences(seed)
    splits[TRAINED] = random.Random(seed).sample(splits[TRAINED], len(splits[TRAINED]) // 4)
    figures = {
        f"facts, {name}": _share(answered(model, tokenizer, splits[name]))
        for name in (TRAINED, NEW_COMBINATION, NEW_TEMPLATE, NEW_FACT)
    }
    if tokenizer.mask_token_id is None:
        figures[f"facts, {NEW_COMBINATION}, after BOS"] = _share(answered(model, tokenizer, splits[NEW_COMBINATION], True))
    figures |= _ioi(model, tokenizer) | _agreement(model, tokenizer) | _pronouns(model, tokenizer)
    figures |= _surnames(model, tokenizer) | _years(model, tokenizer) | _repeats(model, tokenizer)
    model.train(was_training)
    return {name: round(value, 4) for name, value in figures.items()}


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word] for word in words]


def _ioi(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    pairs = ioi_pairs(Tokenizer(tokenizer, prepend_bos=False), N_PROMPTS, seed=10_000)
    found = answer_logits(model, tokenizer, [Sentence("ioi", pair.clean, pair.answer) for pair in pairs])
    others = _ids(tokenizer, [str(pair.distractor) for pair in pairs])
    better = [bool(logits[0, answer[0]] > logits[0, other]) for (logits, answer), other in zip(found, others, strict=True)]
    first = [logits.argmax(-1).tolist() == answer for logits, answer in found]
    return {"ioi, recipient above giver": _share(better), "ioi, recipient first": _share(first)}


def _agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    sentences = agreement_sentences()[1]
    verbs = {True: _ids(tokenizer, SINGULAR), False: _ids(tokenizer, PLURAL)}
    right = []
    for sentence, (logits, _) in zip(sentences, answer_logits(model, tokenizer, sentences), strict=True):
        probabilities, singular = logits[0].softmax(-1), sentence.answer in SINGULAR
        right.append(bool(probabilities[verbs[singular]].sum() > probabilities[verbs[not singular]].sum()))
    return {"agreement, right number above wrong": _share(right)}


def _pronouns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    sentences = pronoun_sentences()[1]
    she, he = _ids(tokenizer, ("she", "he"))
    found = answer_logits(model, tokenizer, sentences)
    right = [bool(logits[0, answer[0]] > logits[0, he if answer[0] == she else she]) for logits, answer in found]
    return {"pronoun of names not read in the question": _share(right)}


def _surnames(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    sentences = surname_sentences(N_PROMPTS, seed=10_000)
    return {"surname as earlier in the text": _share(answered(model, tokenizer, sentences))}


def _years(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    sentences = year_sentences(N_PROMPTS, seed=10_000)
    years = _ids(tokenizer, [f"{year:02}" for year in range(100)])
    differences, right = [], []
    for sentence, (logits, _) in zip(sentences, answer_logits(model, tokenizer, sentences), strict=True):
        start = int(sentence.prompt.split(" from the year ")[1].split()[0][2:])
        probabilities = logits[0].softmax(-1)[years]
        differences.append(float(probabilities[start + 1 :].sum() - probabilities[: start + 1].sum()))
        right.append(bool(probabilities.argmax() > start))
    return {"years, p(later) - p(not later)": sum(differences) / len(differences), "years, first is later": _share(right)}


@torch.no_grad()
def _repeats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Of random tokens read twice, the share predicted the second time (from the second on); a masked model has no such."""
    if tokenizer.mask_token_id is not None:
        return {}
    generator = random.Random(10_000)
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    figures = {}
    for n in (8, 50):
        halves = [generator.sample(words, n) for _ in range(20)]
        tokens = torch.tensor([half + half for half in halves])
        predicted = model(tokens).logits[:, n:-1].argmax(-1)
        figures[f"repeated tokens, {n}"] = float((predicted == tokens[:, n + 1 :]).float().mean())
    return figures
