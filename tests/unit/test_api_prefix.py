"""Path prefixes: which are heeded, from whom, and where they end up."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from tuneyard.api.prefix import Prefix, inner_path, inner_raw_path
from tuneyard.specs.errors import InputError
from tuneyard.specs.prefix import clean_prefix
from tuneyard.specs.settings import load_settings

LOCAL = load_settings({}).trusted_networks
ODD = [
    "proxy/8800", "//evil.example", "/a//b", "/..", "/a/../b", "/./a", "/a/.", "/a b", "/a%2fb",
    "/%2e%2e", "/a\\b", "/a?b", "/a#b", '/a"b', "/a<b", "/a;b", "/ä", "/a\r\nb", "/a\x00", "/a,/b",
    "http://evil.example/", "/a, /b", "/" + "a" * 600, "/api", "/api/v1", "/v1", "/flower",
]  # fmt: skip


class Seen:
    """What the application behind the middleware was asked, and what a client got."""

    scope: Scope
    headers: dict[bytes, bytes]


def ask(
    path: str,
    *,
    peer: str | None = "127.0.0.1",
    headers: tuple[tuple[str, str], ...] = (),
    root_path: str = "",
    trusted: Any = LOCAL,
    location: str = "/api/v1/jobs/1",
) -> Seen:
    seen = Seen()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.scope = scope
        start = {"type": "http.response.start", "status": 201}
        await send(start | {"headers": [(b"location", location.encode())]})

    async def send(message: Any) -> None:
        seen.headers = dict(message["headers"])

    scope = {
        "type": "http",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "client": (peer, 1) if peer else None,
    }
    asyncio.run(Prefix(app, root_path=root_path, trusted=trusted)(scope, None, send))  # type: ignore[arg-type]
    return seen


def said(prefix: str) -> tuple[tuple[str, str], ...]:
    return (("x-forwarded-prefix", prefix),)


@pytest.mark.parametrize("path", ["/api/v1/jobs", "/proxy/8800/api/v1/jobs"])
@pytest.mark.parametrize("by", ["header", "setting"])
def test_both_kinds_of_proxies_lead_to_the_same_address(path: str, by: str) -> None:
    prefix = "/proxy/8800"
    seen = ask(path, headers=said(prefix)) if by == "header" else ask(path, root_path=prefix)
    assert inner_path(seen.scope) == "/api/v1/jobs"
    assert inner_raw_path(seen.scope) == b"/api/v1/jobs"
    assert seen.scope["path"] == "/proxy/8800/api/v1/jobs"
    assert seen.headers[b"location"] == b"/proxy/8800/api/v1/jobs/1"


def test_what_only_begins_like_the_prefix_is_not_cut() -> None:
    assert inner_path(ask("/proxy/88001/x", root_path="/proxy/8800").scope) == "/proxy/88001/x"
    assert inner_path(ask("/proxy/8800", root_path="/proxy/8800").scope) == "/"


def test_an_escaped_prefix_is_none() -> None:
    seen = ask("/prox%79/8800/api", root_path="/proxy/8800")
    assert inner_raw_path(seen.scope) == b"/prox%79/8800/api"


def test_the_proxys_word_goes_before_the_setting() -> None:
    assert ask("/x", headers=said("/b/"), root_path="/a").scope["root_path"] == "/b"


@pytest.mark.parametrize("peer", ["192.0.2.1", "::2", None, "testclient"])
def test_a_stranger_sets_no_prefix(peer: str | None) -> None:
    headers = (*said("/mine"), ("x-forwarded-proto", "https"))
    seen = ask("/x", peer=peer, headers=headers)
    assert (seen.scope["root_path"], seen.scope["scheme"]) == ("", "http")
    assert seen.headers[b"location"] == b"/api/v1/jobs/1"


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "fd00::1"])
def test_a_trusted_network_sets_prefix_and_scheme(peer: str) -> None:
    trusted = load_settings({}, trusted_proxies="10.1.0.0/16, fd00::/8").trusted_networks
    headers = (*said("/mine"), ("x-forwarded-proto", "https"))
    seen = ask("/x", peer=peer, headers=headers, trusted=trusted)
    assert (seen.scope["root_path"], seen.scope["scheme"]) == ("/mine", "https")


def test_nobody_is_trusted_where_the_setting_is_empty() -> None:
    trusted = load_settings({}, trusted_proxies="").trusted_networks
    assert ask("/x", headers=said("/mine"), trusted=trusted).scope["root_path"] == ""


@pytest.mark.parametrize("prefix", ODD)
def test_an_odd_prefix_is_ignored_with_a_warning(
    prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    sent = prefix.encode().decode("latin-1")
    assert ask("/x", headers=said(sent), root_path="/a").scope["root_path"] == "/a"
    assert [record.__dict__["event"] for record in caplog.records] == ["prefix_ignored"]


def test_two_prefixes_are_none() -> None:
    assert ask("/x", headers=said("/a") + said("/b")).scope["root_path"] == ""


@pytest.mark.parametrize("location", ["https://elsewhere.example/x", "relative"])
def test_only_our_own_addresses_get_the_prefix(location: str) -> None:
    seen = ask("/x", root_path="/a", location=location)
    assert seen.headers[b"location"] == location.encode()


@given(st.text(st.sampled_from('/.%a\\@ \r\n"é8-_~?'), max_size=12))
def test_a_clean_prefix_is_safe_wherever_it_is_written(text: str) -> None:
    prefix = clean_prefix(text)
    if prefix:
        assert prefix.startswith("/")
        assert not prefix.endswith("/")
        assert not {"", ".", ".."} & set(prefix.split("/")[1:])
        assert prefix.isascii()
        assert not set(prefix) & set('%\\ \r\n"?')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("root_path", prefix) for prefix in ODD),
        ("trusted_proxies", "everybody"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("flower_url", "flower:5555"),
        ("flower_url", "ftp://flower"),
        ("flower_url", "http://"),
        ("flower_url", "http://a:b@flower:5555"),
        ("flower_url", "http://flower:5555/?x"),
        ("flower_url", "http://flower:99999"),
        ("flower_url", "http://flower:5555/../x"),
    ],
)
def test_an_odd_setting_is_named_at_the_start(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"Setting {name}: ") as caught:
        load_settings({}, **{name: value})
    assert (caught.value.code, caught.value.field) == ("bad_setting", name)
