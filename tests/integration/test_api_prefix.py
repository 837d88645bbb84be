"""The real API behind proxies that show it under a path prefix: both kinds that notebooks have."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from support.apis import ASK, ROWS, Api, serve
from support.commands import Command
from support.flowers import OddFlower, odd_flower
from support.prefix_proxy import PrefixProxy, prefix_proxy
from support.yards import wait_for

from tuneyard.models.nodes import OfferedDevice, register_node

PREFIX = "/user/jane@team/proxy/8800"
KEY = "ty-default-admin"
HOW_TO = Path(__file__).parents[2] / "docs/howto/proxies.md"
KINDS = {
    # strips, says X-Forwarded-Prefix, the API's own setting root_path
    "strips and says": (True, True, ""),
    "strips and is silent": (True, False, PREFIX),
    "passes on and says": (False, True, ""),
    "passes on and is silent": (False, False, PREFIX),
}


class Behind:
    """An API, and its address behind a proxy."""

    def __init__(self, api: Api, proxy: PrefixProxy) -> None:
        self.api, self.proxy = api, proxy

    def client(self) -> httpx.Client:
        """A client of the address behind the proxy."""
        self.api.client().close()  # makes the key
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(headers=headers, trust_env=False, timeout=20)

    @property
    def url(self) -> str:
        return f"{self.proxy.url}/api/v1"


@pytest.fixture(scope="module")
def flower() -> Iterator[OddFlower]:
    with odd_flower() as flower:
        yield flower


@pytest.fixture(scope="module")
def prefixed_api(shared_api: Api, flower: OddFlower) -> Iterator[Api]:
    """A second process over the same database and store, whose setting says the prefix."""
    more = {"root_path": PREFIX, "flower_url": flower.url}
    with serve(shared_api.db, shared_api.home, **more) as api:
        shared_api.a_base()
        yield api


@pytest.fixture(scope="module", params=KINDS)
def behind(request: pytest.FixtureRequest, shared_api: Api, prefixed_api: Api) -> Iterator[Behind]:
    strips, says, root_path = KINDS[request.param]
    api = prefixed_api if root_path else shared_api
    with prefix_proxy(api.url, PREFIX, strips=strips, says=says) as proxy:
        yield Behind(api, proxy)


@pytest.fixture(scope="module")
def node(shared_api: Api) -> UUID:
    """A node with a CPU slot."""
    devices = [OfferedDevice("cpu", "cpu", "cores", 2**34, [[0]])]
    with shared_api.db.worker.begin() as tx:
        return register_node(tx, "n1", boot_id="boot", capabilities={}, devices=devices)


def at(url: str, location: str) -> str:
    """Where a client is sent: an address without a host means this one."""
    return str(httpx.URL(url).join(location))


def test_links_docs_uploads_and_parts_of_files_work_through_every_kind_of_proxy(
    behind: Behind,
) -> None:
    with behind.client() as http:
        made = http.post(f"{behind.url}/jobs", json=ASK)
        assert made.headers["location"].startswith(f"{PREFIX}/api/v1/jobs/job_")
        assert http.get(at(behind.url, made.headers["location"])).json()["id"] == made.json()["id"]

        docs = http.get(f"{behind.proxy.url}/docs")
        assert f"url: '{PREFIX}/openapi.json'" in docs.text
        page = http.get(at(behind.url, f"{PREFIX}/openapi.json")).json()
        assert page["servers"] == [{"url": PREFIX}]

        rows = ROWS * 400  # in many pieces
        file = http.post(f"{behind.url}/files", files={"file": ("rows.jsonl", rows)}).json()
        assert file["sha256"] == hashlib.sha256(rows).hexdigest()
        content = f"{behind.url}/files/{file['id']}/content"
        assert http.get(content).content == rows
        part = http.get(content, headers={"Range": "bytes=3-9"})
        assert (part.status_code, part.content) == (206, rows[3:10])
        assert part.headers["content-range"] == f"bytes 3-9/{len(rows)}"
        checked = f"{behind.url}/files/{file['id']}"
        wait_for(
            lambda: http.get(checked).json()["state"] == "processed",
            within_s=60,
            what="the file's check",
        )

        wrong = http.get(f"{behind.proxy.url}/nothing").json()["error"]
        assert wrong["hint"] == f"{PREFIX}/docs lists the addresses"
        assert http.get(f"{behind.proxy.url}/healthz").status_code == 200
    assert httpx.get(f"{behind.url}/jobs", trust_env=False).status_code == 401


def events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """(id, type) of a stream's numbered events, each as soon as it came."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "id" in fields:
                yield fields["id"], fields["event"]
            fields = {}
        else:
            name, _, value = line.partition(": ")
            fields[name] = value


