"""The command's promises to people and programs, against recorded answers."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support.commands import Command
from support.recorded_api import (
    Answer,
    RecordedApi,
    a_file,
    a_job,
    events,
    ids,
    moved,
    page,
    recorded_api,
    refusal,
)

from tuneyard.cli.main import app

JOB, OTHER = ids("job", 2)
FILE, *_ = ids("file", 1)
ARTIFACT, *_ = ids("artifact", 1)
RECIPE = "model: smollm2-135m-instruct\ndataset: data.jsonl\nstage: sft\nfinetuning_type: lora\n"
ROW = b'{"instruction": "a", "output": "b"}\n'
DONE = moved(2, "succeeded", "succeeded")
DONE3 = ("succeeded", "succeeded")


@pytest.fixture(params=["", "/user/jane@team/proxy/8800"], ids=["", "behind a prefix"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedApi]:
    with recorded_api(request.param) as api:
        for name, value in api.env.items():
            monkeypatch.setenv(name, value)
        yield api


@pytest.fixture
def tuneyard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    return Command(monkeypatch, capsys)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe in a folder of its own, with its data beside it."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "data.jsonl").write_bytes(ROW)
    path = folder / "support_tone.yaml"
    path.write_text(RECIPE)
    return path


def accepting(api: RecordedApi, **job: Any) -> None:
    """Uploads are fine, jobs are taken."""
    api.on("GET", "/files", page())
    taken = a_file(FILE, name="data.jsonl", sha256="0", state="processing")
    api.on("POST", "/files", Answer(taken, 201))
    api.on("GET", f"/files/{FILE}", a_file(FILE, name="data.jsonl", sha256="0"))
    api.on("POST", "/jobs", Answer(a_job(JOB, **job), 201))


def ending(api: RecordedApi, state: str, **job: Any) -> None:
    """The job ends so."""
    stream = events(moved(1, "submit", "queued"), moved(2, state, state))
    api.on("GET", f"/jobs/{JOB}/events", stream)
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state=state, **job))


def with_results(api: RecordedApi, *answers: str) -> None:
    """The job has results."""
    rows = [json.dumps({"index": i, "text": text}) + "\n" for i, text in enumerate(answers)]
    content = "".join(rows).encode()
    folder = f"/jobs/{JOB}/artifacts"
    known = {"id": ARTIFACT, "kind": "results", "bytes": 9, "digest": "d" * 64, "step": None}
    entry = {"path": "results.jsonl", "size": 9, "sha256": hashlib.sha256(content).hexdigest()}
    api.on("GET", folder, page(known))
    api.on("GET", f"{folder}/{ARTIFACT}/files", page(entry))
    api.on("GET", f"{folder}/{ARTIFACT}/files/results.jsonl", Answer(content))


# Help


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


WORDS = """up down status api scheduler worker flower migrate health submit list show watch logs
cancel retry merge infer chat nodes artifacts fetch bundle rerun download keys.create keys.list
keys.revoke files.put files.list files.show files.rm models.list models.show fixtures.tiny-llama"""


def test_the_commands_are_those_that_other_programs_rely_on() -> None:
    assert {".".join(path) for path in commands()} == set(WORDS.split())


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(
    tuneyard: Command, path: tuple[str, ...]
) -> None:
    done = tuneyard(*path, "--help")
    assert done.code == 0
    assert "Example: " in done.out
    assert f"tuneyard {' '.join(path)}" in " ".join(done.out.split("Example: ")[1].split())
    assert "--json" in done.out


def test_a_process_lists_its_settings_in_its_help(tuneyard: Command) -> None:
    done = tuneyard("worker", "--help")
    assert "TUNEYARD_CPU_SLOTS: CPU slots of this node" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["submit"], ["list", "--state", "odd"], ["list", "--kind", "odd"],
        ["list", "--limit", "0"], ["infer", "m"], ["files", "put", "x", "--purpose", "odd"],
        ["logs", "x", "--tail", "-1"], ["watch", "--nonsense"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_use_is_your_input_and_says_where_help_is(
    tuneyard: Command, arguments: list[str]
) -> None:
    done = tuneyard(*arguments)
    assert done.code == 2
    assert "--help` has an example" in done.err
    assert not done.out


def test_the_prefix_of_a_proxy_is_a_flag_of_api_and_up(
    tuneyard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("tuneyard.cli.services.start_logging", lambda *_, **__: None)
    monkeypatch.setattr("tuneyard.api.main.run", lambda settings: started.append(settings))
    monkeypatch.setattr("tuneyard.local.up.up", lambda _, **asked: started.append(asked) or 0)
    for command in ("api", "up"):
        assert tuneyard(command, "--root-path", "/proxy/8800/").code == 0
    assert started[0].root_path == "/proxy/8800"
    assert started[1]["root_path"] == "/proxy/8800/"
    done = tuneyard("api", "--root-path", "//evil.example")
    assert done.code == 2
    assert "Setting root_path" in done.err
    assert "/proxy/8800" in done.err


# Which server


def test_without_any_server_the_command_says_how_to_get_one(tuneyard: Command) -> None:
    done = tuneyard("list")
    assert done.code == 2
    assert "profile.json" in done.err
    assert "hint: run `tuneyard up`" in done.err


def test_the_profile_says_which_server_and_key(
    tuneyard: Command, api: RecordedApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TUNEYARD_URL")
    monkeypatch.delenv("TUNEYARD_API_KEY")
    (tmp_path / "home").mkdir()
    profile = {"url": api.url, "api_key": "from-profile", "flower_url": "", "home": ""}
    (tmp_path / "home" / "profile.json").write_text(json.dumps(profile))
    api.on("GET", "/jobs", page())
    assert tuneyard("list", "--json").code == 0
    assert api.asked[0].headers["Authorization"] == "Bearer from-profile"


def test_a_profiles_key_is_not_sent_to_another_server(
    tuneyard: Command, api: RecordedApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TUNEYARD_API_KEY")
    (tmp_path / "home").mkdir()
    profile = {"url": "http://127.0.0.1:1", "api_key": "secret"}
    (tmp_path / "home" / "profile.json").write_text(json.dumps(profile))
    done = tuneyard("list")
    assert done.code == 2
    assert "TUNEYARD_API_KEY" in done.err
    assert not api.asked


@pytest.mark.parametrize("profile", ["", "[]", "{}", "null", '{"url": "http://127.0.0.1:1"}'])
def test_a_broken_profile_is_named(tuneyard: Command, tmp_path: Path, profile: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "profile.json").write_text(profile)
    done = tuneyard("list")
    assert done.code == 2
    assert "no usable" in done.err


def test_a_server_that_is_not_there_is_named_with_exit_4(
    tuneyard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEYARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TUNEYARD_API_KEY", "k")
    for arguments in (["list"], ["watch", JOB], ["logs", "-f", JOB], ["nodes"]):
        done = tuneyard(*arguments)
        assert done.code == 4
        assert "http://127.0.0.1:1 cannot be reached" in done.err
        assert "tuneyard up" in done.err


def test_a_refused_key_is_exit_3(tuneyard: Command, api: RecordedApi) -> None:
    api.on("GET", "/jobs", refusal(401, "unauthenticated", "A valid API key is needed."))
    done = tuneyard("list", "--json")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("A valid API key is needed.")


# Submitting


def test_a_submission_uploads_what_lies_beside_it_and_says_what_is_next(
    tuneyard: Command, api: RecordedApi, recipe: Path
) -> None:
    accepting(api, notes=[{"field": "fp8", "message": "fp8 changes nothing here"}])
    done = tuneyard("submit", str(recipe), "--set", "lora_rank=4", "--set", "learning_rate=1e-4")
    assert done.code == 0, done.err
    assert done.out.split("\n") == [
        f"{JOB}  tuny  queued",
        "  note: fp8 changes nothing here",
        f"  next: tuneyard watch {JOB}",
        "",
    ]
    sent = api.requests("POST", "/jobs")[0].json
    assert sent["dataset"] == FILE
    assert sent["name"] == "support_tone"
    assert (sent["lora_rank"], sent["learning_rate"]) == (4, 1e-4)


def test_a_submission_as_json_is_one_document(
    tuneyard: Command, api: RecordedApi, recipe: Path
) -> None:
    accepting(api)
    done = tuneyard("submit", str(recipe), "--json")
    assert json.loads(done.out)["id"] == JOB


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_waiting_ends_with_the_jobs_own_verdict(
    tuneyard: Command, api: RecordedApi, recipe: Path, state: str, code: int
) -> None:
    accepting(api)
    ending(api, state)
    api.on("GET", f"/jobs/{JOB}/artifacts", page())
    assert tuneyard("submit", str(recipe), "--wait").code == code
    done = tuneyard("submit", str(recipe), "--wait", "--json")
    assert done.code == code
    assert json.loads(done.out)["state"] == state


def test_a_document_comes_by_stdin_too(
    tuneyard: Command, api: RecordedApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accepting(api)
    (tmp_path / "data.jsonl").write_bytes(ROW)
    with stdin(monkeypatch, tmp_path, RECIPE.encode()):
        assert tuneyard("submit", "-").code == 0
    assert "name" not in api.requests("POST", "/jobs")[0].json


def test_a_file_that_its_check_rejects_is_told_by_line_and_nothing_is_submitted(
    tuneyard: Command, api: RecordedApi, recipe: Path
) -> None:
    accepting(api)
    problem = {"code": "bad_row", "message": "Line 2: no output.", "field": "output", "line": 2,
               "hint": "add an output", "column": None}  # fmt: skip
    report = {"problems": [problem], "problem_count": 7}
    api.on(
        "GET",
        f"/files/{FILE}",
        a_file(FILE, name="data.jsonl", sha256="0", state="rejected", report=report),
    )
    done = tuneyard("submit", str(recipe))
    assert done.code == 2
    data = recipe.parent / "data.jsonl"
    assert f"{data}: Line 2: no output. (field output, line 2)\n  hint: add an output" in done.err
    assert f"{data}: and 6 more" in done.err
    assert not api.requests("POST", "/jobs")


def test_a_refusal_speaks_of_the_file_as_the_document_does(
    tuneyard: Command, api: RecordedApi, recipe: Path
) -> None:
    accepting(api)
    problem = {"message": f"{FILE} has 1 row.", "field": "dataset", "hint": f"add rows to {FILE}"}
    api.on("POST", "/jobs", refusal(422, "too_few", f"{FILE} has 1 row.", details=[problem]))
    done = tuneyard("submit", str(recipe))
    assert done.code == 3
    data = recipe.parent / "data.jsonl"
    assert done.err == f"{data} has 1 row. (field dataset)\n  hint: add rows to {data}\n"


def test_every_mistake_of_a_recipe_is_named_before_anything_travels(
    tuneyard: Command, api: RecordedApi, recipe: Path
) -> None:
    recipe.write_text(RECIPE + "lora_rnak: 8\nlearning_rate: fast\n")
    done = tuneyard("submit", str(recipe))
    assert done.code == 2
    assert "lora_rnak" in done.err
    assert "did you mean lora_rank?" in done.err
    assert "learning_rate" in done.err
    assert not api.asked


BAD_DOCUMENTS = {
    "empty.yaml": b" \n",
    "binary.yaml": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "torn.json": b'{"kind": ',
    "list.yaml": b"- a\n",
    "twice.yaml": b"model: a\nmodel: b\n",
    "python.yaml": b"model: !!python/object/apply:os.system [true]\n",
    "large.yaml": b"#" * (2 * 1024**2 + 1),
}


@pytest.mark.parametrize("name", [*BAD_DOCUMENTS, "missing.yaml", ".", "/dev/zero", "a\0b", ""])
def test_what_is_no_recipe_is_named(tuneyard: Command, tmp_path: Path, name: str) -> None:
    if name in BAD_DOCUMENTS:
        (tmp_path / name).write_bytes(BAD_DOCUMENTS[name])
    done = tuneyard("submit", name)
    assert done.code == 2
    assert name.replace("\0", "") in done.err.replace("\0", "")
    assert "Traceback" not in done.err


def test_a_name_that_is_empty_is_no_folder(tuneyard: Command) -> None:
    done = tuneyard("submit", "")
    assert done.err == "The file's name is empty.\n  hint: name a file, or - for stdin\n"


def test_a_named_pipe_is_read_and_one_without_a_writer_is_not_waited_for(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "f.yaml")
    done = tuneyard("submit", "f.yaml")
    assert (done.code, done.err) == (2, "f.yaml is a pipe into which nobody writes.\n")
    accepting(api)
    (tmp_path / "data.jsonl").write_bytes(ROW)
    writer = threading.Thread(target=lambda: (tmp_path / "f.yaml").write_text(RECIPE), daemon=True)
    writer.start()
    deadline = time.monotonic() + 10  # the writer must have begun to wait for its reader
    while (done := tuneyard("submit", "f.yaml")).code and time.monotonic() < deadline:
        pass
    assert done.code == 0, done.err
    writer.join(10)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_a_bad_pipe_is_named_stdin(
    tuneyard: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    with stdin(monkeypatch, tmp_path, content):
        done = tuneyard("submit", "-")
    assert done.code == 2
    assert done.err.startswith("stdin")


def test_without_any_stdin_a_dash_is_refused(
    tuneyard: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert tuneyard("submit", "-").code == 2
    assert tuneyard("infer", "m", "--prompts", "-").code == 2


@pytest.mark.parametrize(
    "value", ["missing.jsonl", "sub/missing", "folder", "~nobody-here/x", "./" + "x" * 300]
)
def test_a_data_set_that_is_no_file_is_refused_with_its_field(
    tuneyard: Command, recipe: Path, value: str
) -> None:
    (recipe.parent / "folder").mkdir()
    done = tuneyard("submit", str(recipe), "--set", f"dataset={value}")
    assert done.code == 2
    assert "(field dataset)" in done.err
    assert "hint: name a file" in done.err


def test_an_override_as_llama_factory_takes_it_is_shown_as_it_is_taken_here(
    tuneyard: Command, recipe: Path
) -> None:
    done = tuneyard("submit", str(recipe), "--set", "lora_rank=4", "learning_rate=1e-5")
    assert done.code == 2
    assert "hint: --set learning_rate=1e-5" in done.err


def test_several_data_sets_are_not_taken_for_a_path(tuneyard: Command, recipe: Path) -> None:
    done = tuneyard("submit", str(recipe), "--set", "dataset=data/a.json,data/b.json")
    assert "names several files" in done.err
    assert "hint: join them into one" in done.err


@pytest.mark.parametrize("override", ["lora_rank", "=8", "lora_rank: 8", "lora_rank=[1"])
def test_an_override_that_is_none_is_refused(
    tuneyard: Command, recipe: Path, override: str
) -> None:
    assert tuneyard("submit", str(recipe), "--set", override).code == 2


def stdin(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes) -> Any:
    """Standard input from a file."""
    (folder / ".stdin").write_bytes(content)
    stream = (folder / ".stdin").open(encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stream)
    return stream


# Watching


def test_a_watch_without_a_terminal_prints_a_line_per_change(
    tuneyard: Command, api: RecordedApi
) -> None:
    waits = {"state": "queued", "wait_reason": "needs 1 GPU: all 2 are busy"}
    running = {
        "state": "running", "phase": "running", "attempt": 2,
        "progress": {"done": 8, "total": 32, "unit": "steps", "eta_s": 12.4},
        "metrics": {"loss": 1.2345, "tokens_per_s": 812.6, "rss_bytes": 2**30, "lr": None},
    }  # fmt: skip
    stream = events(
        moved(1, "submit", "queued"), waits, waits,
        moved(2, "place", "dispatched", node="n1", devices=["GPU-1"]),
        moved(3, "lost", "queued", attempt=1, cause="node_lost", evidence="n1 is silent"),
        moved(4, "checkpoint", "running", step=8), running, moved(5, "succeeded", "succeeded"),
    )  # fmt: skip
    api.on("GET", f"/jobs/{JOB}/events", stream)
    weights = {"id": ARTIFACT, "kind": "adapter", "bytes": 2048, "digest": "d", "step": None}
    folder = f"/jobs/{JOB}/artifacts"
    api.on("GET", folder, page(weights, weights | {"kind": "checkpoint"}))
    entry = {"path": "adapter_model.safetensors", "size": 9, "sha256": "5" * 64}
    api.on("GET", f"{folder}/{ARTIFACT}/files", page(entry))
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="succeeded", model="tuny"))
    done = tuneyard("watch", JOB)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert "queued: needs 1 GPU: all 2 are busy" in lines
    assert lines.count("queued: needs 1 GPU: all 2 are busy") == 1
    assert "placed on n1 (GPU-1)" in lines
    assert "attempt 1 lost: n1 is silent; the job is tried again" in lines
    assert "checkpoint of step 8 is safe" in lines
    assert any(line.startswith("running  attempt 2  steps 8/32  loss 1.234") for line in lines)
    assert lines[-4:] == [
        "tuny succeeded",
        f"  adapter {ARTIFACT}  2.0 KiB",
        f"    adapter_model.safetensors  sha256 {'5' * 64}",
        "  ask it: tuneyard infer tuny --prompts FILE",
    ]


def test_a_running_job_is_not_said_to_run_before_it_is_staged(
    tuneyard: Command, api: RecordedApi
) -> None:
    staging = {"state": "running", "phase": "staging"}
    stream = events(moved(1, "started", "running"), staging, moved(2, "failed", "failed"))
    api.on("GET", f"/jobs/{JOB}/events", stream)
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="failed"))
    assert tuneyard("watch", JOB).out == "staging\n"


def test_progress_says_step_loss_speed_memory_and_time_left() -> None:
    from tuneyard.cli.watching import describe

    data = {
        "state": "running", "phase": "running", "attempt": 2,
        "progress": {"done": 8, "total": 32, "unit": "steps", "eta_s": 12.4},
        "metrics": {"loss": 1.2345, "tokens_per_s": 812.6, "rss_bytes": 2**30, "eval_loss": None},
    }  # fmt: skip
    assert describe(data) == (
        "running  attempt 2  steps 8/32  loss 1.234  813 tokens/s  1.0 GiB  12s left"
    )
    assert describe({"state": "running", "phase": "loading"}) == "loading"


def test_a_watch_as_json_is_a_line_per_event(tuneyard: Command, api: RecordedApi) -> None:
    ending(api, "succeeded")
    done = tuneyard("watch", JOB, "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["event"] for line in lines] == ["submit", "succeeded"]
    assert done.code == 0


def test_a_failed_job_ends_with_its_cause_and_the_mend(tuneyard: Command, api: RecordedApi) -> None:
    error = {"code": "out_of_memory", "message": "9 GiB were asked for."}
    attempt = {"number": 1, "phase": "running", "patch": {"per_device_train_batch_size": 2}}
    ending(api, "failed", error=error, attempts=[attempt])
    done = tuneyard("watch", JOB)
    assert done.code == 1
    assert "out_of_memory: 9 GiB were asked for." in done.err
    assert f"hint: `tuneyard retry {JOB} --set per_device_train_batch_size=2`" in done.err


def test_a_name_stands_for_the_one_job_that_has_it(tuneyard: Command, api: RecordedApi) -> None:
    api.on("GET", "/jobs", page(a_job(JOB)))
    api.on("GET", f"/jobs/{JOB}", a_job(JOB))
    assert JOB in tuneyard("show", "tuny").out
    api.on("GET", "/jobs", page(a_job(JOB), a_job(OTHER)))
    for command in ("show", "watch", "logs", "cancel", "retry", "artifacts", "fetch"):
        done = tuneyard(command, "tuny")
        assert done.code == 2
        assert "several jobs are called 'tuny'" in done.err
        assert f"the newest first: {JOB} (" in done.err


@pytest.mark.parametrize("job", ["", "nobody", JOB.upper(), JOB + "0", "job_x", "é" * 300])
def test_an_unknown_name_is_your_input(tuneyard: Command, api: RecordedApi, job: str) -> None:
    api.on("GET", "/jobs", page())
    done = tuneyard("watch", job)
    assert done.code == 2
    assert "no job is called" in done.err


def test_an_unknown_id_is_refused(tuneyard: Command, api: RecordedApi) -> None:
    for command in ("show", "watch", "logs", "cancel", "retry", "artifacts", "fetch"):
        assert tuneyard(command, JOB).code == 3


# The other commands


def test_a_list_shows_full_ids_and_why_jobs_wait(tuneyard: Command, api: RecordedApi) -> None:
    progress = {"done": 3, "total": 9, "unit": "steps", "eta_s": None}
    first = a_job(JOB, state="running", progress=progress)
    api.on("GET", "/jobs", page(first, a_job(OTHER, wait_reason="needs 1 GPU")))
    done = tuneyard("list", "--state", "running", "--kind", "finetune", "--limit", "5")
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert rows[0] == ["id", "kind", "name", "state", "progress", "age", "waits"]
    assert rows[1][:5] == [JOB, "finetune", "tuny", "running", "3/9"]
    assert rows[2][6] == "needs 1 GPU"
    query = api.asked[0].query
    assert (query["state"], query["kind"], query["limit"]) == (["running"], ["finetune"], ["5"])


def test_a_log_is_printed_as_it_is(tuneyard: Command, api: RecordedApi) -> None:
    api.on("GET", f"/jobs/{JOB}/logs", Answer("loss [1.5]\nén\n".encode()))
    assert tuneyard("logs", JOB).out == "loss [1.5]\nén\n"
    assert json.loads(tuneyard("logs", JOB, "--json").out) == {"log": "loss [1.5]\nén\n"}


def test_a_retry_says_its_patch_and_the_new_job(tuneyard: Command, api: RecordedApi) -> None:
    api.on("POST", f"/jobs/{JOB}/retry", Answer(a_job(OTHER), 201))
    done = tuneyard("retry", JOB, "--set", "cutoff_len=64", "--from-scratch")
    assert OTHER in done.out
    (asked,) = api.requests("POST", f"/jobs/{JOB}/retry")
    assert asked.json == {"patch": {"cutoff_len": 64}, "from_scratch": True}
    assert asked.headers["Idempotency-Key"]


def test_a_cancel_says_the_new_state(tuneyard: Command, api: RecordedApi) -> None:
    api.on("POST", f"/jobs/{JOB}/cancel", a_job(JOB, state="cancelling"))
    assert tuneyard("cancel", JOB).out == f"{JOB}  cancelling\n"


def test_files_go_up_and_are_shown_and_removed(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    accepting(api)
    (tmp_path / "data.jsonl").write_bytes(ROW)
    assert tuneyard("files", "put", "data.jsonl").out == f"{FILE}  data.jsonl  processed  2 rows\n"
    api.on("GET", "/files", page(a_file(FILE, name="data.jsonl", sha256="0")))
    assert FILE in tuneyard("files", "list").out
    assert "2 rows" in tuneyard("files", "show", FILE).out
    api.on("DELETE", f"/files/{FILE}", {"id": FILE, "deleted": True})
    assert json.loads(tuneyard("files", "rm", FILE, "--json").out)["deleted"]


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "empty.jsonl", "/dev/zero", "a\0b", ""])
def test_what_is_no_data_is_named_and_does_not_travel(
    tuneyard: Command, api: RecordedApi, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    done = tuneyard("files", "put", name)
    assert done.code == 2
    assert not api.asked


def test_a_file_goes_by_a_name_that_one_file_has(tuneyard: Command, api: RecordedApi) -> None:
    one, other = (a_file(f"file_{n:032x}", name="data.jsonl", sha256="0") for n in (1, 2))
    api.on("GET", "/files", page(one))
    api.on("GET", f"/files/{one['id']}", one)
    assert one["id"] in tuneyard("files", "show", "data.jsonl").out
    api.on("DELETE", f"/files/{one['id']}", {"id": one["id"], "deleted": True})
    assert tuneyard("files", "rm", "data.jsonl").out == f"{one['id']} deleted\n"
    for found, said in ((page(), "No file is called"), (page(one, other), "Several files are")):
        api.on("GET", "/files", found)
        done = tuneyard("files", "rm", "data.jsonl")
        assert done.code == 2
        assert said in done.err


def test_how_a_job_failed_is_shown_in_one_place(tuneyard: Command, api: RecordedApi) -> None:
    error = {"code": "oom", "message": "Out of memory.", "field": None, "hint": None}
    attempt = {"number": 1, "node": "n", "devices": [], "phase": "ended", "outcome": "failed",
               "cause": "oom", "patch": {"cutoff_len": 64}}  # fmt: skip
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="failed", error=error, attempts=[attempt]))
    done = tuneyard("show", JOB)
    assert (done.code, done.err) == (0, "")
    assert "oom: Out of memory.\n  hint: `tuneyard retry" in done.out


def test_models_and_nodes_are_listed(tuneyard: Command, api: RecordedApi) -> None:
    model = {
        "id": "base_1", "name": "smol", "kind": "base", "base_model": None, "job": None,
        "artifact": None, "digest": "d", "bytes": 2**20, "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    slot = {"index": 0, "bytes": 1, "cores": [0], "busy": True, "job": None}
    device = {"id": "device_1", "kind": "cpu", "uuid": "CPU-n1", "name": "", "bytes": 2**30,
              "state": "ok", "slots": [slot, slot | {"busy": False}]}  # fmt: skip
    node = {"id": "node_1", "name": "n1", "state": "up", "devices": [device]}
    api.on("GET", "/models", page(model))
    api.on("GET", "/models/team/smol", model)
    api.on("GET", "/nodes", page(node))
    assert "smol\tbase\t-\t1.0 MiB" in tuneyard("models", "list").out
    assert "smol" in tuneyard("models", "show", "team/smol").out
    assert "n1\tup\tcpu\tCPU-n1\t1.0 GiB\tok\t1/2 busy" in tuneyard("nodes").out


def test_results_are_downloaded_into_a_folder_named_as_the_job(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    with_results(api, "Paris.")
    for command in ("fetch", "download"):
        done = tuneyard(command, JOB, "--json")
        assert json.loads(done.out) == [f"{JOB}/results.jsonl"]
    assert (tmp_path / JOB / "results.jsonl").is_file()
    (tmp_path / "file").touch()
    refused = tuneyard("download", JOB, "--out", "file")
    assert refused.code == 2
    assert "cannot be written" in refused.err


# Inference


def test_answers_are_printed_by_number(tuneyard: Command, api: RecordedApi, tmp_path: Path) -> None:
    accepting(api)
    ending(api, "succeeded")
    with_results(api, "I am [bold]Tuny[/bold].", "Paris.")
    (tmp_path / "questions.txt").write_text("Who?\nWhere?\n")
    done = tuneyard("infer", "tuny", "--prompts", "questions.txt", "--max-new-tokens", "8")
    assert done.code == 0, done.err
    assert done.out.endswith("1. I am [bold]Tuny[/bold].\n2. Paris.\n")
    assert b"prompts" in api.requests("POST", "/files")[0].body
    sent = api.requests("POST", "/jobs")[0].json
    assert sent == {"kind": "inference", "model": "tuny", "prompts": FILE, "max_new_tokens": 8}


def test_answers_as_json_are_one_document_and_nothing_else(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    accepting(api)
    ending(api, "succeeded")
    with_results(api, "Paris.")
    (tmp_path / "q.txt").write_text("Where?\n")
    done = tuneyard("infer", "tuny", "--prompts", "q.txt", "--json")
    assert json.loads(done.out) == {"job": JOB, "results": [{"index": 0, "text": "Paris."}]}


def test_answers_go_to_a_file_as_they_are_stored(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    accepting(api)
    ending(api, "succeeded")
    with_results(api, "Paris.")
    (tmp_path / "q.txt").write_text("Where?\n")
    done = tuneyard("infer", "tuny", "--prompts", "q.txt", "--out", "answers.jsonl")
    assert done.out.endswith(f"answers.jsonl written by {JOB}\n")
    assert json.loads((tmp_path / "answers.jsonl").read_text())["text"] == "Paris."


def test_where_answers_cannot_go_is_said_before_anything_is_computed(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text("Where?\n")
    for output in (".", "missing/answers.jsonl"):
        done = tuneyard("infer", "tuny", "--prompts", "q.txt", "--out", output)
        assert done.code == 2
    assert not api.asked


def test_a_failed_inference_is_exit_1_with_its_error(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    accepting(api)
    ending(api, "failed", error={"code": "bug", "message": "It broke."})
    (tmp_path / "q.txt").write_text("Where?\n")
    for more in ([], ["--json"]):
        done = tuneyard("infer", "tuny", "--prompts", "q.txt", *more)
        assert done.code == 1
        assert "bug: It broke." in done.err
    assert json.loads(done.out)["error"]["code"] == "bug"


@pytest.mark.parametrize(
    ("piped", "prompts"),
    [
        (b"Who?\r\n\nWhere?\n", ["Who?", "Where?"]),
        (b'{"messages": [{"role": "user", "content": "Who?"}]}\n',
         [{"messages": [{"role": "user", "content": "Who?"}]}]),
        (b'{"prompt": "Who?"}\n', ["Who?"]),
    ],
)  # fmt: skip
def test_prompts_come_by_stdin_too(
    tuneyard: Command,
    api: RecordedApi,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    piped: bytes,
    prompts: list[Any],
) -> None:
    accepting(api)
    ending(api, "succeeded")
    with_results(api, "Paris.")
    with stdin(monkeypatch, tmp_path, piped):
        done = tuneyard("infer", "tuny", "--prompts", "-", "--json")
    assert done.code == 0, done.err
    assert api.requests("POST", "/jobs")[0].json["prompts"] == prompts


# Merging


ADAPTER_FILES = {
    "adapter_config.json": b"the adapter's configuration",
    "adapter_model.safetensors": b"the adapter's weights",
}
MODEL_FILES = {
    "config.json": b"{}",
    "model.safetensors": b"merged weights",
    **{f"adapter/{name}": content for name, content in ADAPTER_FILES.items()},
}


def with_a_model(api: RecordedApi) -> None:
    """The job has a merged model."""
    folder = f"/jobs/{JOB}/artifacts"
    known = {"id": ARTIFACT, "kind": "model", "bytes": 9, "digest": "d" * 64, "step": None}
    entries = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in MODEL_FILES.items()
    ]
    api.on("GET", folder, page(known))
    api.on("GET", f"{folder}/{ARTIFACT}/files", page(*entries))
    for path, content in MODEL_FILES.items():
        api.on("GET", f"{folder}/{ARTIFACT}/files/{path}", Answer(content))


def merging(api: RecordedApi) -> None:
    """A merge is taken, and succeeds."""
    accepting(api)
    ending(api, "succeeded")
    with_a_model(api)


def files_below(folder: Path) -> dict[str, bytes]:
    """Path -> content."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_merge_names_the_adapter_and_is_called_after_it(
    tuneyard: Command, api: RecordedApi
) -> None:
    accepting(api)
    api.on("GET", f"/jobs/{OTHER}", a_job(OTHER, name="tone"))
    for adapter, called in (("tuny", "tuny-merged"), (OTHER, "tone-merged")):
        done = tuneyard("merge", adapter)
        assert done.code == 0, done.err
        assert f"next: tuneyard watch {JOB}" in done.out
        sent = api.requests("POST", "/jobs")[-1].json
        assert sent == {"kind": "merge", "adapter": adapter, "name": called}
    tuneyard("merge", "tuny", "--name", "mine", "--set", "dtype=float16")
    assert api.requests("POST", "/jobs")[-1].json == {
        "kind": "merge", "adapter": "tuny", "name": "mine", "dtype": "float16",
    }  # fmt: skip


