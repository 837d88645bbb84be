"""Flower's pages behind another path, and the sealed cookies of those who look at them."""

import time
from pathlib import Path
from typing import Any

import flower
import pytest
from starlette.responses import Response

from tuneyard.api.flower import _path_below, relink
from tuneyard.api.login import _next
from tuneyard.api.sessions import COOKIE, Sessions, give_form_token, is_own_form
from tuneyard.specs.errors import NotFound

KEY_HASH = bytes(range(32))
TEMPLATES = Path(flower.__file__).parent / "templates"


def a_scope(*, cookie: str = "", scheme: str = "http", **headers: str) -> dict[str, Any]:
    sent = {"cookie": cookie} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    return {"type": "http", "scheme": scheme, "root_path": "/p", "headers": raw}


def set_cookie(response: Response) -> str:
    return response.headers["set-cookie"]


def a_session(sessions: Sessions) -> str:
    response = Response()
    sessions.begin(a_scope(), response, KEY_HASH)
    return set_cookie(response).split(";")[0]


# Sessions


@pytest.mark.parametrize(("scheme", "secure"), [("http", False), ("https", True)])
def test_a_sessions_cookie_is_closed_to_scripts_other_sites_and_other_paths(
    scheme: str, secure: bool
) -> None:
    response = Response()
    Sessions("s", lasting_s=60).begin(a_scope(scheme=scheme), response, KEY_HASH)
    _, *attributes = set_cookie(response).lower().split("; ")
    expected = {"httponly", "samesite=strict", "path=/p/flower", "max-age=60"}
    assert set(attributes) == expected | ({"secure"} if secure else set())


def test_a_session_stands_for_its_key_in_every_process_that_knows_the_secret() -> None:
    cookie = a_session(Sessions("s", lasting_s=60))
    assert Sessions("s", lasting_s=60).key_hash(a_scope(cookie=cookie)) == KEY_HASH
    for other in (Sessions("t", lasting_s=60), Sessions(None, lasting_s=60)):
        assert other.key_hash(a_scope(cookie=cookie)) is None


def test_no_changed_cookie_is_a_session() -> None:
    sessions = Sessions("s", lasting_s=60)
    cookie = a_session(sessions)
    name, _, text = cookie.partition("=")
    changed = [
        text[:i] + ("A" if text[i] != "A" else "B") + text[i + 1 :] for i in range(len(text))
    ]
    # The last character has bits that mean nothing: two texts stand for the same bytes.
    odd = [*changed[:-1], text[:-4], "", "A", "=" * 50, "A" * 118, text * 3, "%00", "ä"]
    for each in odd:
        assert sessions.key_hash(a_scope(cookie=f"{name}={each}")) is None, each
    assert sessions.key_hash(a_scope(cookie=cookie)) == KEY_HASH


def test_a_session_ends_by_its_time_whatever_the_browser_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = Sessions("s", lasting_s=60)
    cookie, now = a_session(sessions), time.time()
    monkeypatch.setattr("tuneyard.api.sessions.time.time", lambda: now + 61)
    assert sessions.key_hash(a_scope(cookie=cookie)) is None


def test_a_copied_cookie_opens_nothing_after_the_logout() -> None:
    sessions = Sessions("s", lasting_s=60)
    cookie, other = a_session(sessions), a_session(sessions)
    response = Response()
    sessions.end(a_scope(cookie=cookie), response)
    assert f'{COOKIE}=""' in set_cookie(response)
    assert sessions.key_hash(a_scope(cookie=cookie)) is None
    assert sessions.key_hash(a_scope(cookie=other)) == KEY_HASH


def test_the_key_cannot_be_read_from_the_cookie() -> None:
    assert "ty-" not in a_session(Sessions("s", lasting_s=60))


