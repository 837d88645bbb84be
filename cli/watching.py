"""Watching a job to its end: a live line on a terminal, one line per change elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from tuneyard.cli.output import duration, out, plain_error, print_error, print_json, say, size
from tuneyard.client import Client
from tuneyard.specs.errors import TuneyardError

PLAIN_EVERY_S = 1.0


def watch_job(client: Client, job: str, *, as_json: bool = False) -> int:
    """Follow a job to its end. Returns the exit code: 0 succeeded, 1 otherwise."""
    try:
        if as_json:
            for kind, data in client.watch(job):
                print_json({"event": kind, **data})
        elif out.is_terminal:
            _watch_live(client, job)
        else:
            _watch_plain(client, job)
    except KeyboardInterrupt:
        plain_error(f"\nthe job goes on; `tuneyard watch {job}` looks again")
        raise
    return report_end(client, job, quiet=as_json)


def _watch_plain(client: Client, job: str) -> None:
    said, said_at = "", 0.0
    for kind, data in client.watch(job):
        line = _describe(data) if kind == "progress" else _event_line(kind, data)
        too_soon = kind == "progress" and time.monotonic() - said_at < PLAIN_EVERY_S
        if line and line != said and not too_soon:
            said, said_at = line, time.monotonic()
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


def _watch_live(client: Client, job: str) -> None:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=out)
    task = bar.add_task("waiting", total=None)
    with Live(bar, console=out, refresh_per_second=8, transient=True):
        for kind, data in client.watch(job):
            if kind != "progress":
                line = _event_line(kind, data)
                if line:
                    out.print(Text(line))
                continue
            progress = data.get("progress") or {}
            bar.update(
                task,
                description=_describe(data),
                total=progress.get("total"),
                completed=progress.get("done") or 0,
            )


def _describe(data: Mapping[str, Any]) -> str:
    """State, step, loss, speed, time left and memory in one line."""
    progress, values = data.get("progress") or {}, data.get("metrics") or {}
    parts = [str(data.get("state", ""))]
    if data.get("state") == "queued" and data.get("wait_reason"):
        return f"queued: {data['wait_reason']}"
    if data.get("phase") in ("staging", "loading", "publishing"):
        parts = [str(data["phase"])]
    if progress.get("total"):
        parts.append(f"{progress['unit']} {progress['done']}/{progress['total']}")
    if "loss" in values:
        parts.append(f"loss {values['loss']:.3f}")
    if "eval_loss" in values:
        parts.append(f"eval_loss {values['eval_loss']:.3f}")
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:.0f} tokens/s")
    if progress.get("eta_s"):
        parts.append(f"{duration(progress['eta_s'])} left")
    memory = values.get("gpu_bytes") or values.get("rss_bytes")
    if memory:
        parts.append(size(memory))
    return "  ".join(parts)


def _event_line(kind: str, data: Mapping[str, Any]) -> str:
    details = data.get("data") or {}
    if kind == "place":
        return f"placed on {details.get('node')} ({', '.join(details.get('devices', []))})"
    if kind == "checkpoint":
        return f"checkpoint of step {details.get('step')} is safe"
    if kind in ("lost", "retried"):
        reason = details.get("evidence") or details.get("cause")
        return f"attempt {details.get('attempt')} {kind}: {reason}; the job is tried again"
    if kind in ("warning", "checkpoint_rejected"):
        return f"note: {details.get('message')}"
    return ""


def report_end(client: Client, job: str, *, quiet: bool = False) -> int:
    """Say how a job ended, and where its result lies."""
    found = client.job(job)
    if found["state"] == "succeeded":
        if not quiet:
            _report_success(client, found)
        return 0
    error = found.get("error") or {}
    if not quiet:
        plain_error(f"{found['name']} {found['state']}")
        if error:
            message = f"{error.get('code')}: {error.get('message')}"
            print_error(TuneyardError(message, hint=_mend(error.get("patch"), job)))
    return 1


def _mend(patch: Mapping[str, Any] | None, job: str) -> str | None:
    if not patch:
        return f"`tuneyard logs {job}` shows the log"
    changes = " ".join(f"--set {name}={value}" for name, value in patch.items())
    return f"`tuneyard retry {job} {changes}`"


def _report_success(client: Client, job: Mapping[str, Any]) -> None:
    say(f"{job['name']} succeeded")
    for artifact in client.artifacts(job["id"]):
        if artifact["kind"] == "checkpoint":
            continue
        say(f"  {artifact['kind']} {artifact['id']}  {size(artifact['bytes'])}")
        for entry in client.artifact_files(job["id"], artifact["id"]):
            if entry["path"].endswith(".safetensors"):
                say(f"    {entry['path']}  sha256 {entry['sha256']}")
    if job.get("model"):
        say(f"  ask it: tuneyard infer {job['model']} --prompts FILE")