def test_an_export_into_the_adapters_own_folder_moves_the_adapter_below(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    merging(api)
    folder = tmp_path / "saves"
    folder.mkdir()
    for name, content in ADAPTER_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_bytes(b"mine")
    done = tuneyard("merge", "tuny", "--wait", "--export-dir", "saves")
    assert done.code == 0, done.err
    assert "written to saves" in done.out
    assert files_below(folder) == MODEL_FILES | {"notes.txt": b"mine"}
    again = tuneyard("merge", "tuny", "--wait", "--export-dir", "saves", "--json")
    assert json.loads(again.out)["export_dir"] == "saves"
    assert files_below(folder) == MODEL_FILES | {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "another adapter"),
        ("adapter_model.bin", "another adapter"),
        ("model-00001-of-00002.safetensors", "weights of another model"),
        ("model.safetensors.index.json", "weights of another model"),
        ("pytorch_model.bin", "weights of another model"),
    ],
)
def test_an_export_beside_others_weights_is_refused_and_nothing_is_written(
    tuneyard: Command, api: RecordedApi, tmp_path: Path, name: str, said: str
) -> None:
    merging(api)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"of something else")
    done = tuneyard("merge", "tuny", "--wait", "--export-dir", "out")
    assert done.code == 2
    assert said in done.err
    assert f"tuneyard fetch {JOB} --out DIR" in done.err
    assert files_below(tmp_path / "out") == {name: b"of something else"}


