"""Hand-wired models whose heads are of known kinds, to hold head scores against.

``general_heads`` has a head of every kind that weights, or attention on any text, show; ``ioi_heads`` has the end of the IOI
circuit: who inhibits, and who is inhibited. All other heads are small random ones (``wires.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ground_truth.wires import BOS, Reading, boot, joined, noisy_gpt2, read_any, read_space, set_head, set_neurons, with_rest
from kc_lib.models.model import Model

# fmt: off
NAMES = (
    "Mary", "John", "James", "Robert", "Michael", "William", "David", "Richard", "Thomas", "Charles",
)
NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)
WORDS = (
    "river", "stone", "cloud", "garden", "paper", "window", "engine", "summer", "letter", "market", "silver",
    "bridge",
)
# fmt: on
SHARP = 40.0  # attention score of a match: all of the attention


@dataclass(frozen=True)
class KnownHeads:
    """A model, and which heads (layer, head) are of which kind; kinds are named as the scores are."""

    model: Model
    heads: Mapping[str, frozenset[tuple[int, int]]]


def general_heads() -> KnownHeads:
    """Previous-token, duplicate-token, induction, successor and copy-suppression heads in one model.

    a0.h2 writes the previous token; a0.h1 attends to the same token earlier and writes nothing at all, as a pruned head. m0
    says once more which token is there. a1.h1 is an induction head, which copies what it attends to and so is a name mover
    by its weights. a2.h0 attends to the token that the stream predicts and writes against it: by its weights a negative name
    mover, and where the induction head predicts, its attention is an induction head's. a2.h3 writes, of the number that m0
    says is there, the next.
    """
    wires = noisy_gpt2((BOS, *NAMES, *NUMBERS, *WORDS), ("previous", "again"), seed=2, d_model=320, n_positions=44)
    after, text = wires.spaces["answer"].roll(-1, 0), wires.spaces["token"].clone()
    text[0] = 0.0  # nothing is copied from BOS, where heads rest
    wires = replace(wires, spaces={**wires.spaces, "next": after, "text": text})
    here, token = read_space(wires, "position"), read_space(wires, "token")
    one_on = read_space(wires, "position", shift=1)
    set_head(wires, 0, 2, here, one_on, value="token", output="previous", gain=1.0, sharpness=SHARP)
    earlier = with_rest(wires, joined(token, _minus(here)), joined(token, here), score=0.5)
    set_head(wires, 0, 1, *earlier, value="token", output="answer", gain=0.0, sharpness=SHARP)
    on = Reading(8.0 * wires.spaces["token"].T, torch.full((len(wires.words),), -4.0))  # GELU(4) = 4.000
    set_neurons(wires, 0, on, wires.spaces["again"] / 4.0)
    followed = with_rest(wires, token, read_space(wires, "previous"), score=0.5)
    set_head(wires, 1, 1, *followed, value="text", output="answer", gain=1.0, sharpness=SHARP)
    predicted = with_rest(wires, read_space(wires, "answer"), token, score=0.5)
    set_head(wires, 2, 0, *predicted, value="text", output="answer", gain=-0.5, sharpness=SHARP)
    set_head(wires, 2, 3, here, here, value="again", output="next", gain=0.05, sharpness=SHARP)
    kinds = {
        "previous_token": {(0, 2)},
        "duplicate_token": {(0, 1)},
        "induction": {(1, 1), (2, 0)},
        "name_mover": {(1, 1)},
        "negative_name_mover": {(2, 0)},
        "copy_suppression": {(2, 0)},
        "successor": {(2, 3)},
    }
    return KnownHeads(boot(wires, "handwired/general_heads"), {kind: frozenset(heads) for kind, heads in kinds.items()})


def ioi_heads() -> KnownHeads:
    """A name mover and the S-inhibition head that keeps it from the subject.

    a0.h1 writes, at every token, the places where it has been, its own among them. a1.h2 attends from "to" to the subject's
    second mention, which is four back in the project's prompts, and copies those places. a2.h1 attends from "to" to names
    that are not in such a place, and copies them.
    """
    words = (BOS, *NAMES, "to")
    wires = noisy_gpt2(words, (), seed=3, d_model=160, n_positions=24, positions_in=("places", "inhibited"))
    here, token = read_space(wires, "position"), read_space(wires, "token")
    set_head(wires, 0, 1, token, token, value="position", output="places", gain=1.0, sharpness=SHARP)
    four_on = read_space(wires, "position", shift=4)
    set_head(wires, 1, 2, here, four_on, value="places", output="inhibited", gain=2.0, sharpness=SHARP)
    query = joined(read_any(wires, ["to"]), _minus(read_space(wires, "inhibited")))
    names = with_rest(wires, query, joined(read_any(wires, NAMES), here), score=0.5)
    set_head(wires, 2, 1, *names, value="token", output="answer", gain=1.0, sharpness=SHARP)
    kinds = {"name_mover": frozenset({(2, 1)}), "s_inhibition": frozenset({(1, 2)})}
    return KnownHeads(boot(wires, "handwired/ioi_heads"), kinds)


def _minus(reading: Reading) -> Reading:
    return Reading(-reading.weight, -reading.bias)
