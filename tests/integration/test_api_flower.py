"""/flower: who may look, what Flower is asked for, and what of its answers comes back."""

import re
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from support.apis import Api, serve
from support.flowers import OddFlower, answer, odd_flower, real_flower
from support.prefix_proxy import prefix_proxy

from tuneyard.local.ports import any_free
from tuneyard.local.valkey import RunningValkey

KEY = "ty-default-admin"
PREFIX = "/user/jane@team/proxy/8800"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
TABLE = {"draw": "1", "start": "0", "length": "15", "order[0][column]": "0"}


@pytest.fixture(scope="module")
def flower() -> Iterator[OddFlower]:
    with odd_flower() as flower:
        yield flower


@pytest.fixture(scope="module")
def flower_api(
    shared_api: Api, flower: OddFlower, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("flower")
    with serve(shared_api.db, home, flower_url=flower.url + "/inner") as api:
        yield api


@pytest.fixture
def http(flower_api: Api, flower: OddFlower) -> Iterator[httpx.Client]:
    """A program with an administrator's key, and a Flower that has not been asked yet."""
    flower.play = answer()
    flower.asked.clear()
    with program(flower_api) as http:
        yield http


def program(api: Api, *, role: str = "admin") -> httpx.Client:
    api.client(role=role).close()
    headers = {"Authorization": f"Bearer ty-default-{role}"}
    return httpx.Client(base_url=api.url, headers=headers, trust_env=False, timeout=20)


def browser(url: str) -> httpx.Client:
    """Keeps cookies and follows where it is sent, as a browser does."""
    return httpx.Client(
        base_url=url, headers=BROWSER, trust_env=False, timeout=20, follow_redirects=True
    )


def token_of(page: httpx.Response) -> str:
    found = re.search(r'name="token" value="([^"]+)"', page.text)
    assert found
    return found[1]


def log_in(http: httpx.Client, key: str = KEY, *, next_page: str = "/flower/") -> httpx.Response:
    page = http.get("flower/login")
    form = {"token": token_of(page), "key": key, "next": next_page}
    return http.post("flower/login", data=form)


def raw(api: Api, target: str, *headers: str, method: str = "GET") -> bytes:
    """The answer to a request that no client would send."""
    lines = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
    parts = urlsplit(api.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as sock:
        sock.sendall("\r\n".join(lines).encode("latin-1"))
        return b"".join(iter(lambda: sock.recv(65536), b""))


# Who may look


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "unauthenticated"),
        ({"Authorization": "Bearer wrong"}, 401, "unauthenticated"),
        ({"Authorization": "Bearer ty-default-viewer"}, 403, "forbidden"),
        ({"Authorization": "Bearer ty-default-member"}, 403, "forbidden"),
        ({"Cookie": "tuneyard_session=AAAA"}, 401, "unauthenticated"),
        ({"Cookie": f"tuneyard_session={KEY}"}, 401, "unauthenticated"),
    ],
)
@pytest.mark.parametrize("path", ["/flower", "/flower/", "/flower/tasks", "/flower/api/tasks"])
def test_flower_shows_nothing_to_whom_may_not_see_all_teams(
    flower_api: Api, flower: OddFlower, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    for role in ("viewer", "member"):
        flower_api.client(role=role).close()
    flower.asked.clear()
    refused = httpx.get(flower_api.url + path, headers=headers, trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert not flower.asked


def test_a_browser_is_led_to_the_login_and_on_to_its_page(
    flower_api: Api, flower: OddFlower, http: httpx.Client
) -> None:
    with browser(flower_api.url) as user:
        page = user.get("/flower/tasks?state=STARTED")
        assert page.url.path == "/flower/login"
        assert 'value="/flower/tasks?state=STARTED"' in page.text
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert not flower.asked
        shown = log_in(user, next_page="/flower/tasks?state=STARTED")
        assert shown.url == f"{flower_api.url}/flower/tasks?state=STARTED"
        assert [(method, target) for method, target, _ in flower.asked] == [
            ("GET", "/inner/tasks?state=STARTED")
        ]
        assert user.get("/api/v1/me").status_code == 401  # a session opens no more than pages


@pytest.mark.parametrize(
    ("key", "status", "said"),
    [
        ("wrong", 401, "This API key is not known."),
        ("", 401, "This API key is not known."),
        ("k" * 5000, 401, "This API key is not known."),
        ("ty-default-member", 403, "These pages show the work of all teams."),
    ],
)
def test_a_wrong_key_is_said_on_the_page_and_begins_no_session(
    flower_api: Api, key: str, status: int, said: str
) -> None:
    flower_api.client(role="member").close()
    with browser(flower_api.url) as user:
        refused = log_in(user, key)
        assert (refused.status_code, said in refused.text) == (status, True)
        assert "tuneyard_session" not in user.cookies


def test_a_login_from_another_site_begins_no_session(flower_api: Api) -> None:
    program(flower_api).close()
    with browser(flower_api.url) as user:
        token = token_of(user.get("/flower/login"))
        form = {"token": token, "key": KEY}
        foreign = user.post("/flower/login", data=form, headers={"Sec-Fetch-Site": "cross-site"})
        user.cookies.clear()
        without = user.post("/flower/login", data=form)
        assert (foreign.status_code, without.status_code) == (403, 403)
        assert "tuneyard_session" not in user.cookies


def test_no_key_stands_in_an_address_a_log_or_a_cookie(
    flower_api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    program(flower_api).close()
    with browser(flower_api.url) as user:
        shown = log_in(user)
        seen = [str(each.url) + str(each.headers) for each in (*shown.history, shown)]
        assert KEY not in "".join(seen) + str(user.cookies.jar)
        log_in(user, "ty-wrong")
    logged = "".join(
        f"{r.getMessage()}{r.__dict__}" for r in caplog.records if "httpx" not in r.name
    )
    assert "/flower/login" in logged
    assert KEY not in logged
    assert "ty-wrong" not in logged
    assert flower_api_refuses_keys_in_addresses(flower_api)


def flower_api_refuses_keys_in_addresses(api: Api) -> bool:
    asked = httpx.get(f"{api.url}/flower/login?key={KEY}", trust_env=False)
    return "set-cookie" in asked.headers and "tuneyard_session" not in asked.headers["set-cookie"]


def test_a_logout_ends_the_session_for_every_copy_of_its_cookie(
    flower_api: Api, http: httpx.Client
) -> None:
    with browser(flower_api.url) as user, browser(flower_api.url) as thief:
        log_in(user)
        thief.cookies.update(user.cookies)
        assert thief.get("/flower/tasks").url.path == "/flower/tasks"
        refused = user.post("/flower/logout", data={"token": "x"})
        assert refused.status_code == 403
        token = token_of(user.get("/flower/logout"))
        left = user.post("/flower/logout", data={"token": token})
        assert left.url.path == "/flower/login"
        for each in (user, thief):
            assert each.get("/flower/tasks").url.path == "/flower/login"


def test_a_session_ends_with_its_key(flower_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneyard.api.access.KEY_KNOWN_S", 0.0)
    flower_api.client("leaving").close()
    with browser(flower_api.url) as user:
        assert log_in(user, "ty-leaving-admin").url.path == "/flower/"
        flower_api.db.run(
            "UPDATE api_keys SET revoked_at = clock_timestamp() WHERE team_id ="
            " (SELECT id FROM teams WHERE name = 'leaving')"
        )
        assert user.get("/flower/").url.path == "/flower/login"


# What Flower is asked for


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize(
    "path",
    [
        "/flower/api/worker/shutdown/celery@n1", "/flower/api/task/revoke/job_1.1",
        "/flower/api/task/async-apply/tuneyard.finetune", "/flower/tasks", "/flower/",
    ],
)  # fmt: skip
def test_nothing_can_be_changed(
    http: httpx.Client, flower: OddFlower, method: str, path: str
) -> None:
    override = {"X-HTTP-Method-Override": "POST", "Content-Type": "application/json"}
    refused = http.request(method, path, headers=override)
    assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
    assert http.get(path, headers=override).status_code == 200
    assert {method for method, _, _ in flower.asked} == {"GET"}


def test_the_rows_of_the_page_of_tasks_are_read_by_its_form(
    http: httpx.Client, flower: OddFlower
) -> None:
    flower.play = answer(b'{"data": []}', headers=(("Content-Type", "application/json"),))
    table = http.post("/flower/tasks/datatable", data=TABLE | {"search[value]": "a&b=c d"})
    assert table.json() == {"data": []}
    ((method, target, headers),) = flower.asked
    path, _, query = target.partition("?")
    assert (method, path) == ("GET", "/inner/tasks/datatable")
    assert parse_qs(query) == {k: [v] for k, v in TABLE.items()} | {"search[value]": ["a&b=c d"]}
    assert "content-length" not in headers
    assert "transfer-encoding" not in headers


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b"a=1&" * 10_000}, 413),
        ({"content": b"a&" * 2000}, 422),
        ({"content": b"a=" + b"b" * 100_000}, 413),
        ({"json": {}}, 415),
    ],
)
def test_an_odd_form_is_refused(
    http: httpx.Client, flower: OddFlower, request_: dict[str, object], status: int
) -> None:
    media = {} if "json" in request_ else {"Content-Type": "application/x-www-form-urlencoded"}
    refused = http.post("/flower/tasks/datatable", headers=media, **request_)  # type: ignore[arg-type]
    assert refused.status_code == status
    assert refused.json()["error"]["code"]
    assert not flower.asked


