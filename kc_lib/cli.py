"""The command ``kc``: list models and tasks, run a notebook with parameters, and find its results again."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import nbformat
import papermill
import typer
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kc_lib import errors, runs
from kc_lib.errors import KnowledgeCircuitsError, RunError, first_line
from kc_lib.options import plain_value, read_value, shown
from kc_lib.reading import read_text

EXECUTION_TIMEOUT = 4 * 3600  # seconds for one cell
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
out_option = typer.Option(
    "--out",
    help="folder for results (default: outputs/ of the checkout, or of the current folder where kc_lib is installed)",
)


class ThisPython(AsyncKernelManager):
    """Runs notebooks in the Python that runs ``kc``, whatever kernel they name and whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launch, display_name="this Python", language="python")


def main() -> None:
    """Entry point: an error of ours is one line and exit code 2."""
    try:
        arguments = sys.argv[1:]
        if arguments[:1] == ["run"] and "--help" in arguments[2:]:
            Console().print(notebook_help(arguments[1]))
        else:
            app(_joined(arguments))
    except KnowledgeCircuitsError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"kc: {error}")
        sys.exit(2)


def _joined(arguments: list[str]) -> list[str]:
    """``-p KEY VALUE`` as ``-p KEY=VALUE``, because typer's repeatable options take one value."""
    joined, rest = [], list(arguments)
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("-p", "--parameter") and rest:
            item = rest.pop(0)
            joined.append(item if "=" in item or not rest else f"{item}={rest.pop(0)}")
    return joined


