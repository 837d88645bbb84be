"""The guard of one attempt: it starts the runner, holds its deadline and leaves nothing behind.

    python -I -S guard.py WORKDIR --deadline BOOTTIME_S --grace S [--cwd DIR] [--cores 0,1] -- ARGV…

The standard library alone, so that it is up in some 20 ms; it imports nothing of ours. The started
process returns 0 as soon as the runner runs; the guard itself goes on in a session of its own, so
that it outlives the worker and never becomes its zombie. The runner's environment is the guard's.

It binds WORKDIR/guard.sock and answers each line of JSON with one line:

    {"deadline": 1234.5}        moves the deadline to this CLOCK_BOOTTIME second; only ever forward
    {"stop": {"grace_s": 60}}   SIGTERM to the runner now, SIGKILL of everything after the grace;
                                asked again, the earlier end holds
    {"checkpoint": true}        SIGUSR1 to the runner
    {"status": true}            nothing else

The answer is {"runner_pid", "state": "running" | "ended", "deadline", "stopping", "exit"}, or
{"error": "…"}. A descendant of the guard is not listened to: a runner cannot extend its lease.

At deadline - grace the runner gets SIGTERM, at the deadline every descendant gets SIGKILL. When the
runner has ended, whatever it left gets SIGKILL too; then WORKDIR/exit.json is renamed into place,
and the guard ends. Should the guard be killed, the kernel kills the runner (PR_SET_PDEATHSIG).
"""

import ctypes
import json
import math
import os
import selectors
import signal
import socket
import struct
import sys
import time

GUARD_FILE = "guard.json"
EXIT_FILE = "exit.json"
SOCKET = "guard.sock"
LOG = "log"

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

LOOK_EVERY_S = 0.5  # select() sleeps on CLOCK_MONOTONIC, which stands still while suspended
CLEAR_EVERY_S = 0.02
UNKILLABLE_AFTER_S = 10.0
MAX_LINE_BYTES = 16 * 1024
MAX_CLIENTS = 32
EXIT_BYTES = 2048
MAX_UNKILLABLE = 40
CANNOT_START = 127
RUNNER_OOM_SCORE = "500"  # of all on this node, the kernel shall prefer a runner

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
RESET = (*IGNORED, signal.SIGXFSZ, signal.SIGCHLD)  # what is ignored stays so over exec

libc = ctypes.CDLL(None, use_errno=True)


class Plan:
    """What the command line asks for."""

    def __init__(self, arguments: list[str]) -> None:
        split = arguments.index("--")
        self.workdir, *pairs = arguments[:split]
        self.runner = arguments[split + 1 :]
        options = dict(zip(pairs[::2], pairs[1::2], strict=True))
        self.deadline = float(options["--deadline"])
        self.grace_s = float(options["--grace"])
        self.cwd = options.get("--cwd", "/")
        cores = options.get("--cores", "")
        self.cores = {int(core) for core in cores.split(",") if core}


