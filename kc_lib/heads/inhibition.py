"""S-inhibition heads by path patching into the name movers' queries (Wang et al. 2023, arXiv:2211.00593, section 3.3).

An S-inhibition head tells the name movers at the last position where the subject was first named, so that they attend
to the other name. Prompts with the same names in exchanged places ("B and A ... B gave" for "A and B ... B gave": token
same, position opposite) give its output the wrong position. Patched into the name movers' queries, that lowers the logit
difference and the attention to the indirect object (IO), and raises the attention to the subject's first mention (S1).

The score is the share of the clean logit difference that is lost, at the last position, other heads frozen on the way
(``path_patching.py``). A head counts where all three effects have that sign, as in Tigges et al. 2024
(arXiv:2407.10827), and where its score exceeds the null. That null is ours, because among hundreds of heads many have
these signs by chance: the 99th percentile over heads of the share lost when the prompt differs in the thing given alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.components.attention import Head, check_heads
from kc_lib.components.head_runs import run_layers
from kc_lib.errors import MethodError, check_counts
from kc_lib.heads.copying import copy_scores
from kc_lib.heads.head_scores import NULL_LEVEL, HeadScores, described
from kc_lib.heads.path_patching import Paths, patch_queries
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.files import PairText
from kc_lib.tasks.generated import THINGS, ioi_pairs
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of


@dataclass(frozen=True)
class IoiPrompts:
    """IOI prompts of one length: clean, names in exchanged places, another thing given; and where the names are."""

    clean: Int[Tensor, "batch pos"]
    exchanged: Int[Tensor, "batch pos"]
    other_thing: Int[Tensor, "batch pos"]
    io: Int[Tensor, " batch"]  # positions
    s1: Int[Tensor, " batch"]
    s2: Int[Tensor, " batch"]
    names: Int[Tensor, "batch 2"]  # tokens of the indirect object and the subject

    def __len__(self) -> int:
        return len(self.clean)


def s_inhibition_scores(
    model: Model,
    *,
    name_movers: Sequence[Head] | None = None,
    copies: HeadScores | None = None,
    n_prompts: int = 32,
    seed: int = 0,
) -> HeadScores:
    """Share of the logit difference that a head's wrong position takes away; see the head of this file.

    Args:
        name_movers: (layer, head) of the receivers; None takes ``name_movers(model, copies=copies)``.

    ``detail`` has the mean change of the name movers' attention to IO and S1. Heads that are below no name mover score 0.

    Raises:
        MethodError: no name mover, a head the model does not have, or a model that prefers the subject.
        TaskError: a tokenizer that splits almost every name.
        ModelError: a model that is no decoder.
    """
    decoder = model.residual
    receivers = list(_default_name_movers(model, copies, n_prompts, seed) if name_movers is None else name_movers)
    if not receivers:
        raise MethodError("name_movers is empty: give at least one (layer, head)")
    check_heads(decoder, receivers)
    top = max(layer for layer, _ in receivers)
    senders = [(layer, head) for layer in range(top) for head in range(decoder.n_heads)]
    if not senders:
        raise MethodError("the name movers are in the first layer: no head is below them, so none can inhibit")
    paths = Paths(senders, receivers)
    groups = ioi_prompts(model, n_prompts, seed)
    n = sum(map(len, groups))
    total, control, clean = torch.zeros(3, len(senders)), torch.zeros(len(senders)), torch.zeros(3)
    for group in groups:
        weight = len(group) / n
        unpatched = _effects(decoder, group, group.clean, Paths(senders[:1], receivers))
        clean += unpatched[:, 0] * weight
        total += (_effects(decoder, group, group.exchanged, paths) - unpatched) * weight
        control += (_effects(decoder, group, group.other_thing, paths) - unpatched)[0] * weight
    if clean[0] <= 0:
        raise MethodError(
            f"the model's mean logit difference on IOI is {clean[0]:.2f}: it prefers the subject and has nothing to lose"
        )
    lost, io, s1 = (_per_head(decoder, values) for values in (-total[0] / clean[0], total[1], total[2]))
    criterion = "all three effects have their sign (Tigges et al. 2024), and the null (ours)"
    chance = "99th percentile over heads for prompts that differ in the thing given"
    figures = dict(zip(("logit_difference", "io_attention", "s1_attention"), clean.tolist(), strict=True))
    figures |= {"name_movers": [list(head) for head in receivers], "n_prompts": n}
    provenance = described(model, seed, criterion, chance, **figures)
    null = float((-control / clean[0]).double().quantile(NULL_LEVEL))
    detail = {"io_attention": io, "s1_attention": s1}
    return HeadScores.of("s_inhibition", lost, 0.0, null, also=(io < 0) & (s1 > 0), detail=detail, provenance=provenance)


def name_movers(model: Model, *, copies: HeadScores | None = None, n_prompts: int = 32, seed: int = 0) -> list[Head]:
    """Heads that copy names and, at the end of IOI prompts, attend more to the indirect object than to the subject.

    The criterion of Tigges et al. 2024 (arXiv:2407.10827): copy score above 10%, mean attention to IO above that to S1 and
    S2. Highest attention to IO first. ``copies``: name-mover scores that are known already.
    """
    decoder = model.residual
    copies = copy_scores(model, n_prompts=n_prompts, seed=seed)["name_mover"] if copies is None else copies
    groups = ioi_prompts(model, n_prompts, seed)
    attention = torch.zeros(3, decoder.n_layers, decoder.n_heads)
    for group in groups:
        rows = torch.arange(len(group))
        for run in run_layers(decoder, group.clean):
            from_end = run.pattern[:, :, -1].float().cpu()
            for i, place in enumerate((group.io, group.s1, group.s2)):
                attention[i, run.layer] += from_end[rows, :, place].sum(0)
    moves = copies.passes & (attention[0] > attention[1]) & (attention[0] > attention[2])
    return replace(copies, scores=attention[0], passes=moves).heads()


def ioi_prompts(model: Model, n_prompts: int, seed: int) -> list[IoiPrompts]:
    """Generated IOI prompts with their two counterparts, by token length."""
    tokenizer = tokenizer_of(model)
    check_counts(1, n_prompts=n_prompts)
    by_length: dict[int, list[IoiPrompts]] = defaultdict(list)
    for pair in ioi_pairs(tokenizer, n_prompts, seed):
        prompt = _prompt(tokenizer, pair)
        by_length[prompt.clean.shape[1]].append(prompt)
    return [
        IoiPrompts(**{part.name: torch.cat([getattr(prompt, part.name) for prompt in group]) for part in fields(IoiPrompts)})
        for group in by_length.values()
    ]


def _prompt(tokenizer: Tokenizer, pair: PairText) -> IoiPrompts:
    """One prompt with its counterparts; names are single tokens, so places follow from tokens."""
    io, subject = str(pair.answer), str(pair.distractor)
    clean = tokenizer.encode(pair.clean)
    first, second = (io, subject) if pair.clean.index(io) < pair.clean.index(subject) else (subject, io)
    exchanged = tokenizer.encode(pair.clean.replace(f"{first} and {second}", f"{second} and {first}"))
    tokens = [tokenizer.answer("and", name)[0] for name in (io, subject)]
    s1, s2 = (place for place, token in enumerate(clean) if token == tokens[1])
    return IoiPrompts(
        clean=torch.tensor([clean]),
        exchanged=torch.tensor([exchanged]),
        other_thing=torch.tensor([_with_other_thing(tokenizer, pair.clean, len(clean))]),
        io=torch.tensor([clean.index(tokens[0])]),
        s1=torch.tensor([s1]),
        s2=torch.tensor([s2]),
        names=torch.tensor([tokens]),
    )


def _with_other_thing(tokenizer: Tokenizer, prompt: str, length: int) -> tuple[int, ...]:
    """The prompt with the next thing that keeps its length; the prompt itself if no thing does."""
    given = next(i for i, thing in enumerate(THINGS) if f" {thing} to" in prompt)
    for step in range(1, len(THINGS)):
        other = THINGS[(given + step) % len(THINGS)]
        tokens = tokenizer.encode(prompt.replace(f" {THINGS[given]} to", f" {other} to"))
        if len(tokens) == length:
            return tokens
    return tokenizer.encode(prompt)


def _effects(
    decoder: Decoder, group: IoiPrompts, other: Int[Tensor, "batch pos"], paths: Paths
) -> Float[Tensor, "effect sender"]:
    """Mean logit difference, and the receivers' mean attention to IO and to S1, with each sender patched at the end."""
    tokens, places = group.names.unique(return_inverse=True)
    patched = patch_queries(decoder, group.clean, other, replace(paths, start=group.clean.shape[1] - 1), tokens)
    logits = patched.logits.cpu().gather(2, places.expand(len(paths.senders), -1, -1))
    attention = patched.attention.cpu().mean(1)
    rows = torch.arange(len(group))
    return torch.stack(
        [
            (logits[:, :, 0] - logits[:, :, 1]).mean(1),
            attention[:, rows, group.io].mean(1),
            attention[:, rows, group.s1].mean(1),
        ]
    )


def _per_head(decoder: Decoder, values: Float[Tensor, " sender"]) -> Float[Tensor, "layer head"]:
    """Zeros for the heads that are no senders, which are the last layers'."""
    scores = torch.zeros(decoder.n_layers * decoder.n_heads)
    scores[: len(values)] = values
    return scores.view(decoder.n_layers, decoder.n_heads)


def _default_name_movers(model: Model, copies: HeadScores | None, n_prompts: int, seed: int) -> list[Head]:
    found = name_movers(model, copies=copies, n_prompts=n_prompts, seed=seed)
    if not found:
        raise MethodError(
            "the model has no head that copies names and attends to the indirect object: S-inhibition is not defined for "
            "it; name the receivers yourself with name_movers=[(layer, head)]"
        )
    return found
