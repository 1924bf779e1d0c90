"""Run folders: where results go, what they were made from, and how the same run is found instead of repeated.

``outputs/<experiment>/<model>/<task>/<run id>/`` holds the results as parquet and json, ``run.json``, and, when the run came
from ``kc run``, the executed notebook and its HTML report. The run id is a hash of what determines the result: the
experiment, its parameters, the model's weights, the task's tokens and the library's code. Work goes on in a hidden
folder beside it, which is renamed when the run is finished, so a visible run folder is always whole; an interrupted run
goes on from the results the hidden folder already holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from kc_lib import __version__
from kc_lib.errors import RunError, first_line
from kc_lib.options import Notebook, Options
from kc_lib.resources import CHECKOUT, OUTPUTS
from kc_lib.resources import NOTEBOOKS as NOTEBOOKS  # asked for as runs.NOTEBOOKS
from kc_lib.results import Savable, hash_of, kept

if TYPE_CHECKING:  # torch and transformers take seconds to import, and ``kc`` needs them only inside notebooks
    from kc_lib.models.model import Model

DECLARED_IN = {  # which module says what a notebook asks for
    "circuit_discovery": "kc_lib.circuits.options",
    "circuit_evaluation": "kc_lib.circuits.options",
    "component_analysis": "kc_lib.components.options",
    "head_classification": "kc_lib.heads.options",
    "causal_tracing": "kc_lib.tracing.options",
    "knowledge_neurons": "kc_lib.neurons.options",
    "fact_editing": "kc_lib.neurons.options",
    "circuits_over_training": "kc_lib.training.options",
}
STATE = ".state"  # folder of what an interrupted method goes on from
MIME = "application/vnd.kc-run+json"  # how an executed notebook tells ``kc run`` its folder
NOT_DETERMINING = ("batch_size", "device", "out", "model", "task")  # model and task enter by their hashes
PACKAGES = ("torch", "transformers", "transformer_lens", "numpy", "pandas", "pyarrow", "plotly")


class AnyTask(Protocol):
    """What a run asks of its task: pairs, facts or several tasks."""

    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def prepend_bos(self) -> bool: ...
    @property
    def report(self) -> Mapping[str, int]: ...


@dataclass
class Run:
    """One run: its final folder, the folder it works in, and what it was made from."""

    folder: Path
    working: Path
    record: dict[str, Any]
    started: float = field(default_factory=time.monotonic)

    @property
    def found(self) -> bool:
        """True when the run was finished before and its results are only read."""
        return self.working == self.folder

    def keep(self, name: str, compute: Callable[..., Any] | Savable, *args: Any, **options: Any) -> Any:
        """``compute(*args, **options)``, kept in file ``name``: read where it is there already, else computed and written.

        A result that needs no computing may stand in place of ``compute``.

        Example:
            >>> scores = run.keep("scores.parquet", kc.score_edges, model, task.discovery, "eap_ig", steps=5)

        Raises:
            RunError: the file is there and cannot be read.
        """
        path = self.working / name
        try:
            return kept(path, compute, *args, **options)
        except Exception as error:  # whatever the reader met, the remedy is the same
            if not path.exists():
                raise
            raise RunError(
                f"{path}: a result of an earlier run cannot be read ({first_line(error)}); delete the folder "
                f"{self.working} and run again"
            ) from error

    def state(self, name: str) -> Path:
        """The file in which a method keeps the state from which it goes on; it is gone when the run is finished."""
        folder = self.working / STATE
        if not self.found:
            folder.mkdir(exist_ok=True)
        return folder / name

    def finish(self, headline: Mapping[str, Any]) -> Run:
        """Write ``run.json`` with the figures that matter and give the folder its final name."""
        if self.found:
            return self
        self.record |= {
            "headline": dict(headline),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": round(time.monotonic() - self.started, 1),
            "peak_memory_mb": _peak_memory_mb(),
        }
        shutil.rmtree(self.working / STATE, ignore_errors=True)
        (self.working / "run.json").write_text(json.dumps(self.record, indent=2, default=str))
        try:
            os.replace(self.working, self.folder)
        except OSError as error:
            raise RunError(f"the finished run cannot be moved to {self.folder} ({error})") from error
        self.working = self.folder
        return self

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        text = f"run folder: {self.folder}"
        return {"text/plain": text, MIME: {"folder": str(self.folder), "headline": self.record.get("headline", {})}}


@dataclass(frozen=True)
class Settings:
    """A notebook's parameters and options as they stand, checked: ``settings.acdc`` is the group of that name."""

    notebook: str
    cell: Options
    groups: Mapping[str, Options]

    def __getattr__(self, name: str) -> Options:
        groups: Mapping[str, Options] = self.__dict__.get("groups", {})
        if name not in groups:
            raise AttributeError(f"{name!r} is no group of options: there are {', '.join(groups)}")
        return groups[name]

    def parameters(self, only_determining: bool = False) -> dict[str, Any]:
        """Every parameter and option by the name that ``-p`` takes; or those alone on which the result depends."""
        values = self.cell.determining() if only_determining else dict(**self.cell)
        for group, options in self.groups.items():
            for name, value in (options.determining() if only_determining else dict(**options)).items():
                if name not in self.cell.declared() or value != self.cell[name]:
                    values[f"{group}.{name}"] = value
        return values

    def open(self, model: Model, task: AnyTask, **inputs: str | None) -> Run:
        """The run with these settings; ``inputs`` are hashes of what else it depends on (a circuit's file, a text).

        Raises:
            RunError: as ``open_run``.
        """
        determining = self.parameters(only_determining=True) | inputs
        return open_run(self.notebook, model, task, self.parameters(), self.cell["out"], determining)


