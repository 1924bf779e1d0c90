"""Loading any model TransformerLens boots, and the models that need no hub."""

from kc_lib.models.checkpoints import SCHEDULES, Checkpoint, checkpoints_of, load_checkpoint, schedule_steps
from kc_lib.models.handwired import HAND_WIRED, HandWired, hand_wired
from kc_lib.models.load import EMBEDDED, embedded_models, load_model, model_hash, model_name, parameter_count
from kc_lib.models.nano.shipped import nano_steps
from kc_lib.models.smollm2 import cached_smollm2

__all__ = [
    "EMBEDDED",
    "HAND_WIRED",
    "SCHEDULES",
    "Checkpoint",
    "HandWired",
    "cached_smollm2",
    "checkpoints_of",
    "embedded_models",
    "hand_wired",
    "load_checkpoint",
    "load_model",
    "model_hash",
    "model_name",
    "nano_steps",
    "parameter_count",
    "schedule_steps",
]
