"""Value vectors of MLP neurons: those that give a fact another answer, written in place and put back, and what is then said.

The value vector v of a neuron is what it adds to the MLP's output per unit of its activation: a row of ``W_out`` (Dai et al.
2022 write the transpose, and call it a column). Their update (section 5.1), v - l1 e_old + l2 e_new, adds the activation
times (l2 e_new - l1 e_old) to the stream. The published models' MLPs are not gated: a neuron that holds a fact fires, that
is, its activation is positive, and of the size of 1. In a gated MLP an activation is a product of either sign. Where it is
negative the published formula takes away the new answer and adds the old one, so here the change has the sign of the
activation. And where it is large so is the edit: in SmolLM2, at sizes of 6 to 40, the published l2 = 8 raises the perplexity
of other facts a million-fold; l1 = 0.5 and l2 = 1 serve there. (To divide by the activation instead would make random
neurons, which hardly fire, nearly as effective as those of the fact, and no longer what these are to be compared with.)

An edit is made in the model's own memory, so that the model and its parts see it alike. What is put back is a copy of the
bytes that were there: taking off what was added would leave rounding behind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.errors import MethodError, ModelError, checked
from kc_lib.neurons.cloze import Read, batches_by_length
from kc_lib.neurons.integrate import neuron_values
from kc_lib.neurons.options import EditOptions
from kc_lib.neurons.sets import Neuron, neurons_per_layer
from kc_lib.residual.encoder import Residual

DEFAULT = EditOptions()
Values = Mapping[Neuron, Float[Tensor, " d_model"]]


@checked
def value_vectors(residual: Residual, neurons: Sequence[Neuron]) -> Float[Tensor, "neuron d_model"]:
    """Copies of the neurons' value vectors."""
    check_neurons(residual, neurons)
    rows = [residual.parts(layer).W_out[neuron] for layer, neuron in neurons]
    return torch.stack(rows) if rows else residual.parts(0).W_out.new_zeros(0, residual.W_U.shape[0])


def check_neurons(residual: Residual, neurons: Sequence[Neuron]) -> None:
    """Raise MethodError for a neuron that the model does not have."""
    for layer, neuron in neurons:
        if not (0 <= layer < residual.n_layers and 0 <= neuron < neurons_per_layer(residual)):
            raise MethodError(
                f"the model has no neuron {neuron} in layer {layer}: it has {residual.n_layers} layers of "
                f"{neurons_per_layer(residual)} neurons"
            )


@torch.no_grad()
@checked
def updated_values(
    residual: Residual,
    neurons: Sequence[Neuron],
    old: int,
    new: int,
    activations: Float[Tensor, " neuron"] | None = None,
    how: EditOptions = DEFAULT,
) -> dict[Neuron, Float[Tensor, " d_model"]]:
    """The value vectors v - l1 e_old + l2 e_new of the neurons, for ``edited_values``.

    Args:
        old, new: tokens.
        activations: of each neuron where the fact is answered, from ``mean_activations``; None takes them for 1.
        how: l1 and l2. ``scale`` "code" scales both embeddings to the length of v, "paper" takes them as they are. The
            ``embedding`` is "output", columns of the unembedding; or "input", rows of the embedding, as the model stores
            them. With ``orient`` the change has the sign of the activation, so that what is written moves to the new
            answer; False is the published formula. A neuron whose activation is not negative is changed alike by both.

    Raises:
        MethodError: a neuron the model does not have.
    """
    values = value_vectors(residual, neurons)
    table = residual.W_U.T if how.embedding == "output" else residual.bridge.embed.W_E.detach()
    e_old, e_new = (table[token].float() for token in (old, new))
    fired = [1.0] * len(neurons) if activations is None else activations.tolist()
    updated: dict[Neuron, Tensor] = {}
    for neuron, value, activation in zip(neurons, values.float(), fired, strict=True):
        old_ratio, new_ratio = (1.0 if how.scale == "paper" else value.norm() / e.norm() for e in (e_old, e_new))
        change = how.l2 * new_ratio * e_new - how.l1 * old_ratio * e_old
        updated[neuron] = (value + (-change if how.orient and activation < 0 else change)).to(values.dtype)
    return updated


def mean_activations(
    residual: Residual, prompts: Sequence[Read], neurons: Sequence[Neuron], batch_size: int = 32
) -> Float[Tensor, " neuron"]:
    """Mean activation of each neuron over prompts, where each is answered."""
    sums = torch.zeros(len(neurons))
    for _, tokens, positions in batches_by_length(prompts, batch_size):
        sums += neuron_values(residual, tokens, neurons)[torch.arange(len(tokens)), positions].sum(0).cpu()
    return sums / len(prompts)