def notebook_of(name: str) -> Notebook | None:
    """What one of the project's notebooks asks for, as its slice declares it; None for a notebook of the user's own."""
    if name not in DECLARED_IN:
        return None
    notebooks: Mapping[str, Notebook] = import_module(DECLARED_IN[name]).NOTEBOOKS
    return notebooks[name]


def settings(name: str, values: Mapping[str, Any]) -> Settings:
    """The parameters and options of a notebook's first cell, checked; ``values`` are its ``globals()``.

    Example:
        >>> settings = kc.settings("circuit_discovery", globals())
        >>> lm = kc.load_model(model, **settings.model)

    Raises:
        RunError: no such notebook, or an option that it does not have.
        KnowledgeCircuitsError: a value out of range, as the group of options says.
    """
    notebook = notebook_of(name)
    if notebook is None:
        raise RunError(f"no notebook {name!r} has settings: there are {', '.join(DECLARED_IN)}")
    plain = {key: values[key] for key in notebook.cell.declared()}
    given = dict(values.get("options") or {})
    unknown = [key for key in given if key not in notebook.option_names()]
    if unknown:
        raise RunError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(notebook.option_names())}")
    groups = {}
    for group, options in notebook.groups.items():
        named = {key: given[f"{group}.{key}"] for key in options.declared() if f"{group}.{key}" in given}
        groups[group] = options(**{key: value for key, value in plain.items() if key in options.declared()} | named)
    return Settings(name, notebook.cell(**plain), groups)


