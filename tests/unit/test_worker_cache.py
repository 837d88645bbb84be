"""The node's cache: least recently used goes, what is pinned or locked stays, nothing is half."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneyard.specs.runner import INPUTS
from tuneyard.store.folder import copy_folder, manifest_digest, publish_folder, read_manifest
from tuneyard.workers import cache
from tuneyard.workers.cache import Entry, locked


def an_entry(folder: Path, letter: str, *, size: int = 10, used_at: float = 1.0) -> Path:
    path = folder / (letter * 64)
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * size)
    os.utime(path, (used_at, used_at))
    return path


def no_pins() -> set[str]:
    return set()


def names(folder: Path) -> set[str]:
    return {path.name[0] for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_least_recently_used_goes_until_the_rest_fits(tmp_path):
    for letter, used_at in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        an_entry(tmp_path, letter, used_at=used_at)
    gone = cache.make_room(tmp_path, wanted_bytes=0, max_bytes=15, pins=no_pins)
    assert [entry.name[0] for entry in gone] == ["b", "c"]
    assert names(tmp_path) == {"a"}


def test_what_an_attempt_uses_or_fetches_stays(tmp_path):
    folder, workdir = tmp_path / "cache", tmp_path / "work"
    used, fetched = an_entry(folder, "a"), an_entry(folder, "b")
    (workdir / INPUTS).mkdir(parents=True)
    (workdir / INPUTS / "model").symlink_to(used)
    with locked(folder, fetched.name):
        pins = lambda: cache.pinned([workdir])  # noqa: E731 - short
        assert cache.make_room(folder, wanted_bytes=2**62, max_bytes=0, pins=pins) == []
    (gone,) = cache.make_room(folder, wanted_bytes=2**62, max_bytes=0, pins=pins)
    assert gone.name == fetched.name
    assert used.is_dir()


def test_one_that_is_pinned_at_the_last_moment_stays(tmp_path):
    entry = an_entry(tmp_path, "a")
    asked = iter([set(), {entry.name}, {entry.name}, {entry.name}])
    assert cache.make_room(tmp_path, wanted_bytes=0, max_bytes=0, pins=lambda: next(asked)) == []
    assert entry.is_dir()


def test_downloads_that_are_running_stay_and_old_ones_go(tmp_path):
    for key in ("one", "two"):
        (tmp_path / "downloads" / key).mkdir(parents=True)
        (tmp_path / "downloads" / key / "part").write_bytes(b"x")
    (tmp_path / ".locks").mkdir()
    with (tmp_path / ".locks" / "folder-one").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.make_room(tmp_path, wanted_bytes=2**62, max_bytes=None, pins=no_pins)
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["one"]


def test_a_folder_that_a_runner_made_is_adopted_once(tmp_path):
    digest = "d" * 64
    for number in (1, 2):
        made = tmp_path / "work" / f"output-{number}"
        made.mkdir(parents=True)
        (made / "weights").write_bytes(b"x")
        adopted = cache.adopt(tmp_path / "cache", made, digest)
        assert adopted == (number == 1)
    assert [entry.digest for entry in cache.entries(tmp_path / "cache")] == [digest]


def test_what_died_on_its_way_is_swept(tmp_path):
    for name in (".aside-old", ".aside-new", "downloads/old", "downloads/new"):
        (tmp_path / name).mkdir(parents=True)
        if name.endswith("old"):
            os.utime(tmp_path / name, (1.0, 1.0))
    cache.sweep(tmp_path, pins=no_pins)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["folder-old", "new"]
    assert [path.name for path in tmp_path.glob(".aside-*")] == [".aside-new"]


ENTRIES = st.lists(st.tuples(st.integers(0, 100), st.floats(0, 10), st.booleans()), max_size=8)


@given(ENTRIES, st.integers(0, 300))
def test_no_pinned_entry_goes_and_none_goes_without_need(wanted, max_bytes):
    found = [
        Entry(Path(f"{number:064x}"), size, used_at)
        for number, (size, used_at, _) in enumerate(wanted)
    ]
    pins = {entry.name for entry, (_, _, pin) in zip(found, wanted, strict=True) if pin}
    going = cache.over(found, max_bytes=max_bytes, pins=pins)
    assert not pins & {entry.name for entry in going}
    left = sum(entry.bytes for entry in found) - sum(entry.bytes for entry in going)
    stayed = [e for e in found if e not in going and e.name not in pins]
    assert left <= max_bytes or not stayed
    if going:
        assert left + going[-1].bytes > max_bytes
        assert all(going[-1].used_at <= entry.used_at for entry in stayed)


@pytest.mark.parametrize("name", ["downloads", ".locks", ".aside-1", "a" * 63])
def test_only_whole_entries_are_entries(tmp_path, name):
    (tmp_path / name).mkdir()
    assert cache.entries(tmp_path) == []


def test_an_adopted_output_is_found_where_it_was_and_stays_while_it_may_be_needed(tmp_path):
    workdir = tmp_path / "work"
    (workdir / ".aside").mkdir(parents=True)
    (workdir / ".aside" / "weights").write_bytes(b"weights")
    publish_folder(workdir / ".aside", workdir / "output", {})
    digest = manifest_digest(read_manifest(workdir / "output"))
    assert cache.adopt(tmp_path / "cache", workdir / "output", digest)
    # A worker that died after it publishes once more.
    copy_folder(workdir / "output", tmp_path / "stored", aside=tmp_path / "aside")
    assert (tmp_path / "stored" / "weights").read_bytes() == b"weights"
    assert cache.pinned([workdir]) == {digest}
