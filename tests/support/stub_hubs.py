"""One server on 127.0.0.1 that speaks as ModelScope and as Hugging Face, and misbehaves on demand.

The real clients talk to it: ``environment()`` is what points them here. What each file does wrong,
and how often, is set by ``misbehave``; what was asked is in ``asked``.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000
"""Files from this size on are LFS: their hash is sha256, else git's."""

HTML = b"<!DOCTYPE html><html><body>Please log in to the guest network.</body></html>"


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class StubHubs:
    """Both hubs. repos: (what, id) -> name of a file -> its bytes."""

    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    commit: str = COMMIT
    listing_is: str = "json"  # or html, or 503
    piece_s: float = 0.0  # a pause after each piece of a file that is ``slow``
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    _wrongs: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Where both hubs listen."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What points the clients here, and makes them give up soon."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_API_MAX_RETRIES": "0",
            "MODELSCOPE_API_TIMEOUT": "2",
            "MODELSCOPE_DOWNLOAD_TIMEOUT": "1",
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
            "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "0",
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        }

    def misbehave(self, name: str, how: str, *, times: int = 1) -> None:
        """Let the next ``times`` GETs of a file go wrong: stall, truncate, wrong, html, slow."""
        self._wrongs[name] = [how] * times

    def wrong_now(self, name: str) -> str | None:
        """How this GET goes wrong, if it does."""
        with self._lock:
            left = self._wrongs.get(name)
            return left.pop() if left else None

    def gets(self, name: str) -> list[Asked]:
        """GETs of a file's bytes."""
        return [
            each
            for each in self.asked
            if each.method == "GET"
            and (each.path.endswith(f"/{name}") or f"FilePath={name}" in each.path)
        ]

    def forget(self) -> None:
        """Begin the next test clean."""
        self.repos.clear()
        self.gated.clear()
        self.asked.clear()
        self._wrongs.clear()
        self.commit, self.listing_is, self.piece_s = COMMIT, "json", 0.0


