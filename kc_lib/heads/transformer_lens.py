"""TransformerLens's own head tools, and where their result is exact: the one place that decides whether they serve.

``transformer_lens.head_detector.detect_head`` never serves. It takes text, and random tokens do not survive the way through
text; it divides by all attention of the sequence, where the published scores are means over a diagonal. On text that
survives, both are the same sums (tests).

``transformer_lens.patching.get_act_patch_direct_path`` agrees with ``path_patching.py`` to rounding wherever
it accepts the model (tests, on every kind of decoder). S-inhibition asks for what it does not have: several receivers at
once, the last position alone, and MLPs on the way; and it runs the whole model once for every pair of heads. So the scores
use our kernel on every model, and the tool is the check on it.
"""

from __future__ import annotations

from kc_lib.errors import first_line
from kc_lib.models.model import Model


def direct_path_obstacle(model: Model) -> str | None:
    """Why TransformerLens's direct path patching into queries has no exact result for this model; None where it has.

    Grouped queries and parallel blocks are no obstacle. Norms on outputs (Gemma) are: what a head adds to the stream is not
    ``z W_O`` there. So are attention modules without an input of its own for every head (GPT-J).

    Raises:
        ModelError: a model that is no decoder.
    """
    for layer, block in enumerate(model.residual.blocks):
        if block.attention.post_norm is not None:
            return f"layer {layer} normalises its attention output, so a head's write is not z W_O"
    before = bool(getattr(model.cfg, "use_split_qkv_input", False))
    try:
        model.bridge.set_use_split_qkv_input(True)
    except (NotImplementedError, ValueError) as error:
        return first_line(error)
    finally:
        model.bridge.set_use_split_qkv_input(before)
    return None
