#!/usr/bin/env -S python3 -S
"""A runner that computes hashes instead of gradients: same protocol, same files, starts in 20 ms.

It stands in for the interpreter (setting ``runner_python``), so worker, guard and store do not know
the difference. What it is asked stands as JSON in the argument ``source``, as a path: steps,
step_s, save_steps, exit, ignore_term, leak_child, hang, no_output, wrong_digest. A job of kind
serve goes to fake_server.py.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time

SPEC, WORKDIR = sys.argv[-2:]
with open(SPEC) as file:
    spec = json.load(file)
asked = json.loads(spec["arguments"].get("source", "node:/{}").removeprefix("node:/"))
stopping = False
n = 0
held = []  # a lock goes with its descriptor


def emit(type_, **fields):
    global n
    n += 1
    line = {"v": 1, "n": n, "t_mono": time.monotonic(), "type": type_, **fields}
    with open(os.path.join(WORKDIR, "events.jsonl"), "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def on_term(*_):
    global stopping
    stopping = True


def take_gpus():
    folder = os.environ.get("TUNEYARD_FAKE_GPUS")
    handles = []
    for name in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        handle = os.open(os.path.join(folder, name), os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        handles.append(handle)
        diary(folder, name, "take")
    return handles


def diary(folder, name, event):
    line = {
        "at": time.time(),
        "event": event,
        "gpu": name,
        "pid": os.getpid(),
        "attempt": os.environ["TUNEYARD_ATTEMPT"],
    }
    with open(os.path.join(folder, name + ".diary"), "a") as file:
        file.write(json.dumps(line) + "\n")


def publish(name, content, **meta):
    target = os.path.join(WORKDIR, name)
    aside = os.path.join(WORKDIR, ".aside-" + name.replace("/", "-"))
    os.makedirs(aside, exist_ok=True)
    body = json.dumps(content).encode()
    with open(os.path.join(aside, "state.json"), "wb") as file:
        file.write(body)
    files = [{"path": "state.json", "size": len(body), "sha256": hashlib.sha256(body).hexdigest()}]
    manifest = json.dumps({"files": files, **meta}).encode()
    with open(os.path.join(aside, "manifest.json"), "wb") as file:
        file.write(manifest)
        os.fsync(file.fileno())
    os.rename(aside, target)
    return hashlib.sha256(manifest).hexdigest()


def main():
    signal.signal(signal.SIGTERM, signal.SIG_IGN if asked.get("ignore_term") else on_term)
    held.extend(take_gpus())
    emit("started", pid=os.getpid())
    emit("phase", phase="loading")
    state, step = "", 0
    if spec["resume"]:
        with open(os.path.join(spec["resume"], "state.json")) as file:
            content = json.load(file)
        state, step = content["state"], content["step"]
    if asked.get("leak_child") and os.fork() == 0:
        os.setsid()
        while True:
            time.sleep(60)
    emit("phase", phase="running")
    total = asked.get("steps", 5)
    while step < total:
        while asked.get("hang"):
            time.sleep(0.1)
        time.sleep(asked.get("step_s", 0.02))
        step += 1
        state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
        sys.stdout.write(f"step {step}\n")
        sys.stdout.flush()
        emit("metric", step=step, values={"loss": 1.0 / step})
        emit("progress", done=step, total=total, unit="steps", eta_s=0.0)
        if step % asked.get("save_steps", 2) == 0 or stopping:
            name = f"checkpoints/step-{step}"
            digest = publish(name, {"state": state, "step": step}, step=step)
            digest = "0" * 64 if asked.get("wrong_digest") else digest
            emit("checkpoint", step=step, path=name, manifest_sha256=digest)
        if stopping:
            return 75
        if asked.get("exit") and step == asked.get("exit_at", 1):
            if asked["exit"] != 1:
                emit("failed", cause="bug", evidence="asked to fail", patch={"steps": 1})
            return asked["exit"]
    if asked.get("no_output"):
        return 0
    publish("output", {"state": state}, source="fake", revision="1")
    emit("result", values={"state": state})
    return 0


if spec["kind"] == "serve":
    import fake_server

    emit("started", pid=os.getpid())
    fake_server.serve(spec, WORKDIR, emit)
code = main()
for name in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
    diary(os.environ["TUNEYARD_FAKE_GPUS"], name, "release")
sys.exit(code)
