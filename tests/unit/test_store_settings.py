"""Where the store lies: what settings say of it, what is loaded for it, whose scratch is whose."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import load_settings
from tuneyard.store import bucket
from tuneyard.store.disk import DiskStore
from tuneyard.store.remote import open_store
from tuneyard.store.scratch import Scratch


def test_a_folder_is_a_store_by_path_and_by_url(tmp_path: Path) -> None:
    for url in ("", str(tmp_path / "store"), f"file://{tmp_path / 'store'}"):
        settings = load_settings({"TUNEYARD_STORE_URL": url}, home=tmp_path)
        store = open_store(settings)
        assert isinstance(store, DiskStore)
        assert store.root == tmp_path / "store"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://x", "no other process"),
        ("store", "absolute path"),
        ("file://store", "absolute path"),
        ("s3://", "names no bucket"),
        ("s3://key:very-secret@bucket/x", "store_access_key"),
    ],
)
def test_a_url_that_is_no_store_is_refused_with_the_mend(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        load_settings({"TUNEYARD_STORE_URL": url})
    assert refused.value.field == "store_url"
    assert "very-secret" not in str(refused.value.as_dict())


def test_one_key_without_the_other_is_refused() -> None:
    with pytest.raises(InputError, match="together"):
        load_settings({"TUNEYARD_STORE_ACCESS_KEY": "a"})


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bucket.PACKAGES, "s3", "no_such_package_of_s3")
    settings = load_settings({"TUNEYARD_STORE_URL": "s3://bucket/x"}, home=tmp_path)
    with pytest.raises(InputError, match="no_such_package_of_s3") as refused:
        open_store(settings)
    assert (refused.value.field, refused.value.code) == ("store_url", "bad_setting")


def test_api_and_worker_load_nothing_for_a_store_in_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "import tuneyard.api.main, tuneyard.workers.main;"
        "from tuneyard.specs.settings import Settings;"
        "from tuneyard.store.remote import open_store;"
        f"open_store(Settings(home=Path({str(tmp_path)!r})));"
        "print(sorted({'fsspec', 's3fs', 'aiohttp', 'botocore'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


OWNER = """
import signal, sys, time
from pathlib import Path
from tuneyard.store.scratch import Scratch
with Scratch(Path(sys.argv[1])).folder() as folder:
    (folder / "left").write_text("x")
    print(folder, flush=True)
    signal.pause()
"""


def test_scratch_of_a_killed_owner_is_removed_by_the_next_and_a_living_ones_is_not(
    tmp_path: Path,
) -> None:
    owners = [
        subprocess.Popen([sys.executable, "-P", "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        folders = [Path(os.fsdecode(each.stdout.readline().strip())) for each in owners]  # type: ignore[union-attr]
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait(10)
        with Scratch(tmp_path).folder() as mine:
            assert mine.exists()
            assert not folders[0].exists()
            assert (folders[1] / "left").exists()
        assert not mine.exists()
    finally:
        for each in owners:
            each.kill()
            each.communicate()
