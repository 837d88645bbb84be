"""What the store promises, in a folder and on a real S3-compatible server alike."""

import errno
import gc
import hashlib
import itertools
import json
import logging
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from support.databases import TestDatabase
from support.object_stores import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectServer

from tuneyard.checks.models import model_facts
from tuneyard.specs.errors import NotFound
from tuneyard.specs.ids import new_id
from tuneyard.specs.settings import Settings
from tuneyard.store.bucket import Bucket
from tuneyard.store.disk import DiskStore
from tuneyard.store.folder import (
    FolderDamaged,
    manifest_digest,
    publish_folder,
    read_manifest,
    verify_folder,
)
from tuneyard.store.objects import ObjectStore
from tuneyard.store.remote import OtherContent, Store, StoreUnreachable, open_store
from tuneyard.workers.sweeping import remove_unrecorded

BIG_BYTES = 10 * 1024**2  # more than a block: on S3 it travels in parts
PREFIX = itertools.count()


@dataclass
class Stored:
    """A store, and what a stranger may do to it."""

    store: Store
    home: Path
    bucket: Bucket | None

    def made(self, **files: bytes) -> Path:
        """A published folder to be put."""
        number = len(list(self.home.glob("made-*")))
        aside = self.home / f"aside-{number}"
        contents = files or {"a.txt": b"alpha", "deep/b.bin": os.urandom(70_000), "empty": b""}
        for name, content in contents.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(content)
        publish_folder(aside, self.home / f"made-{number}", {"kind": "test"})
        return self.home / f"made-{number}"

    def put(self, **files: bytes) -> tuple[UUID, str, Path]:
        """A folder that lies in the store: its id, its digest, where it was made."""
        made, folder_id = self.made(**files), new_id()
        self.store.put_folder(made, "artifacts", folder_id)
        return folder_id, manifest_digest(read_manifest(made)), made

    def fetch(self, folder_id: UUID, digest: str) -> Path:
        """Fetch a folder; verified."""
        target = self.home / f"fetched-{new_id().hex}"
        aside = self.home / "fetching"
        try:
            self.store.fetch_folder("artifacts", folder_id, target, digest=digest, aside=aside)
        finally:
            assert not aside.exists()
        verify_folder(target)
        return target

    def harm(self, key: str, content: bytes | None) -> None:
        """Overwrite or remove an object behind the store's back."""
        if self.bucket is None:
            path = self.home / "store" / key
            path.unlink() if content is None else path.write_bytes(content)
        elif content is None:
            self.bucket.remove([key])
        else:
            self.bucket.write(key, content)

    def contents(self) -> set[str]:
        """All that lies there and is whole: place/id/… of each."""
        places = ("artifacts", "models", "files")
        if self.bucket is not None:
            return {f"{place}/{key}" for place in places for key in self.bucket.entries(place)}
        root = self.home / "store"
        found = [path for place in places for path in (root / place).rglob("*")]
        return {str(path.relative_to(root)) for path in found if path.is_file()}

    def ids(self) -> set[str]:
        """The ids of all that lies there."""
        return {key.split("/")[1] for key in self.contents()}