class Runner:
    """The runner's process, and what is known of its end."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = False
        self.code: int | None = None
        self.signal: int | None = None
        self.maxrss = 0  # bytes

    def end(self, status: int, maxrss_kib: int) -> None:
        """Note what wait4 said."""
        code = os.waitstatus_to_exitcode(status)
        self.ended = True
        self.code, self.signal = (code, None) if code >= 0 else (None, -code)
        self.maxrss = maxrss_kib * 1024

    def send(self, number: int) -> None:
        """Signal it; until it is reaped its pid cannot belong to another."""
        try:
            if not self.ended:
                os.kill(self.pid, number)
        except PermissionError:
            pass  # it took another user's identity


class Guard:
    """One attempt's deadline, its runner and everything that descends from it."""

    def __init__(self, plan: Plan, folder: int, runner: Runner) -> None:
        self.folder = folder
        self.runner = runner
        self.deadline = plan.deadline
        self.grace_s = plan.grace_s
        self.stop_at = math.inf
        self.terminated = False
        self.killing_since: float | None = None
        self.killed: set[int] = set()
        self.oom_kills = count_oom_kills()

    def kill_at(self) -> float:
        """When everything gets SIGKILL."""
        return min(self.deadline, self.stop_at)

    def next_look_s(self) -> float:
        """How long the guard may sleep."""
        if self.killing_since is not None:
            return CLEAR_EVERY_S
        term_at = math.inf if self.terminated else self.deadline - self.grace_s
        return max(0.0, min(term_at - boottime(), self.kill_at() - boottime(), LOOK_EVERY_S))

    def look(self) -> bool:
        """Reap, terminate and kill as the time asks. False: the attempt's processes are gone."""
        self._reap()
        now = boottime()
        if now >= self.deadline - self.grace_s:
            self._terminate()
        if self.killing_since is None and (self.runner.ended or now >= self.kill_at()):
            self.killing_since = now
        if self.killing_since is None:
            return True
        return bool(self._kill_descendants()) and now < self.killing_since + UNKILLABLE_AFTER_S

    def answer(self, request: object) -> dict[str, object]:
        """Do what one line asks for. Raises: ValueError that says what is wrong with it."""
        match request:
            case {"deadline": int() | float() as moment} if math.isfinite(moment):
                self._extend(float(moment))
            case {"stop": {"grace_s": int() | float() as grace_s}} if grace_s >= 0:
                self.stop_at = min(self.stop_at, boottime() + grace_s)
                self._terminate()
            case {"checkpoint": True}:
                self.runner.send(signal.SIGUSR1)
            case {"status": True}:
                pass
            case _:
                raise ValueError("not a request; guard.py lists them")
        return self.status()

    def status(self) -> dict[str, object]:
        """What the guard knows."""
        ended = self.runner.ended
        return {
            "runner_pid": self.runner.pid,
            "state": "ended" if ended else "running",
            "deadline": self.deadline,
            "stopping": self.terminated or self.killing_since is not None,
            "exit": {"code": self.runner.code, "signal": self.runner.signal} if ended else None,
        }

    def report(self) -> dict[str, object]:
        """How it ended: exit.json."""
        runner, left = self.runner, descendants()
        by_us = runner.pid in self.killed
        oom_killed = runner.signal == signal.SIGKILL and not by_us
        return {
            "code": runner.code,
            "signal": runner.signal,
            "maxrss": runner.maxrss,
            "oom_killed": oom_killed and count_oom_kills() > self.oom_kills,
            "descendants_killed": len(self.killed - {runner.pid}),
            "unkillable": [[pid, start_time(pid)] for pid in left[:MAX_UNKILLABLE]],
            "ended_at": time.time(),
        }

    def _extend(self, moment: float) -> None:
        if self.killing_since is not None:
            raise ValueError("too late: the deadline has passed, or the runner has ended")
        self.deadline = max(self.deadline, moment)

    def _terminate(self) -> None:
        if not self.terminated:
            self.terminated = True
            self.runner.send(signal.SIGTERM)
            self.runner.send(signal.SIGCONT)  # a stopped runner may save its checkpoint too

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.runner.pid:
                self.runner.end(status, usage.ru_maxrss)

    def _kill_descendants(self) -> list[int]:
        """SIGKILL to all that is left; called until nothing is, for some may fork meanwhile."""
        pids = descendants()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                self.killed.add(pid)
            except (ProcessLookupError, PermissionError):
                pass  # gone meanwhile, or of another user: it is reported as unkillable then
        self._reap()
        return descendants()


