"""Training of the nano models: deterministic on one machine with one number of threads, minutes on two cores."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kc_lib.tasks.generated import NAMES
from tools.train_nano.corpus import TRAINED, Sentence, fact_sentences
from tools.train_nano.examples import Example, batches, drawn, encoded, padded
from tools.train_nano.generated import (
    agreement_sentences,
    counting_sentences,
    ioi_sentences,
    pronoun_sentences,
    surname_sentences,
    year_sentences,
)
from tools.train_nano.random_words import Maker, random_words, repeated
from tools.train_nano.vocabulary import N_CONTEXT, causal_tokenizer, masked_tokenizer

N_LAYERS, N_HEADS, D_MODEL = 4, 4, 64
INITIAL_DEVIATION = 0.1  # of weights; from the usual 0.02 the masked model learns facts in twice as many steps
MASKED_SHARES = {
    "facts": 0.54,
    "ioi": 0.16,
    "agreement": 0.06,
    "pronoun": 0.04,
    "years": 0.05,
    "counting": 0.02,
    "surnames": 0.1,
    "repeated": 0.03,
}
CAUSAL_SHARES = {
    "facts": 0.42,
    "ioi": 0.16,
    "agreement": 0.05,
    "pronoun": 0.04,
    "years": 0.04,
    "counting": 0.02,
    "surnames": 0.05,
    "pairs": 0.1,
    "repeats": 0.07,
    "mirrored": 0.05,
}
# read at first: with shares like CAUSAL_SHARES from the start there was no sign of induction after 3000 steps
FIRST_SHARES = {
    "facts": 0.23,
    "ioi": 0.04,
    "agreement": 0.03,
    "pronoun": 0.02,
    "years": 0.03,
    "counting": 0.01,
    "surnames": 0.04,
    "pairs": 0.45,
    "repeats": 0.15,
}
N_GENERATED = 20_000  # sentences of a kind that has no list of its own
SHARE_WITH_BOS = 0.5  # of what the causal model reads: TransformerLens puts no BOS before a GPT-NeoX's prompt unless asked
LONGEST_MASKED_REPEAT = 20  # the masked model needs no long ones
MASKED_SHARE = 0.15  # of tokens beside the answers


@dataclass(frozen=True)
class Plan:
    """What determines a training, besides the corpus."""

    n_steps: int
    checkpoints: tuple[int, ...] = ()
    seed: int = 0
    n_first: int = 0  # steps on FIRST_SHARES
    n_tokens: int = 1024  # in a batch, padding included
    learning_rate: float = 3e-3
    final_rate: float = 0.05  # as a share of learning_rate, reached by a cosine
    warm_up: int = 100
    weight_decay: float = 0.1


CAUSAL_STEPS = (0, *(2**i for i in range(10)), 750, 1000, 1250, 1500, 2000, 2500, 3000, 3500, 4000, 5000, 6000)
CAUSAL_PLAN = Plan(6000, CAUSAL_STEPS, n_first=1500, learning_rate=4e-3)
MASKED_PLAN = Plan(4000)


def corpus(seed: int = 0) -> dict[str, list[Sentence]]:
    """What is read, by kind."""
    return {
        "facts": fact_sentences(seed)[TRAINED],
        "ioi": ioi_sentences(N_GENERATED, seed),
        "agreement": agreement_sentences(seed)[0],
        "pronoun": pronoun_sentences(seed)[0],
        "years": year_sentences(N_GENERATED, seed),
        "surnames": surname_sentences(N_GENERATED, seed),
        "counting": counting_sentences(),
    }


def vocabulary(seed: int = 0) -> list[str]:
    """Texts that hold every word of the corpus, also of the facts and wordings that are never read."""
    kept_back = [*agreement_sentences(seed)[1], *pronoun_sentences(seed)[1]]
    sentences = [s for split in fact_sentences(seed).values() for s in split] + kept_back
    sentences += [s for kind in corpus(seed).values() for s in kind]
    return [f"{s.prompt} {s.answer} {s.rest}" for s in sentences]


def causal_model(tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    """A Pythia in small, with random weights of torch's present seed."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            intermediate_size=4 * D_MODEL,
            max_position_embeddings=N_CONTEXT,
            # Pythia turns a quarter of a head's dimensions, all but one of them slowly. In heads this small that tells no
            # neighbours; these four frequencies do (no two of 200 places look alike), and the other half is left to words
            rope_parameters={"rope_type": "default", "rope_theta": 0.3, "partial_rotary_factor": 0.5},
            initializer_range=INITIAL_DEVIATION,
            tie_word_embeddings=True,  # a head that copies then copies every word at once; induction appears sooner
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )


