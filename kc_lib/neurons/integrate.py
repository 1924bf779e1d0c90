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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from kc_lib.errors import MethodError, checked
from kc_lib.neurons.options import RULES
from kc_lib.residual.decoder import frozen
from kc_lib.residual.encoder import Residual

GAUSS_POINTS = 6
PARTS, CUTS = 4, 6  # down to a 4096th: where a norm follows the MLP, as in Gemma, nearly all happens close to zero


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
def answer_states(residual: Residual, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " batch"]) -> AnswerStates:
    """One clean run of prompts of one length, read at one position of each.

    Raises:
        MethodError: a causal model is asked anywhere but at the last position, or the MLPs differ in width.
    """
    widths = {residual.parts(layer).W_out.shape[0] for layer in range(residual.n_layers)}
    if len(widths) > 1:
        raise MethodError(f"the model's MLPs have different widths ({sorted(widths)}): its neurons do not fit one table")
    last = tokens.shape[1] - 1
    if residual.causal and bool((positions != last).any()):
        raise MethodError("a causal model's prompts must end at the position that is read: leave out what follows it")
    tokens, positions = tokens.to(residual.device), positions.to(residual.device)
    kept = slice(last, None) if residual.causal else slice(None)
    at = torch.zeros_like(positions) if residual.causal else positions
    rows = torch.arange(len(tokens), device=residual.device)
    resid = residual.embed(tokens)
    neurons, after_attention, writes, past = [], [], [], []
    for layer in range(residual.n_layers):
        if residual.causal:
            past.append(residual.keys_values(layer, resid[:, :last]))
        after = residual.run_attention(layer, resid)
        post = residual.parts(layer).neurons(residual.mlp_input(layer, resid, after))
        write = residual.parts(layer).write(post)
        neurons.append(post[rows, positions])
        after_attention.append(after[:, kept])
        writes.append(write[:, kept])
        resid = residual.after_mlp(layer, after, write)
    return AnswerStates(
        neurons=torch.stack(neurons),
        after_attention=torch.stack(after_attention),
        writes=torch.stack(writes),
        logits=residual.unembed(resid[rows, positions]).float(),
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


class Paths:
    """The targets' probabilities, and their gradients at the layers' outputs, along the paths from zero to the neurons.

    A path is a prompt and a layer, numbered layer * batch + prompt. The runs of all layers climb together: those that
    start at a layer join the ones from below it, so the weights of a layer are read once for all. At most ``max_rows``
    runs (a prompt, a layer, a point) are made at once, which changes memory and not the result.

    Args:
        log_probability: of log p instead, which adds up over the tokens of an answer.
    """

    def __init__(
        self,
        residual: Residual,
        states: AnswerStates,
        targets: Int[Tensor, " batch"],
        log_probability: bool = False,
        max_rows: int = 512,
    ) -> None:
        self.residual, self.states = residual, states
        self.targets, self.log_probability, self.max_rows = targets.to(residual.device), log_probability, max_rows
        self.batch = len(targets)
        self.n = residual.n_layers * self.batch
        log_p = states.logits.log_softmax(-1)[torch.arange(self.batch, device=residual.device), self.targets]
        self.observed = (log_p if log_probability else log_p.exp()).repeat(residual.n_layers)  # at point 1, of every layer
        # the output is linear in the point: one product serves all
        outputs = [states.neurons[layer] @ residual.parts(layer).W_out for layer in range(residual.n_layers)]
        self.of_neurons = torch.cat(outputs).detach()
        self.biases = torch.stack([residual.parts(layer).b_out for layer in range(residual.n_layers)])

    def __call__(
        self, paths: Int[Tensor, " n"], points: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d_model"]]:
        """Values and gradients, in float32, of paths each at a point."""
        values, gradients = [], []
        for order, some, at in self._pieces(paths, points):
            with frozen(self.residual.bridge), torch.enable_grad():
                writes = self._writes(some, at).requires_grad_(True)
                value = self._values(some, writes)
                (gradient,) = torch.autograd.grad(value.sum(), [writes])
            values.append(value.detach()[order])
            gradients.append(gradient.float()[order])
        return torch.cat(values), torch.cat(gradients)

    @torch.no_grad()
    def values(self, paths: Int[Tensor, " n"], points: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Values alone."""
        pieces = self._pieces(paths, points)
        return torch.cat([self._values(some, self._writes(some, at))[order] for order, some, at in pieces])

    def scores(self, at_output: Float[Tensor, "path d_model"]) -> Float[Tensor, "layer batch d_mlp"]:
        """Scores of the neurons from the integrals of the gradients at their layers' outputs."""
        by_layer = rearrange(at_output, "(layer b) d -> layer b d", b=self.batch)
        at_neurons = [at_layer @ self.residual.parts(i).W_out.float().T for i, at_layer in enumerate(by_layer)]
        return torch.stack(at_neurons) * self.states.neurons.float()

    def _pieces(self, paths: Tensor, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """At most ``max_rows`` at once, each piece in the order of its layers, and the order that takes it back."""
        for some, at in zip(paths.split(self.max_rows), points.split(self.max_rows), strict=True):
            order = some.argsort(stable=True)
            yield order.argsort(), some[order], at[order]

    def _writes(self, paths: Tensor, points: Tensor) -> Tensor:
        scaled = points[:, None].to(self.of_neurons.dtype) * self.of_neurons[paths]
        return scaled + self.biases[paths // self.batch]

    def _values(self, paths: Tensor, writes: Tensor) -> Tensor:
        residual, states = self.residual, self.states
        prompts, layers = paths % self.batch, paths // self.batch
        starting = torch.bincount(layers, minlength=residual.n_layers).tolist()
        resid, n = states.after_attention[0][:0], 0
        for layer, joining in enumerate(starting):
            if n:
                past = (states.past[layer][0][prompts[:n]], states.past[layer][1][prompts[:n]]) if states.past else None
                resid = residual.run_block(layer, resid, past)
            if joining:
                new = slice(n, n + joining)
                after = states.after_attention[layer][prompts[new]]
                joined = residual.after_mlp(layer, after, _placed(states, layer, writes[new], prompts[new]))
                resid = torch.cat([resid, joined])
                n += joining
        each = torch.arange(n, device=paths.device)
        log_p = residual.unembed(resid[each, states.at[prompts]]).float().log_softmax(-1)[each, self.targets[prompts]]
        return log_p if self.log_probability else log_p.exp()


@checked
def integrated_gradients(paths: Paths, steps: int = 20, rule: str = "trapezoid") -> Float[Tensor, "layer batch d_mlp"]:
    """Integrated gradients of the target's probability from zero to the observed neurons, of every layer by itself.

    score_i = w_i * integral over a in [0, 1] of d p(target | neurons of the layer = a w) / d neuron_i (Dai et al. 2022,
    eq. 4), summed by ``quadrature``. A layer's scores sum to p(w) - p(0) as ``steps`` grows.

    Raises:
        MethodError: as ``quadrature``.
    """
    points, weights = (paths.states.neurons.new_tensor(numbers) for numbers in quadrature(steps, rule))
    every = torch.arange(paths.n, device=points.device)
    _, gradients = paths(every.repeat_interleave(len(points)), points.repeat(paths.n))
    return paths.scores(torch.einsum("k,nkd->nd", weights.float(), rearrange(gradients, "(n k) d -> n k d", n=paths.n)))


@checked
def adaptive_gradients(paths: Paths, tolerance: float = 1e-2) -> Float[Tensor, "layer batch d_mlp"]:
    """``integrated_gradients`` to a tolerance, with as many points as each prompt and layer asks for.

    An interval is summed at ``GAUSS_POINTS`` Gauss-Legendre points. What its scores must add up to is known exactly,
    p(end) - p(start); where they miss it by more than ``tolerance`` (a share of p, or of how far p moves along the whole
    path if that is more; of log p at least so many nats), the interval is cut in ``PARTS``, at most ``CUTS`` times. Where p
    is smooth along the path, as in most layers, the first look is enough, and more exact than twenty points of any rule.
    """
    device = paths.residual.device
    nodes, weights = (torch.tensor(x, dtype=torch.float32, device=device) for x in leggauss(GAUSS_POINTS))
    nodes, weights = (nodes + 1) / 2, weights / 2
    which, start = torch.arange(paths.n, device=device), torch.zeros(paths.n, device=device)
    end = torch.ones_like(start)
    p_start, p_end = paths.values(which, start), paths.observed.clone()
    least = torch.ones_like(p_end) if paths.log_probability else p_end
    allowed = None
    at_output = torch.zeros(paths.n, paths.residual.W_U.shape[0], device=device)
    for cut in range(CUTS + 1):
        points = start[:, None] + (end - start)[:, None] * nodes
        _, gradients = paths(which.repeat_interleave(len(nodes)), points.flatten())
        gradients = rearrange(gradients, "(n k) d -> n k d", k=len(nodes))
        slopes = torch.einsum("nkd,nd->nk", gradients, paths.of_neurons[which].float())  # of p along the path
        if allowed is None:
            allowed = tolerance * torch.maximum(least, slopes.abs() @ weights)
        integral = torch.einsum("k,nkd->nd", weights, gradients) * (end - start)[:, None]
        missed = ((slopes @ weights) * (end - start) - (p_end - p_start)).abs()
        enough = (missed <= allowed[which]) | (cut == CUTS)
        at_output.index_add_(0, which[enough], integral[enough])
        which, start, end, p_start, p_end = (x[~enough] for x in (which, start, end, p_start, p_end))
        if not len(which):
            break
        edges = start[:, None] + (end - start)[:, None] * torch.linspace(0, 1, PARTS + 1, device=device)
        inner = paths.values(which.repeat_interleave(PARTS - 1), edges[:, 1:-1].flatten())
        p_edges = torch.cat([p_start[:, None], rearrange(inner, "(n k) -> n k", k=PARTS - 1), p_end[:, None]], 1)
        which = which.repeat_interleave(PARTS)
        start, end = edges[:, :-1].flatten(), edges[:, 1:].flatten()
        p_start, p_end = p_edges[:, :-1].flatten(), p_edges[:, 1:].flatten()
    return paths.scores(at_output)


@torch.no_grad()
@checked
def changed_logits(
    residual: Residual,
    states: AnswerStates,
    change: Callable[[int, Tensor], Tensor],
    first_layer: int = 0,
) -> Float[Tensor, "batch vocab"]:
    """Logits at the position when its neurons are changed in every layer from ``first_layer`` on.

    ``change(layer, neurons)`` gives the neurons ``[batch, d_mlp]`` that the layer is to have instead; in layers above a
    changed one it is given what they became through that change.
    """
    neurons = states.neurons[first_layer]
    write = residual.parts(first_layer).write(change(first_layer, neurons))
    rows = torch.arange(len(write), device=write.device)
    resid = residual.after_mlp(first_layer, states.after_attention[first_layer], _placed(states, first_layer, write, rows))
    for layer in range(first_layer + 1, residual.n_layers):
        after = residual.run_attention(layer, resid, states.past[layer] if states.past else None)
        post = residual.parts(layer).neurons(residual.mlp_input(layer, resid, after))
        post[rows, states.at] = change(layer, post[rows, states.at])
        resid = residual.after_mlp(layer, after, residual.parts(layer).write(post))
    return residual.unembed(resid[rows, states.at]).float()


@torch.no_grad()
@checked
def neuron_values(
    residual: Residual, tokens: Int[Tensor, "batch pos"], neurons: Sequence[tuple[int, int]]
) -> Float[Tensor, "batch pos neuron"]:
    """Values of some neurons (layer, index) at every position of prompts of one length; layers above are not run."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for place, (layer, _) in enumerate(neurons):
        by_layer[layer].append(place)
    resid = residual.embed(tokens)
    values = resid.new_zeros(*tokens.shape, len(neurons), dtype=torch.float32)
    for layer in range(max(by_layer, default=-1) + 1):
        after = residual.run_attention(layer, resid)
        post = residual.parts(layer).neurons(residual.mlp_input(layer, resid, after))
        places = by_layer.get(layer, [])
        values[..., places] = post[..., [neurons[place][1] for place in places]].float()
        resid = residual.after_mlp(layer, after, residual.parts(layer).write(post))
    return values


def _placed(
    states: AnswerStates, layer: int, writes: Float[Tensor, "n d_model"], rows: Int[Tensor, " n"]
) -> Float[Tensor, "n pos d_model"]:
    """The layer's clean writes of prompts by number, with these at the position."""
    if states.past:
        return rearrange(writes, "n d -> n 1 d")
    full = states.writes[layer][rows]  # indexing copies
    full[torch.arange(len(rows), device=rows.device), states.at[rows]] = writes
    return full
