"""Files over HTTP: streamed to disk, checked in a child, freeing the jobs that wait for them."""

import errno
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.apis import ASK, ROWS, Api, serve, serve_again
from support.databases import TestDatabase
from support.yards import wait_for

TUNE = {"kind": "finetune", "model": "tiny", "stage": "sft", "finetuning_type": "lora"}


def put(
    http: httpx.Client, content: bytes = ROWS, *, name: str = "rows.jsonl", **fields: str
) -> httpx.Response:
    return http.post("/files", files={"file": (name, content)}, data=fields)


def checked(http: httpx.Client, file: str) -> dict[str, Any]:
    """The file, once its check is over."""

    def look() -> dict[str, Any] | None:
        shown: dict[str, Any] = http.get(f"/files/{file}").json()
        return shown if shown["state"] in ("processed", "rejected") else None

    return wait_for(look, within_s=30, what="the check")


def left_behind(api: Api) -> list[Path]:
    """Everything in the store that is a file."""
    return [path for path in (api.home / "store").rglob("*") if path.is_file()]


def test_an_upload_is_stored_checked_and_read_back(api: Api) -> None:
    with api.client() as http:
        answer = put(http, name="identity.jsonl")
        assert answer.status_code == 201, answer.text
        file = answer.json()
        assert (file["name"], file["purpose"], file["bytes"]) == (
            "identity.jsonl",
            "dataset",
            len(ROWS),
        )
        assert file["sha256"] == hashlib.sha256(ROWS).hexdigest()
        report = checked(http, file["id"])["report"]
        assert (report["ok"], report["rows"]) == (True, 10)
        content = http.get(f"/files/{file['id']}/content")
        assert content.content == ROWS
        assert content.headers["etag"] == f'"{file["sha256"]}"'
        part = http.get(f"/files/{file['id']}/content", headers={"Range": "bytes=1-4"})
        assert (part.status_code, part.content) == (206, ROWS[1:5])
        assert [each["id"] for each in http.get("/files").json()["data"]] == [file["id"]]


def test_a_bad_file_is_rejected_by_line_and_jobs_may_not_name_it(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        file = put(http, ROWS + b'{"instruction": "broken').json()["id"]
        shown = checked(http, file)
        assert shown["state"] == "rejected"
        assert shown["report"]["problems"][0]["line"] == 11
        answer = http.post("/jobs", json=TUNE | {"dataset": file})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["line"]) == (422, "bad_data", 11)


