"""A whole Tuneyard on this machine for a test: `tuneyard up` in a folder of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psycopg

Found = TypeVar("Found")

TUNEYARD = [sys.executable, "-P", "-m", "tuneyard.cli.main"]


def wait_for(look: Callable[[], Found | None], *, within_s: float, what: str) -> Found:
    """Look again and again until something is found; fail with its name when it is not."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {within_s} s")


@dataclass
class LocalYard:
    """A running `tuneyard up`, and short ways to ask it."""

    home: Path
    env: Mapping[str, str]
    profile: dict[str, Any]

    @property
    def http(self) -> httpx.Client:
        """A client with the key."""
        return httpx.Client(
            base_url=self.profile["url"] + "/api/v1",
            headers={"Authorization": f"Bearer {self.profile['api_key']}"},
            trust_env=False,
            timeout=30,
        )

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command as a user does."""
        done = subprocess.run(
            [*TUNEYARD, *arguments], env=dict(self.env), capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done

    def get(self, path: str, **params: Any) -> Any:
        """GET, asked again while a killed part comes back."""

        def look() -> Any:
            try:
                with self.http as http:
                    answer = http.get(path, params=params)
            except httpx.TransportError:
                return None
            return None if answer.status_code == 503 else answer

        answer = wait_for(look, within_s=60, what=f"an answer to GET {path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, **document: Any) -> str:
        """Submit a job; its id."""
        with self.http as http:
            answer = http.post("/jobs", json=document)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def put_file(self, path: Path) -> str:
        """Upload a file and wait for its check; its id."""
        with self.http as http, path.open("rb") as file:
            answer = http.post("/files", files={"file": (path.name, file)})
        assert answer.status_code == 201, answer.text
        file_id = str(answer.json()["id"])
        wait_for(
            lambda: self.get(f"/files/{file_id}")["state"] == "processed",
            within_s=30,
            what="the check of the file",
        )
        return file_id

    def job(self, job: str) -> dict[str, Any]:
        """A job as the API shows it."""
        return dict(self.get(f"/jobs/{job}"))

    def finish(self, job: str, *, within_s: float = 180) -> dict[str, Any]:
        """Wait for a job's end; the job."""
        ends = ("succeeded", "failed", "cancelled")
        wait_for(
            lambda: self.job(job)["state"] in ends, within_s=within_s, what=f"the end of {job}"
        )
        return self.job(job)

    def database(self) -> psycopg.Connection[Any]:
        """A connection as the superuser, by the embedded server's own files."""
        folder = self.home / "postgres"
        return psycopg.connect(
            host="127.0.0.1",
            port=int((folder / "port").read_text()),
            user="postgres",
            password=(folder / "password").read_text().strip(),
            dbname="tuneyard",
            autocommit=True,
        )


@contextmanager
def local_yard(home: Path, **settings: object) -> Iterator[LocalYard]:
    """`tuneyard up --detach` before, `tuneyard down` after, whatever happens between."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")}
    env |= {f"TUNEYARD_{key.upper()}": str(value) for key, value in settings.items()}
    env |= {"TUNEYARD_HOME": str(home), "PYTHONSAFEPATH": "1"}
    try:
        yield start(home, env)
    finally:
        subprocess.run([*TUNEYARD, "down", "--home", str(home)], env=env, check=False)


def start(home: Path, env: Mapping[str, str]) -> LocalYard:
    """Start, or take over what a killed supervisor left."""
    up = subprocess.run(
        [*TUNEYARD, "up", "--home", str(home), "--detach", "--json"],
        env=dict(env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert up.returncode == 0, up.stdout + up.stderr
    return LocalYard(home, env, json.loads(up.stdout))