@pytest.mark.parametrize(
    "target",
    [
        "/flower//", "/flower//evil.example/", "/flower/../api/v1/me", "/flower/%2e%2e/x",
        "/flower/a%2fb", "/flower/a%5cb", "/flower/a\\b", "/flower/%252e%252e/x", "/flower/.",
        "/flower@evil.example/", "/flower:80/", "//flower/", "/Flower/", "/%2fflower/",
        "/flower/http://evil.example/", "http://evil.example/flower/", "http://evil.example/",
    ],
)  # fmt: skip
def test_an_odd_path_reaches_no_flower(
    flower_api: Api, flower: OddFlower, http: httpx.Client, target: str
) -> None:
    assert raw(flower_api, target).split()[1] == b"401"
    assert raw(flower_api, target, f"Authorization: Bearer {KEY}").split()[1] == b"404"
    assert not flower.asked


def test_flower_gets_no_header_of_the_client_that_could_mean_anything(
    flower_api: Api, flower: OddFlower, http: httpx.Client
) -> None:
    raw(
        flower_api,
        "/flower/tasks?x=1",
        f"Authorization: Bearer {KEY}",
        "Cookie: user=admin; tuneyard_session=x",
        "X-Forwarded-For: 1.2.3.4",
        "X-Real-Ip: 1.2.3.4",
        "X-Scheme: https",
        "Transfer-Encoding: chunked",
        "Upgrade: websocket",
        "Proxy-Authorization: Basic eDp5",
        "TE: trailers",
        "Keep-Alive: 5",
        "Origin: https://evil.example",
        "X-Anything: 1",
        "Accept: text/html",
        "",
        "0",
    )
    ((_, target, headers),) = flower.asked
    assert target == "/inner/tasks?x=1"
    assert set(headers) <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
    assert headers["host"] == urlsplit(flower.url).netloc
    assert headers["accept"] == "text/html"


