"""Who gets in, and what is cut off at the door."""

import gzip
import json
import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest
from support.apis import ASK, Api

HOSTILE_PATHS = [
    "//api/v1/jobs",
    "/api/v1/jobs/../me",
    "/api/v1/jobs/%2e%2e/me",
    "/api/v1/jobs/%252e%252e/me",
    "/api/v1/nothing",
    "/api/v1/models/healthz",
    "/api/v1/healthz",
    "/readyz/",
]


@pytest.fixture
def api(shared_api: Api) -> Api:
    """Most of what is refused here is refused by one and the same process."""
    return shared_api


def raw(api: Api, request: bytes) -> bytes:
    """Speak HTTP by hand: clients tidy paths up and refuse to send what is wrong."""
    answer = b""
    parts = urlsplit(api.url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as connection:
        try:
            connection.sendall(request)
        except ConnectionError:
            pass  # it was cut off early, which is what some tests are about
        while piece := connection.recv(65536):
            answer += piece
    return answer


def get(api: Api, target: str, *headers: str) -> tuple[int, dict[str, object]]:
    lines = [f"GET {target} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
    head, _, body = raw(api, "\r\n".join(lines).encode()).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic dHk6dHk=",
        "ty-default-admin",
        "Bearer " + "k" * 20_000,
        "Bearer \xe4\xf6",
    ],
)
def test_without_a_valid_key_there_is_nothing(api: Api, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.get(f"{api.url}/api/v1/jobs", headers=headers, trust_env=False)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "unauthenticated"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_in_the_address_is_no_key(api: Api) -> None:
    api.client().close()
    for query in ("api_key", "key", "token", "access_token"):
        answer = httpx.get(f"{api.url}/api/v1/jobs?{query}=ty-default-admin", trust_env=False)
        assert answer.status_code == 401


def test_a_revoked_key_is_refused_within_seconds(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneyard.api.access.KEY_KNOWN_S", 0.0)
    with api.client("green", role="member") as http:
        assert http.get("/me").status_code == 200
        api.db.run("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE role = 'member'")
        assert http.get("/me").status_code == 401


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_the_key_is_asked_for_before_a_path_is_looked_at(api: Api, path: str) -> None:
    api.client().close()
    assert get(api, path)[0] == 401
    status, error = get(api, path, "Authorization: Bearer ty-default-admin")
    assert (status, error["code"]) == (404, "not_found")


def test_health_needs_no_key(api: Api) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert httpx.get(api.url + path, trust_env=False).status_code == 200


def test_a_wrong_method_is_said_in_our_shape(api: Api) -> None:
    with api.client() as http:
        answer = http.put("/jobs", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]


def test_a_viewer_may_look_and_change_nothing(api: Api) -> None:
    api.a_base()
    with api.client() as http, api.client(role="viewer") as viewer:
        job = http.post("/jobs", json=ASK).json()["id"]
        assert viewer.get(f"/jobs/{job}").status_code == 200
        refused = [
            viewer.post("/jobs", json=ASK),
            viewer.post(f"/jobs/{job}/cancel"),
            viewer.post(f"/jobs/{job}/retry"),
            viewer.post("/files", files={"file": ("a.jsonl", b"{}")}),
            viewer.delete("/files/file_x"),
        ]
        assert {(a.status_code, a.json()["error"]["code"]) for a in refused} == {(403, "forbidden")}
        assert viewer.get(f"/jobs/{job}").json()["state"] == "queued"


def test_me_says_whose_key_it_is(api: Api) -> None:
    with api.client("red", role="member") as http:
        assert http.get("/me").json() == {"team": "red", "role": "member", "key": "first"}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"kind": "inference"', 400, "malformed_json"),
        (b'{"kind": "inference",}', 400, "malformed_json"),
        (b'{"kind": 1} // no', 400, "malformed_json"),
        (b'{"priority": NaN}', 400, "malformed_json"),
        (b'{"priority": Infinity}', 400, "malformed_json"),
        (b'{"priority": 1e999}', 400, "malformed_json"),
        (b'{"kind": "inference", "priority": 1, "priority": 9}', 400, "duplicate_key"),
        (b"[" * 100_000, 400, "too_deep"),
        (b'{"name": "\xe9"}', 400, "malformed_json"),
        ('{"name": "x"}'.encode("utf-16"), 400, "malformed_json"),
        (b"", 422, "missing_field"),
        (b"null", 422, "not_an_object"),
        (b"[]", 422, "not_an_object"),
        (b'"x"', 422, "not_an_object"),
        (b"{}", 422, "missing_field"),
        (b'{"kind": "inference", "name": "a\\u0000b"}', 422, "bad_character"),
        (b'{"kind": "inference", "name": "\\ud800"}', 422, "bad_character"),
        (b'{"kind": "inference", "name": "a\\r\\nSet-Cookie: x"}', 422, "bad_character"),
        (b'{"kind": "inference", "model": "m", "prompts": ["x"], "state": "running"}', 422,
         "read_only_field"),
    ],
)  # fmt: skip
def test_odd_bodies_are_refused_and_leave_nothing(
    api: Api, body: bytes, status: int, code: str
) -> None:
    headers = {"Content-Type": "application/json"}
    with api.client("silent") as http:
        answer = http.post("/jobs", content=body, headers=headers)
        assert http.get("/jobs").json()["data"] == []
    error = answer.json()["error"]
    codes = [error["code"], *(each["code"] for each in error.get("details") or [])]
    assert answer.status_code == status, answer.text
    assert code in codes