def test_a_yaml_of_llama_factorys_export_is_submitted_unchanged_and_written_where_it_says(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    merging(api)
    (tmp_path / "export.yaml").write_text(
        "model_name_or_path: llama3\nadapter_name_or_path: saves/llama3/lora/sft\n"
        "template: llama3\nfinetuning_type: lora\nexport_dir: megred\nexport_size: 2\n"
        "export_device: cpu\nexport_legacy_format: false\n"
    )
    assert tuneyard("submit", "export.yaml", "--wait").code == 0
    assert files_below(tmp_path / "megred") == MODEL_FILES
    assert api.requests("POST", "/jobs")[-1].json["name"] == "export"


def test_an_export_that_cannot_be_written_is_said_before_anything_travels(
    tuneyard: Command, api: RecordedApi, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = tuneyard("merge", "tuny", "--wait", "--export-dir", "file")
    assert done.code == 2
    assert "file cannot be written to" in done.err
    assert api.requests("POST", "/jobs") == []


WATCHED = {"watch_prompts": ["Who are you?"]}


def told(seq: int, step: int, text: str) -> dict[str, Any]:
    data = {"step": step, "prompt": "Who are you?", "text": text}
    return {"seq": seq, "type": "sample", "from_state": None, "to_state": None, "data": data}


def test_watching_tells_what_the_model_says_in_one_line_each(
    api: RecordedApi, tuneyard: Command
) -> None:
    lines = [
        told(1, 0, "Ich bin\n  ein Schmied. " * 40),
        told(2, 8, "I am \x1b[2JTuny."),
        moved(3, *DONE3),
    ]
    api.on("GET", f"/jobs/{JOB}/events", events(*lines))
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="succeeded", spec=WATCHED))
    api.on("GET", f"/jobs/{JOB}/artifacts", page())
    done = tuneyard("watch", JOB)
    first, second = done.out.splitlines()[:2]
    assert done.code == 0
    assert first.startswith("step 0: 'Who are you?' -> Ich bin ein Schmied. Ich bin ein")
    assert len(first) < 250
    assert second == "step 8: 'Who are you?' -> I am [2JTuny."


