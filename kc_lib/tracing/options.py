"""What is restored and at which tokens, how subjects are corrupted, and what the notebook causal_tracing asks for."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.errors import MethodError
from kc_lib.models.options import ModelOptions
from kc_lib.options import Notebook, Options, option
from kc_lib.tasks.options import POSITION_CLASSES, FactOptions

MEDIATORS = ("state", "attention_severed", "mlp_severed", "attention", "mlp")
WINDOWED = ("attention", "mlp")  # restored in a window of layers
DEFAULT_MEDIATORS = MEDIATORS[:3]
NOISES = ("gaussian", "uniform", "covariance", "replacement")
SIZED = ("gaussian", "uniform")  # noises that may have a fixed size
ALL = "all"  # classes of tokens


@dataclass(frozen=True)
class TraceOptions(Options):
    """Keywords of ``trace``; ``positions`` may be a list of classes as well."""

    mediators: list[str] = option(
        " ".join(DEFAULT_MEDIATORS), "what is restored; attention, mlp: outputs in a window of layers", among=MEDIATORS
    )
    window: int = option(10, "layers of that window; 1 is the layer alone", least=1)
    noise: str = option("gaussian", "covariance: of the vocabulary; replacement: by other subjects", among=NOISES)
    level: float = option(3.0, "size of the noise, in standard deviations of the subjects' token embeddings", least=0)
    sigma: float | None = option(None, "fixed size of gaussian or uniform noise instead", least=0)
    n_samples: int = option(10, "noise samples of a fact; at most so many other subjects", least=1)
    positions: str = option(ALL, 'or classes of tokens, separated by commas: "last subject token, last token"')
    known_only: bool = option(True, "trace facts the model knows ...")
    known_rank: int = option(1, "... that is, whose answer has at most this rank among all tokens", least=1)
    max_facts: int | None = option(None, "at most so many, drawn by seed from those that could be traced", least=1)
    seed: int = option(0, "of the noise and the drawn facts")
    batch_size: int = option(24, "restored states that are run at once, each with all samples", least=1, determines=False)

    def __post_init__(self) -> None:
        if isinstance(self.positions, list | tuple):
            object.__setattr__(self, "positions", ", ".join(map(str, self.positions)))
        super().__post_init__()
        if not self.mediators:
            raise MethodError(f"mediators are none: name some of {', '.join(MEDIATORS)}")
        unknown = [name for name in self.position_classes if name not in POSITION_CLASSES]
        if unknown:
            raise MethodError(f"unknown position class {unknown[0]!r}: use some of {', '.join(POSITION_CLASSES)}, or {ALL}")
        if self.sigma is not None and self.noise not in SIZED:
            raise MethodError(
                f"sigma={self.sigma} is a fixed size of {' or '.join(SIZED)} noise: leave it out for {self.noise!r}"
            )

    @property
    def position_classes(self) -> list[str]:
        """The classes of tokens at which something is restored."""
        return list(POSITION_CLASSES) if self.positions == ALL else [name.strip() for name in self.positions.split(",")]


@dataclass(frozen=True)
class TracingCell(Options):
    """The first cell of the notebook causal_tracing."""

    model: str = option("smollm2", "embedded model, local folder or hub name", determines=False)
    task: str = option(
        "person_occupation",
        "relation, known_1000.json, or a file of facts with subjects (.json, .csv, .jsonl)",
        determines=False,
    )
    max_facts: int | None = option(10, "at most so many facts, drawn by seed from those that are known", least=1)
    noise: str = option(
        "gaussian", "gaussian, uniform, covariance (of the vocabulary), replacement (by other subjects)", among=NOISES
    )
    level: float = option(3.0, "size of the noise, in standard deviations of the subjects' token embeddings", least=0)
    n_samples: int = option(10, "noise samples of a fact", least=1)
    mediators: list[str] = option(
        " ".join(DEFAULT_MEDIATORS), "what is restored; attention, mlp: outputs in a window of layers", among=MEDIATORS
    )
    window: int = option(10, "layers of that window; 1 is the layer alone", least=1)
    positions: str = option(ALL, 'or classes of tokens, separated by commas: "last subject token, last token"')
    fact: int = option(0, "the fact that is shown by itself", least=0)
    seed: int = option(0, "of the noise and the drawn facts")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)


NOTEBOOKS = {
    "causal_tracing": Notebook(cell=TracingCell, groups={"model": ModelOptions, "task": FactOptions, "trace": TraceOptions}),
}