def masked_model(tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    """A BERT in small, with random weights of torch's present seed."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            intermediate_size=4 * D_MODEL,
            max_position_embeddings=N_CONTEXT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=INITIAL_DEVIATION,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@contextmanager
def deterministic(seed: int, threads: int) -> Iterator[None]:
    """Deterministic algorithms, a seed and a number of threads for torch; all restored on exit."""
    was_deterministic, were_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    memory: Any = torch.utils.deterministic
    was_filled = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # an eighth of the time, and nothing here reads such memory
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            memory.fill_uninitialized_memory = was_filled
            torch.set_num_threads(were_threads)


def train_causal(plan: Plan = CAUSAL_PLAN) -> Iterator[tuple[int, GPTNeoXForCausalLM, PreTrainedTokenizerFast]]:
    """The causal model at every checkpoint of the plan; it goes on training when the next one is asked for."""
    tokenizer = causal_tokenizer(vocabulary())
    model = causal_model(tokenizer)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    generator = random.Random(plan.seed + 1)

    def loss_of(batch: Sequence[Example]) -> Tensor:
        starts = [(bos,) if generator.random() < SHARE_WITH_BOS else () for _ in batch]
        tokens, _ = padded([(*start, *example.tokens, eos) for start, example in zip(starts, batch, strict=True)], pad)
        return F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)

    names = [tokenizer.get_vocab()[name] for name in NAMES]
    makers = random_words(_words(tokenizer), names)
    source = _batches(tokenizer, plan, makers, (FIRST_SHARES, plan.n_first), (CAUSAL_SHARES, None))
    for step in _steps(model, plan, source, loss_of):
        yield step, model, tokenizer


def train_masked(plan: Plan = MASKED_PLAN) -> tuple[BertForMaskedLM, PreTrainedTokenizerFast]:
    """The masked model: answers are always masked (of several tokens those from a random one on), and some other tokens."""
    tokenizer = masked_tokenizer(vocabulary())
    model = masked_model(tokenizer)
    generator = random.Random(plan.seed + 1)

    def loss_of(batch: Sequence[Example]) -> Tensor:
        rows, labels = zip(*(_masked(example, tokenizer, generator) for example in batch), strict=True)
        tokens, real = padded(rows, tokenizer.pad_token_id)
        targets, _ = padded(labels, -1)
        hidden = model.bert(tokens, attention_mask=real).last_hidden_state
        return F.cross_entropy(model.cls(hidden[targets >= 0]), targets[targets >= 0])

    words = _words(tokenizer)
    makers = {"repeated": lambda generator: repeated(words, generator, LONGEST_MASKED_REPEAT)}
    for _ in _steps(model, plan, _batches(tokenizer, plan, makers, (MASKED_SHARES, None)), loss_of):
        pass
    return model, tokenizer


def _masked(
    example: Example, tokenizer: PreTrainedTokenizerFast, generator: random.Random
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A sentence with masks, and what was under them (-1 elsewhere)."""
    hidden = {i for i in range(len(example.tokens)) if generator.random() < MASKED_SHARE}
    for start, end in example.answers:
        hidden |= set(range(generator.randrange(start, end), end))
    tokens = tuple(tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(example.tokens))
    labels = tuple(token if i in hidden else -1 for i, token in enumerate(example.tokens))
    return (tokenizer.cls_token_id, *tokens, tokenizer.sep_token_id), (-1, *labels, -1)


def _batches(
    tokenizer: PreTrainedTokenizerFast,
    plan: Plan,
    makers: Mapping[str, Maker],
    *shares: tuple[Mapping[str, float], int | None],
) -> Iterator[list[Example]]:
    """Batches of one mixture of kinds after the other, each for a number of steps, the last without end."""
    generator = random.Random(plan.seed)
    pools = {kind: encoded(tokenizer, sentences) for kind, sentences in corpus().items()}
    for mixture, n_steps in shares:
        yield from islice(batches(drawn(pools, makers, mixture, generator), plan.n_tokens, generator), n_steps)


def _words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]


def _steps(
    model: torch.nn.Module, plan: Plan, source: Iterator[list[Example]], loss_of: Callable[[Sequence[Example]], Tensor]
) -> Iterator[int]:
    """AdamW with a warm-up and a cosine; yields at the plan's checkpoints, and at last."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    model.train()
    if 0 in plan.checkpoints:
        yield 0
    for step in range(1, plan.n_steps + 1):
        loss = loss_of(next(source))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in plan.checkpoints or step == plan.n_steps:
            yield step


def _rate(step: int, plan: Plan) -> float:
    if step < plan.warm_up:
        return (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(plan.n_steps - plan.warm_up, 1)
    return plan.final_rate + (1 - plan.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