@pytest.fixture(params=["folder", "s3"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    """An empty store of each kind."""
    if request.param == "folder":
        return Stored(open_store(Settings(home=tmp_path)), tmp_path, None)
    return on_s3(request.getfixturevalue("object_server"), tmp_path)


@pytest.fixture
def s3(object_server: ObjectServer, tmp_path: Path) -> Stored:
    """An empty store on S3."""
    return on_s3(object_server, tmp_path)


def on_s3(server: ObjectServer, home: Path) -> Stored:
    store = open_store(Settings(home=home, **server.settings(f"store-{next(PREFIX)}/deep")))
    assert isinstance(store, ObjectStore)
    return Stored(store, home, store._bucket)


# Folders ----------------------------------------------------------------------------------------


def test_what_was_put_is_fetched_byte_for_byte(stored: Stored) -> None:
    big = os.urandom(BIG_BYTES)
    folder_id, digest, made = stored.put(**{"big.bin": big, "deep/er/small": b"s", "empty": b""})
    fetched = stored.fetch(folder_id, digest)
    assert (fetched / "big.bin").read_bytes() == big
    assert read_manifest(fetched) == read_manifest(made)


def test_a_folder_that_broke_off_is_not_there_and_goes_on_where_it_was(stored: Stored) -> None:
    made, folder_id = stored.made(a=b"first", b=b"second"), new_id()
    digest = manifest_digest(read_manifest(made))
    (made / "b").write_bytes(b"sEcond")
    with pytest.raises(FolderDamaged, match="b has changed"):
        stored.store.put_folder(made, "artifacts", folder_id)
    with pytest.raises(FileNotFoundError):
        stored.fetch(folder_id, digest)
    (made / "b").write_bytes(b"second")
    stored.store.put_folder(made, "artifacts", folder_id)
    assert (stored.fetch(folder_id, digest) / "b").read_bytes() == b"second"


def test_a_source_that_goes_away_is_said_to_be_gone(stored: Stored) -> None:
    made = stored.made(a=b"first", b=b"second")
    (made / "b").unlink()
    with pytest.raises(FileNotFoundError):
        stored.store.put_folder(made, "artifacts", new_id())


def test_putting_twice_is_one_put_and_other_content_is_refused(stored: Stored) -> None:
    folder_id, digest, made = stored.put(a=b"one")
    before = stored.contents()
    assert stored.store.put_folder(made, "artifacts", folder_id) == read_manifest(made)
    assert stored.contents() == before
    with pytest.raises(OtherContent):
        stored.store.put_folder(stored.made(a=b"two"), "artifacts", folder_id)
    assert (stored.fetch(folder_id, digest) / "a").read_bytes() == b"one"


def test_many_that_put_one_folder_at_once_leave_one_whole_folder(stored: Stored) -> None:
    made, folder_id = stored.made(**{f"f{i}": os.urandom(200_000) for i in range(5)}), new_id()
    ready = threading.Barrier(6)

    def put(_: int) -> object:
        ready.wait()
        return stored.store.put_folder(made, "artifacts", folder_id)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(put, range(6)))
    assert answers == [read_manifest(made)] * 6
    stored.fetch(folder_id, manifest_digest(read_manifest(made)))
    assert len(stored.contents()) == 6


def test_damage_is_found_on_the_way_and_nothing_is_left(stored: Stored) -> None:
    folder_id, digest, _ = stored.put(**{"a.txt": b"alpha"})
    for harm in (b"alphb", b"alph", None):
        stored.harm(f"artifacts/{folder_id.hex}/a.txt", harm)
        with pytest.raises((FolderDamaged, FileNotFoundError, StoreUnreachable)):
            stored.fetch(folder_id, digest)
        assert list(stored.home.glob("fetch*")) == []


def test_another_manifest_than_was_recorded_is_refused(stored: Stored) -> None:
    folder_id, _, _ = stored.put()
    with pytest.raises(FolderDamaged, match="manifest"):
        stored.fetch(folder_id, "ab" * 32)


def test_what_was_removed_is_gone_and_its_neighbour_is_not(stored: Stored) -> None:
    (gone, digest, _), (kept, kept_digest, _) = stored.put(), stored.put()
    for _ in range(2):
        stored.store.remove_folder("artifacts", gone)
    with pytest.raises(FileNotFoundError):
        stored.fetch(gone, digest)
    stored.fetch(kept, kept_digest)
    assert stored.ids() == {kept.hex}


def test_a_folder_can_be_looked_into_without_its_bulk(stored: Stored) -> None:
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "F32", "shape": [16, 16], "data_offsets": [i * 1024, (i + 1) * 1024],
        }
        for i in range(3)
    }  # fmt: skip
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + os.urandom(3 * 1024)
    files = {"config.json": b'{"num_hidden_layers": 3}', "model.safetensors": weights}
    folder_id, _, made = stored.put(**files)
    with stored.store.look_into("artifacts", folder_id) as folder:
        assert model_facts(folder) == model_facts(made)
        assert model_facts(folder)["linear_modules"] == ["up_proj"]
    with (
        pytest.raises(FileNotFoundError),
        stored.store.look_into("artifacts", new_id()),
    ):
        pass


# Files and ranges -------------------------------------------------------------------------------


def pieces_of(content: bytes, size: int = 1024**2) -> Iterator[bytes]:
    return (content[i : i + size] for i in range(0, len(content), size))


def test_a_file_is_stored_as_it_comes_with_its_hash(stored: Stored) -> None:
    content, file_id = os.urandom(BIG_BYTES), new_id()
    sha256 = hashlib.sha256(content).hexdigest()
    assert stored.store.put_file(pieces_of(content), file_id) == (BIG_BYTES, sha256)
    assert stored.store.fetch_file(file_id, stored.home / "out") == sha256
    assert (stored.home / "out").read_bytes() == content
    with stored.store.file_here(file_id) as path:
        assert path.read_bytes() == content
    with stored.store.file_here(new_id()) as path:
        assert not path.exists()
    empty = new_id()
    assert stored.store.put_file([], empty)[0] == 0
    stored.store.fetch_file(empty, stored.home / "empty")
    assert (stored.home / "empty").read_bytes() == b""