def test_a_websocket_is_not_opened(flower_api: Api, http: httpx.Client) -> None:
    got = raw(
        flower_api,
        "/flower/events",
        f"Authorization: Bearer {KEY}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    assert got.startswith(b"HTTP/1.1 200 ")
    assert b"upgrade" not in got.lower()


def test_head_is_answered_without_a_body(http: httpx.Client, flower: OddFlower) -> None:
    flower.play = answer(b"<html>", headers=(("Content-Type", "text/html"),))
    head = http.head("/flower/tasks")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "text/html"


# What of its answers comes back


def test_of_flowers_headers_only_harmless_ones_come_back(
    http: httpx.Client, flower: OddFlower
) -> None:
    headers = {
        "Content-Type": "application/json", "ETag": '"1"', "Set-Cookie": "_xsrf=1; Path=/",
        "Access-Control-Allow-Origin": "*", "Connection": "X-Hop", "X-Hop": "1",
        "Keep-Alive": "timeout=5", "Proxy-Authenticate": "Basic", "Server": "Tornado",
        "Link": "</x>; rel=preload", "Refresh": "0; url=https://evil.example",
    }  # fmt: skip
    flower.play = answer(b"{}", headers=tuple(headers.items()))
    got = http.get("/flower/api/tasks").headers
    assert (got["content-type"], got["etag"]) == ("application/json", '"1"')
    assert not {name.lower() for name in headers} - {"content-type", "etag"} & set(got)
    assert got["x-content-type-options"] == "nosniff"
    assert "script-src 'self'" in got["content-security-policy"]
    for name in ("set-cookie", "access-control-allow-origin", "server", "refresh", "x-hop"):
        assert name not in got


def test_what_did_not_change_is_not_sent_again(http: httpx.Client, flower: OddFlower) -> None:
    flower.play = answer(b"", status=304, headers=(("ETag", '"1"'),))
    got = http.get("/flower/static/css/flower.css", headers={"If-None-Match": '"1"'})
    assert (got.status_code, got.headers["etag"]) == (304, '"1"')
    assert flower.asked[0][2]["if-none-match"] == '"1"'


@pytest.mark.parametrize("location", ["https://evil.example/", "/inner/tasks", "//evil.example"])
def test_flower_sends_nobody_anywhere(http: httpx.Client, flower: OddFlower, location: str) -> None:
    flower.play = answer(status=302, headers=(("Location", location),))
    got = http.get("/flower/tasks")
    assert (got.status_code, got.json()["error"]["code"]) == (502, "flower_failed")
    assert "location" not in got.headers
    assert len(flower.asked) == 1


def test_no_users_cookie_is_sent_with_anothers_request(
    http: httpx.Client, flower: OddFlower
) -> None:
    flower.play = answer(headers=(("Set-Cookie", "_xsrf=1; Path=/"),))
    for _ in range(2):
        assert "set-cookie" not in http.get("/flower/tasks").headers
    assert not [headers for _, _, headers in flower.asked if "cookie" in headers]


def test_a_failure_of_flower_is_said_in_our_shape(http: httpx.Client, flower: OddFlower) -> None:
    flower.play = answer(b"<pre>Traceback, secrets</pre>", status=500)
    got = http.get("/flower/tasks")
    assert (got.status_code, got.json()["error"]["code"]) == (502, "flower_failed")
    assert "Traceback" not in got.text


def test_a_large_answer_is_passed_on_piece_by_piece(http: httpx.Client, flower: OddFlower) -> None:
    go_on = threading.Event()

    def play(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.end_headers()
        request.wfile.write(b"first")
        assert go_on.wait(20)
        request.wfile.write(b"second")

    flower.play = play
    with http.stream("GET", "/flower/api/tasks") as got:
        pieces = got.iter_raw()
        assert next(pieces) == b"first"
        go_on.set()
        assert b"".join(pieces) == b"second"


def endless(media: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def play(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", media)
        request.end_headers()
        while True:
            request.wfile.write(b"x" * 65536)

    return play


def test_an_endless_page_is_refused(
    http: httpx.Client, flower: OddFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneyard.api.flower.MAX_PAGE_BYTES", 200_000)
    flower.play = endless("text/html")
    got = http.get("/flower/tasks")
    assert (got.status_code, got.json()["error"]["code"]) == (502, "flower_failed")


def test_an_endless_answer_is_cut_off(
    http: httpx.Client, flower: OddFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneyard.api.flower.MAX_ANSWER_BYTES", 200_000)
    flower.play = endless("application/json")
    sizes = []
    with http.stream("GET", "/flower/api/tasks") as got:
        pieces = map(len, got.iter_raw())
        with pytest.raises(httpx.RemoteProtocolError):
            sizes.extend(pieces)
    assert 0 < sum(sizes) <= 200_000


def test_without_flower_the_answer_says_so_and_when_to_ask_again(
    shared_api: Api, tmp_path: Path
) -> None:
    nowhere = f"http://127.0.0.1:{any_free()}"
    with serve(shared_api.db, tmp_path, flower_url=nowhere) as api, program(api) as http:
        got = http.get("/flower/tasks")
    assert (got.status_code, got.json()["error"]["code"]) == (503, "flower_away")
    assert int(got.headers["retry-after"]) >= 1


def test_a_flower_that_hangs_is_not_waited_for(
    http: httpx.Client, flower: OddFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def play(_: BaseHTTPRequestHandler) -> None:
        done.wait(20)

    flower.play = play
    monkeypatch.setattr("tuneyard.api.flower.TIMEOUT", httpx.Timeout(0.2))
    got = http.get("/flower/tasks")
    done.set()
    assert (got.status_code, got.json()["error"]["code"]) == (503, "flower_away")


def test_an_api_that_knows_no_flower_says_which_setting_names_it(shared_api: Api) -> None:
    with program(shared_api) as http:
        got = http.get("/flower/")
    assert got.status_code == 404
    assert "TUNEYARD_FLOWER_URL" in got.json()["error"]["hint"]


# The real Flower


@pytest.mark.parametrize("path", ["", "/flower"])
def test_the_real_flower_is_seen_whole_below_its_prefixes(
    shared_api: Api, valkey: RunningValkey, tmp_path: Path, path: str
) -> None:
    with ExitStack() as stack:
        broker = valkey.plan.url()
        flower = stack.enter_context(real_flower(broker, tmp_path, path=path))
        direct = httpx.get(f"{flower}/api/workers", trust_env=False)
        assert direct.status_code == 200
        assert "access-control-allow-origin" not in direct.headers  # no other site may read it
        api = stack.enter_context(serve(shared_api.db, tmp_path, flower_url=flower))
        program(api).close()
        proxy = stack.enter_context(prefix_proxy(api.url, PREFIX, strips=True, says=True))
        for url, prefix in ((api.url, ""), (proxy.url, PREFIX)):
            with browser(url + "/") as user:
                assert log_in(user).url.path == f"{prefix}/flower/"
                for page in ("", "tasks", "workers", "broker"):
                    shown = user.get(f"flower/{page}")
                    assert shown.status_code == 200
                    assert_links_lead_below(shown, f"{prefix}/flower/", user)
                workers = user.get("flower/workers")
                (inline,) = re.findall(r"<script type=[^>]*>(.*?)</script>", workers.text, re.S)
                digest = b64encode(sha256(inline.encode()).digest()).decode()
                assert f"'sha256-{digest}'" in workers.headers["content-security-policy"]
                assert user.get("flower").url.path == f"{prefix}/flower/"
                table = user.post("flower/tasks/datatable", data=TABLE)
                assert table.json()["data"] == []
                assert user.get("flower/task/nothing").status_code == 404
        with program(api) as http:
            assert http.get("/flower/healthcheck").text == "OK"


def assert_links_lead_below(page: httpx.Response, below: str, user: httpx.Client) -> None:
    links = re.findall(r'(?:href|src)="([^"]*)"', page.text)
    own = [link for link in links if not link.startswith(("https://", "#"))]
    assert own
    for link in own:
        assert link.startswith(below), link
    assert f'value="{below.rstrip("/")}" id="url_prefix"' in page.text
    assert f'href="{below}logout"' in page.text
    for link in {link for link in own if "/static/" in link}:
        assert user.get(str(page.url.join(link))).status_code == 200, link