def test_only_a_form_of_ours_in_this_browser_counts() -> None:
    response = Response()
    give_form_token(a_scope(), response, "t1")
    cookie = set_cookie(response).split(";")[0]
    assert is_own_form(a_scope(cookie=cookie), "t1")
    assert is_own_form(a_scope(cookie=cookie, sec_fetch_site="same-origin"), "t1")
    assert not is_own_form(a_scope(cookie=cookie), "t2")
    assert not is_own_form(a_scope(), "")
    for site in ("cross-site", "same-site", "none"):
        assert not is_own_form(a_scope(cookie=cookie, sec_fetch_site=site), "t1")


# Where a login leads, and what Flower is asked for


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "//evil.example", "https://evil.example/flower/", "/flower", "/flower//evil",
        "/flower/..//evil", "/flower/\\evil", "/flower/\r\nX: y", "/flowers/", "/flower/ä",
    ],
)  # fmt: skip
def test_a_login_leads_to_flower_and_nowhere_else(text: str) -> None:
    assert _next(text) == "/flower/"


def test_a_login_leads_on_to_the_page_that_was_asked_for() -> None:
    assert _next("/flower/tasks?state=STARTED") == "/flower/tasks?state=STARTED"


@pytest.mark.parametrize(
    ("raw", "asked"),
    [
        (b"/", "/"),
        (b"/tasks", "/tasks"),
        (b"/static/js/flower.js", "/static/js/flower.js"),
        (b"/worker/celery%40my-host", "/worker/celery@my-host"),
        (b"/task/job_1.2", "/task/job_1.2"),
        (b"/worker/%C3%A4%20b", "/worker/%C3%A4%20b"),
        (b"/worker/a%3Fb%23c", "/worker/a%3Fb%23c"),
    ],
)
def test_a_path_is_passed_on_in_one_reading(raw: bytes, asked: str) -> None:
    assert _path_below(raw) == asked


@pytest.mark.parametrize(
    "raw",
    [
        b"s", b"@evil.example/", b"//", b"//evil.example", b"/a//b", b"/../x", b"/a/..", b"/./a",
        b"/%2e%2e/x", b"/a%2fb", b"/a%2Fb", b"/a%5cb", b"/a\\b", b"/%252e%252e/x", b"/a%00",
        b"/a%0d%0ab", b"/a%7f", b"/a%zz",
    ],
)  # fmt: skip
def test_an_odd_path_is_not_there(raw: bytes) -> None:
    with pytest.raises(NotFound):
        _path_below(raw)


# Links


@pytest.mark.parametrize("path", ["", "/flower", "/deep/inside"])
def test_links_are_as_the_page_is_seen(path: str) -> None:
    page = (
        f'<a href="{path}/tasks?name=x">t</a><script src="{path}/static/a.js?v=1"></script>'
        f'<input type="hidden" value="{path.strip("/")}" id="url_prefix">'
        '<a href="https://elsewhere.example/">e</a><a href="#tab">h</a>'
        "<pre>href=&quot;/tasks&quot;</pre>"
    )
    assert relink(page.encode(), path, "/proxy/1/flower").decode() == (
        '<a href="/proxy/1/flower/tasks?name=x">t</a>'
        '<script src="/proxy/1/flower/static/a.js?v=1"></script>'
        '<input type="hidden" value="/proxy/1/flower" id="url_prefix">'
        '<a href="https://elsewhere.example/">e</a><a href="#tab">h</a>'
        "<pre>href=&quot;/tasks&quot;</pre>"
    )


def test_flowers_templates_are_written_as_the_links_are_looked_for() -> None:
    """Told by the installed Flower: a new one that writes its pages in another way fails here."""
    base, navbar = ((TEMPLATES / name).read_text() for name in ("base.html", "navbar.html"))
    assert """<input type="hidden" value="{{ url_prefix or '' }}" id="url_prefix">""" in base
    assert '<ul class="app-nav app-nav-secondary navbar-nav ms-lg-auto">' in navbar
    for template in TEMPLATES.glob("*.html"):
        for line in template.read_text().splitlines():
            if "reverse_url(" in line or "static_url(" in line:
                attribute = any(f'{name}="{{{{' in line for name in ("href", "src"))
                assert attribute or "task_link(" in line, f"{template.name}: {line}"
