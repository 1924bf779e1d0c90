"""The nano models: a small GPT-NeoX with checkpoints and a small BERT, trained by the project on its own sentences.

``python -m kc_lib.models.nano`` (``make nano``) trains them; ``load_model("nano")`` and ``load_model("nano-bert")`` load
what comes with the project in ``data/models``.
"""

from kc_lib.models.nano.corpus import NEW_COMBINATION, NEW_FACT, NEW_TEMPLATE, RELATIONS, TRAINED, Sentence, fact_sentences
from kc_lib.models.nano.shipped import CAUSAL, MASKED, MODELS, nano_folder, nano_steps, read_manifest

__all__ = [
    "CAUSAL",
    "MASKED",
    "MODELS",
    "NEW_COMBINATION",
    "NEW_FACT",
    "NEW_TEMPLATE",
    "RELATIONS",
    "TRAINED",
    "Sentence",
    "fact_sentences",
    "nano_folder",
    "nano_steps",
    "read_manifest",
]