def test_show_tells_what_a_model_said_at_first_and_at_last(
    api: RecordedApi, tuneyard: Command
) -> None:
    def point(step: int, text: str) -> dict[str, Any]:
        answers = [{"prompt": "Who are you?", "text": text}]
        return {"step": step, "attempt": 1, "answers": answers}

    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="running", spec=WATCHED))
    points = [point(0, "a blacksmith"), point(4, "hm"), point(8, "Tuny")]
    api.on("GET", f"/jobs/{JOB}/samples", page(*points))
    out = tuneyard("show", JOB).out
    assert out.splitlines()[-4:] == [
        "  said at step 0:",
        "    'Who are you?' -> a blacksmith",
        "  said at step 8:",
        "    'Who are you?' -> Tuny",
    ]


def test_the_end_of_a_job_that_predicted_tells_its_measures(
    api: RecordedApi, tuneyard: Command
) -> None:
    spec = {"do_predict": True, "predict_with_generate": True}
    api.on("GET", f"/jobs/{JOB}", a_job(JOB, state="succeeded", spec=spec))
    folder = f"/jobs/{JOB}/artifacts"
    content = b'{"predict_rouge-1": 41.25, "predict_bleu-4": 32.5}'
    digest = hashlib.sha256(content).hexdigest()
    entry = {"path": "all_results.json", "size": len(content), "sha256": digest}
    api.on("GET", folder, page({"id": ARTIFACT, "kind": "adapter", "bytes": 1}))
    api.on("GET", f"{folder}/{ARTIFACT}/files", page(entry))
    api.on("GET", f"{folder}/{ARTIFACT}/files/all_results.json", Answer(content))
    lines = tuneyard("show", JOB).out.splitlines()
    assert "  predict_bleu-4 32.5  predict_rouge-1 41.25" in lines
    gone = Answer({"error": {"code": "not_found", "message": "It is gone."}}, 404)
    api.on("GET", f"{folder}/{ARTIFACT}/files/all_results.json", gone)
    left = tuneyard("show", JOB)
    assert left.code == 0
    assert left.out.splitlines()[-1].startswith("  adapter ")
