"""A small hub on the loopback: the endpoints huggingface_hub asks, with faults on demand and a log of what was asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "tiny/family"


@dataclass
class Asked:
    """One request: what was asked, and the bytes asked for where only a range was."""

    method: str
    path: str
    first_byte: int | None


@dataclass
class Hub:
    """What a running hub has, and what it is to do wrong.

    ``fault`` is asked before the weights of a revision are sent: ("break", n) ends the connection after n bytes,
    ("status", n) is sent in their place, None sends all.
    """

    folders: Mapping[str, Path]  # by revision
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    fault: Callable[[str, Asked], tuple[str, int] | None] = lambda revision, asked: None

    def commit(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def revision(self, name: str) -> str | None:
        return next((known for known in self.folders if name in (known, self.commit(known))), None)

    def weights_asked(self, revision: str) -> list[Asked]:
        """The requests for a revision's weights, by its name or commit."""
        names = (revision, self.commit(revision))
        return [
            a for a in self.asked if a.method == "GET" and a.path.endswith(".safetensors") and a.path.split("/")[4] in names
        ]


@contextmanager
def serving(folders: Mapping[str, Path]) -> Iterator[Hub]:
    """A hub with one repository, ``tiny/family``, whose branches are folders."""
    hub = Hub(folders)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(wanted[1]) if wanted else None
            path = self.path.partition("?")[0]
            asked = Asked(self.command, path, first)
            hub.asked.append(asked)
            status, headers, content = self.look_up(path)
            fault = None
            file = re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/.+\.safetensors", path)
            if file and body and status == 200:
                fault = hub.fault(str(hub.revision(file[1])), asked)
            if fault and fault[0] == "status":
                status, headers, content = fault[1], {}, b"{}"
            elif first is not None and status == 200:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                status, content = 206, content[first:]
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            if fault and fault[0] == "break":
                self.wfile.write(content[: fault[1]])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(content)

        def look_up(self, path: str) -> tuple[int, dict[str, str], bytes]:
            if path == "/":
                return 200, {}, b"a hub"
            if path == f"/api/models/{REPOSITORY}/refs":
                refs = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": hub.commit(name)} for name in hub.folders
                ]
                return 200, {}, json.dumps({"branches": refs, "tags": [], "converts": []}).encode()
            file = re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", path)
            about = re.fullmatch(rf"/api/models/{REPOSITORY}/(revision|tree)/([^/]+)", path)
            if not file and not about:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            revision = hub.revision(file[1] if file else str(about and about[2]))
            if revision is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            folder, headers = hub.folders[revision], {"X-Repo-Commit": hub.commit(revision)}
            files = sorted(folder.iterdir())
            if file and (folder / file[2]).is_file():
                content = (folder / file[2]).read_bytes()
                etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
                return 200, headers | etag, content
            if about and about[1] == "revision":
                siblings = [{"rfilename": path.name} for path in files]
                found = {"id": REPOSITORY, "sha": hub.commit(revision), "siblings": siblings}
                return 200, headers, json.dumps(found).encode()
            if about:
                tree = [
                    {
                        "type": "file",
                        "path": path.name,
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in files
                ]
                return 200, headers, json.dumps(tree).encode()
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b"{}"

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