@pytest.mark.parametrize("after_bytes", [1, BIG_BYTES])
def test_of_an_upload_that_breaks_off_nothing_is_left(stored: Stored, after_bytes: int) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces_of(os.urandom(after_bytes))
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        stored.store.put_file(broken(), new_id())
    assert stored.contents() == set()
    assert [path for path in stored.home.rglob("store/**/*") if path.is_file()] == []
    if stored.bucket is not None:
        assert stored.bucket.abort_uploads(older_than_s=-60) == 0  # it was aborted at once


def test_any_range_of_a_file_is_read(stored: Stored) -> None:
    content, file_id = os.urandom(5 * 1024**2), new_id()
    stored.store.put_file(pieces_of(content), file_id)
    block = 2 * 1024**2
    for first, last in ((0, 0), (0, 9), (block - 1, block), (5, len(content) - 1), (0, -1)):
        read = stored.store.read_file(file_id, first=first, last=last)
        assert b"".join(read) == content[first : last + 1]


def test_what_is_not_there_is_not_found_before_the_first_byte(stored: Stored) -> None:
    with pytest.raises(NotFound):
        stored.store.read_file(new_id(), first=0, last=9)
    with pytest.raises(NotFound):
        stored.store.read_within("artifacts", new_id(), "a", first=0, last=9)
    with pytest.raises(FileNotFoundError):
        stored.store.fetch_file(new_id(), stored.home / "out")
    stored.store.remove_file(new_id())


def test_memory_is_bounded_however_large_a_file_is(s3: Stored) -> None:
    piece, file_id = os.urandom(1024**2), new_id()
    tracemalloc.start()
    try:
        s3.store.put_file((piece for _ in range(56)), file_id)
        _, writing = tracemalloc.get_traced_memory()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in s3.store.read_file(file_id, first=0, last=56 * 1024**2 - 1):
            pass
        _, reading = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert writing < 48 * 1024**2
    assert reading - held < 12 * 1024**2


# What is left over ------------------------------------------------------------------------------

LEFT = """
import os, sys
from pathlib import Path
from tuneyard.specs.settings import load_settings
from tuneyard.store.remote import open_store
from uuid import UUID

def pieces():
    for _ in range(40):
        yield b"x" * 2**20
    print("parts are sent", flush=True)
    os.kill(os.getpid(), 9)

open_store(load_settings()).put_file(pieces(), UUID(sys.argv[1]))
"""


def test_parts_that_a_killed_process_left_are_swept(
    s3: Stored, object_server: ObjectServer
) -> None:
    assert s3.bucket is not None
    url = f"s3://{BUCKET}/{s3.bucket._root.partition('/')[2]}"
    values = object_server.environment("") | {"store_url": url, "home": s3.home}
    env = os.environ | {f"TUNEYARD_{k.upper()}": str(v) for k, v in values.items()}
    left = subprocess.run(
        [sys.executable, "-P", "-c", LEFT, str(new_id())], env=env, capture_output=True, check=False
    )
    assert (left.returncode, left.stdout) == (-9, b"parts are sent\n"), left.stderr
    assert s3.contents() == set()
    s3.store.sweep()
    assert s3.bucket.abort_uploads(older_than_s=3600) == 0  # it is young: it may still go on
    assert s3.bucket.abort_uploads(older_than_s=-60) == 1
    assert s3.bucket.abort_uploads(older_than_s=-60) == 0


def test_what_no_row_knows_is_swept_once_no_live_attempt_could_record_it(
    stored: Stored, db: TestDatabase, a_team: Callable[..., UUID]
) -> None:
    team = a_team()
    file_id, lost_file, base, lost = new_id(), new_id(), new_id(), new_id()
    for each in (file_id, lost_file):
        stored.store.put_file([b"rows"], each)
    for each in (base, lost):
        stored.store.put_folder(stored.made(a=b"weights"), "models", each)
    stored.put()
    db.run(
        "INSERT INTO files (id, team_id, name, purpose, bytes, sha256)"
        " VALUES (:id, :team, 'rows', 'dataset', 4, :sha)",
        id=file_id, team=team, sha="ab" * 32,
    )  # fmt: skip
    db.run(
        "INSERT INTO base_models (id, name, source, revision, digest, bytes, manifest)"
        " VALUES (:id, 'm', 'here', '1', :digest, 1, '{}')",
        id=base, digest="cd" * 32,
    )  # fmt: skip
    attempt = a_live_attempt(db, team, began="clock_timestamp()")
    # Younger than that attempt, or than a day, or both: it may be recorded in a moment.
    assert remove_unrecorded(db.worker, stored.store) == 0
    assert remove_unrecorded(db.worker, stored.store, younger_s=-60) == 0
    ended = "UPDATE attempts SET ended_at = clock_timestamp(), outcome = 'lost' WHERE id = :id"
    db.run(ended, id=attempt)
    assert remove_unrecorded(db.worker, stored.store, younger_s=-60) == 3
    assert stored.ids() == {file_id.hex, base.hex}
    assert remove_unrecorded(db.worker, stored.store, younger_s=-60) == 0