@contextmanager
def edited_values(residual: Residual, values: Values) -> Iterator[None]:
    """The neurons have these value vectors inside; on exit, also by an exception, the weights are what they were to the bit.

    Raises:
        MethodError: a neuron that the model does not have, or a vector of another size.
        ModelError: the value vectors are not the model's own memory, so that writing them would not change the model.
    """
    check_neurons(residual, list(values))
    width = residual.W_U.shape[0]
    wrong = [vector.shape for vector in values.values() if vector.shape != (width,)]
    if wrong:
        raise MethodError(f"a value vector has the shape {tuple(wrong[0])}; it must have ({width},)")
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, neuron in values:
        by_layer[layer].append(neuron)
    tables = {layer: residual.parts(layer).W_out for layer in by_layer}
    _check_memory(residual, tables)
    before = {layer: tables[layer][neurons].clone() for layer, neurons in by_layer.items()}
    try:
        with torch.no_grad():
            for layer, neurons in by_layer.items():
                tables[layer][neurons] = torch.stack([values[layer, neuron] for neuron in neurons]).to(tables[layer])
        yield
    finally:
        with torch.no_grad():
            for layer, neurons in by_layer.items():
                tables[layer][neurons] = before[layer]


def _check_memory(residual: Residual, tables: Mapping[int, Tensor]) -> None:
    owned = {parameter.untyped_storage().data_ptr() for parameter in residual.bridge.parameters()}
    for layer, table in tables.items():
        if table.untyped_storage().data_ptr() not in owned:
            raise ModelError(
                f"the value vectors of layer {layer} are a copy of the model's weights, so an edit would not reach it: load "
                "the model with load_model, and without weights that are processed or quantised"
            )


@dataclass(frozen=True)
class Answers:
    """What a model says at one position of every prompt: its first token, and of some tokens log probability and rank."""

    predicted: Int[Tensor, " prompt"]
    log_p: Float[Tensor, "prompt token"]
    rank: Int[Tensor, "prompt token"]  # 1 for the most probable

    def split(self, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """predicted, log_p and rank of the first so many prompts, of the next so many, ..."""
        sizes = list(sizes)
        return zip(self.predicted.split(sizes), self.log_p.split(sizes), self.rank.split(sizes), strict=True)


@torch.no_grad()
def edited_answers(
    residual: Residual,
    prompts: Sequence[Read],
    tokens: Int[Tensor, "prompt token"],
    edits: Sequence[Values],
    batch_size: int = 32,
) -> list[Answers]:
    """Answers of the model under each edit; an empty edit is the model itself.

    The layers below an edit's lowest are run once for all edits.

    Raises:
        MethodError, ModelError: as ``edited_values``; MethodError also for logits that are no finite numbers.
    """
    firsts = [min((layer for layer, _ in edit), default=residual.n_layers) for edit in edits]
    n_prompts, n_tokens = tokens.shape
    answers_of_edits = [
        Answers(
            torch.zeros(n_prompts, dtype=torch.long),
            torch.zeros(n_prompts, n_tokens),
            torch.zeros(n_prompts, n_tokens, dtype=torch.long),
        )
        for _ in edits
    ]
    for rows, batch, positions in batches_by_length(prompts, batch_size):
        wanted = tokens[rows].to(residual.device)
        resid, layer, streams = residual.embed(batch), 0, {}
        for first in sorted(set(firsts)):
            resid, layer = _run(residual, resid, layer, first), first
            streams[first] = resid
        for edit, first, answers in zip(edits, firsts, answers_of_edits, strict=True):
            with edited_values(residual, edit):
                final = _run(residual, streams[first], first, residual.n_layers)
            logits = residual.unembed(final[torch.arange(len(rows)), positions]).float()
            if not logits.isfinite().all():  # ranks of what is no number would be 1
                raise MethodError("the edited model's logits are no finite numbers: use dtype float32, or a smaller edit")
            of_tokens = logits.gather(1, wanted)
            answers.predicted[rows] = logits.argmax(-1).cpu()
            answers.log_p[rows] = logits.log_softmax(-1).gather(1, wanted).cpu()
            answers.rank[rows] = (1 + (logits[:, None] > of_tokens[:, :, None]).sum(-1)).cpu()
    return answers_of_edits


def _run(residual: Residual, resid: Float[Tensor, "batch pos d_model"], first: int, end: int) -> Tensor:
    """The stream before layer ``end`` from that before layer ``first``."""
    for layer in range(first, end):
        resid = residual.run_block(layer, resid)
    return resid
