"""Logs of ended attempts become one artifact, and who reads them does not notice."""

import gzip
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.apis import ASK, Api, serve
from support.databases import TestDatabase
from support.invariants import broken_invariants
from support.object_stores import ObjectServer

from tuneyard.models import shipments
from tuneyard.specs.ids import parse_id
from tuneyard.store.remote import Store, open_store
from tuneyard.store.scratch import Scratch
from tuneyard.workers.archiving import LogArchiver

RANGES = ("bytes=0-0", "bytes=5-70", "bytes=1040000-1060000", "bytes=-9", "bytes=3-", "bytes=9-2")


class Logged:
    """A job with attempts that write logs."""

    def __init__(self, api: Api, http: httpx.Client, node: object) -> None:
        self.api, self.http, self.node = api, http, node
        api.a_base()
        self.job = http.post("/jobs", json=ASK).json()["id"]
        self.ref = api.start(self.job, node)  # type: ignore[arg-type]

    def again(self) -> None:
        """Lose the attempt and start the next."""
        self.api.lose(self.ref)
        self.ref = self.api.start(self.job, self.node)  # type: ignore[arg-type]

    def archiver(self, store: Store | None = None) -> LogArchiver:
        """What the node's worker has."""
        found = store or self.api.server.config.app.state.yard.store  # type: ignore[union-attr]
        scratch = Scratch(self.api.home / "scratch")
        return LogArchiver(self.api.db.worker, found, self.node, scratch)  # type: ignore[arg-type]

    def asked(self) -> list[tuple[int, str | None, bytes]]:
        """All that can be asked of a log, answered."""
        path = f"/jobs/{self.job}/logs"
        asked = [self.http.get(path, headers={"Range": each}) for each in RANGES]
        for params in ({}, {"tail": 3}, {"tail": 0}, {"start": 9}, {"attempt": 2}, {"follow": 1}):
            asked.append(self.http.get(path, params=params))
        return [(a.status_code, a.headers.get("content-range"), a.content) for a in asked]

    def chunks(self) -> int:
        """How many chunks there are."""
        return int(self.api.db.rows("SELECT count(*) FROM log_chunks")[0][0])

    def logs(self) -> list[dict[str, object]]:
        """The artifacts that are logs."""
        found = self.http.get(f"/jobs/{self.job}/artifacts", params={"kind": "log"})
        return list(found.json()["data"])


@pytest.fixture(params=["folder", "s3"])
def logged(
    request: pytest.FixtureRequest, db: TestDatabase, tmp_path: Path, a_node: object
) -> Iterator[Logged]:
    """A running job, its artifacts in a folder or on S3."""
    settings = {}
    if request.param == "s3":
        server: ObjectServer = request.getfixturevalue("object_server")
        settings = server.settings(f"logs-{tmp_path.name}")
    with serve(db, tmp_path, **settings) as api, api.client() as http:
        yield Logged(api, http, a_node())  # type: ignore[operator]
    assert broken_invariants(db) == {}


def two_attempts(logged: Logged) -> None:
    """Two logs: one with a gap, of more than a mebibyte, and one that is small."""
    logged.api.ship(logged.ref, log=b"head\n")
    logged.api.ship(logged.ref, log=b"cut out\n")
    for i in range(4):
        logged.api.ship(logged.ref, log=f"line {i} ".encode() * 50_000 + b"\n")
    logged.api.db.run("DELETE FROM log_chunks WHERE seq = 2")
    logged.again()
    for word in ("zwei\n", "drei", " vier\n"):
        logged.api.ship(logged.ref, log=word.encode())
    logged.api.finish(logged.ref)


def test_an_archived_log_answers_as_it_did_in_chunks(logged: Logged) -> None:
    two_attempts(logged)
    before = logged.asked()
    assert b"--- 8 bytes left out ---" in before[6][2]
    logged.archiver().archive()
    assert logged.chunks() == 0
    assert logged.asked() == before
    assert [log["attempt"] for log in logged.logs()] in ([1, 2], [2, 1])
    assert logged.http.get(f"/jobs/{logged.job}/artifacts").json()["data"] == []