def test_a_stream_comes_event_by_event_and_goes_on_after_the_last(
    behind: Behind, node: UUID
) -> None:
    with behind.client() as http:
        job = http.post(f"{behind.url}/jobs", json=ASK).json()["id"]
        url, sse = f"{behind.url}/jobs/{job}/events", {"Accept": "text/event-stream"}
        with http.stream("GET", url, headers=sse) as answer:
            stream = events(answer.iter_lines())
            assert next(stream) == ("1", "submit")
            ref = behind.api.start(job, node)  # only now: nothing waits for the answer's end
            assert [next(stream), next(stream)] == [("2", "place"), ("3", "started")]
        behind.api.finish(ref)
        with http.stream("GET", url, headers=sse | {"Last-Event-ID": "2"}) as answer:
            assert list(events(answer.iter_lines())) == [("3", "started"), ("4", "succeeded")]


def test_without_any_proxy_the_same_api_is_still_there(behind: Behind) -> None:
    with behind.api.client() as http:
        assert http.get("/jobs").status_code == 200


def test_what_lies_outside_of_the_prefix_is_not_reached(behind: Behind) -> None:
    origin = behind.proxy.url.removesuffix(PREFIX)
    with behind.client() as http:
        for path in ("/..%2f..", "//api/v1/jobs", "/api/v1/jobs/..%2fme", "/api/v1/nothing"):
            assert http.get(origin + PREFIX + path).status_code == 404
        assert http.get(f"{origin}/api/v1/jobs").status_code == 404


def test_the_commands_work_through_a_proxy(
    prefixed_api: Api,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    node: UUID,
) -> None:
    """TUNEYARD_URL with the prefix, here against the real API; tests/unit has every command."""
    prefixed_api.client().close()
    for name in [name for name in os.environ if name.startswith("TUNEYARD_")]:
        monkeypatch.delenv(name)
    with prefix_proxy(prefixed_api.url, PREFIX, strips=False, says=False) as proxy:
        monkeypatch.setenv("TUNEYARD_URL", proxy.url + "/")
        monkeypatch.setenv("TUNEYARD_API_KEY", KEY)
        monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
        command = Command(monkeypatch, capsys)

        def tuneyard(*arguments: str) -> Any:
            done = command(*arguments, "--json")
            assert done.code == 0, done.err
            return json.loads(done.out)

        data = tmp_path / "rows.jsonl"
        data.write_bytes(ROWS)
        spec = tmp_path / "ask.json"
        spec.write_text(json.dumps(ASK))
        put = tuneyard("files", "put", str(data))
        assert put["sha256"] == hashlib.sha256(ROWS).hexdigest()
        job = tuneyard("submit", str(spec))["id"]
        ref = prefixed_api.start(job, node)
        prefixed_api.ship(ref, log=b"a line\n")
        prefixed_api.finish(ref)
        assert command("watch", job).code == 0
        assert command("logs", job).out == "a line\n"
        assert tuneyard("show", job)["state"] == "succeeded"
        assert {target.split("?")[0].removeprefix(PREFIX) for target in proxy.targets} >= {
            "/api/v1/files", "/api/v1/jobs", f"/api/v1/jobs/{job}", f"/api/v1/jobs/{job}/events",
            f"/api/v1/jobs/{job}/logs",
        }  # fmt: skip


def test_the_how_tos_commands_run(prefixed_api: Api, flower: OddFlower, tmp_path: Path) -> None:
    prefixed_api.client().close()
    with prefix_proxy(prefixed_api.url, PREFIX, strips=True, says=False) as proxy:
        blocks = re.findall(r"```bash\n(.*?)```", HOW_TO.read_text(), re.S)
        (block,) = [each for each in blocks if "TUNEYARD_URL" in each]
        words = {"https://hub.example/user/jane/proxy/8800": proxy.url, "ty-…": KEY}
        for said, real in words.items():
            assert said in block
            block = block.replace(said, real)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", block], env={"PATH": path, "HOME": str(tmp_path)}, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"team":"default"' in done.stdout, done.stdout
    assert done.stdout.endswith("ok"), done.stdout
    assert [target for _, target, _ in flower.asked] == ["/api/workers"]


def test_a_client_of_no_trusted_proxy_cannot_choose_where_links_lead(
    shared_api: Api, prefixed_api: Api
) -> None:
    strangers = {"trusted_proxies": "192.0.2.0/24"}
    with serve(shared_api.db, shared_api.home, **strangers) as api, api.client() as http:
        made = http.post("/jobs", json=ASK, headers={"X-Forwarded-Prefix": "/evil"})
        assert made.headers["location"].startswith("/api/v1/jobs/")
        page = http.get(f"{api.url}/openapi.json", headers={"X-Forwarded-Prefix": "/evil"}).json()
        assert "servers" not in page


@pytest.mark.parametrize("prefix", ["//evil.example", "/a/../..", "https://evil.example", "/<b>"])
def test_an_odd_prefix_reaches_no_answer(shared_api: Api, prefix: str) -> None:
    for path in ("/openapi.json", "/docs", "/nothing"):
        headers = {"X-Forwarded-Prefix": prefix}
        answer = httpx.get(shared_api.url + path, headers=headers, trust_env=False)
        assert prefix not in answer.text
        assert prefix not in str(answer.headers)