def open_run(
    experiment: str,
    model: Model,
    task: AnyTask,
    parameters: Mapping[str, Any],
    out: str | Path | None = None,
    determining: Mapping[str, Any] | None = None,
) -> Run:
    """The run with these parameters: found when it was finished before, resumed when interrupted, else new.

    Example:
        >>> run = kc.open_run("my_experiment", model, task, {"steps": 5})
        >>> scores = run.keep("scores.parquet", kc.score_edges, model, task.discovery, steps=5)
        >>> run.finish({"edges": scores.graph.n_edges})

    Raises:
        RunError: the output folder cannot be written, or a found run's record cannot be read.
    """

    weights, code = model.hash, code_hash()
    values = parameters if determining is None else determining
    identity = [experiment, code, weights, task.hash, {key: values[key] for key in values if key not in NOT_DETERMINING}]
    run_id = hash_of(identity)[:12]
    parent = output_root(out) / experiment / _safe(model.name) / _safe(task.name)
    folder = parent / run_id
    if folder.exists():
        return Run(folder, folder, read_record(folder))
    working = parent / f".{run_id}.unfinished"
    try:
        working.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the output folder {parent} cannot be written ({error}); choose another with --out") from error
    record = {
        "run_id": run_id,
        "experiment": experiment,
        "parameters": dict(parameters),
        "seed": parameters.get("seed"),
        "model": {"name": model.name, "source": model.source, "hash": weights, "dtype": str(model.cfg.dtype)},
        "task": {"name": task.name, "hash": task.hash, "prepend_bos": task.prepend_bos, **task.report},
        "device": str(model.cfg.device),
        "platform": platform.platform(),
        "versions": {"kc_lib": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "code_hash": code,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Run(folder, working, record)


def output_root(out: str | Path | None = None) -> Path:
    """The folder all runs lie under, checked to be one that can be written.

    Raises:
        RunError: it cannot.
    """
    root = OUTPUTS if out is None else Path(out).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"the output folder {root} cannot be written ({error}); choose another with --out") from error
    return root


def read_record(folder: Path) -> dict[str, Any]:
    """A finished run's ``run.json``.

    Raises:
        RunError: it is missing or not JSON.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete the folder {folder} and run again") from error
    if not isinstance(record, dict) or "experiment" not in record:
        raise RunError(f"{path}: is no record of a run; delete the folder {folder} and run again")
    return record


def catalogue(out: str | Path | None = None) -> pd.DataFrame:
    """All finished runs, newest first: run_id, experiment, model, task, headline figures, folder.

    Example:
        >>> kc.catalogue().query("experiment == 'circuit_discovery'")
    """
    rows = []
    root = OUTPUTS if out is None else Path(out)
    for path in root.glob("*/*/*/*/run.json"):
        record = read_record(path.parent)
        rows.append(
            {
                "run_id": record["run_id"],
                "experiment": record["experiment"],
                "model": record["model"]["name"],
                "task": record["task"]["name"],
                "finished": record.get("finished", ""),
                "headline": "; ".join(f"{key} {value}" for key, value in record.get("headline", {}).items()),
                "folder": str(path.parent),
            }
        )
    columns = ["run_id", "experiment", "model", "task", "finished", "headline", "folder"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("finished", ascending=False, ignore_index=True)


def find_run(name: str, out: str | Path | None = None) -> Path:
    """The folder of a run given by folder, run id or the beginning of one.

    Raises:
        RunError: no run, or several, of that name.
    """
    if (Path(name) / "run.json").exists():
        return Path(name)
    runs = catalogue(out)
    matches = runs[runs["run_id"].str.startswith(name)] if name else runs.iloc[:0]
    if len(matches) != 1:
        what = "no run" if matches.empty else f"{len(matches)} runs"
        raise RunError(f"{what} named {name!r} under {OUTPUTS if out is None else out}: 'kc runs' lists the run ids")
    return Path(matches.iloc[0]["folder"])


def code_hash() -> str:
    """Hash of the library's source: a result computed by other code is another result."""
    package = Path(__file__).resolve().parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str | None:
    """The project's commit, marked ``-dirty`` when files differ from it; None in a wheel or outside git."""
    if CHECKOUT is None:
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _peak_memory_mb() -> float:
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak / (1024 if sys.platform != "darwin" else 1024**2)
    return round(host + (torch.cuda.max_memory_allocated() / 1024**2 if torch.cuda.is_available() else 0), 1)


def _safe(name: str) -> str:
    """A name as one folder: a local path keeps its last part."""
    return re.sub(r"[^\w.@-]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-.") or "unnamed"
