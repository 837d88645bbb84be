"""Watching a job to its end: a live line on a terminal, one line per change elsewhere."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.text import Text

from tuneyard.cli.output import (
    duration,
    error_lines,
    on_screen,
    out,
    plain_error,
    print_json,
    say,
    size,
)
from tuneyard.client import Client
from tuneyard.specs.errors import TuneyardError
from tuneyard.specs.states import TERMINAL

PLAIN_EVERY_S = 1.0
STANDING = ("state", "phase", "attempt", "wait_reason")
MEMORY = ("gpu_bytes", "rss_bytes")


def watch_job(client: Client, job: str, *, as_json: bool = False) -> int:
    """Follow a job to its end. Returns the exit code: 0 succeeded, 1 otherwise."""
    with leaving_alone(job):
        if as_json:
            for kind, data in client.watch(job):
                print_json({"event": kind, **data})
        elif on_screen():
            _watch_live(client, job)
        else:
            _watch_plain(client, job)
    return report_end(client, job, quiet=as_json)


def watch_jobs(
    client: Client,
    jobs: Sequence[Mapping[str, Any]],
    *,
    as_json: bool = False,
    after: Callable[[Client, Mapping[str, Any]], None] = lambda client, job: None,
) -> int:
    """Follow jobs one after the other, and do ``after`` for each that succeeds.

    Returns the exit code: 0 if all succeeded, 1 otherwise.
    """
    code = 0
    for job in jobs:
        if len(jobs) > 1 and not as_json:
            say(f"{job['name']}  ({job['kind']})")
        failed = watch_job(client, job["id"], as_json=as_json)
        if not failed:
            after(client, job)
        code = max(code, failed)
    return code


def await_end(client: Client, job: str) -> dict[str, Any]:
    """Wait for a job's end without a word; the ended job."""
    with leaving_alone(job):
        for _ in client.watch(job):
            pass
    return client.job(job)


@contextmanager
def leaving_alone(job: str) -> Iterator[None]:
    """Say on Ctrl-C that the job goes on: watching is not holding."""
    try:
        yield
    except KeyboardInterrupt:
        plain_error(f"\nthe job goes on; `tuneyard watch {job}` looks again")
        raise


def _watch_plain(client: Client, job: str) -> None:
    said, said_at = "", 0.0
    stood: tuple[Any, ...] = ()
    for kind, data in client.watch(job):
        stands = tuple(data.get(name) for name in STANDING) if kind == "progress" else stood
        # Steps come often and may be passed over; a reason to wait is sent once.
        too_soon = stands == stood and time.monotonic() - said_at < PLAIN_EVERY_S
        line = describe(data) if kind == "progress" else event_line(kind, data)
        if not line or line == said or (kind == "progress" and too_soon):
            continue
        said, said_at, stood = line, time.monotonic(), stands
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _watch_live(client: Client, job: str) -> None:
    bar = Progress(BarColumn(None), TaskProgressColumn(), TimeElapsedColumn(), console=out)
    bar.expand = True
    task = bar.add_task("", total=None)
    with Live(Group(Text("…"), bar), console=out, refresh_per_second=8, transient=True) as live:
        for kind, data in client.watch(job):
            if kind == "progress":
                progress = data.get("progress") or {}
                if data.get("started_at"):
                    bar.tasks[0].start_time = bar.get_time() - seconds_since(data["started_at"])
                bar.update(task, total=progress.get("total"), completed=progress.get("done") or 0)
                line = Text(describe(data), no_wrap=True, overflow="ellipsis")
                live.update(Group(line, bar))
            elif line_ := event_line(kind, data):
                out.print(Text(line_), soft_wrap=True)


def seconds_since(started_at: str) -> float:
    """How long an attempt has run, whenever the watching began; 0 where a clock is behind."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(started_at)).total_seconds())


def describe(data: Mapping[str, Any]) -> str:
    """State, step, loss, speed, time left and memory in one line."""
    if data.get("state") in ("queued", "blocked") and data.get("wait_reason"):
        return f"{data['state']}: {data['wait_reason']}"
    progress, values = data.get("progress") or {}, data.get("metrics") or {}
    loading = data.get("phase") in ("staging", "loading", "publishing")
    parts = [str(data["phase"] if loading else data.get("state", ""))]
    if (data.get("attempt") or 1) > 1:
        parts.append(f"attempt {data['attempt']}")
    if progress.get("total"):
        parts.append(_amount(progress))
    return "  ".join([*parts, *_measured(values), *_left(progress)])


def _measured(values: Mapping[str, float | None]) -> Iterator[str]:
    for name in ("loss", "eval_loss"):
        if (value := values.get(name)) is not None:
            yield f"{name} {value:.3f}"
    if (rate := values.get("tokens_per_s")) is not None:
        yield f"{rate:.0f} tokens/s"
    memory = next((values[name] for name in MEMORY if values.get(name)), None)
    if memory:
        yield size(memory)


def _amount(progress: Mapping[str, Any]) -> str:
    if progress["unit"] == "bytes":
        return f"{size(progress['done'])} of {size(progress['total'])}"
    return f"{progress['unit']} {progress['done']}/{progress['total']}"


def _left(progress: Mapping[str, Any]) -> list[str]:
    return [f"{duration(progress['eta_s'])} left"] if progress.get("eta_s") else []


def event_line(kind: str, data: Mapping[str, Any]) -> str:
    """A line of the timeline in words; empty for those that the end's report says better."""
    details = data.get("data") or {}
    if kind == "place":
        return f"placed on {details.get('node')} ({', '.join(details.get('devices', []))})"
    if kind == "checkpoint":
        return f"checkpoint of step {details.get('step')} is safe"
    if kind in ("lost", "retried"):
        reason = details.get("evidence") or details.get("cause")
        goes_on = "the job is tried again" if data.get("to_state") == "queued" else ""
        return f"attempt {details.get('attempt')} {kind}: {reason}" + (goes_on and f"; {goes_on}")
    if kind == "sample":
        return f"step {details.get('step')}: {quoted(details)}"
    if kind in ("warning", "checkpoint_rejected"):
        return f"note: {details.get('message')}"
    if kind == "away":
        return f"note: {data.get('message')} The job goes on; asked again for some minutes."
    if kind == "started":  # progress says it better, by its phase
        return ""
    moved = data.get("to_state") and data.get("to_state") != data.get("from_state")
    return str(data["to_state"]) if moved and data["to_state"] not in TERMINAL else ""


