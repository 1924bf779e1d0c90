"""What follows from the MLP neurons of one position: integrals of the answer's probability, and runs with neurons changed.

A neuron is one unit of an MLP after the activation and, where there is one, the gate. Here neurons are read and changed
at the position that predicts the answer: a masked language model's mask, the last position of a causal one. Under
causal attention nothing to the left depends on that position, so a run from layer l recomputes this one position in the
layers above l, with the keys and values of the others from one clean run; a masked model recomputes all positions.

The gradient at a neuron is the gradient at the MLP's output times the neuron's output vector, which is linear: autograd
stops at the output, the points of the integral are summed there, and one matrix product serves them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.checks import checked
from kc_lib.errors import MethodError
from kc_lib.wiring import MlpWiring, frozen

RULES = ("right", "left", "trapezoid")


@dataclass(frozen=True)
class AnswerStates:
    """A clean run of prompts of one length, as far as runs that change the neurons of one position need it.

    ``pos`` is 1 for causal models (the position itself) and all positions for masked ones; ``at`` is the position in that.
    """

    neurons: Float[Tensor, "layer batch d_mlp"]
    after_attention: Float[Tensor, "layer batch pos d_model"]
    writes: Float[Tensor, "layer batch pos d_model"]
    logits: Float[Tensor, "batch vocab"]
    past: tuple[tuple[Tensor, Tensor], ...]  # keys and values left of the position, per layer; empty for masked models
    at: Int[Tensor, " batch"]

    def rows(self, index: Int[Tensor, " row"]) -> AnswerStates:
        """The states of these prompts, each as often as it is named."""
        index = index.to(self.at.device)
        return AnswerStates(
            neurons=self.neurons[:, index],
            after_attention=self.after_attention[:, index],
            writes=self.writes[:, index],
            logits=self.logits[index],
            past=tuple((keys[index], values[index]) for keys, values in self.past),
            at=self.at[index],
        )


@torch.no_grad()
@checked
def answer_states(wiring: MlpWiring, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " batch"]) -> AnswerStates:
    """One clean run of prompts of one length, read at one position of each.

    Raises:
        MethodError: a causal model is asked anywhere but at the last position, or the MLPs differ in width.
    """
    widths = {wiring.parts(layer).W_out.shape[0] for layer in range(wiring.n_layers)}
    if len(widths) > 1:
        raise MethodError(f"the model's MLPs have different widths ({sorted(widths)}): its neurons do not fit one table")
    last = tokens.shape[1] - 1
    if wiring.causal and bool((positions != last).any()):
        raise MethodError("a causal model's prompts must end at the position that is read: leave out what follows it")
    tokens, positions = tokens.to(wiring.device), positions.to(wiring.device)
    kept = slice(last, None) if wiring.causal else slice(None)
    at = torch.zeros_like(positions) if wiring.causal else positions
    rows = torch.arange(len(tokens), device=wiring.device)
    resid = wiring.embed(tokens)
    neurons, after_attention, writes, past = [], [], [], []
    for layer in range(wiring.n_layers):
        if wiring.causal:
            past.append(wiring.keys_values(layer, resid[:, :last]))
        after = wiring.run_attention(layer, resid)
        post = wiring.parts(layer).neurons(wiring.mlp_input(layer, resid, after))
        write = wiring.parts(layer).write(post)
        neurons.append(post[rows, positions])
        after_attention.append(after[:, kept])
        writes.append(write[:, kept])
        resid = wiring.after_mlp(layer, after, write)
    return AnswerStates(
        neurons=torch.stack(neurons),
        after_attention=torch.stack(after_attention),
        writes=torch.stack(writes),
        logits=wiring.unembed(resid[rows, positions]).float(),
        past=tuple(past),
        at=at,
    )


def quadrature(m: int, rule: str) -> tuple[list[float], list[float]]:
    """Points of [0, 1] and their weights, which sum to 1.

    "right" takes k/m for k = 1..m (Dai et al. 2022, eq. 5), "left" k = 0..m-1 (their code), "trapezoid" k = 0..m with the
    ends counted half, whose error falls with 1/m^2 instead of 1/m.

    Raises:
        MethodError: another rule, or fewer than one step.
    """
    if m < 1:
        raise MethodError(f"steps is {m}; an integral takes at least 1")
    if rule not in RULES:
        raise MethodError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    if rule == "trapezoid":
        return [k / m for k in range(m + 1)], [(0.5 if k in (0, m) else 1.0) / m for k in range(m + 1)]
    first = 1 if rule == "right" else 0
    return [(k + first) / m for k in range(m)], [1.0 / m] * m


@checked
def integrated_gradients(
    wiring: MlpWiring,
    states: AnswerStates,
    layer: int,
    targets: Int[Tensor, " batch"],
    steps: int = 20,
    rule: str = "trapezoid",
    log_probability: bool = False,
    max_rows: int = 512,
) -> Float[Tensor, "batch d_mlp"]:
    """Integrated gradients of the target's probability from zero to the observed neurons of one layer.

    score_i = w_i * integral over a in [0, 1] of d p(target | neurons of the layer = a w) / d neuron_i (Dai et al. 2022,
    eq. 4), summed by ``quadrature``. A layer's scores sum to p(w) - p(0) as ``steps`` grows. At most ``max_rows`` prompts
    times points are run at once, which changes memory and not the result.

    Args:
        log_probability: of log p instead, which adds up over the tokens of an answer.

    Raises:
        MethodError: as ``quadrature``.
    """
    points, weights = quadrature(steps, rule)
    neurons, parts = states.neurons[layer], wiring.parts(layer)
    of_neurons = (neurons @ parts.W_out).detach()  # the output is linear in the point: one product serves all
    at_output = torch.zeros_like(of_neurons, dtype=torch.float32)
    n_points = max(1, max_rows // len(targets))
    for start in range(0, len(points), n_points):
        some = neurons.new_tensor(points[start : start + n_points])
        weight = torch.tensor(weights[start : start + n_points], device=neurons.device)
        writes = some[:, None, None] * of_neurons + parts.b_out
        with frozen(wiring.model), torch.enable_grad():
            writes.requires_grad_(True)
            logits = _from_write(wiring, states, layer, writes.flatten(0, 1))
            log_p = logits.float().log_softmax(-1)[torch.arange(len(logits)), targets.to(logits.device).repeat(len(some))]
            (gradient,) = torch.autograd.grad((log_p if log_probability else log_p.exp()).sum(), [writes])
        at_output += torch.einsum("k,kbd->bd", weight, gradient.float())
    return neurons.float() * (at_output @ parts.W_out.float().T)


@torch.no_grad()
@checked
def changed_logits(
    wiring: MlpWiring,
    states: AnswerStates,
    change: Callable[[int, Tensor], Tensor],
    first_layer: int = 0,
) -> Float[Tensor, "batch vocab"]:
    """Logits at the position when its neurons are changed in every layer from ``first_layer`` on.

    ``change(layer, neurons)`` gives the neurons ``[batch, d_mlp]`` that the layer is to have instead; in layers above a
    changed one it is given what they became through that change.
    """
    neurons = states.neurons[first_layer]
    write = wiring.parts(first_layer).write(change(first_layer, neurons))
    resid = wiring.after_mlp(first_layer, states.after_attention[first_layer], _placed(states, first_layer, write))
    rows = torch.arange(len(resid), device=resid.device)
    for layer in range(first_layer + 1, wiring.n_layers):
        after = wiring.run_attention(layer, resid, states.past[layer] if states.past else None)
        post = wiring.parts(layer).neurons(wiring.mlp_input(layer, resid, after))
        post[rows, states.at] = change(layer, post[rows, states.at])
        resid = wiring.after_mlp(layer, after, wiring.parts(layer).write(post))
    return wiring.unembed(resid[rows, states.at]).float()


@torch.no_grad()
@checked
def neuron_values(
    wiring: MlpWiring, tokens: Int[Tensor, "batch pos"], neurons: Sequence[tuple[int, int]]
) -> Float[Tensor, "batch pos neuron"]:
    """Values of some neurons (layer, index) at every position of prompts of one length; layers above are not run."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for place, (layer, _) in enumerate(neurons):
        by_layer[layer].append(place)
    resid = wiring.embed(tokens)
    values = resid.new_zeros(*tokens.shape, len(neurons), dtype=torch.float32)
    for layer in range(max(by_layer, default=-1) + 1):
        after = wiring.run_attention(layer, resid)
        post = wiring.parts(layer).neurons(wiring.mlp_input(layer, resid, after))
        places = by_layer.get(layer, [])
        values[..., places] = post[..., [neurons[place][1] for place in places]].float()
        resid = wiring.after_mlp(layer, after, wiring.parts(layer).write(post))
    return values


def _from_write(
    wiring: MlpWiring, states: AnswerStates, layer: int, writes: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows vocab"]:
    """Logits when the layer's MLP writes this at the position; rows repeat the prompts, prompt index fastest."""
    n = len(writes) // states.after_attention.shape[1]
    after = repeat(states.after_attention[layer], "b p d -> (n b) p d", n=n)
    resid = wiring.after_mlp(layer, after, _placed(states, layer, writes))
    for above in range(layer + 1, wiring.n_layers):
        after = wiring.run_attention(above, resid, states.past[above] if states.past else None)
        resid = wiring.after_mlp(above, after, wiring.parts(above)(wiring.mlp_input(above, resid, after)))
    return wiring.unembed(resid[torch.arange(len(resid), device=resid.device), states.at.repeat(n)])


def _placed(states: AnswerStates, layer: int, writes: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows pos d_model"]:
    """The layer's clean writes with these at the position."""
    if states.past:
        return rearrange(writes, "rows d -> rows 1 d")
    n = len(writes) // states.writes.shape[1]
    full = repeat(states.writes[layer], "b p d -> (n b) p d", n=n).clone()
    full[torch.arange(len(full), device=full.device), states.at.repeat(n)] = writes
    return full
