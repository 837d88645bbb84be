"""What a node offers: GPUs found by NVML, pretended ones for tests, and its cores.

Identity is the UUID: indexes change with reboots, and CUDA_VISIBLE_DEVICES takes UUIDs as well.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pynvml

from tuneyard.models.nodes import OfferedDevice
from tuneyard.specs.settings import Settings

log = logging.getLogger(__name__)

FAKE_BYTES = 16 * 1024**3
FAKE_FOLDER = "fake_gpus"


class Inventory(Protocol):
    """Where a node's GPUs are looked up."""

    def gpus(self) -> list[OfferedDevice]:
        """The GPUs that are there now."""

    def is_empty(self, uuid: str) -> bool:
        """Whether no process holds memory of this GPU."""


class Nvml:
    """The GPUs of this machine, by NVIDIA's management library; none where it is absent."""

    def gpus(self) -> list[OfferedDevice]:
        """One device with one slot for each GPU."""
        with _nvml() as present:
            if not present:
                return []
            handles = [
                pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
            ]
            return [_describe(handle) for handle in handles]

    def is_empty(self, uuid: str) -> bool:
        """No compute process on it. (Used memory is never 0: the driver keeps some.)"""
        with _nvml() as present:
            if not present:
                return False
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                return not pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except pynvml.NVMLError as error:
                log.warning(
                    "GPU not readable",
                    extra={"event": "gpu_unreadable", "gpu": uuid, "error": str(error)},
                )
                return False


@contextmanager
def _nvml() -> Iterator[bool]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _describe(handle: Any) -> OfferedDevice:
    return OfferedDevice(
        kind="gpu",
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        slot_cores=[_cores_near(handle)],
    )


def _cores_near(handle: Any) -> list[int]:
    """The cores of the GPU's own NUMA node; all that we may use where NVML does not say."""
    allowed = sorted(os.sched_getaffinity(0))
    words = (max(allowed) // 64) + 1
    try:
        masks = pynvml.nvmlDeviceGetCpuAffinity(handle, words)
    except pynvml.NVMLError:
        return allowed
    near = [64 * i + bit for i, mask in enumerate(masks) for bit in range(64) if mask >> bit & 1]
    return [core for core in near if core in allowed] or allowed


class FakeGpus:
    """GPUs that are files: a runner holds one by locking it. For tests and benchmarks."""

    def __init__(self, folder: Path, node_name: str, count: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._names = [f"GPU-fake-{node_name}-{i}" for i in range(count)]
        for name in self._names:
            (folder / name).touch()

    def gpus(self) -> list[OfferedDevice]:
        """Those whose file is there: removing one is how a test loses a GPU."""
        return [
            OfferedDevice("gpu", name, "fake GPU", FAKE_BYTES, [sorted(os.sched_getaffinity(0))])
            for name in self._names
            if (self.folder / name).exists()
        ]

    def is_empty(self, uuid: str) -> bool:
        """Whether the lock is free."""
        try:
            handle = os.open(self.folder / uuid, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True


def node_name(settings: Settings) -> str:
    """This node's name: as set, else the host's."""
    return settings.node_name or socket.gethostname()


def inventory_of(settings: Settings) -> Inventory:
    """Pretended GPUs where some are asked for, real ones otherwise."""
    if settings.fake_gpus:
        return FakeGpus(settings.home / FAKE_FOLDER, node_name(settings), settings.fake_gpus)
    return Nvml()


def offered_devices(inventory: Inventory, cpu_slots: int) -> list[OfferedDevice]:
    """All that this node offers: its GPUs, and its cores split among its CPU slots."""
    cores = sorted(os.sched_getaffinity(0))
    gpus = inventory.gpus()
    if cpu_slots == 0:
        return gpus
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [*gpus, OfferedDevice("cpu", "cpu", "cores", memory, split_cores(cores, cpu_slots))]


def split_cores(cores: Sequence[int], slots: int) -> list[list[int]]:
    """Divide cores among slots as evenly as it goes; more slots than cores share some.

    >>> split_cores([0, 1, 2, 3, 4], 2)
    [[0, 1, 2], [3, 4]]
    >>> split_cores([0, 1], 3)
    [[0], [1], [0]]
    """
    if slots >= len(cores):
        return [[cores[i % len(cores)]] for i in range(slots)]
    each, more = divmod(len(cores), slots)
    parts, start = [], 0
    for slot in range(slots):
        end = start + each + (slot < more)
        parts.append(list(cores[start:end]))
        start = end
    return parts
