"""Runners forked from one process that has imported the hubs' clients: seconds are saved each."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.attempts_by_hand import Ran, write_spec

SERVER = """
import json, os, sys, logging
import modelscope, huggingface_hub, huggingface_hub.file_download, modelscope_hub.api
import modelscope_hub.compat.snapshot_download
from tuneyard.runners.attempt import run_attempt
from tuneyard.runners.download import download
_ = modelscope.snapshot_download, modelscope.dataset_snapshot_download
_ = huggingface_hub.snapshot_download
print("ready", flush=True)
for line in sys.stdin:
    spec, workdir = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ["HOME"] = workdir
        log = os.open(os.path.join(workdir, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
        code = run_attempt(download, [spec, workdir])
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Started:
    """A runner that was forked."""

    pid: int
    workdir: Path
    server: "subprocess.Popen[str]"

    def end(self) -> Ran:
        """Wait for its end; below 0 is a signal."""
        return Ran(int(_line(self.server)), self.workdir)

    def kill(self) -> int:
        """kill -9, and its end."""
        os.kill(self.pid, signal.SIGKILL)
        return self.end().code


@dataclass
class DownloadRunners:
    """Starts download runners, one at a time."""

    server: "subprocess.Popen[str]"

    def start(self, folder: Path, arguments: Mapping[str, Any], **spec: Any) -> Started:
        """Start one."""
        path, workdir = write_spec(folder, kind="download", arguments=dict(arguments), **spec)
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(path), str(workdir)]) + "\n")
        self.server.stdin.flush()
        return Started(int(_line(self.server)), workdir, self.server)

    def run(self, folder: Path, arguments: Mapping[str, Any], **spec: Any) -> Ran:
        """Run one to its end."""
        return self.start(folder, arguments, **spec).end()


def _line(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


@contextmanager
def download_runners(environment: Mapping[str, str]) -> Iterator[DownloadRunners]:
    """The process that they are forked from, with the clients' settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
    server = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**kept, **environment},
        text=True,
    )
    try:
        assert _line(server) == "ready"
        yield DownloadRunners(server)
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(30)
        server.stdout.close()  # type: ignore[union-attr]