@contextmanager
def running_hubs() -> Iterator[StubHubs]:
    """Serve until left."""
    hubs = StubHubs()
    handler = type("Handler", (_Handler,), {"hubs": hubs})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hubs.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hubs
    finally:
        hubs.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def git_sha1(content: bytes) -> str:
    """The hash of a file that git itself holds."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hubs: StubHubs

    def log_message(self, *_: object) -> None:
        """Nothing: ``asked`` is the log."""

    def do_GET(self) -> None:
        """Answer."""
        parts = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        asked = Asked(self.command, unquote(self.path), self.headers.get("Range"), authorization)
        self.hubs.asked.append(asked)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        segments = unquote(parts.path).strip("/").split("/")
        try:
            self._route(segments, query)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET
    do_POST = do_GET

    def _route(self, parts: list[str], query: Mapping[str, str]) -> None:
        if parts[:2] == ["api", "v1"] and len(parts) >= 5 and parts[2] in ("models", "datasets"):
            self._modelscope(parts[2][:-1], "/".join(parts[3:5]), parts[5:], query)
        elif parts[0] == "api" and parts[1] in ("models", "datasets") and len(parts) >= 4:
            self._huggingface(parts[1][:-1], "/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:
            what = "dataset" if parts[0] == "datasets" else "model"
            at = parts.index("resolve")
            self._huggingface_file(what, "/".join(parts[at - 2 : at]), "/".join(parts[at + 2 :]))
        else:
            self._say(404, {"error": "no such page"})

    # ModelScope ------------------------------------------------------------------------------

    def _modelscope(self, what: str, repo: str, rest: list[str], query: Mapping[str, str]) -> None:
        files = self.hubs.repos.get((what, repo))
        if files is None:
            self._say(404, {"Code": 10010205001, "Success": False, "Message": "not found"})
        elif rest == ["revisions"]:
            branches = [{"Revision": "master"}, {"Revision": "v1"}]
            tags: list[object] = []
            self._data({"RevisionMap": {"Branches": branches, "Tags": tags}})
        elif rest in (["repo", "files"], ["repo", "tree"]):
            if self._listing_is_broken():
                return
            if query.get("Revision") not in ("master", "v1"):
                self._say(404, {"Code": 10010205002, "Success": False, "Message": "no revision"})
                return
            entries = [self._modelscope_entry(name, content) for name, content in files.items()]
            first = query.get("PageNumber", "1") == "1"
            self._data({"Files": entries if first else []})
        elif rest == ["repo"]:
            if repo in self.hubs.gated and not self.headers.get("Authorization"):
                self._say(403, {"Code": 10010301002, "Success": False, "Message": "no access"})
                return
            name = query.get("FilePath", "")
            self._file(name, files.get(name), {})
        else:
            self._data({"Name": repo, "Revision": "master"})

    def _modelscope_entry(self, name: str, content: bytes) -> dict[str, object]:
        return {
            "Name": name.rpartition("/")[2],
            "Path": name,
            "Type": "blob",
            "Size": len(content),
            "Sha256": hashlib.sha256(content).hexdigest(),
            "Revision": self.hubs.commit,
            "CommittedDate": 1_700_000_000,
            "IsLFS": len(content) >= LARGE,
        }

    def _data(self, data: object) -> None:
        self._say(200, {"Code": 200, "Success": True, "Data": data})

    # Hugging Face ----------------------------------------------------------------------------

    def _huggingface(self, what: str, repo: str, rest: list[str]) -> None:
        files = self.hubs.repos.get((what, repo))
        if files is None:
            self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if self._listing_is_broken():
            return
        if rest[:1] in (["revision"], ["tree"]) and rest[1] not in ("main", self.hubs.commit):
            code = {"X-Error-Code": "RevisionNotFound"}
            self._say(404, {"error": "Invalid rev id"}, code)
        elif rest[:1] == ["tree"]:
            self._say(200, [self._tree_entry(name, body) for name, body in files.items()])
        else:
            siblings = [self._sibling(name, content) for name, content in files.items()]
            gated = "manual" if repo in self.hubs.gated else False
            about = {"id": repo, "sha": self.hubs.commit, "private": False, "gated": gated}
            self._say(200, about | {"siblings": siblings, "tags": [], "downloads": 0})

    def _sibling(self, name: str, content: bytes) -> dict[str, object]:
        entry = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
        return entry | self._lfs(content)

    def _tree_entry(self, name: str, content: bytes) -> dict[str, object]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        return entry | self._lfs(content)

    def _lfs(self, content: bytes) -> dict[str, object]:
        if len(content) < LARGE:
            return {}
        sha256 = hashlib.sha256(content).hexdigest()
        more = {"size": len(content), "pointerSize": 134}
        return {"lfs": {"oid": sha256, "sha256": sha256, **more}}

    def _huggingface_file(self, what: str, repo: str, name: str) -> None:
        content = self.hubs.repos.get((what, repo), {}).get(name)
        if repo in self.hubs.gated and not self.headers.get("Authorization"):
            code = {"X-Error-Code": "GatedRepo"}
            self._say(401, {"error": "Access to model is restricted"}, code)
            return
        etag = ""
        if content is not None:
            large = len(content) >= LARGE
            etag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hubs.commit}
        self._file(name, content, headers)

    # Both ------------------------------------------------------------------------------------

    def _listing_is_broken(self) -> bool:
        if self.hubs.listing_is == "html":
            self._send(200, HTML, {"Content-Type": "text/html"})
        elif self.hubs.listing_is == "503":
            self._say(503, {"error": "maintenance"})
        return self.hubs.listing_is != "json"

    def _file(self, name: str, content: bytes | None, headers: Mapping[str, str]) -> None:
        if content is None:
            self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        how = self.hubs.wrong_now(name) if self.command == "GET" else None
        if how == "html":
            self._send(200, HTML, {**headers, "Content-Type": "text/html"})
            return
        if how == "wrong":
            content = bytes(255 - byte for byte in content)
        status, start = 200, 0
        headers = {**headers, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) and asked.startswith("bytes="):
            start = int(asked[6:].partition("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], headers, how=how)

    def _say(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(status, json.dumps(body).encode(), {**kind, **(headers or {})})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], *, how: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if how in ("stall", "truncate"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if how == "stall":
                self.hubs.stopping.wait(60)
            self.close_connection = True
        elif how == "slow":
            for start in range(0, len(body), 64 * 1024):
                self.wfile.write(body[start : start + 64 * 1024])
                time.sleep(self.hubs.piece_s)
        else:
            self.wfile.write(body)
