"""The value vectors that give a fact another answer (Dai et al. 2022, section 5.1), and which way they act.

What a neuron writes is its activation times its value vector v, so v - l1 e_old + l2 e_new adds the activation times
(l2 e_new - l1 e_old) to the stream. The published models' MLPs are not gated: a neuron that holds a fact fires, that is, its
activation is positive, and of the size of 1. In a gated MLP an activation is a product of either sign. Where it is negative
the published formula takes away the new answer and adds the old one, so here the change has the sign of the activation.
And where it is large so is the edit: in SmolLM2, at sizes of 6 to 40, the published l2 = 8 raises the perplexity of other
facts a million-fold; l1 = 0.5 and l2 = 1 serve there. (To divide by the activation instead would make random neurons, which
hardly fire, nearly as effective as those of the fact, and no longer what these are to be compared with.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.errors import MethodError, checked
from kc_lib.neurons.cloze_batches import Read, batches_by_length
from kc_lib.neurons.integrate import neuron_values
from kc_lib.neurons.refine import Neuron
from kc_lib.neurons.value_vectors import value_vectors
from kc_lib.residual.encoder import Residual

SCALES = ("code", "paper")
EMBEDDINGS = ("output", "input")


@torch.no_grad()
@checked
def updated_values(
    residual: Residual,
    neurons: Sequence[Neuron],
    old: int,
    new: int,
    *,
    l1: float = 1.0,
    l2: float = 8.0,
    scale: str = "code",
    embedding: str = "output",
    activations: Float[Tensor, " neuron"] | None = None,
    orient: bool = True,
) -> dict[Neuron, Float[Tensor, " d_model"]]:
    """The value vectors v - l1 e_old + l2 e_new of the neurons, for ``edited_values``.

    Args:
        old, new: tokens.
        scale: "code" scales both embeddings to the length of v; "paper" takes them as they are.
        embedding: "output", columns of the unembedding; or "input", rows of the embedding, as the model stores them.
        activations: of each neuron where the fact is answered, from ``mean_activations``; None takes them for 1.
        orient: the change has the sign of the activation, so that what is written moves to the new answer; False is the
            published formula. A neuron whose activation is not negative is changed alike by both.

    Raises:
        MethodError: a neuron the model does not have, or a parameter out of range.
    """
    check_update(l1, l2, scale, embedding)
    values = value_vectors(residual, neurons)
    table = residual.W_U.T if embedding == "output" else residual.bridge.embed.W_E.detach()
    e_old, e_new = (table[token].float() for token in (old, new))
    fired = [1.0] * len(neurons) if activations is None else activations.tolist()
    updated: dict[Neuron, Tensor] = {}
    for neuron, value, activation in zip(neurons, values.float(), fired, strict=True):
        old_ratio, new_ratio = (1.0 if scale == "paper" else value.norm() / e.norm() for e in (e_old, e_new))
        change = l2 * new_ratio * e_new - l1 * old_ratio * e_old
        updated[neuron] = (value + (-change if orient and activation < 0 else change)).to(values.dtype)
    return updated


def mean_activations(
    residual: Residual, prompts: Sequence[Read], neurons: Sequence[Neuron], batch_size: int = 32
) -> Float[Tensor, " neuron"]:
    """Mean activation of each neuron over prompts, where each is answered."""
    sums = torch.zeros(len(neurons))
    for _, tokens, positions in batches_by_length(prompts, batch_size):
        sums += neuron_values(residual, tokens, neurons)[torch.arange(len(tokens)), positions].sum(0).cpu()
    return sums / len(prompts)


def check_update(l1: float = 1.0, l2: float = 8.0, scale: str = "code", embedding: str = "output") -> None:
    """Raise MethodError for a parameter that ``updated_values`` cannot use."""
    for name, number in {"l1": l1, "l2": l2}.items():
        if not isinstance(number, (int, float)) or not math.isfinite(number) or number < 0:
            raise MethodError(f"{name} is {number!r}; it must be a number, at least 0")
    if scale not in SCALES:
        raise MethodError(f"scale is {scale!r}; it must be one of {', '.join(SCALES)}")
    if embedding not in EMBEDDINGS:
        raise MethodError(f"embedding is {embedding!r}; it must be one of {', '.join(EMBEDDINGS)}")
