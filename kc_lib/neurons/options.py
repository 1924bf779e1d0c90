"""What the methods of knowledge neurons and their two notebooks ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kc_lib.errors import MethodError, TaskError
from kc_lib.models.options import ModelOptions
from kc_lib.options import Notebook, Options, option

ADAPTIVE = "adaptive"
RULES = ("right", "left", "trapezoid")  # of a fixed number of points


@dataclass(frozen=True)
class ClozeOptions(Options):
    """Keywords of ``load_clozes``."""

    error = TaskError

    patterns: str | None = option(None, "a ParaRel pattern file, whose sentences replace the relation's own")
    n_prompts: int | None = option(None, "paraphrases to find neurons with; none: all that are not held out", least=1)
    n_held_out: int = option(0, "paraphrases held out", least=0)
    known_only: bool = option(True, "keep facts the model knows under at least half of the paraphrases ...")
    known_rank: int = option(1, "... that is, whose answer has at most this rank among all tokens", least=1)
    max_facts: int | None = option(None, "of each relation, at most so many, drawn by seed", least=1)
    prepend_bos: bool | None = option(None, "none: TransformerLens's default for the model, as a rule true")
    seed: int = option(0, "of the draw of facts")
    batch_size: int = option(32, "prompts at once", least=1, determines=False)

    def __post_init__(self) -> None:
        if isinstance(self.patterns, Path):
            object.__setattr__(self, "patterns", str(self.patterns))
        super().__post_init__()


@dataclass(frozen=True)
class AttributeOptions(Options):
    """Keywords of ``knowledge_neurons``."""

    rule: str = option(
        ADAPTIVE, "the integral to a tolerance; or right (the paper), left (its code), trapezoid", among=(ADAPTIVE, *RULES)
    )
    steps: int = option(20, "points of the other rules", least=1)
    tolerance: float = option(0.01, "share of p that the scores of a layer may miss together", above=0)
    target: str | int = option("gold", "gold, predicted, or the id of a token")
    kept: float = option(0.1, "share of a prompt's largest score below which scores are not stored", above=0, most=1)
    batch_size: int = option(16, "prompts at once", least=1, determines=False)

    def __post_init__(self) -> None:
        if isinstance(self.target, str) and self.target.isdecimal():  # as the command line gives it
            object.__setattr__(self, "target", int(self.target))
        super().__post_init__()
        if self.tolerance >= 1:
            raise MethodError(f"tolerance is {self.tolerance!r}; it must be above 0 and below 1")
        if isinstance(self.target, str) and self.target not in ("gold", "predicted"):
            raise MethodError(f"target is {self.target!r}; it must be 'gold', 'predicted' or the id of a token")


@dataclass(frozen=True)
class RefineOptions(Options):
    """Keywords of ``refine_neurons``."""

    threshold: float = option(0.2, "which of a prompt's neurons count, by criterion: least share of the largest score")
    base_threshold: float = option(0.5, "the same for the base method")
    criterion: str = option(
        "share of maximum",
        "what thresholds are: shares, scores, or percentiles of the stored scores",
        among=("share of maximum", "absolute", "percentile"),
    )
    share: float = option(0.7, "of a fact's paraphrases that must find a neuron, to begin with", above=0, most=1)
    adapt: bool = option(True, "move that share until a fact has 2 to 5 neurons on average")
    relation_share: float = option(0.1, "of a relation's facts that must have a neuron of the relation", above=0, most=1)


@dataclass(frozen=True)
class ReadOptions(Options):
    """Keywords of ``activating_prompts``."""

    n_random: int = option(3, "draws of random neurons of the same layers", least=0)
    seed: int = option(0, "of the random neurons, and of what else is drawn")
    batch_size: int = option(32, "prompts or sentences at once", least=1, determines=False)


@dataclass(frozen=True)
class ChangeOptions(ReadOptions):
    """Keywords of ``change_neurons``."""

    factors: list[float] = option((0.0, 2.0), "by which neurons are multiplied: 0 suppresses, 2 amplifies")
    n_other: int = option(20, "prompts of other relations on which a fact's neurons are changed, at most", least=0)
    batch_size: int = option(64, "prompts at once", least=1, determines=False)


@dataclass(frozen=True)
class SentenceOptions(Options):
    """Keywords of ``sentences_for``."""

    error = TaskError

    sentences: str | None = option(None, "a distant-supervision file; none: held-out paraphrases and other relations")
    corpus: str | None = option(None, "text file or folder for trigger sentences; none: the project's own stories")
    seed: int = option(0, "of the sentences that are drawn")


@dataclass(frozen=True)
class EditOptions(Options):
    """How a value vector is given another answer, as ``updated_values`` takes it."""

    l1: float = option(1.0, "how much of the old answer is taken from a value vector ...", least=0)
    l2: float = option(8.0, "... and of the new one added", least=0)
    scale: str = option("code", "in lengths of the value vector; paper: embeddings as they are", among=("code", "paper"))
    embedding: str = option("output", "columns of the unembedding; input: rows of the embedding", among=("output", "input"))
    orient: bool = option(True, "turn the change with the sign of the activation; false is the published formula")


@dataclass(frozen=True)
class UpdateOptions(EditOptions, ReadOptions):
    """Keywords of ``update_facts`` and ``update_answers``."""

    n_other: int = option(20, "prompts of other facts that are asked again, of the relation and of others each", least=0)


@dataclass(frozen=True)
class EraseOptions(ReadOptions):
    """Keywords of ``erase_relation``."""

    n_neurons: int = option(20, "neurons erased, at most", least=1)
    n_other: int = option(100, "prompts of every other relation that are asked again, at most", least=0)


RELATION = "one or several: the project's, an LRE .json, ParaRel's data_1-1.json"


@dataclass(frozen=True)
class NeuronsCell(Options):
    """The first cell of knowledge_neurons."""

    model: str = option("smollm2", "embedded model, local folder or hub name; causal or masked", determines=False)
    relation: str = option("country_capital country_language", RELATION, determines=False)
    n_prompts: int | None = option(5, "paraphrases to find neurons with", least=1)
    n_held_out: int = option(3, "paraphrases kept for sentences that the neurons are read on", least=0)
    max_facts: int | None = option(5, "of each relation, at most so many, drawn by seed", least=1)
    share: float = option(0.7, "of a fact's paraphrases that must find a neuron, to begin with", above=0, most=1)
    n_random: int = option(3, "draws of random neurons of the same layers", least=0)
    sentences: str | None = option(None, "a distant-supervision file; none: held-out paraphrases and other relations")
    corpus: str | None = option(None, "text file or folder for trigger sentences; none: the project's own stories")
    fact: int = option(0, "the fact that is shown by itself")
    seed: int = option(0, "of everything that is drawn")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)


@dataclass(frozen=True)
class EditingCell(Options):
    """The first cell of fact_editing."""

    model: str = option("smollm2", "embedded model, local folder or hub name; causal or masked", determines=False)
    relation: str = option("country_capital country_language", RELATION, determines=False)
    n_prompts: int | None = option(5, "paraphrases to find neurons with", least=1)
    n_held_out: int = option(3, "paraphrases on which edits are tested, and nothing else", least=0)
    max_facts: int | None = option(5, "of each relation, at most so many, drawn by seed", least=1)
    l1: float = option(0.5, "how much of the old answer is taken from a value vector; published is 1 ...", least=0)
    l2: float = option(1.0, "... and of the new one added; published is 8", least=0)
    erase: list[str] | None = option(None, "relations to erase, one at a time; none: all")
    n_random: int = option(3, "draws of random neurons of the same layers", least=0)
    fact: int | None = option(None, "the fact that is shown by itself; none: the first that is updated")
    seed: int = option(0, "of everything that is drawn")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)


FINDING: dict[str, type[Options]] = {
    "model": ModelOptions,
    "facts": ClozeOptions,
    "attribute": AttributeOptions,
    "refine": RefineOptions,
}
NOTEBOOKS = {
    "knowledge_neurons": Notebook(
        NeuronsCell, FINDING | {"sentences": SentenceOptions, "change": ChangeOptions, "read": ReadOptions}
    ),
    "fact_editing": Notebook(EditingCell, FINDING | {"update": UpdateOptions, "erasure": EraseOptions}),
}