def test_an_archive_is_one_file_for_gunzip(logged: Logged) -> None:
    two_attempts(logged)
    logged.archiver().archive()
    second = next(log for log in logged.logs() if log["attempt"] == 2)
    path = f"/jobs/{logged.job}/artifacts/{second['id']}/files/log.gz"
    assert gzip.decompress(logged.http.get(path).content) == b"zwei\ndrei vier\n"


def test_a_live_log_stays_in_chunks_and_other_nodes_logs_are_left_to_them(logged: Logged) -> None:
    logged.api.ship(logged.ref, log=b"one\n")
    archiver = logged.archiver()
    archiver.archive()
    assert logged.chunks() == 1
    logged.api.finish(logged.ref)
    archiver.node_id = parse_id("job", logged.job)  # another node's
    archiver.archive()
    assert logged.chunks() == 1
    archiver.archive(others_after_s=0)
    assert logged.chunks() == 0


def test_two_that_archive_one_log_at_once_leave_one(logged: Logged) -> None:
    two_attempts(logged)
    before = logged.asked()
    archivers = [logged.archiver() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: each.archive(), archivers))
    assert len(logged.logs()) == 2
    assert logged.asked() == before


def test_who_follows_a_log_reads_on_while_it_is_archived(logged: Logged) -> None:
    logged.api.ship(logged.ref, log=b"one\ntwo\n")
    path = f"/jobs/{logged.job}/logs"
    with logged.http.stream("GET", path, params={"follow": 1}) as answer:
        lines = answer.iter_lines()
        assert [next(lines), next(lines)] == ["one", "two"]
        # The next attempt has begun when the follower looks, and the first is no longer in chunks.
        logged.again()
        logged.archiver().archive()
        logged.api.ship(logged.ref, log=b"three\n")
        assert [next(lines), next(lines)] == ["--- attempt 2 ---", "three"]
        logged.api.ship(logged.ref, log=b"four\n")
        logged.api.finish(logged.ref)
        logged.archiver().archive()
        assert list(lines) == ["four"]


def test_what_was_laid_out_in_chunks_is_read_from_the_archive(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneyard.models import logs

    two_attempts(logged)
    whole = logged.http.get(f"/jobs/{logged.job}/logs").content
    lay_out = logs.lay_out

    def archived_meanwhile(*args: object, **kwargs: object) -> object:
        found = lay_out(*args, **kwargs)  # type: ignore[arg-type]
        logged.archiver().archive()
        return found

    monkeypatch.setattr(logs, "lay_out", archived_meanwhile)
    assert logged.http.get(f"/jobs/{logged.job}/logs").content == whole
    assert logged.chunks() == 0


def test_of_a_long_log_head_and_tail_are_kept_and_the_cut_is_said(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipments, "LOG_LIMIT_BYTES", 1000)
    for i in range(100):
        logged.api.ship(logged.ref, log=f"line {i:04}\n".encode() * 10)
    kept = logged.http.get(f"/jobs/{logged.job}/logs").text
    logged.api.finish(logged.ref)
    logged.archiver().archive()
    assert logged.http.get(f"/jobs/{logged.job}/logs").text == kept
    assert kept.startswith("line 0000\n")
    assert kept.endswith("line 0099\n")
    assert "bytes left out ---" in kept
    assert len(kept) < 1300


def test_an_archived_log_on_a_store_that_is_away_is_503(
    db: TestDatabase, tmp_path: Path, a_node: object
) -> None:
    away = {"store_url": "s3://bucket/x", "store_endpoint": "http://127.0.0.1:1"}
    away |= {"store_access_key": "a", "store_secret_key": "s"}
    with serve(db, tmp_path, **away) as api, api.client() as http:
        logged = Logged(api, http, a_node())  # type: ignore[operator]
        api.ship(logged.ref, log=b"first\n")
        logged.again()
        api.ship(logged.ref, log=b"second\n")
        with api.db.owner.begin() as tx:
            tx.exec_driver_sql("UPDATE attempts SET ended_at = ended_at")
        logged.archiver(open_store(api.server.config.app.state.yard.settings.model_copy(
            update={"store_url": ""}
        ))).archive()  # fmt: skip
        answer = http.get(f"/jobs/{logged.job}/logs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unreachable")
        assert answer.headers["retry-after"] == "1"
        assert http.get(f"/jobs/{logged.job}/logs", params={"attempt": 2}).text == "second\n"