def test_malformed_json_is_answered_with_its_line(api: Api) -> None:
    headers = {"Content-Type": "application/json"}
    with api.client() as http:
        answer = http.post("/jobs", content=b'{"kind": "inference",\n "name": }', headers=headers)
    error = answer.json()["error"]
    assert error["line"] == 2
    assert "column" in error["message"]


def test_a_byte_order_mark_is_accepted(api: Api) -> None:
    api.a_base()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    with api.client() as http:
        body = b"\xef\xbb\xbf" + json.dumps(ASK).encode()
        assert http.post("/jobs", content=body, headers=headers).status_code == 201


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", None])
def test_only_json_is_taken(api: Api, media: str | None) -> None:
    headers = {"Content-Type": media} if media else {}
    with api.client() as http:
        answer = http.post("/jobs", content=json.dumps(ASK).encode(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_compressed_bodies_are_not_unpacked(api: Api) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with api.client() as http:
        bomb = gzip.compress(bytes(10 * 1024**2))
        answer = http.post("/jobs", content=bomb, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


def test_a_body_that_says_it_is_large_is_not_read(api: Api) -> None:
    api.client().close()
    request = (
        "POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ty-default-admin\r\n"
        "Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n{"
    )
    assert b" 413 " in raw(api, request.encode()).split(b"\r\n")[0]


def test_an_endless_body_is_cut_off(api: Api) -> None:
    parts = urlsplit(api.url)
    api.client().close()
    head = (
        "POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ty-default-admin\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answered = threading.Event()
    sent = 0
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as connection:
        connection.sendall(head.encode())
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        try:
            while not answered.is_set() and sent < 64 * 1024**2:
                connection.sendall(chunk)
                sent += 65536
        except ConnectionError:
            answered.set()
    assert answered.is_set(), f"{sent} bytes were taken"


@pytest.mark.parametrize(
    ("target", "headers", "status", "code"),
    [
        ("/api/v1/jobs?name=" + "x" * 10_000, [], 414, "uri_too_long"),
        ("/api/v1/jobs?name=" + "x" * 100_000, [], 414, "uri_too_long"),
        ("/api/v1/jobs", ["X-Large: " + "x" * 65_536], 431, "headers_too_large"),
        ("/api/v1/jobs", [f"X-{i}: 1" for i in range(2000)], 431, "headers_too_large"),
        ("/api/v1/jobs", ["X-Huge: " + "x" * 300_000], 431, "headers_too_large"),
        ("/api/v1/models/%00", [], 422, "bad_character"),
    ],
)
def test_odd_heads_are_refused(
    api: Api, target: str, headers: list[str], status: int, code: str
) -> None:
    api.client().close()
    found, error = get(api, target, "Authorization: Bearer ty-default-admin", *headers)
    assert (found, error["code"]) == (status, code)


def test_what_is_no_request_is_answered_in_our_shape(api: Api) -> None:
    head, _, body = raw(api, b"HELO you\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "bad_request"


def test_every_answer_has_a_request_id_and_keeps_the_clients(api: Api) -> None:
    with api.client() as http:
        assert len(http.get("/jobs").headers["x-request-id"]) == 32
        assert http.get("/jobs", headers={"X-Request-Id": "my-1"}).headers["x-request-id"] == "my-1"
        odd = http.get("/jobs", headers={"X-Request-Id": "a b"})
        assert odd.headers["x-request-id"] != "a b"
    refused = httpx.get(f"{api.url}/api/v1/jobs", trust_env=False)
    assert "x-request-id" in refused.headers


def test_a_bug_is_answered_without_a_traceback_and_logged_with_its_request(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret detail")

    monkeypatch.setattr("tuneyard.models.catalogue.list_models", broken)
    with api.client() as http:
        answer = http.get("/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in answer.text
    (record,) = [r for r in caplog.records if getattr(r, "event", "") == "internal_error"]
    assert record.__dict__["request"] == answer.headers["x-request-id"]
    assert record.exc_info is not None


def test_the_openapi_page_shows_keys_bodies_and_errors(api: Api) -> None:
    page = httpx.get(f"{api.url}/openapi.json", trust_env=False).json()
    submit = page["paths"]["/api/v1/jobs"]["post"]
    examples = submit["requestBody"]["content"]["application/json"]["examples"]
    kinds = {"finetune", "merge", "inference", "download", "serve", "pipeline"}
    assert set(examples) == kinds
    assert submit["security"] == [{"HTTPBearer": []}]
    assert submit["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "ErrorBody"
    )
    upload = page["paths"]["/api/v1/files"]["post"]
    assert "multipart/form-data" in upload["requestBody"]["content"]
    assert "HTTPValidationError" not in page["components"]["schemas"]
    answers = {
        ("post", "/jobs"): {"400", "409"},
        ("post", "/jobs/{job}/retry"): {"400", "409"},
        ("post", "/jobs/{job}/cancel"): {"409"},
        ("get", "/jobs/{job}/events"): {"400"},
        ("post", "/files"): {"400"},
        ("delete", "/files/{file}"): {"409"},
    }
    for (method, path), statuses in answers.items():
        assert statuses <= set(page["paths"][f"/api/v1{path}"][method]["responses"]), path
    for path in ("/jobs", "/files"):
        parameters = page["paths"][f"/api/v1{path}"]["get"]["parameters"]
        (cursor,) = [each["schema"] for each in parameters if each["name"] == "cursor"]
        assert cursor["minLength"] == 1  # ?cursor= is refused


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/jobs", "GET, POST"), ("/files", "GET, POST"), ("/files/x", "DELETE, GET"), ("/me", "GET")],
)
def test_a_method_that_an_address_does_not_take_is_answered_with_all_that_it_takes(
    api: Api, path: str, methods: str
) -> None:
    with api.client() as http:
        answer = http.request("OPTIONS", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, methods)