@pytest.fixture
def unchecked(db: TestDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API whose checker does not run: files stay as they were uploaded."""
    monkeypatch.setattr("tuneyard.api.checking.FileChecker.start", lambda _: None)
    with serve(db, tmp_path) as running:
        yield running


def test_a_job_waits_blocked_until_its_file_is_checked(
    unchecked: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked.a_base()
    with unchecked.client() as http:
        file = put(http).json()["id"]
        job = http.post("/jobs", json=TUNE | {"dataset": file}).json()
        assert (job["state"], job["inputs"]["dataset"]) == ("blocked", file)
        monkeypatch.undo()
        with serve_again(unchecked):

            def tokens_are_made() -> bool:
                jobs = http.get("/jobs", params={"all": "true", "kind": "prepare"}).json()["data"]
                return bool(jobs[0]["state"] == "queued")

            wait_for(tokens_are_made, within_s=30, what="its tokens' being made next")
            assert "check of" not in http.get(f"/jobs/{job['id']}").json()["wait_reason"]


@pytest.mark.parametrize(
    ("content", "more", "code"),
    [
        (b'{"instruction": "x"', {}, "bad_data"),
        (ROWS, {"val_size": 10}, "too_few_rows"),
    ],
)
def test_a_waiting_job_whose_file_does_not_serve_it_fails_with_the_reason(
    unchecked: Api, monkeypatch: pytest.MonkeyPatch, content: bytes, more: Any, code: str
) -> None:
    unchecked.a_base()
    with unchecked.client() as http:
        file = put(http, content).json()["id"]
        job = http.post("/jobs", json=TUNE | {"dataset": file} | more).json()["id"]
        monkeypatch.undo()
        with serve_again(unchecked):

            def failed() -> Any:
                shown = http.get(f"/jobs/{job}").json()
                return shown if shown["state"] == "failed" else None

            error = wait_for(failed, within_s=30, what="the job's end")["error"]
    assert error["code"] == code


def test_a_small_file_does_not_wait_for_the_check_of_a_large_one(api: Api) -> None:
    with api.client() as http:
        row = b'{"instruction": "Who are you?", "output": "I am Tuny."}\n'
        large = [put(http, row * 600_000, name=f"{n}.jsonl").json()["id"] for n in range(2)]
        small = put(http).json()["id"]
        assert checked(http, small)["state"] == "processed"
        states = [http.get(f"/files/{file}").json()["state"] for file in large]
        assert states == ["processing", "processing"]
        for file in large:
            http.delete(f"/files/{file}")


def test_a_check_whose_process_died_is_done_by_another(
    unchecked: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unchecked.client() as http:
        file = put(http).json()["id"]
        unchecked.db.run("UPDATE files SET state = 'processing', check_until = clock_timestamp()")
        monkeypatch.undo()
        with serve_again(unchecked):
            assert checked(http, file)["state"] == "processed"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../x.jsonl", "x.jsonl"),
        ("/abs/rows.jsonl", "rows.jsonl"),
        ("a\\b.jsonl", "b.jsonl"),
        ("ряды.jsonl", "ряды.jsonl"),
        ("\u202egnp.jsonl", "gnp.jsonl"),
        ("x" * 300, "x" * 200),
    ],
)
def test_names_are_shown_cleaned(api: Api, name: str, shown: str) -> None:
    with api.client() as http:
        file = put(http, name=name).json()
        saved = http.get(f"/files/{file['id']}/content").headers["content-disposition"]
    assert file["name"] == shown
    assert saved.startswith('attachment; filename="')
    assert "filename*=UTF-8''" in saved


@pytest.mark.parametrize("name", [".", "..", "a/", "\u200f"])
def test_a_name_of_which_nothing_is_left_is_refused(api: Api, name: str) -> None:
    with api.client() as http:
        answer = put(http, name=name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_name")
    assert left_behind(api) == []


def test_a_declared_checksum_is_checked(api: Api) -> None:
    with api.client() as http:
        right = hashlib.sha256(ROWS).hexdigest()
        assert put(http, sha256=right).status_code == 201
        answer = put(http, ROWS[1:], sha256=right)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checksum_mismatch")
    assert len(left_behind(api)) == 1


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({"files": {"wrong": ("a", b"x")}}, "unknown_field"),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fun"}}, "bad_choice"),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"y"))]}, "conflicting_fields"),
        ({"files": {"purpose": (None, b"dataset")}}, "missing_field"),
        ({"files": {"file": ("a", b"x"), "sha256": (None, b"0" * 5000)}}, "body_too_large"),
    ],
)
def test_odd_forms_are_refused_and_leave_nothing(api: Api, form: Any, code: str) -> None:
    with api.client() as http:
        answer = http.post("/files", **form)
    assert answer.json()["error"]["code"] == code
    assert left_behind(api) == []
    assert api.db.rows("SELECT count(*) FROM files")[0][0] == 0


@pytest.mark.parametrize(
    ("media", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=" + "x" * 500, b""),
        ("multipart/form-data; boundary=x", b"no form"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhal',
        ),
    ],
)
def test_what_is_no_whole_form_is_refused(api: Api, media: str, body: bytes) -> None:
    with api.client() as http:
        answer = http.post("/files", content=body, headers={"Content-Type": media})
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["code"] in ("malformed_form", "missing_field")
    assert left_behind(api) == []


def test_json_is_no_upload(api: Api) -> None:
    with api.client() as http:
        answer = http.post("/files", json={"file": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_file_above_the_limit_is_refused_and_leaves_nothing(
    db: TestDatabase, tmp_path: Path
) -> None:
    with serve(db, tmp_path, max_file_bytes=100_000) as api, api.client() as http:
        assert put(http, b"x" * 100_000).status_code == 201
        said, streamed = put(http, b"x" * 200_000), put(http, b"x" * 100_001)
        for answer in (said, streamed):
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert len(left_behind(api)) == 1


def test_a_full_disk_is_named_with_the_mend(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tuneyard.store.disk.DiskStore.put_file", full)
    with api.client() as http:
        answer = put(http)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "storage_full")
    assert "delete files" in error["hint"]


def test_an_upload_that_breaks_off_leaves_nothing(api: Api) -> None:
    api.client().close()
    parts = urlsplit(api.url)
    head = (
        "POST /api/v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ty-default-admin\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 50000000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as connection:
        connection.sendall(head.encode() + b"x" * 5_000_000)
        wait_for(lambda: left_behind(api), within_s=10, what="the first bytes on disk")
    wait_for(lambda: not left_behind(api), within_s=10, what="their removal")
    assert api.db.rows("SELECT count(*) FROM files")[0][0] == 0


def test_a_large_upload_is_not_held_in_memory(api: Api) -> None:
    piece = b"y" * 1024**2

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'
        for _ in range(64):
            yield piece
        yield b"\r\n--x--\r\n"

    before = peak_kib()
    with api.client() as http:
        media = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = http.post("/files", content=body(), headers=media)
    assert answer.json()["bytes"] == 64 * 1024**2
    assert peak_kib() - before < 32 * 1024


def peak_kib() -> int:
    """This process's peak of resident memory: server and client are both in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


def test_a_file_that_an_open_job_needs_is_not_deleted(api: Api) -> None:
    api.a_base()
    with api.client() as http:
        file = put(http, b"Who are you?\n", name="ask.txt", purpose="prompts").json()["id"]
        checked(http, file)
        job = http.post("/jobs", json=ASK | {"prompts": file}).json()["id"]
        refused = http.delete(f"/files/{file}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "file_in_use")
        http.post(f"/jobs/{job}/cancel")
        assert http.delete(f"/files/{file}").json() == {"id": file, "deleted": True}
        answers = [http.get(f"/files/{file}"), http.delete(f"/files/{file}")]
        assert [a.status_code for a in answers] == [404, 404]
        assert http.get("/files").json()["data"] == []
    assert left_behind(api) == []


def test_another_teams_file_is_answered_like_one_that_never_was(api: Api) -> None:
    with api.client("one") as one, api.client("two") as two:
        file = put(one).json()["id"]
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            ids = (file, "file_" + "0" * 32, "file_x", file.upper())
            answers = [two.request(method, f"/files/{each}{path}") for each in ids]
            assert {a.status_code for a in answers} == {404}
            assert len({a.content for a in answers}) == 1
        assert one.get(f"/files/{file}").status_code == 200


def test_pages_of_files_go_on_where_they_ended(api: Api) -> None:
    with api.client() as http:
        made = [put(http, name=f"{i}.jsonl").json()["id"] for i in range(3)]
        first = http.get("/files?limit=2").json()
        second = http.get(f"/files?limit=2&cursor={first['next_cursor']}").json()
    assert [f["id"] for f in first["data"] + second["data"]] == made[::-1]
    assert second["next_cursor"] is None


def test_a_file_name_cannot_forge_a_header(api: Api) -> None:
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a%0d%0aSet-Cookie: x"\r\n'
        b"\r\n" + json.dumps({"prompt": "x"}).encode() + b"\r\n--x--\r\n"
    )
    with api.client() as http:
        media = {"Content-Type": "multipart/form-data; boundary=x"}
        file = http.post("/files", content=form, headers=media).json()
        content = http.get(f"/files/{file['id']}/content")
    assert "set-cookie" not in content.headers


def test_rows_for_something_else_are_refused_at_submission(api: Api) -> None:
    api.a_base()
    pairs = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    with api.client() as http:
        good, pair = (put(http, content).json()["id"] for content in (ROWS, pairs))
        assert [checked(http, each)["state"] for each in (good, pair)] == ["processed"] * 2
        asked: list[tuple[dict[str, Any], str]] = [
            (ASK | {"prompts": good}, "prompts"),
            (TUNE | {"dataset": pair}, "dataset"),
            (TUNE | {"dataset": good, "eval_dataset": pair}, "eval_dataset"),
        ]
        for body, field in asked:
            answer = http.post("/jobs", json=body)
            problems = answer.json()["error"]["details"]
            assert (answer.status_code, "wrong_dataset_kind", field) in [
                (422, p["code"], p["field"]) for p in problems
            ]
        assert http.get("/jobs").json()["data"] == []
