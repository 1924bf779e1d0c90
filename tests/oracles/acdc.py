"""ACDC the published way: the full model is run once for every edge under test.

Conmy et al. 2023 (arXiv:2304.14997), algorithm 1, on the hand-written forward pass of `eap.py`. Nothing is shared
between runs and nothing is left out of a run: every reader sums the outputs of all earlier writers by itself.

Pairs are objects with `clean`, `corrupted` (token ids), `answer` (token ids) and `distractor` (a token id).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eap import (
    Decoder,
    edge_exists,
    head_contributions,
    mlp_contribution,
    read_decoder,
    reader_heads,
    reader_names,
    run,
    unembed,
    writer_names,
)


@dataclass
class Prompts:
    """Pairs as padded token tensors [B, P], with the answer tokens of each and the positions that predict them."""

    clean: Tensor
    corrupted: Tensor
    lengths: list[int]
    answers: list[list[int]]
    positions: list[list[int]]
    distractors: list[int]


@dataclass
class Found:
    """The edges that stayed [U, V], how much each test raised the loss (NaN: no test), and the losses at the ends."""

    mask: Tensor
    effects: Tensor
    n_tests: int
    loss_full: float
    loss: float


def read_prompts(pairs: Sequence[Any], full_answer: bool = False) -> Prompts:
    """The first answer token of every pair, or all of them, each predicted after the answer tokens before it."""
    answers = [list(pair.answer if full_answer else pair.answer[:1]) for pair in pairs]
    clean = [[*pair.clean, *answer[:-1]] for pair, answer in zip(pairs, answers, strict=True)]
    corrupted = [[*pair.corrupted, *answer[:-1]] for pair, answer in zip(pairs, answers, strict=True)]
    lengths = [len(tokens) for tokens in clean]

    def padded(rows: list[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows])

    positions = [list(range(n - len(answer), n)) for n, answer in zip(lengths, answers, strict=True)]
    return Prompts(padded(clean), padded(corrupted), lengths, answers, positions, [pair.distractor for pair in pairs])


def ablated_outputs(decoder: Decoder, prompts: Prompts, intervention: str) -> Tensor:
    """What a removed edge carries: [U, B, P, D], or [U, 1, 1, D] where it is the same at all positions."""

    def outputs(tokens: Tensor) -> Tensor:
        return run(decoder, decoder.embed(tokens))[1].permute(2, 0, 1, 3)

    if intervention == "patching":
        return outputs(prompts.corrupted)
    clean = outputs(prompts.clean)
    if intervention == "zero":
        return torch.zeros_like(clean[:, :1, :1])
    real = [clean[:, example, :length] for example, length in enumerate(prompts.lengths)]
    if intervention == "mean":  # over every real token of every prompt
        return torch.cat(real, dim=1).mean(dim=1)[:, None, None]
    if intervention == "positional_mean":  # over the prompts that are long enough to have the position
        at_position = [
            torch.stack([example[:, position] for example in real if example.shape[1] > position]).mean(dim=0)
            for position in range(max(prompts.lengths))
        ]
        return torch.stack(at_position, dim=1)[:, None]
    raise ValueError(f"unknown intervention {intervention}")


@torch.no_grad()
def run_edges(
    decoder: Decoder, tokens: Tensor, mask: Tensor, ablated: Tensor, kv_readers: int, at: tuple[list[int], list[int]] | None
) -> Tensor:
    """Logits of a run with only the edges in `mask` [U, V]: at every position, or at the examples and positions `at`."""
    own = decoder.embed(tokens)[None]
    biases = torch.zeros_like(own[0])  # output biases of the attention layers passed so far
    column = 0

    def next_inputs(readers: int) -> Tensor:
        """What the next readers read, [B, P, readers, D]: kept edges carry this run's outputs, removed ones do not."""
        nonlocal column
        inputs = []
        for _ in range(readers):
            kept = mask[: len(own), column]
            inputs.append(biases + own[kept].sum(0) + ablated[: len(own)][~kept].sum(0))
            column += 1
        return torch.stack(inputs, dim=2)

    for layer in decoder.layers:
        heads = head_contributions(layer, next_inputs(decoder.heads), next_inputs(kv_readers), next_inputs(kv_readers))
        if decoder.parallel:
            mlp_in = next_inputs(1)
        own = torch.cat([own, heads.permute(2, 0, 1, 3)])
        biases = biases + layer.b_o
        if not decoder.parallel:
            mlp_in = next_inputs(1)
        own = torch.cat([own, mlp_contribution(layer, mlp_in[:, :, 0])[None]])
    final = next_inputs(1)[:, :, 0]
    return unembed(decoder, final if at is None else final[at])


