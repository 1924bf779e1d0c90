"""Knowledge circuits: where a transformer keeps a piece of knowledge, and how it gets to the answer.

>>> import kc_lib as kc
>>> model = kc.load_model("smollm2")
>>> task = kc.load_task("country_capital", model)
>>> circuit = kc.select(kc.score_edges(model, task.discovery), size=0.005)

All names below are imported when they are first used, so that ``import kc_lib`` itself takes no time.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_FROM = {
    "models.load": ("load_model",),
    "models.model": ("Model",),
    "models.checkpoints": ("checkpoints_of",),
    "tasks.task": ("load_task",),
    "tasks.facts": ("load_facts",),
    "graph": ("Circuit",),
    "circuits.attribution": ("score_edges",),
    "circuits.selection": ("select",),
    "circuits.acdc.search": ("acdc",),
    "circuits.evaluate": ("evaluate",),
    "circuits.baselines": ("random_baselines",),
    "circuits.figures": ("circuit_graph",),
    "circuits.evaluation_figures": ("faithfulness_figure",),
    "components.lens": ("logit_lens",),
    "components.direct": ("direct_attribution",),
    "components.figures": ("lens_figure",),
    "heads.general": ("head_scores",),
    "heads.classes": ("classify_heads",),
    "heads.figures": ("head_score_grid",),
    "neurons.attribute": ("knowledge_neurons",),
    "neurons.refine": ("refine_neurons",),
    "neurons.update": ("update_facts",),
    "tracing.trace": ("trace",),
    "tracing.figures": ("tracing_figure",),
    "training.over_training": ("over_training",),
    "runs": ("settings", "open_run", "catalogue"),
}
_PUBLIC = {name: module for module, names in _FROM.items() for name in names}
__all__ = sorted(_PUBLIC)  # names of _FROM, said once


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
