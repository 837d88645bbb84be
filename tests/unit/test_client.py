"""The client's promises, against recorded answers."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.recorded_api import (
    KEY,
    Answer,
    RecordedApi,
    a_file,
    a_job,
    events,
    ids,
    moved,
    page,
    recorded_api,
    refusal,
)

from tuneyard.client import Client, Refused, Unreachable
from tuneyard.client.stream import read_events
from tuneyard.specs.errors import InputError

JOB, OTHER = ids("job", 2)
FILE, *_ = ids("file", 1)
ARTIFACT, *_ = ids("artifact", 1)
BUSY = refusal(503, "db_busy", "The database is busy.")


@pytest.fixture
def api() -> Iterator[RecordedApi]:
    with recorded_api() as api:
        yield api


@pytest.fixture
def client(api: RecordedApi) -> Iterator[Client]:
    with Client(api.url, KEY) as client:
        yield client


def test_a_submission_that_was_not_answered_is_asked_again_under_the_same_key(
    api: RecordedApi, client: Client
) -> None:
    api.on("POST", "/jobs", BUSY, Answer(a_job(JOB), 201))
    assert client.submit({"kind": "download"})["id"] == JOB
    first, second = api.requests("POST", "/jobs")
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]


def test_two_submissions_have_two_keys(api: RecordedApi, client: Client) -> None:
    api.on("POST", "/jobs", Answer(a_job(JOB), 201))
    client.submit({})
    client.submit({})
    first, second = api.requests("POST", "/jobs")
    assert first.headers["Idempotency-Key"] != second.headers["Idempotency-Key"]


def test_what_could_happen_twice_is_asked_once(api: RecordedApi, client: Client) -> None:
    api.on("POST", f"/jobs/{JOB}/cancel", BUSY)
    with pytest.raises(Unreachable):
        client.cancel(JOB)
    assert len(api.requests("POST", f"/jobs/{JOB}/cancel")) == 1


def test_a_server_that_asks_for_too_long_a_pause_is_given_up_at_once(
    api: RecordedApi, client: Client
) -> None:
    api.on("GET", f"/jobs/{JOB}", Answer(BUSY.body, 503, {"Retry-After": "3600"}))
    with pytest.raises(Unreachable, match="busy"):
        client.job(JOB)
    assert len(api.requests("GET", f"/jobs/{JOB}")) == 1


def test_a_retry_after_in_the_form_of_a_date_is_borne(api: RecordedApi, client: Client) -> None:
    dated = Answer(BUSY.body, 503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
    api.on("GET", f"/jobs/{JOB}", dated, a_job(JOB))
    assert client.job(JOB)["id"] == JOB


def test_a_refusal_keeps_everything_that_the_server_said(api: RecordedApi, client: Client) -> None:
    more = {"field": "lora_rnak", "line": 3, "hint": "lora_rank?", "details": [{"message": "a"}]}
    api.on("POST", "/jobs", refusal(422, "unknown_field", "No such field.", **more))
    with pytest.raises(Refused) as caught:
        client.submit({})
    error = caught.value
    assert (error.status, error.code, error.message) == (422, "unknown_field", "No such field.")
    assert (error.field, error.line, error.hint) == ("lora_rnak", 3, "lora_rank?")
    assert error.details == [{"message": "a"}]


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"[]", b'{"error": "a text"}', b'{"error": null}']
)
@pytest.mark.parametrize("status", [200, 302, 404])
def test_another_kind_of_server_is_named_as_such(
    api: RecordedApi, client: Client, body: bytes, status: int
) -> None:
    api.on("GET", "/me", Answer(body, status))
    if status == 200 and body.startswith(b"{"):
        assert client.me()
        return
    with pytest.raises(Refused) as caught:
        client.me()
    assert caught.value.code == "not_tuneyard"


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://a", "http://", "http://a:port", "http://["])
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Client(url, KEY)
    assert caught.value.code == "bad_url"


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel"])
def test_what_is_no_key_is_refused_before_anything_is_sent(api: RecordedApi, key: str) -> None:
    with pytest.raises(InputError) as caught:
        Client(api.url, key)
    assert caught.value.code == "bad_api_key"


def test_no_proxy_stands_before_a_server_on_this_machine(
    api: RecordedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    api.on("GET", "/me", {"team": "default"})
    with Client(api.url, KEY) as client:
        assert client.me() == {"team": "default"}


@pytest.mark.parametrize("scheme", ["https", "HTTPS", "Https"])
def test_a_server_with_tls_is_always_verified(
    api: RecordedApi, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    built: dict[str, Any] = {}
    real = httpx.Client

    def note(**options: Any) -> httpx.Client:
        built.update(options)
        return real(**options)

    monkeypatch.setattr("tuneyard.client.connection.httpx.Client", note)
    with Client(api.url.replace("http", scheme, 1), KEY) as client, pytest.raises(Unreachable):
        client.me()  # the server speaks no TLS
    assert built["verify"] is True


def test_a_list_goes_on_page_by_page_up_to_its_limit(api: RecordedApi, client: Client) -> None:
    api.on("GET", "/jobs", page(a_job(JOB), next_cursor="c1"), page(a_job(OTHER)))
    assert [job["id"] for job in client.jobs(limit=500)] == [JOB, OTHER]
    assert [r.query.get("cursor") for r in api.requests("GET", "/jobs")] == [None, ["c1"]]
    assert [r.query["limit"] for r in api.requests("GET", "/jobs")] == [["200"], ["200"]]


def test_metrics_go_on_after_a_page_that_ends_at_step_0(api: RecordedApi, client: Client) -> None:
    api.on("GET", f"/jobs/{JOB}/metrics", page({"step": 0}, next_cursor="0"), page({"step": 1}))
    assert [point["step"] for point in client.metrics(JOB)] == [0, 1]
    assert api.requests("GET", f"/jobs/{JOB}/metrics")[1].query["after"] == ["0"]


def test_an_odd_id_stays_one_part_of_the_path(api: RecordedApi, client: Client) -> None:
    with pytest.raises(Refused):
        client.job("../files?x=1#y")
    assert api.asked[0].path == "/jobs/../files?x=1#y"
    assert not api.asked[0].query


# Watching


def test_a_broken_stream_goes_on_after_the_last_event_that_came_whole(
    api: RecordedApi, client: Client
) -> None:
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="running"))
    api.on(
        "GET",
        f"/jobs/{JOB}/events",
        events(moved(1, "submit", "queued"), torn='id: 2\nevent: place\ndata: {"seq": 2'),
        events(moved(2, "place", "dispatched"), moved(3, "succeeded", "succeeded")),
    )
    assert [kind for kind, _ in client.watch(JOB)] == ["submit", "place", "succeeded"]
    streams = api.requests("GET", f"/jobs/{JOB}/events")
    assert [each.headers["Last-Event-ID"] for each in streams] == ["0", "1"]


def test_an_event_that_is_sent_again_comes_once(api: RecordedApi, client: Client) -> None:
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="running"))
    first, last = moved(1, "submit", "queued"), moved(2, "cancel", "cancelled")
    api.on("GET", f"/jobs/{JOB}/events", events(first), events(first, last))
    assert [kind for kind, _ in client.watch(JOB)] == ["submit", "cancel"]


def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    api: RecordedApi, client: Client
) -> None:
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="running"))
    first, last = moved(1, "submit", "queued"), moved(2, "failed", "failed")
    api.on("GET", f"/jobs/{JOB}/events", events(first), BUSY, BUSY, events(last))
    assert [kind for kind, _ in client.watch(JOB)] == ["submit", "failed"]


def test_a_server_that_falls_silent_is_waited_for_and_that_is_said_once(
    api: RecordedApi, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneyard.client.stream.SILENCE_S", 0.3)
    monkeypatch.setattr("tuneyard.client.stream.FIRST_PATIENCE_S", 0.1)  # before the first contact
    monkeypatch.setattr("tuneyard.client.stream.AWAY_SAID_AFTER_S", 0.2)
    monkeypatch.setattr("tuneyard.client.stream.LONGEST_PAUSE_S", 0.1)
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="running"))
    first, last = moved(1, "submit", "queued"), moved(2, "failed", "failed")
    never = threading.Event()
    silent = events(first, open_until=never)
    api.on("GET", f"/jobs/{JOB}/events", silent, BUSY, BUSY, BUSY, BUSY, BUSY, events(last))
    try:
        kinds = [kind for kind, _ in client.watch(JOB)]
    finally:
        never.set()
    assert kinds == ["submit", "away", "failed"]


def test_a_watch_ends_when_the_job_was_over_before(api: RecordedApi, client: Client) -> None:
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="failed"))
    api.on("GET", f"/jobs/{JOB}/events", events(": still here\n\n"), page())
    assert list(client.watch(JOB, after=7)) == []


def test_an_address_that_ends_in_the_apis_own_path_is_the_servers(api: RecordedApi) -> None:
    api.on("GET", f"/jobs/{JOB}", a_job(JOB))
    for url in (f"{api.url}/api/v1", f"{api.url}/api/v1/"):
        with Client(url, KEY) as client:
            assert client.job(JOB)["id"] == JOB
            assert client.url == api.url


def test_a_watch_of_an_unknown_job_is_refused(client: Client) -> None:
    with pytest.raises(Refused, match="no such thing"):
        next(client.watch(JOB))


def test_texts_in_events_may_hold_any_line_separator_of_unicode() -> None:
    text = 'event: progress\r\ndata: {"a": "x\u2028y\u0085z"}\r\n\r\n'.encode()
    pieces = [text[i : i + 1] for i in range(len(text))]
    assert [(e.kind, e.data, e.number) for e in read_events(pieces)] == [
        ("progress", {"a": "x\u2028y\u0085z"}, None)
    ]


def test_comments_and_cut_events_are_no_events() -> None:
    assert list(read_events([b": still here\n\n", b"id: 1\nevent: a\ndata: {}\n"])) == []


def test_data_on_several_lines_is_one_text() -> None:
    assert [e.data for e in read_events([b'data: {"a":\ndata: 1}\n\n'])] == [{"a": 1}]


# Files


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n')
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_bytes_that_are_there_already_do_not_travel_again(
    api: RecordedApi, client: Client, data: Path
) -> None:
    digest = sha256(data.read_bytes())
    other_name = a_file(FILE, name="other.jsonl", sha256=digest)
    other_use = a_file(FILE, name=data.name, sha256=digest, purpose="prompts")
    same = a_file(FILE, name=data.name, sha256=digest)
    api.on("GET", "/files", page(other_name, next_cursor="c"), page(other_use, same))
    assert client.put_file(data) == same
    assert not api.requests("POST", "/files")


def test_a_new_file_travels_with_its_name_purpose_and_sha256(
    api: RecordedApi, client: Client, data: Path
) -> None:
    digest = sha256(data.read_bytes())
    api.on("GET", "/files", page(a_file(FILE, name=data.name, sha256="other")))
    api.on("POST", "/files", Answer(a_file(FILE, name=data.name, sha256=digest), 201))
    client.put_file(data, purpose="prompts")
    (sent,) = api.requests("POST", "/files")
    for part in (b'filename="data.jsonl"', b"prompts", digest.encode(), data.read_bytes()):
        assert part in sent.body


def with_artifact(api: RecordedApi, name: str, *answers: Answer, sha: str) -> None:
    folder = f"/jobs/{JOB}/artifacts/{ARTIFACT}/files"
    api.on("GET", folder, page({"path": name, "size": 1, "sha256": sha}))
    api.on("GET", f"{folder}/{name}", *answers)


def test_an_artifact_is_fetched_whole_and_into_its_folders(
    api: RecordedApi, client: Client, tmp_path: Path
) -> None:
    with_artifact(api, "a/b c#d.bin", Answer(b"weights"), sha=sha256(b"weights"))
    assert client.fetch_artifact(JOB, ARTIFACT, tmp_path) == [tmp_path / "a" / "b c#d.bin"]
    assert (tmp_path / "a" / "b c#d.bin").read_bytes() == b"weights"


def test_an_upload_is_fetched_again(api: RecordedApi, client: Client, tmp_path: Path) -> None:
    api.on("GET", "/files/rows.jsonl", {"sha256": sha256(b"rows")})
    api.on("GET", "/files/rows.jsonl/content", Answer(b"rows"))
    client.fetch_file("rows.jsonl", tmp_path / "again.jsonl")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("again.jsonl", b"rows")]


def test_a_file_that_arrives_cut_or_broken_is_fetched_again(
    api: RecordedApi, client: Client, tmp_path: Path
) -> None:
    cut, broken = Answer(b"wei", says_bytes=7), Answer(b"WEIGHTS")
    with_artifact(api, "w", cut, broken, Answer(b"weights"), sha=sha256(b"weights"))
    client.fetch_artifact(JOB, ARTIFACT, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert (tmp_path / "w").read_bytes() == b"weights"


def test_a_file_that_never_arrives_whole_leaves_the_one_before_it(
    api: RecordedApi, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"older")
    with_artifact(api, "w", Answer(b"broken"), sha=sha256(b"weights"))
    with pytest.raises(Unreachable) as caught:
        client.fetch_artifact(JOB, ARTIFACT, tmp_path)
    assert caught.value.code == "checksum_mismatch"
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("w", b"older")]


def test_a_file_that_lies_there_already_is_not_fetched(
    api: RecordedApi, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"weights")
    with_artifact(api, "w", Answer(b"broken"), sha=sha256(b"weights"))
    client.fetch_artifact(JOB, ARTIFACT, tmp_path)
    assert not api.requests("GET", f"/jobs/{JOB}/artifacts/{ARTIFACT}/files/w")


@pytest.mark.parametrize("name", ["../up", "/root", "a/../../up", "", ".", "a\0b"])
def test_no_server_can_write_outside_of_the_folder(
    api: RecordedApi, client: Client, tmp_path: Path, name: str
) -> None:
    with_artifact(api, name, Answer(b"x"), sha=sha256(b"x"))
    with pytest.raises(Refused) as caught:
        client.fetch_artifact(JOB, ARTIFACT, tmp_path / "in")
    assert caught.value.code == "path_not_allowed"
    assert list(tmp_path.iterdir()) == []


def test_a_log_is_followed_as_it_grows(api: RecordedApi, client: Client) -> None:
    more = threading.Event()
    api.on("GET", f"/jobs/{JOB}", {"state": "running"}, {"state": "succeeded"})
    api.on(
        "GET",
        f"/jobs/{JOB}/logs",
        Answer(b"step 1\n", headers={"X-Log-Start": "10"}, open_until=more),
        Answer(b"step 2\n", headers={"X-Log-Start": "17"}),
    )
    pieces = client.logs(JOB, follow=True, tail=3, attempt=2)
    assert next(pieces) == "step 1\n"
    more.set()
    assert list(pieces) == ["step 2\n"]
    first, second = (each.query for each in api.asked if each.path.endswith("/logs"))
    assert first == {"follow": ["1"], "tail": ["3"], "attempt": ["2"]}
    assert second == {"follow": ["1"], "start": ["17"], "attempt": ["2"]}


def test_a_letter_that_a_break_cut_in_two_is_whole(api: RecordedApi, client: Client) -> None:
    api.on("GET", f"/jobs/{JOB}", {"state": "succeeded"})
    broken = Answer("één".encode()[:4], says_bytes=9)
    api.on("GET", f"/jobs/{JOB}/logs", broken, Answer("één".encode()[4:]))
    assert "".join(client.logs(JOB, follow=True)) == "één"