def losses_of_answer(metric: str, logits: Tensor, full: Tensor, answer: list[int], distractor: int) -> Tensor:
    """What is to stay low, at each answer token of one prompt: from the logits and the full model's, [tokens, vocab]."""
    log_p = logits.log_softmax(-1)
    log_p_full = full.log_softmax(-1)
    if metric == "logit_difference":  # of the first answer token
        return logits[:1, distractor] - logits[:1, answer[0]]
    if metric == "kl":
        return F.kl_div(log_p, log_p_full, reduction="none", log_target=True).sum(-1)
    own = torch.stack([log_p[i, token] for i, token in enumerate(answer)])
    if metric == "log_probability":
        return -own
    if metric == "probability":
        return -own.exp()
    if metric == "match_nll":
        return torch.stack([log_p_full[i, token] for i, token in enumerate(answer)]) - own
    raise ValueError(f"unknown metric {metric}")


def loss_of_edges(
    hf_model: Any,
    pairs: Sequence[Any],
    metric: str = "match_nll",
    intervention: str = "zero",
    normalize: str = "answer",
    full_answer: bool = False,
    ungrouped: bool = False,
    all_positions: bool = False,
) -> Callable[[Tensor], float]:
    """The loss, averaged over pairs, as a function of a mask [U, V]; every call is one run of the full model.

    With "answer" a pair's loss is the mean over its answer tokens, with "positions" their sum over the number of tokens
    of its prompt. `all_positions` unembeds every position, as a plain forward pass does, and reads the same ones.
    """
    decoder, prompts = read_decoder(hf_model), read_prompts(pairs, full_answer)
    with torch.no_grad():
        ablated = ablated_outputs(decoder, prompts, intervention)
    n_answers = [len(answer) for answer in prompts.answers]
    rows = [example for example, n in enumerate(n_answers) for _ in range(n)]
    at = rows, [position for positions in prompts.positions for position in positions]

    def answer_logits(mask: Tensor) -> tuple[Tensor, ...]:
        where = None if all_positions else at
        logits = run_edges(decoder, prompts.clean, mask, ablated, reader_heads(hf_model, ungrouped), where)
        return (logits[at] if all_positions else logits).split(n_answers)

    full = answer_logits(edge_exists(hf_model, ungrouped))

    def loss(mask: Tensor) -> float:
        total = 0.0
        for example, logits in enumerate(answer_logits(mask)):
            answer, distractor = prompts.answers[example], prompts.distractors[example]
            values = losses_of_answer(metric, logits, full[example], answer, distractor)
            parts = len(values) if normalize == "answer" else prompts.lengths[example]
            total += values.sum().item() / parts
        return total / len(prompts.answers)

    return loss


def nodes_of_reader(hf_model: Any, ungrouped: bool, reader: str) -> list[str]:
    """The writers computed from what a reader reads: one, or all heads that share a key or value."""
    if not reader.endswith(("<k>", "<v>")):
        return [reader.split("<")[0]]
    layer, index = reader.split("<")[0].split(".h")
    group = hf_model.config.num_attention_heads // reader_heads(hf_model, ungrouped)
    return [f"{layer}.h{int(index) * group + i}" for i in range(group)]


def plain_acdc(
    hf_model: Any,
    pairs: Sequence[Any],
    tau: float,
    metric: str = "match_nll",
    intervention: str = "zero",
    order: str = "reverse",
    absolute: bool = False,
    normalize: str = "answer",
    skip: Sequence[str] = (),
    start: Tensor | None = None,
    full_answer: bool = False,
    ungrouped: bool = False,
    seed: int = 0,
) -> Found:
    """Take away one edge after the other, from the logits down, and put it back if the loss rises by tau or more.

    Readers come last first. A reader whose nodes write to nothing any more loses its edges without a test; else one
    of a node in `skip` keeps them without a test. `start` [U, V] is the set of edges to begin with, by default all.
    """
    loss = loss_of_edges(hf_model, pairs, metric, intervention, normalize, full_answer, ungrouped)
    writers, readers = writer_names(hf_model), reader_names(hf_model, ungrouped)
    mask = edge_exists(hf_model, ungrouped) if start is None else start.clone()
    effects = torch.full(mask.shape, float("nan"))
    loss_full, current = loss(edge_exists(hf_model, ungrouped)), loss(mask)
    n_tests = 0
    for column, reader in reversed(list(enumerate(readers))):
        nodes = nodes_of_reader(hf_model, ungrouped, reader)
        if reader != "logits" and not any(mask[writers.index(node)].any() for node in nodes):
            mask[:, column] = False
            current = loss(mask)  # moves only where a norm over all heads reads also those that nothing else reads
            continue
        if set(nodes) & set(skip):
            continue
        rows = [row for row in range(len(writers)) if mask[row, column]]
        if order == "reverse":
            rows.reverse()
        elif order == "random":
            random.Random(f"{seed} {reader}").shuffle(rows)
        for row in rows:
            mask[row, column] = False
            without = loss(mask)
            n_tests += 1
            rise = without - current
            effects[row, column] = rise
            if (abs(rise) if absolute else rise) < tau:
                current = without
            else:
                mask[row, column] = True
    return Found(mask, effects, n_tests, loss_full, current)
