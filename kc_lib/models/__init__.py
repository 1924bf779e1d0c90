"""Loading any model TransformerLens boots, and the models that need no hub."""

from kc_lib.models.handwired import HAND_WIRED, HandWired, hand_wired
from kc_lib.models.load import EMBEDDED, embedded_models, load_model, model_hash, model_name
from kc_lib.models.nano.shipped import nano_steps
from kc_lib.models.smollm2 import cached_smollm2

__all__ = [
    "EMBEDDED",
    "HAND_WIRED",
    "HandWired",
    "cached_smollm2",
    "embedded_models",
    "hand_wired",
    "load_model",
    "model_hash",
    "model_name",
    "nano_steps",
]