class Door:
    """The socket: it never waits for a client, and no rubbish gets past it."""

    def __init__(self, listener: socket.socket, guard: Guard) -> None:
        self.guard = guard
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        self.heard: dict[socket.socket, bytes] = {}

    def wake_on(self, descriptor: int) -> None:
        """End a wait when this descriptor becomes readable."""
        self.selector.register(descriptor, selectors.EVENT_READ)

    def serve(self, timeout_s: float) -> None:
        """Answer what has come, waiting for at most ``timeout_s``."""
        for key, _ in self.selector.select(timeout_s):
            if key.fileobj is self.listener:
                self._welcome()
            elif isinstance(key.fileobj, socket.socket):
                self._hear(key.fileobj)
            else:
                os.read(key.fd, 4096)

    def _welcome(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return
        client.setblocking(False)
        if len(self.heard) >= MAX_CLIENTS or descends_from_us(peer_pid(client)):
            client.close()
            return
        self.heard[client] = b""
        self.selector.register(client, selectors.EVENT_READ)

    def _hear(self, client: socket.socket) -> None:
        try:
            received = client.recv(MAX_LINE_BYTES)
            *lines, rest = (self.heard[client] + received).split(b"\n")
            for line in lines:
                client.sendall(self._reply(line))
        except OSError:  # gone, or it does not read its answers
            received = b""
        if not received or len(rest) > MAX_LINE_BYTES:
            self._dismiss(client)
        else:
            self.heard[client] = rest

    def _reply(self, line: bytes) -> bytes:
        try:
            answer = self.guard.answer(json.loads(line))
        except (ValueError, ArithmeticError, RecursionError) as error:
            answer = {"error": str(error)}
        return json.dumps(answer).encode() + b"\n"

    def _dismiss(self, client: socket.socket) -> None:
        self.selector.unregister(client)
        del self.heard[client]
        client.close()


def main() -> int:
    """Leave a guard behind; 0 once its runner runs."""
    plan = Plan(sys.argv[1:])
    ready, tell = os.pipe()
    if os.fork() > 0:
        os.close(tell)
        return 0 if os.read(ready, 1) else 1  # nothing: the guard died, and said why on stderr
    os.close(ready)
    os.setsid()
    guard_attempt(plan, tell)
    return 0


def guard_attempt(plan: Plan, tell: int) -> None:
    """The guard's whole life."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.umask(0o077)
    folder = os.open(plan.workdir, os.O_RDONLY | os.O_DIRECTORY)
    reserve(folder)
    listener = listen(folder)
    identity = identify()
    write_whole(folder, GUARD_FILE, identity)
    wake = wake_on_sigchld()
    guard = Guard(plan, folder, Runner(start_runner(plan, folder)))
    door = Door(listener, guard)
    door.wake_on(wake)
    write_whole(folder, GUARD_FILE, identity | {"runner_pid": guard.runner.pid})
    detach(tell)
    while guard.look():
        door.serve(guard.next_look_s())
    write_exit(folder, guard.report())


def start_runner(plan: Plan, folder: int) -> int:
    """Fork and exec the runner, from the main thread: PR_SET_PDEATHSIG fires when a thread ends."""
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, dir_fd=folder)
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            become_runner(plan, guard, log)
        except BaseException as error:
            os.write(2, f"The runner cannot start: {error}: {plan.runner}\n".encode())
        finally:
            os._exit(CANNOT_START)
    os.close(log)
    return pid


def become_runner(plan: Plan, guard: int, log: int) -> None:
    """From here on this process is the runner; it does not return."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(CANNOT_START)  # the guard died before the line above
    signal.set_wakeup_fd(-1)
    for number in RESET:
        signal.signal(number, signal.SIG_DFL)
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(RUNNER_OOM_SCORE)
    except OSError:
        pass
    os.chdir(plan.cwd)
    os.execvp(plan.runner[0], plan.runner)  # noqa: S606 - that there is no shell is the point


def descendants() -> list[int]:
    """Every process below this one, zombies included: one that is not reaped is not gone."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_fields(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    found = []
    below = children.get(os.getpid(), [])
    while below:
        pid = below.pop()
        found.append(pid)
        below.extend(children.get(pid, []))
    return found


def descends_from_us(pid: int) -> bool:
    """Whether a process stands below this one."""
    while pid > 1:
        pid = int((stat_fields(pid) or ["", "0"])[1])
        if pid == os.getpid():
            return True
    return False


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from field 3 (state) on; empty where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid it names one for ever."""
    return int((stat_fields(pid) or ["0"] * 20)[19])


def identify() -> dict[str, object]:
    """What names this guard among all that ever ran here: guard.json."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    return {
        "pid": os.getpid(),
        "start_time": start_time(os.getpid()),
        "boot_id": boot_id,
        "pid_ns": os.readlink("/proc/self/ns/pid"),
    }


def count_oom_kills() -> int:
    """How often the kernel killed for want of memory: in our cgroup, or else on this machine."""
    for path in (*memory_event_files(), "/proc/vmstat"):
        try:
            with open(path) as file:
                for line in file:
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        return int(value)
        except (OSError, ValueError):
            continue
    return 0


def memory_event_files() -> list[str]:
    """Where this process' cgroup, version 2 or 1, counts such kills."""
    root, files = "/sys/fs/cgroup", []
    with open("/proc/self/cgroup") as file:
        entries = [line.strip().split(":", 2) for line in file]
    for _, controllers, path in entries:
        if controllers == "":
            files.append(f"{root}{path}/memory.events")
        elif "memory" in controllers.split(","):
            files += [
                f"{root}/memory{path}/memory.oom_control",
                f"{root}/memory/memory.oom_control",
            ]
    return files


def listen(folder: int) -> socket.socket:
    """Bind the socket through the folder's descriptor: a path of over 107 bytes would not fit."""
    try:
        os.unlink(SOCKET, dir_fd=folder)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{folder}/{SOCKET}")
    listener.listen(MAX_CLIENTS)
    listener.setblocking(False)
    return listener


def peer_pid(client: socket.socket) -> int:
    """Who is at the other end."""
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def wake_on_sigchld() -> int:
    """A descriptor that becomes readable when a child ends."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    return readable


def detach(tell: int) -> None:
    """Say that the runner runs, and let go of the starter's files."""
    os.write(tell, b"1")
    os.close(tell)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.chdir("/")


def reserve(folder: int) -> None:
    """Take exit.json's place on the disk now: it may be full when the runner ends."""
    write_aside(folder, EXIT_FILE, b" " * EXIT_BYTES, os.O_TRUNC)


def write_exit(folder: int, report: dict[str, object]) -> None:
    """Write the end into the reserved file, then let it be seen."""
    text = json.dumps(report).encode().ljust(EXIT_BYTES)
    write_aside(folder, EXIT_FILE, text, 0)
    show(folder, EXIT_FILE)


def write_whole(folder: int, name: str, value: dict[str, object]) -> None:
    """Write a JSON file aside, fsync it and rename it."""
    write_aside(folder, name, json.dumps(value).encode(), os.O_TRUNC)
    show(folder, name)


def write_aside(folder: int, name: str, data: bytes, truncate: int) -> None:
    """Write and fsync what is not to be seen yet."""
    aside = os.open(f".{name}", os.O_WRONLY | os.O_CREAT | truncate, 0o600, dir_fd=folder)
    try:
        os.write(aside, data)
        os.fsync(aside)
    finally:
        os.close(aside)


def show(folder: int, name: str) -> None:
    """Let a file that is whole be seen under its name."""
    os.rename(f".{name}", name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process."""
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def boottime() -> float:
    """Seconds since boot, those of a suspended machine included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


if __name__ == "__main__":
    sys.exit(main())
