"""ACDC's tests of edges, batched by predicting their outcomes; a prediction can cost time, never change a result.

In a batch test j is the circuit that stands if tests 1 to j-1 turn out as predicted. Results count up to the first outcome
that was not; the rest is run again. Predictions go by the share of the reader's input that an edge carries, and by what
removals of such shares did last.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from kc_lib.circuits.acdc.removals import RunningCircuit
from kc_lib.circuits.options import AcdcOptions
from kc_lib.errors import MethodError

Edge = tuple[int, int]  # writer, reader: row and column of the graph
REMEMBERED = 128  # outcomes from which the next ones' chances are told
ROWS_AT_ONCE = 1024  # rows times tests of one batch: more only costs memory


class EdgeTests:
    """Tests of edges on a running circuit, with its loss as it stands."""

    def __init__(
        self, running: RunningCircuit, effects: Tensor, ratios: Mapping[str, Sequence[float]], asked: AcdcOptions
    ) -> None:
        self.running, self.effects, self.tau, self.absolute = running, effects, asked.tau, asked.absolute
        self.widest = max(1, min(asked.edges_at_once, ROWS_AT_ONCE // len(running.rows)))
        # by kind of reader, the last effects in proportion to what their edges carried: in a pruned circuit that tells
        # better what will stand than a gradient does, whose sign is hardly more than chance (norms bend what they see)
        kinds = dict.fromkeys(reader.kind for reader in running.graph.readers)
        self.ratios = {kind: deque(ratios.get(kind, (0.0,)), maxlen=REMEMBERED) for kind in kinds}
        self.loss = self._finite(running.full_loss())

    def refresh(self) -> None:
        """Compute the circuit's activations and loss afresh from its mask."""
        self.running.build()
        self.loss = self._finite(self.running.full_loss())

    def n_done(self) -> int:
        """How many edges have been tested."""
        return int(self.effects.isfinite().sum())

    def test(self, edges: Sequence[Edge]) -> None:
        """Test edges into one reader, or into the readers of one layer's attention, in that order.

        The circuit is what stands afterwards.
        """
        sizes = self._sizes(edges)
        remaining = list(edges)
        while remaining:
            next_ones = remaining[: self.widest]
            chances = [chance_to_stand(sizes[edge], self._ratios(edge[1]), self.tau, self.absolute) for edge in next_ones]
            stands = [chance > 0.5 for chance in chances]
            together = next_ones[: how_many(chances)]
            accepted = None
            losses = self.running.trial_losses(self._removals(together, stands))
            for place, (edge, loss) in enumerate(zip(together, losses, strict=True)):
                effect = self._finite(loss) - self.loss
                self.effects[edge] = effect
                self._ratios(edge[1]).append(effect / sizes[edge])
                remaining.pop(0)
                if self._stands(effect):
                    accepted, self.loss = place, loss
                if self._stands(effect) != stands[place]:
                    break  # the later tests assumed the other outcome
            if accepted is not None:
                self.running.accept(accepted)

    def _removals(self, together: Sequence[Edge], stands: Sequence[bool]) -> dict[int, Bool[Tensor, "trial writer"]]:
        """For each reader, what each test removes: its own edge and those before it that are to stand removed."""
        n_writers = len(self.running.graph.writers)
        removed = {column: torch.zeros(len(together), n_writers, dtype=torch.bool) for _, column in together}
        for place, (writer, column) in enumerate(together):
            removed[column][place, writer] = True
            if stands[place]:
                removed[column][place + 1 :, writer] = True
        return removed

    def _sizes(self, edges: Sequence[Edge]) -> dict[Edge, float]:
        """What each edge carries of what its reader sees."""
        shares = {column: self.running.shares(column).tolist() for column in {column for _, column in edges}}
        return {(writer, column): shares[column][writer] for writer, column in edges}

    def _ratios(self, column: int) -> deque[float]:
        return self.ratios[self.running.graph.readers[column].kind]

    def remove_untested(self, column: int) -> None:
        """Remove all edges into a reader that nothing reads; only a norm on the layer's output can feel it."""
        if not self.running.post_norm:
            self.running.mask[:, column] = False
            return
        self.loss = self._finite(next(self.running.trial_losses({column: self.running.mask[:, column][None]})))
        self.running.accept(0)

    def _stands(self, rise: float) -> bool:
        return (abs(rise) if self.absolute else rise) < self.tau

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise MethodError("the loss is not finite: the model overflows; load it with dtype='float32'")
        return loss


def chance_to_stand(size: float, ratios: Sequence[float], tau: float, absolute: bool) -> float:
    """How likely a removal is to stand, if its effect is to its size as the last ones' were."""
    outcomes = size * np.array(ratios)
    stand = (np.abs(outcomes) if absolute else outcomes) < tau
    return float(stand.sum() + 0.5) / (len(ratios) + 1)


def how_many(chances: Sequence[float]) -> int:
    """How many tests to batch, so that the most count for the work: a test counts if all before are as predicted.

    A batch costs about one test beside its own: reading the weights, starting the operations.
    """
    best, n_best, sure, counting = 0.0, 1, 1.0, 0.0
    for n, chance in enumerate(chances, start=1):
        counting += sure
        if counting / (n + 1) >= best:
            best, n_best = counting / (n + 1), n
        sure *= max(chance, 1 - chance)
    return n_best
