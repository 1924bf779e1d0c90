"""Pages of the site that do not lie in docs/: a hook of mkdocs, named in mkdocs.yml.

README is the first page; CONTRIBUTING, CHANGELOG, the notebooks and the READMEs of data keep their place in the repository.
Links in the files hold in the repository, and are turned into those of the site here. The API gets the public names,
and a page for each folder of the library.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import kc_lib

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("*.md", "LICENSE", "CITATION.cff", "data/*/README.md", "notebooks/*.ipynb")
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")  # of a file, with or without an anchor


def on_config(config: MkDocsConfig) -> None:
    """The pages of the API join the navigation."""
    for section in config.nav or []:
        for entry in section.get("Reference", []):
            if isinstance(entry, dict) and "API" in entry:
                entry["API"] += [f"api/{name}.md" for name in _folders()]


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            if place == "README.md":
                files.append(File.generated(config, "index.md", abs_src_path=str(path)))
            else:
                files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    for name in _folders():
        text = f"# {name}\n\n::: kc_lib.{name}\n    options:\n      show_root_heading: false\n      show_submodules: true\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the repository as links of the site."""
    here = _repository_path(page.file.src_uri)

    def of_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[0]))
        return posixpath.relpath(_site_path(target), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(of_site, markdown) + (_public_names() if page.file.src_uri == "api/index.md" else "")


def _site_path(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _repository_path(place: str) -> str:
    if place == "index.md":
        return "README.md"
    return place if (ROOT / place).is_file() else f"docs/{place}"


def _folders() -> list[str]:
    """The folders of the library: its slices, and those of the core."""
    return sorted(path.parent.name for path in (ROOT / "kc_lib").glob("*/__init__.py"))


def _public_names() -> str:
    """What ``import kc_lib`` offers: names are imported when they are used, so they are looked up here."""
    text = ""
    for name in getattr(kc_lib, "__all__", []):
        value = getattr(kc_lib, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            text += f"\n::: {value.__module__}.{value.__qualname__}\n"
            text += f"    options:\n      heading: kc.{name}\n      toc_label: {name}\n      skip_local_inventory: true\n"
    return text


class Examples(Extension):
    """Docstrings say "Example:", and the reader of docstrings knows only "Examples:"."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
