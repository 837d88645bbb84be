"""The folder of one machine, its children as data, and ports."""

import os
import socket
import stat
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.local import ports, processes
from tuneyard.local.children import BACKOFF_MOST_S, Child, backoff_s
from tuneyard.local.credentials import secret
from tuneyard.local.down import down
from tuneyard.local.home import Home, Record, open_home, unusable
from tuneyard.local.status import status
from tuneyard.local.yard import answers, choose_api_port
from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import load_settings


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@given(st.integers(0, 10_000))
def test_backoff_grows_from_a_fifth_of_a_second_to_ten(failures: int) -> None:
    assert 0.2 <= backoff_s(failures) <= backoff_s(failures + 1) <= BACKOFF_MOST_S
    assert backoff_s(0) == 0.2


def test_a_child_differs_when_its_command_or_its_settings_do() -> None:
    child = Child("api", ("python", "x"), {"PATH": "/bin"}, settings="a")
    assert child.fingerprint == Child("api", ("python", "x"), {}, settings="a").fingerprint
    assert child.fingerprint != Child("api", ("python", "y"), {}, settings="a").fingerprint
    assert child.fingerprint != Child("api", ("python", "x"), {}, settings="b").fingerprint
    assert "PATH" not in repr(child)


def test_a_home_is_closed_to_others_and_its_secrets_stay(home: Home) -> None:
    first = secret(home.secret("api_key"), prefix="ty-")
    assert secret(home.secret("api_key"), prefix="ty-") == first
    assert len(first) == len("ty-") + 43
    assert mode(home.secret("api_key")) == 0o600
    assert mode(home.root) == 0o700


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        open_home(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", ["/proc/tuneyard", "/dev/null/home"])
def test_a_home_that_cannot_be_written_is_a_sentence(path: str) -> None:
    with pytest.raises(InputError, match=path) as caught:
        open_home(Path(path))
    assert caught.value.hint is not None
    assert "--home" in caught.value.hint


def test_a_full_disk_is_a_sentence() -> None:
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "w") as full:
        full.write("x")
    error = unusable(Path("/home/ada"), caught.value)
    assert error.code == "disk_full"
    assert "/home/ada" in error.message


def test_a_home_has_one_holder(home: Home) -> None:
    assert home.holder() is None
    with home.held():
        assert home.holder() == processes.process_id(os.getpid())
        with pytest.raises(InputError, match="already running"), home.held():
            pass


def test_a_lock_that_names_a_stranger_is_stale(home: Home) -> None:
    home.lock.write_text(f"{os.getpid()} 1 {processes.boot_id()}\n")
    assert home.holder() is None
    home.lock.write_text("rubbish")
    assert home.holder() is None
    with home.held():
        assert home.holder() is not None


def test_a_record_of_an_earlier_boot_names_nobody(home: Home) -> None:
    me = processes.process_id(os.getpid())
    assert me is not None
    now = Record(*me, processes.boot_id(), 0.0, 0, "", 15, 1.0)
    assert now.process.alive
    home.keep_record("api", now)
    assert home.record("api") == now
    before = Record(*me, "another boot", 0.0, 0, "", 15, 1.0)
    assert not before.process.alive


def test_down_and_status_of_a_home_that_never_was_change_nothing(tmp_path: Path) -> None:
    assert down(tmp_path / "none") == []
    assert status(tmp_path / "none").phase == "stopped"
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_that_was_asked_for_is_refused_with_the_mend(
    home: Home, taken_port: int
) -> None:
    settings = load_settings({}, home=home.root, api_port=taken_port)
    with pytest.raises(InputError, match=str(taken_port)) as caught:
        choose_api_port(home, settings)
    assert caught.value.hint is not None
    assert "--port" in caught.value.hint


def test_a_taken_port_that_nobody_asked_for_is_replaced_and_said(
    home: Home, taken_port: int
) -> None:
    home.run("api.port").write_text(str(taken_port))
    chosen, notices = choose_api_port(home, load_settings({}, home=home.root))
    assert chosen != taken_port
    assert str(taken_port) in notices[0]
    assert str(chosen) in notices[0]
    assert choose_api_port(home, load_settings({}, home=home.root)) == (chosen, ())


def test_port_0_is_any_free_one_and_stays_the_same(home: Home) -> None:
    settings = load_settings({}, home=home.root, api_port=0)
    port, notices = choose_api_port(home, settings)
    assert port != 0
    assert notices == ()
    assert choose_api_port(home, settings) == (port, ())


def test_an_address_that_is_not_of_this_machine_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):
        ports.is_free(8800, "192.0.2.1")
    with pytest.raises(InputError, match=r"no-such-host\.invalid"):
        ports.is_free(8800, "no-such-host.invalid")


class _AnothersApi(BaseHTTPRequestHandler):
    """An API that is ready, and knows one key."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer ty-its-own"
        self.send_response(200 if self.path == "/readyz" or known else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_another_programs_api_on_our_port_is_not_taken_for_ours() -> None:
    with HTTPServer(("127.0.0.1", 0), _AnothersApi) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{path}" for path in ("readyz", "nodes")]
        me = processes.process_id(os.getpid())
        assert me is not None
        assert answers(*urls, key="ty-its-own")(me)
        assert not answers(*urls, key="ty-ours")(me)
        server.shutdown()
