"""Which device an attempt computes on, and the locks of GPUs that tests pretend."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneyard.runners.failures import DeviceLost
from tuneyard.specs.runner import ATTEMPT_MARK

FAKE_PREFIX = "GPU-fake-"
FAKE_GPUS = "TUNEYARD_FAKE_GPUS"
"""Environment variable that names the folder where pretended GPUs lie as files."""


@dataclass(frozen=True)
class Device:
    """Where tensors live: ``torch_name`` for torch, ``threads`` if it must be so many."""

    torch_name: Literal["cpu", "cuda"]
    threads: int | None = None


@contextmanager
def taken_device(
    wanted: Literal["cpu", "gpu"], environ: Mapping[str, str] = os.environ
) -> Iterator[Device]:
    """Hold the devices that the worker named in CUDA_VISIBLE_DEVICES. Raises: DeviceLost.

    Real GPUs need no lock here: the database gives each to one attempt. Does not import torch.
    """
    names = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if wanted == "cpu":
        yield Device("cpu")
    elif names and all(name.startswith(FAKE_PREFIX) for name in names):
        with _locked(names, environ):
            yield Device("cpu", threads=1)
    else:
        yield Device("cuda")


def make_ready(device: Device, *, deterministic: bool = False) -> None:
    """Tell torch. Raises: DeviceLost when there is no such device.

    deterministic: only algorithms that give the same bits from run to run. What has none raises
    RuntimeError when it is called.
    """
    import torch  # slow: not before the device is held and the data are known to be good

    if device.threads is not None:
        torch.set_num_threads(device.threads)
    if device.torch_name == "cuda" and not torch.cuda.is_available():
        raise DeviceLost(
            "A GPU was asked for, and torch sees none.",
            hint=f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}, "
            f"torch {torch.__version__}",
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def _locked(names: Sequence[str], environ: Mapping[str, str]) -> Iterator[None]:
    folder = Path(environ[FAKE_GPUS])
    attempt = environ.get(ATTEMPT_MARK, "")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_lock(folder, name, attempt))
        yield


@contextmanager
def _lock(folder: Path, name: str, attempt: str) -> Iterator[None]:
    try:
        file = (folder / name).open("r+")
    except FileNotFoundError:
        raise DeviceLost(f"{name} is gone.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _last_line(folder / f"{name}.diary")
            raise DeviceLost(f"{name} is held by another process: {holder}") from None
        _note(folder, name, "take", attempt)
        try:
            yield
        finally:
            _note(folder, name, "release", attempt)  # before the lock goes with the file


def _note(folder: Path, name: str, event: str, attempt: str) -> None:
    line = {"at": time.time(), "event": event, "gpu": name, "pid": os.getpid(), "attempt": attempt}
    with (folder / f"{name}.diary").open("ab", buffering=0) as diary:
        diary.write(json.dumps(line).encode() + b"\n")


def _last_line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[-1]
    except (FileNotFoundError, IndexError):
        return "no diary"