def _key_value(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals:
        raise RunError(f"parameter {key!r} has no value: write -p {key} VALUE")
    return key, value


@app.command()
def models() -> None:
    """Models that need no hub, and what else can be loaded."""
    from kc_lib.models.load import embedded_models

    table = Table("model", "what it is", "here")
    for name, (what, here) in embedded_models().items():
        table.add_row(name, what, here)
    table.add_row("a local folder", "any model saved by save_pretrained that TransformerLens boots", "")
    table.add_row("a hub name", "gpt2, EleutherAI/pythia-160m (checkpoint: a training step), Qwen/Qwen2.5-0.5B ...", "")
    Console().print(table)


@app.command()
def tasks(
    model: Annotated[str | None, typer.Option(help="count the facts this model knows")] = None,
    known_rank: Annotated[int, typer.Option(help="known means: the answer's first token has at most this rank")] = 1,
    all_templates: Annotated[bool, typer.Option(help="also find the template under which most facts are known")] = False,
) -> None:
    """Tasks that come with the project; with --model, how many facts of each the model knows (takes minutes)."""
    from kc_lib.models.load import load_model
    from kc_lib.tasks.generated import GENERATED
    from kc_lib.tasks.known import known_facts
    from kc_lib.tasks.relations import load_relation, relation_files

    relations = [load_relation(name) for name in relation_files()]
    table = Table()
    for column in ("task", "kind", "facts", "templates"):
        table.add_column(column, no_wrap=True)
    table.add_column("asks", no_wrap=True, overflow="ellipsis")
    if model is not None:
        table.add_column(f"known (rank <= {known_rank})", justify="right")
        if all_templates:
            table.add_column("most known", justify="right")
    bridge = None if model is None else load_model(model)
    for relation in tqdm(relations, desc="relations", disable=bridge is None):
        row = [relation.name, relation.kind, str(len(relation.facts)), str(len(relation.templates))]
        row.append(relation.templates[0].replace("{}", "…"))
        if bridge is not None:
            templates = relation.templates if all_templates else relation.templates[:1]
            known = [known_facts(bridge, relation, template, known_rank) for template in templates]
            row.append(str(known[0]))
            if all_templates:
                row.append(f"{max(known)} (template {known.index(max(known))})")
        table.add_row(*row)
    for name, what in GENERATED.items():
        table.add_row(name, "generated", "any", "", what)
    Console().print(table)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="a notebook of the project by name, or a path")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="KEY VALUE", help="a parameter of the notebook")
    ] = None,
    out: Annotated[Path | None, out_option] = None,
) -> None:
    """Run a notebook with parameters; results, executed notebook and HTML report go to its run folder."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    given = dict(_key_value(item) for item in parameter or [])
    folder, headline = run_notebook(notebook, given, out)
    console.print(f"run folder   {folder}")
    for name in sorted(path.name for path in folder.iterdir()):
        console.print(f"             {name}")
    for key, value in headline.items():
        console.print(f"{key:<40} {value}")


@app.command()
def demo() -> None:
    """The main job on the embedded model: the circuit of capital cities in SmolLM2, tested on held-out facts."""
    run("circuit_discovery")


@app.command(name="runs")
def list_runs(out: Annotated[Path | None, out_option] = None) -> None:
    """Finished runs, newest first."""
    frame = runs.catalogue(out)
    if frame.empty:
        Console().print("no runs yet: try 'kc demo'")
        return
    table = Table("run", "experiment", "model", "task", "finished", "headline")
    for row in frame.drop(columns="folder").astype(str).to_numpy().tolist():
        table.add_row(*row)
    Console().print(table)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="a run id (or its beginning), or a run folder")],
    out: Annotated[Path | None, out_option] = None,
) -> None:
    """One run: what it was made from, what came out, and its files."""
    folder = runs.find_run(run, out)
    record = runs.read_record(folder)
    table = Table("", "", title=f"{record['experiment']} {record['run_id']}", show_header=False)
    for section in ("headline", "model", "task", "parameters", "versions"):
        for key, value in record.get(section, {}).items():
            table.add_row(f"{section}.{key}", str(value))
    for key in ("seed", "device", "git_commit", "started", "finished", "wall_seconds", "peak_memory_mb"):
        table.add_row(key, str(record.get(key)))
    table.add_row("files", "\n".join(sorted(path.name for path in folder.iterdir())))
    table.add_row("folder", str(folder))
    Console().print(table)


def run_notebook(notebook: str, parameters: dict[str, str], out: Path | None) -> tuple[Path, dict[str, Any]]:
    """Execute a notebook by papermill in the current folder; returns its run folder and headline figures.

    Raises:
        KnowledgeCircuitsError: bad input, here or inside the notebook; nothing half-written stays in sight.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin for long slow a shared machine tenfold
    source = notebook_path(notebook)
    values = parse_parameters(source, parameters)
    root = runs.output_root(out)
    if out is not None:
        values["out"] = str(root)
    with tempfile.TemporaryDirectory(prefix="kc-") as scratch:
        executed = Path(scratch) / source.name
        asked = Path(scratch) / "asked.ipynb"
        nbformat.write(read_notebook(source), asked)
        # the second renderer embeds plotly.js once, so that the exported HTML shows its figures with no network
        renderer = os.environ.get("PLOTLY_RENDERER")
        os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+notebook"
        try:
            papermill.execute_notebook(
                str(asked),
                str(executed),
                values,
                kernel_manager_class=ThisPython,
                cwd=str(Path.cwd()),
                execution_timeout=EXECUTION_TIMEOUT,
                extra_arguments=["--log-level=50"],  # the kernel's notices to Jupyter's developers
            )
        except PapermillExecutionError as error:
            raise _as_ours(error) from None
        finally:
            os.environ.pop("PLOTLY_RENDERER", None)
            if renderer is not None:
                os.environ["PLOTLY_RENDERER"] = renderer
        document = nbformat.read(executed, as_version=4)
    folder, headline = _told_folder(document, source)
    nbformat.write(document, folder / source.name)
    (folder / "report.html").write_text(to_html(document), encoding="utf-8")
    return folder, headline


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook as it is executed: in Python, whatever kernel it names.

    Raises:
        RunError: a file that is no notebook.
    """
    try:
        document = nbformat.reads(read_text(path, RunError), as_version=4)
        nbformat.validate(document)
    except RunError:
        raise
    except Exception as error:  # nbformat raises whatever the content met
        raise RunError(f"{path} is no notebook ({first_line(error)[:200]}): give an .ipynb that Jupyter wrote") from error
    document.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return document


def notebook_path(notebook: str) -> Path:
    """A notebook of the project by name, or a path to one."""
    path = Path(notebook)
    path = path if path.suffix == ".ipynb" else runs.NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in runs.NOTEBOOKS.glob("*.ipynb")))
        raise RunError(f"no notebook {notebook!r}; notebooks of the project: {names}")
    return path


def parse_parameters(source: Path, given: dict[str, str]) -> dict[str, Any]:
    """Values for the notebook's parameters, of the types that it declares; ``group.name`` goes into ``options``.

    Raises:
        RunError: a name the notebook does not have.
        KnowledgeCircuitsError: a value of another type or out of range.
    """
    notebook = runs.notebook_of(source.stem)
    if notebook is None or set(_first_cell(source)) != {*notebook.cell.declared(), "options"}:
        return _of_foreign(source, given)
    cell, options = notebook.cell.declared(), notebook.option_names()
    unknown = [key for key in given if key not in cell and key not in options]
    if unknown:
        listed = ", ".join(notebook.defaults())
        raise RunError(f"{source.stem} has no parameter {unknown[0]!r}; its parameters and options are {listed}")
    plain = {key: read_value(cell[key], text) for key, text in given.items() if key in cell}
    behind = {key: read_value(options[key], text) for key, text in given.items() if key not in cell}
    values = {key: one.default for key, one in cell.items()} | plain
    runs.settings(source.stem, values | {"options": behind})  # so that a wrong value is said before a kernel starts
    return plain | ({"options": behind} if behind else {})


def _first_cell(source: Path) -> dict[str, Any]:
    """What the cell tagged ``parameters`` assigns, as papermill reads it."""
    with tempfile.TemporaryDirectory(prefix="kc-") as scratch:
        asked = Path(scratch) / "asked.ipynb"
        nbformat.write(read_notebook(source), asked)
        return papermill.inspect_notebook(str(asked))


def _of_foreign(source: Path, given: dict[str, str]) -> dict[str, Any]:
    """Values for a notebook of the user's own, whose defaults alone say what they may be."""
    known = _first_cell(source)
    values: dict[str, Any] = {}
    for key, text in given.items():
        if key not in known:
            raise RunError(f"{source.stem} has no parameter {key!r}; its parameters are {', '.join(known)}")
        is_text = known[key]["default"].startswith(("'", '"'))
        values[key] = text if is_text else plain_value(text)
    return values