def a_live_attempt(db: TestDatabase, team: UUID, *, began: str) -> UUID:
    job, attempt = new_id(), new_id()
    db.run(
        "INSERT INTO jobs (id, team_id, kind, name, spec, state, demand)"
        " VALUES (:id, :team, 'download', 'x', '{}', 'queued', '{\"kind\": \"cpu\"}')",
        id=job, team=team,
    )  # fmt: skip
    db.run(
        "INSERT INTO attempts (id, team_id, job_id, number, token, started_at)"
        f" VALUES (:id, :team, :job, 1, nextval('attempt_token'), {began})",
        id=attempt, team=team, job=job,
    )  # fmt: skip
    return attempt


# When it is away --------------------------------------------------------------------------------


def test_a_store_that_is_away_is_unreachable_and_asked_no_more_for_a_moment(
    tmp_path: Path,
) -> None:
    away = Settings(
        home=tmp_path,
        store_url="s3://bucket/prefix",
        store_endpoint="http://127.0.0.1:1",
        store_access_key=SecretStr("a"),
        store_secret_key=SecretStr("s"),
    )
    store = open_store(away)
    with pytest.raises(StoreUnreachable, match="does not answer"):
        store.read_file(new_id(), first=0, last=1)
    made = Stored(store, tmp_path, None).made()
    for ask in (
        lambda: store.put_folder(made, "artifacts", new_id()),
        lambda: store.put_file([b"a"], new_id()),
        lambda: store.fetch_file(new_id(), tmp_path / "x"),
        lambda: store.ids("files"),
    ):
        with pytest.raises(StoreUnreachable):
            ask()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"store_url": "s3://no-such-bucket/x"}, "NoSuchBucket"),
        ({"store_secret_key": SecretStr("wrong")}, "refuses"),
    ],
)
def test_a_wrong_bucket_or_key_is_not_taken_for_a_missing_file(
    object_server: ObjectServer, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    settings = Settings(home=tmp_path, **(object_server.settings("x") | changes))
    with pytest.raises(StoreUnreachable, match=said):
        open_store(settings).fetch_file(new_id(), tmp_path / "out")
    with pytest.raises(StoreUnreachable, match=said):
        open_store(settings).fetch_folder(
            "artifacts", new_id(), tmp_path / "t", digest="", aside=tmp_path / "a"
        )
    with pytest.raises(StoreUnreachable, match=said):
        open_store(settings).put_file([b"x"], new_id())


def test_keys_and_signatures_are_in_no_log(
    object_server: ObjectServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for changes in ({}, {"store_url": "s3://no-such-bucket/x"}):
        settings = Settings(home=tmp_path, **(object_server.settings("logged") | changes))
        store = open_store(settings)
        try:
            store.put_file([b"x"], new_id())
        except StoreUnreachable as away:
            logging.getLogger("test").warning("%r %s", away, away.as_dict())
        logging.getLogger("test").warning("%r %s", settings, settings.model_dump())
    assert caplog.records
    for secret in (ACCESS_KEY, SECRET_KEY, "AWS4-HMAC"):
        assert secret not in caplog.text


@pytest.mark.parametrize("number", [None, errno.ESTALE, errno.EIO])
def test_a_folder_whose_mount_is_away_is_unreachable_and_nothing_is_written_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    store, source = DiskStore(tmp_path / "root"), tmp_path / "source"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_bytes(b"weights")
    publish_folder(tmp_path / "made", source, {})
    folder = uuid4()

    def stale(*_: object, **__: object) -> None:
        raise OSError(number, "away")

    with monkeypatch.context() as away:
        if number is None:
            (tmp_path / "root").rename(tmp_path / "elsewhere")
        else:
            away.setattr("tuneyard.store.disk.copy_folder", stale)
        with pytest.raises(StoreUnreachable):
            store.put_folder(source, "artifacts", folder)
    if number is None:
        assert not (tmp_path / "root").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "root")
    store.put_folder(source, "artifacts", folder)
    with store.look_into("artifacts", folder) as there:
        assert (there / "weights").read_bytes() == b"weights"