def quoted(said: Mapping[str, Any]) -> str:
    """A watch-prompt and its answer in one line."""
    return f"{_in_short(said.get('prompt'), 60)!r} -> {_in_short(said.get('text'), 160)}"


def _in_short(text: Any, length: int) -> str:
    """Nothing in it moves a terminal's cursor."""
    plain = " ".join(str(text or "").split())
    plain = "".join(c for c in plain if c.isprintable())
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def said_lines(client: Client, job: Mapping[str, Any]) -> Iterator[str]:
    """What a job's model said to each watch-prompt, at first and at last."""
    if not job["spec"].get("watch_prompts"):
        return
    points = client.samples(job["id"])
    for point in points[:1] + points[1:][-1:]:
        yield f"  said at step {point['step']}:"
        yield from (f"    {quoted(said)}" for said in point["answers"])


ALL_RESULTS = "all_results.json"
MEASURED = (
    "eval_loss", "eval_accuracy",
    *(f"{what}_{name}" for what in ("predict", "eval")
      for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l")),
)  # fmt: skip
"""What is measured of held-out rows, in the order that it is told."""


def measured_line(
    client: Client, job: str, artifact: str, entries: Sequence[Mapping[str, Any]]
) -> str:
    """What the result came to on held-out rows; empty where nothing was measured.

    Metrics do not tell: the last of them need not be of the model that was taken.
    """
    entry = next((each for each in entries if each["path"] == ALL_RESULTS), None)
    if entry is None:
        return ""
    with TemporaryDirectory() as folder, suppress(TuneyardError):
        path = Path(folder, ALL_RESULTS)
        client.fetch_artifact_file(job, artifact, entry, path)
        values = json.loads(path.read_text(encoding="utf-8"))
        return "  ".join(f"{name} {values[name]:.4g}" for name in MEASURED if name in values)
    return ""


def report_end(client: Client, job: str, *, quiet: bool = False) -> int:
    """Say how a job ended, and where its result lies. Returns the exit code."""
    found = client.job(job)
    if found["state"] == "succeeded":
        if not quiet:
            _report_success(client, found)
        return 0
    if not quiet:
        report_failure(found)
    return 1


def report_failure(job: Mapping[str, Any]) -> None:
    """Say on stderr how a job failed, and the mend."""
    for line in failure_lines(job):
        plain_error(line)


def failure_lines(job: Mapping[str, Any]) -> Iterator[str]:
    """How a job failed, and the mend."""
    yield f"{job['name']} {job['state']}"
    if error := job.get("error"):
        message = f"{error.get('code')}: {error.get('message')}"
        hint = error.get("hint") or _mend(job)
        yield from error_lines(TuneyardError(message, field=error.get("field"), hint=hint))


def _mend(job: Mapping[str, Any]) -> str:
    patches = [attempt.get("patch") for attempt in job.get("attempts") or []]
    patch = patches[-1] if patches else None
    if not patch:
        return f"`tuneyard logs {job['id']}` shows the log"
    changes = " ".join(f"--set {name}={value}" for name, value in patch.items())
    return f"`tuneyard retry {job['id']} {changes}`"


def _report_success(client: Client, job: Mapping[str, Any]) -> None:
    say(f"{job['name']} succeeded")
    for artifact in client.artifacts(job["id"]):
        if artifact["kind"] == "checkpoint":
            continue
        entries = client.artifact_files(job["id"], artifact["id"])
        if line := measured_line(client, job["id"], artifact["id"], entries):
            say(f"  {line}")
        say(f"  {artifact['kind']} {artifact['id']}  {size(artifact['bytes'])}")
        for entry in entries:
            if entry["path"].endswith(".safetensors"):
                say(f"    {entry['path']}  sha256 {entry['sha256']}")
    if job.get("model") and job["spec"].get("stage") == "rm":
        say(f"  let it judge: reward_model: {job['model']} in a fine-tune of stage grpo or rloo")
    elif job.get("model"):
        say(f"  ask it: tuneyard infer {job['model']} --prompts FILE")
