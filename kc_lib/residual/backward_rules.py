"""Local rules that replace the derivative of a part while its value stays what it is.

A gradient says what an infinitesimal change does, and a norm, a saturated activation or a softmax answers a small change
quite differently from the removal of a component. Methods that build on layer-wise relevance propagation therefore
change the backward pass, part by part. Each rule here is one line of plain autograd: ``value.detach() + (y - y.detach())``
has the value of ``value`` and the derivative of ``y``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BackwardRules:
    """How the backward pass departs from the derivative; the default is the derivative.

    Attributes:
        freeze_norms: the scale of every norm (of the stream, of queries and keys, of outputs) is a constant.
        secant_activations: the MLP's activation has the slope of the line from the origin, act(x) / x, instead of act'(x).
        product_share: the share of its gradient that each factor of a gated MLP's product receives.
        softmax_temperature: the derivative of attention's softmax is taken from the softmax of the scores divided by this.
        qk_share, v_share: the share of their gradient that queries and keys, and values, receive.
        freeze_pattern: the attention pattern is a constant: queries and keys receive nothing.
    """

    freeze_norms: bool = False
    secant_activations: bool = False
    product_share: float = 1.0
    softmax_temperature: float = 1.0
    qk_share: float = 1.0
    v_share: float = 1.0
    freeze_pattern: bool = False

    @property
    def of_mlps(self) -> bool:
        """Whether a rule acts inside MLPs, whose parts must then be known."""
        return self.secant_activations or self.product_share != 1

    def softmax(self, scores: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
        """The attention pattern, in float32."""
        pattern = scores.softmax(-1, dtype=torch.float32)
        if self.freeze_pattern:
            return pattern.detach()
        if self.softmax_temperature == 1:
            return pattern
        # the derivative of scores / temperature divides by it, which the authors' code does not
        soft = self.softmax_temperature * (scores / self.softmax_temperature).softmax(-1, dtype=torch.float32)
        return pattern.detach() + (soft - soft.detach())

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """An activation function's values."""
        if not self.secant_activations:
            return function(x)
        value, origin = function(x).detach(), x.detach()
        slope = torch.where(origin == 0, 0.0, value / origin)
        return value + slope * (x - origin)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """A gate's value times what it lets through."""
        return shared(a * b, self.product_share)


NATIVE = BackwardRules()

RELP = BackwardRules(freeze_norms=True, secant_activations=True, product_share=0.5)
"""Relevance Patching (Jafari et al. 2025, arXiv:2508.21258): LN-rule, identity-rule and half-rule.

At x = 0 the slope of the identity-rule is 0, as in the authors' code. That code also has an AH-rule (the attention pattern
is a constant, ``freeze_pattern``) as an option; their example leaves it out, and so does this default.
"""

GIM = BackwardRules(freeze_norms=True, product_share=0.5, softmax_temperature=2.0, qk_share=0.25, v_share=0.5)
"""Gradient Interaction Modifications (Edin et al. 2025, arXiv:2505.17630) with the shares of the authors' code."""


def shared(x: Tensor, share: float) -> Tensor:
    """``x`` unchanged, of whose gradient only this share passes."""
    return x if share == 1 else x.detach() + share * (x - x.detach())
