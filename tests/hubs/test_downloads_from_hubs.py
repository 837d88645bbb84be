"""Downloads by the real clients of both hubs, from a stub of them that stalls, lies and breaks."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked_runners import DownloadRunners, download_runners
from support.hub_files import ALPACA, CONFIG, REPO, WANTED, WEIGHTS, a_model, weights
from support.stub_hubs import StubHubs, git_sha1, running_hubs
from support.yards import wait_for

from tuneyard.specs.exits import ExitCode
from tuneyard.store.folder import verify_folder

HUBS = ["modelscope", "huggingface"]


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[StubHubs, DownloadRunners]]:
    with running_hubs() as hubs, download_runners(hubs.environment()) as runners:
        yield hubs, runners


@pytest.fixture
def hubs(both: tuple[StubHubs, DownloadRunners]) -> StubHubs:
    both[0].forget()
    return both[0]


@pytest.fixture
def runners(both: tuple[StubHubs, DownloadRunners]) -> DownloadRunners:
    return both[1]


def asked(tmp_path: Path, hub: str, **more: object) -> dict[str, object]:
    source = f"{hub}:{REPO}" if hub else REPO
    return {"source": source, "cache": str(tmp_path / "cache"), **more}


@pytest.mark.parametrize("hub", HUBS)
def test_only_what_transformers_needs_comes_pinned_to_a_commit(tmp_path, hubs, runners, hub):
    hubs.repos["model", REPO] = a_model()
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.DONE
    manifest = verify_folder(ran.workdir / "output")
    assert {entry["path"] for entry in manifest["files"]} == WANTED
    assert (manifest["hub"], manifest["repo"], manifest["revision"]) == (hub, REPO, hubs.commit)
    assert (manifest["source"], manifest["kind"]) == (f"{hub}:{REPO}", "base_model")
    assert hubs.gets("pytorch_model.bin") == []
    done = [event for event in ran.of_type("progress") if event["unit"] == "bytes"]
    total = sum(entry["size"] for entry in manifest["files"])
    assert (done[-1]["done"], done[-1]["total"]) == (total, total)


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize(
    ("name", "how"),
    [(WEIGHTS, "stall"), (WEIGHTS, "truncate"), (WEIGHTS, "wrong"), (WEIGHTS, "html"),
     ("config.json", "wrong"), ("config.json", "html")],
)  # fmt: skip
def test_bytes_that_go_wrong_once_end_right(tmp_path, hubs, runners, hub, how, name):
    hubs.repos["model", REPO] = a_model()
    hubs.misbehave(name, how)
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    if ran.code != ExitCode.DONE:
        assert ran.code == ExitCode.HUB_UNREACHABLE
        assert ran.failure["cause"] == "hub_unreachable"
        assert not (ran.workdir / "output").exists()
        ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.DONE
    verify_folder(ran.workdir / "output")
    for each in WANTED:
        content = (ran.workdir / "output" / each).read_bytes()
        assert content == hubs.repos["model", REPO][each]


@pytest.mark.parametrize("hub", HUBS)
def test_bytes_that_stay_wrong_are_never_taken(tmp_path, hubs, runners, hub):
    hubs.repos["model", REPO] = a_model()
    hubs.misbehave(WEIGHTS, "wrong", times=100)
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.HUB_UNREACHABLE
    assert WEIGHTS in ran.failure["evidence"]
    assert not (ran.workdir / "output").exists()
    hubs.misbehave(WEIGHTS, "right", times=0)
    again = runners.run(tmp_path, asked(tmp_path, hub))
    assert again.code == ExitCode.DONE
    content = (again.workdir / "output" / WEIGHTS).read_bytes()
    assert content == hubs.repos["model", REPO][WEIGHTS]


@pytest.mark.parametrize("hub", HUBS)
def test_a_killed_download_goes_on_where_it_was(tmp_path, hubs, runners, hub):
    large = weights(30_000_000)  # Hugging Face's client writes in pieces of 10 MiB
    hubs.repos["model", REPO] = a_model(**{WEIGHTS: large})
    hubs.misbehave(WEIGHTS, "slow")
    hubs.piece_s = 0.004
    runner = runners.start(tmp_path, asked(tmp_path, hub))
    wait_for(
        lambda: partial_bytes(tmp_path / "cache") > 10_000_000,
        within_s=20,
        what="10 MB of the model",
    )
    assert runner.kill() < 0
    assert not (runner.workdir / "output").exists()
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.DONE
    assert (ran.workdir / "output" / WEIGHTS).read_bytes() == large
    first, *_, last = hubs.gets(WEIGHTS)
    assert first.range is None
    assert last.range is not None
    assert int(last.range.removeprefix("bytes=").partition("-")[0]) > 9_000_000


def test_a_stop_ends_a_download_at_once(tmp_path, hubs, runners):
    hubs.repos["model", REPO] = a_model()
    hubs.misbehave(WEIGHTS, "slow")
    hubs.piece_s = 2.0
    runner = runners.start(tmp_path, asked(tmp_path, "modelscope"))
    wait_for(lambda: hubs.gets(WEIGHTS), within_s=20, what="a request for the weights")
    began = time.monotonic()
    os.kill(runner.pid, signal.SIGTERM)
    assert runner.end().code == ExitCode.STOPPED_WITHOUT
    assert time.monotonic() - began < 2.0


def test_a_stall_that_the_client_does_not_see_is_given_up(tmp_path, hubs, runners):
    hubs.repos["model", REPO] = a_model()
    hubs.misbehave(WEIGHTS, "slow")
    hubs.piece_s = 0.9  # within the client's own limit of a second, piece by piece
    ran = runners.run(tmp_path, asked(tmp_path, "huggingface", stall_s=0.5))
    assert ran.code == ExitCode.HUB_UNREACHABLE
    assert "no byte came for 0.5 s" in ran.failure["evidence"]


def partial_bytes(cache: Path) -> int:
    found = [each for each in (cache / "downloads").rglob("*") if each.is_file()]
    return max((each.stat().st_size for each in found), default=0)


@pytest.mark.parametrize("hub", HUBS)
def test_a_poisoned_folder_of_an_earlier_download_is_found_out(tmp_path, hubs, runners, hub):
    hubs.repos["model", REPO] = a_model()
    first = runners.run(tmp_path, asked(tmp_path, hub))
    (folder,) = (tmp_path / "cache" / "downloads").iterdir()
    for name in (WEIGHTS, "config.json"):
        size = (folder / name).stat().st_size
        (folder / name).unlink()
        (folder / name).write_bytes(b"x" * size)
    again = runners.run(tmp_path, asked(tmp_path, hub))
    assert again.code == ExitCode.DONE
    assert verify_folder(again.workdir / "output") == verify_folder(first.workdir / "output")


@pytest.mark.parametrize("hub", HUBS)
def test_the_same_again_asks_for_no_bytes(tmp_path, hubs, runners, hub):
    hubs.repos["model", REPO] = a_model()
    first = runners.run(tmp_path, asked(tmp_path, hub))
    hubs.asked.clear()
    inputs = {"known": first.workdir / "output"}
    elsewhere = asked(tmp_path, hub) | {"cache": str(tmp_path / "other")}
    for arguments, known in ((asked(tmp_path, hub), {}), (elsewhere, inputs)):
        ran = runners.run(tmp_path, arguments, inputs=known)
        assert ran.code == ExitCode.DONE
        assert verify_folder(ran.workdir / "output") == verify_folder(first.workdir / "output")
        assert [each for each in hubs.asked if each.path.endswith(tuple(WANTED))] == []


def test_the_caches_of_the_clients_are_adopted_by_link_after_a_hash_check(tmp_path, hubs, runners):
    files = hubs.repos["model", REPO] = a_model()
    theirs = tmp_path / "hf" / "hub" / "models--team--tiny-llama" / "blobs"
    theirs.mkdir(parents=True)
    blob = theirs / hashlib.sha256(files[WEIGHTS]).hexdigest()
    blob.write_bytes(files[WEIGHTS])
    poisoned = theirs / git_sha1(files["config.json"])
    poisoned.write_bytes(b"x" * len(files["config.json"]))
    ran = runners.run(tmp_path, asked(tmp_path, "huggingface", caches=[str(tmp_path / "hf")]))
    assert ran.code == ExitCode.DONE
    assert os.path.samefile(ran.workdir / "output" / WEIGHTS, blob)
    assert hubs.gets(WEIGHTS) == []
    assert (ran.workdir / "output" / "config.json").read_bytes() == files["config.json"]
    old = tmp_path / "ms" / "hub" / "team" / "tiny-llama"
    old.mkdir(parents=True)
    (old / WEIGHTS).write_bytes(files[WEIGHTS])
    arguments = asked(tmp_path, "modelscope", caches=[str(tmp_path / "ms")])
    ran = runners.run(tmp_path, arguments)
    assert os.path.samefile(ran.workdir / "output" / WEIGHTS, old / WEIGHTS)
    assert hubs.gets(WEIGHTS) == []


def test_two_at_once_are_one_download(tmp_path, hubs, both):
    hubs.repos["model", REPO] = a_model()
    hubs.misbehave(WEIGHTS, "slow", times=2)
    hubs.piece_s = 0.1
    with download_runners(hubs.environment()) as others:
        running = both[1].start(tmp_path / "one", asked(tmp_path, "huggingface"))
        wait_for(lambda: hubs.gets(WEIGHTS), within_s=20, what="a request for the weights")
        second = others.start(tmp_path / "two", asked(tmp_path, "huggingface"))
        assert (running.end().code, second.end().code) == (0, 0)
    assert len(hubs.gets(WEIGHTS)) == 1


@pytest.mark.parametrize("hub", HUBS)
def test_a_gated_model_names_its_licence_page_and_where_the_token_goes(
    tmp_path, hubs, runners, hub
):
    hubs.repos["model", REPO] = a_model()
    hubs.gated.add(REPO)
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.BAD_SPEC
    page = f"{hubs.url}/models/{REPO}" if hub == "modelscope" else f"{hubs.url}/{REPO}"
    assert f"accept it at {page}," in ran.failure["evidence"]
    assert "_TOKEN_" in ran.failure["evidence"]


@pytest.mark.parametrize("hub", HUBS)
def test_a_token_from_its_file_opens_a_gated_model_and_is_written_nowhere(tmp_path, hubs, hub):
    hubs.repos["model", REPO] = a_model()
    hubs.gated.add(REPO)
    (tmp_path / "token").write_text("secret-abc\n")
    name = {"modelscope": "MODELSCOPE_API_TOKEN_FILE", "huggingface": "HF_TOKEN_PATH"}[hub]
    with download_runners(hubs.environment() | {name: str(tmp_path / "token")}) as runners:
        ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.DONE
    assert {each.token for each in hubs.gets(WEIGHTS)} == {"Bearer secret-abc"}
    for path in (tmp_path / "work-0").rglob("*"):
        assert not path.is_file() or b"secret-abc" not in path.read_bytes()


@pytest.mark.parametrize("hub", [*HUBS, ""])
def test_an_unknown_model_is_final_and_says_where_it_was_looked_for(tmp_path, hubs, runners, hub):
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.BAD_SPEC
    assert f"There is no model {REPO} on " in ran.failure["evidence"]
    names = {"modelscope": ["ModelScope"], "huggingface": ["Hugging Face"]}
    for name in names.get(hub, ["ModelScope", "Hugging Face"]):
        assert name in ran.failure["evidence"]


@pytest.mark.parametrize("hub", HUBS)
def test_a_wrong_revision_is_final(tmp_path, hubs, runners, hub):
    hubs.repos["model", REPO] = a_model()
    ran = runners.run(tmp_path, asked(tmp_path, hub, revision="v9"))
    assert ran.code == ExitCode.BAD_SPEC
    assert "has no revision 'v9'" in ran.failure["evidence"]
    if hub == "modelscope":
        assert "it has master, v1" in ran.failure["evidence"]


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize("listing", ["html", "503"])
def test_a_hub_that_answers_no_hub_is_tried_again(tmp_path, hubs, runners, hub, listing):
    hubs.repos["model", REPO] = a_model()
    hubs.listing_is = listing
    ran = runners.run(tmp_path, asked(tmp_path, hub))
    assert ran.code == ExitCode.HUB_UNREACHABLE
    assert "could not be used" in ran.failure["evidence"]
    assert "Traceback" not in (ran.workdir / "log").read_text()


def test_the_second_hub_stands_in_for_the_first(tmp_path, hubs, runners):
    hubs.repos["model", REPO] = a_model()
    order = {"hubs": ["huggingface", "modelscope"]}
    ran = runners.run(tmp_path, asked(tmp_path, "", **order))
    assert verify_folder(ran.workdir / "output")["hub"] == "huggingface"
    ran = runners.run(tmp_path, asked(tmp_path, ""))
    assert verify_folder(ran.workdir / "output")["hub"] == "modelscope"


def test_too_little_disk_is_said_before_a_byte_is_asked_for(tmp_path, hubs, runners):
    hubs.repos["model", REPO] = a_model()
    ran = runners.run(tmp_path, asked(tmp_path, "huggingface", disk_floor_bytes=2**60))
    assert ran.code == ExitCode.DISK_FULL
    assert "needs 0.6 MB, and 0.0 MB are free in" in ran.failure["evidence"]
    assert hubs.gets(WEIGHTS) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"../../escape.json": b"{}"}, "lists a file outside itself"),
        ({"/etc/cron.d/x.json": b"{}"}, "lists a file outside itself"),
        ({WEIGHTS: weights()[:-8]}, "was it cut off?"),
        ({WEIGHTS: b"PK\x03\x04" + b"0" * 100_000}, "cannot be used: its header"),
        ({"config.json": json.dumps(CONFIG | {"auto_map": {"a": "b"}}).encode()}, "auto_map"),
    ],
)
def test_hostile_repositories_are_refused_in_a_sentence(tmp_path, hubs, runners, files, said):
    hubs.repos["model", REPO] = a_model(**files)
    ran = runners.run(tmp_path, asked(tmp_path, "huggingface"))
    assert ran.code == ExitCode.BAD_SPEC
    assert said in ran.failure["evidence"]
    assert not (ran.workdir / "output").exists()


def test_a_model_of_pickles_alone_is_refused(tmp_path, hubs, runners):
    files = a_model()
    del files[WEIGHTS]
    hubs.repos["model", REPO] = files
    ran = runners.run(tmp_path, asked(tmp_path, "modelscope"))
    assert ran.code == ExitCode.BAD_SPEC
    assert "has pickled weights alone (original/consolidated.00.pth)" in ran.failure["evidence"]


@pytest.mark.parametrize("hub", HUBS)
def test_a_data_set_comes_with_what_can_be_trained_on(tmp_path, hubs, runners, hub):
    hubs.repos["dataset", "team/rows"] = {
        "README.md": b"rows",
        "dataset_infos.json": b"{}",
        "load.py": b"raise SystemExit",
        "alpaca_zh.json": ALPACA,
        "data/more.csv": b"instruction,output\nhi,there\n",
        "data/broken.jsonl": b'{"answer": "hi"}\n',
        "data/rows.parquet": b"PAR1",
    }
    arguments = {"source": f"{hub}:team/rows", "what": "dataset", "cache": str(tmp_path / "c")}
    ran = runners.run(tmp_path, arguments)
    assert ran.code == ExitCode.DONE
    manifest = verify_folder(ran.workdir / "output")
    found = {each["path"]: each for each in manifest["data_files"]}
    assert found.keys() == {
        "alpaca_zh.json", "data/more.csv", "data/broken.jsonl", "data/rows.parquet"
    }  # fmt: skip
    assert [found[name]["rows"] for name in ("alpaca_zh.json", "data/more.csv")] == [1, 1]
    assert found["data/broken.jsonl"]["problem"]["line"] == 1
    assert "pyarrow" in found["data/rows.parquet"]["problem"]["message"]
    one = runners.run(tmp_path, arguments | {"data_file": "alpaca_zh.json"})
    assert len(verify_folder(one.workdir / "output")["files"]) == 1
    none = runners.run(tmp_path, arguments | {"data_file": "nope.json"})
    assert none.code == ExitCode.BAD_SPEC
    assert "it has alpaca_zh.json, data/broken.jsonl" in none.failure["evidence"]