def notebook_help(name: str) -> Table:
    """The parameters and options of a notebook: meaning, range and default."""
    notebook = runs.notebook_of(notebook_path(name).stem)
    if notebook is None:
        raise RunError(f"{name} is no notebook of the project: its first cell says what it takes")
    table = Table("-p", "default", "meaning", title=f"kc run {name} -p NAME VALUE ...", title_justify="left", box=None)
    for key, declared in notebook.defaults().items():
        table.add_row(key, str(declared.default), f"{declared.metadata['help']} ({shown(declared)})")
    return table


def to_html(document: nbformat.NotebookNode) -> str:
    """A notebook as one HTML page that loads nothing from anywhere."""
    exporter = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", jquery_url="", widget_renderer_url="")
    body, _ = exporter.from_notebook_node(document)
    return re.sub(r'<script src="https?://[^"]*"></script>', "", str(body))  # plotly asks for MathJax; no figure uses it


def _as_ours(error: PapermillExecutionError) -> Exception:
    """The error the notebook raised, when it is one of ours or a wrong value; else papermill's own."""
    kind = getattr(errors, error.ename, None)
    if isinstance(kind, type) and issubclass(kind, KnowledgeCircuitsError):
        return kind(error.evalue)
    return error


def _told_folder(document: nbformat.NotebookNode, source: Path) -> tuple[Path, dict[str, Any]]:
    for cell in reversed(document.cells):
        for output in reversed(cell.get("outputs", [])):
            told = output.get("data", {}).get(runs.MIME)
            if told:
                return Path(told["folder"]), dict(told["headline"])
    raise RunError(f"{source.name} did not end by finishing a run: its last cell must show run.finish(...)")


notebooks_app = typer.Typer(invoke_without_command=True, help="List the notebooks, or copy them to a folder of yours.")
app.add_typer(notebooks_app, name="notebooks")


@notebooks_app.callback()
def list_notebooks(context: typer.Context) -> None:
    """List the notebooks, or copy them to a folder of yours."""
    if context.invoked_subcommand is None:
        for path in sorted(runs.NOTEBOOKS.glob("*.ipynb")):
            typer.echo(f"{path.stem:<24} {_title(path)}")


@notebooks_app.command(name="copy")
def copy_notebooks(folder: Annotated[Path, typer.Argument(help="where to; it is made if it is not there")]) -> None:
    """Copy the notebooks to a folder, to be opened and changed there; files that are there already stay as they are."""
    sources = sorted(runs.NOTEBOOKS.glob("*.ipynb"))
    there = [source.name for source in sources if (folder / source.name).exists()]
    if there:
        raise RunError(f"{folder} already holds {', '.join(there)}: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copyfile(source, folder / source.name)
    except OSError as error:
        raise RunError(f"the notebooks cannot be copied to {folder} ({error}): name another folder") from error
    typer.echo(f"{len(sources)} notebooks in {folder}: jupyter lab {folder}")


def _title(path: Path) -> str:
    """The first heading of a notebook."""
    lines = nbformat.read(path, as_version=4).cells[0].source.splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
