"""What the component analysis asks for."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.circuits.options import check_size
from kc_lib.models.options import ModelOptions
from kc_lib.options import Notebook, Options, option
from kc_lib.tasks.options import TaskOptions

NORMS = ("own", "final")
DIRECTIONS = ("answer", "difference")


@dataclass(frozen=True)
class LensOptions(Options):
    """Options of ``logit_lens``."""

    norm: str = option("own", "scale on which the stream is read: each point's own, or the final stream's", among=NORMS)
    batch_size: int = option(8, "facts at once", least=1, determines=False)


@dataclass(frozen=True)
class DirectOptions(Options):
    """Options of ``direct_attribution``."""

    direction: str = option(
        "difference", "the logit difference from the distractor; answer: the answer's logit", among=DIRECTIONS
    )
    batch_size: int = option(8, "facts at once", least=1, determines=False)


@dataclass(frozen=True)
class AnalysisCell(Options):
    """First cell of the notebook component_analysis."""

    model: str = option("smollm2", "embedded model, local folder or hub name", determines=False)
    task: str = option("country_capital", 'relation, "ioi", or a file', determines=False)
    direction: str = option(
        "difference", "the logit difference from the distractor; answer: the answer's logit", among=DIRECTIONS
    )
    n_components: int = option(6, "heads that are looked at closely, and as many MLPs", least=1)
    n_tokens: int = option(10, "tokens shown at either end", least=1)
    n_neurons: int = option(20, "neurons shown", least=1)
    circuit: str | None = option(None, "a circuit file; none: discover one by EAP-IG", determines=False)
    classes: str | None = option(None, "classes_*.parquet of head_classification, for the circuit's table", determines=False)
    size: int | float = option(0.005, "of the circuit that is discovered: a share of the edges, or a number", above=0)
    batch_size: int = option(8, "facts at once; circuits run on four times as many", least=1, determines=False)
    seed: int = option(0, "of the split and of intervals")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)


NOTEBOOKS = {
    "component_analysis": Notebook(
        cell=AnalysisCell,
        groups={"model": ModelOptions, "task": TaskOptions, "lens": LensOptions, "direct": DirectOptions},
    )
}
