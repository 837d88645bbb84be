"""store/folder.py: whole or not there, whatever happens."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneyard.store.folder import (
    FolderDamaged,
    FolderTaken,
    copy_folder,
    is_safe_name,
    manifest_digest,
    publish_folder,
    read_manifest,
    verify_folder,
)


def a_folder(path: Path, **files: str) -> Path:
    """A folder with one file below another and one beside it, or those asked for."""
    for name, text in (files or {"a.txt": "alpha", "deep/b.bin": "beta"}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def published(tmp_path: Path, name: str = "out") -> Path:
    publish_folder(a_folder(tmp_path / f"{name}.aside"), tmp_path / name, {"kind": "test"})
    return tmp_path / name


def test_a_published_folder_lists_its_files_with_size_and_hash(tmp_path):
    manifest = verify_folder(published(tmp_path))
    assert [e["path"] for e in manifest["files"]] == ["a.txt", "deep/b.bin"]
    assert manifest["files"][0]["size"] == 5
    assert manifest["kind"] == "test"


def test_the_same_content_has_the_same_digest(tmp_path):
    first, second = (read_manifest(published(tmp_path, name)) for name in ("one", "two"))
    assert manifest_digest(first) == manifest_digest(second)


def test_the_manifest_on_disk_hashes_to_its_digest(tmp_path):
    folder = published(tmp_path)
    content = (folder / "manifest.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == manifest_digest(read_manifest(folder))


def test_a_name_in_use_is_refused(tmp_path):
    published(tmp_path)
    with pytest.raises(FolderTaken):
        publish_folder(a_folder(tmp_path / "again"), tmp_path / "out", {})


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "more", "link"])
def test_damage_is_found_and_the_file_named(tmp_path, harm):
    folder = published(tmp_path)
    victim = folder / "deep" / "b.bin"
    if harm == "bit":
        victim.write_text("betb")
    elif harm == "cut":
        victim.write_text("bet")
    elif harm == "gone":
        victim.unlink()
    elif harm == "more":
        (folder / "deep" / "c").write_text("")
    else:
        victim.unlink()
        victim.symlink_to(folder / "a.txt")
    with pytest.raises(FolderDamaged) as caught:
        verify_folder(folder)
    assert caught.value.path == ("deep/c" if harm == "more" else "deep/b.bin")


def test_links_are_never_published(tmp_path):
    folder = a_folder(tmp_path / "aside")
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(FolderDamaged, match="passwd"):
        publish_folder(folder, tmp_path / "out", {})


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../b", ".git/x", "a\\b", "", "a//b", "a\n", "é" * 200]
)
def test_names_that_leave_the_folder_are_unsafe(name):
    assert not is_safe_name(name)


def test_a_manifest_with_an_unsafe_name_is_damaged(tmp_path):
    folder = a_folder(tmp_path / "x")
    entry = {"path": "../a.txt", "size": 5, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps({"files": [entry]}))
    with pytest.raises(FolderDamaged):
        read_manifest(folder)


def test_a_copy_is_checked_on_the_way(tmp_path):
    folder = published(tmp_path)
    assert copy_folder(folder, tmp_path / "copy", aside=tmp_path / "a") == verify_folder(
        tmp_path / "copy"
    )
    (folder / "a.txt").write_text("alphb")
    with pytest.raises(FolderDamaged, match=r"a\.txt"):
        copy_folder(folder, tmp_path / "second", aside=tmp_path / "a")
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "a").exists()


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from tuneyard.store import folder

root = Path(sys.argv[1])

def child(k):
    # SIGKILL itself before the k-th call that changes the disk.
    left = [k]
    def counted(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped
    for name in ("open", "fsync", "rename", "close"):
        setattr(os, name, counted(getattr(os, name)))
    Path.open = counted(Path.open)
    folder.publish_folder(root / f"aside-{k}", root / f"out-{k}", {"k": k})
    os._exit(0)

k = 0
while True:
    k += 1
    aside = root / f"aside-{k}"
    (aside / "deep").mkdir(parents=True)
    (aside / "a").write_text("alpha")
    (aside / "deep" / "b").write_text("beta")
    pid = os.fork()
    if pid == 0:
        child(k)
    status = os.waitpid(pid, 0)[1]
    if (root / f"out-{k}").exists():
        folder.verify_folder(root / f"out-{k}")
    if status == 0:
        break
print(k)
"""


def test_a_kill_at_any_point_of_publishing_leaves_it_whole_or_absent(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    moments = int(done.stdout)
    whole = [k for k in range(1, moments + 1) if (tmp_path / f"out-{k}").exists()]
    assert moments > 8  # files, manifest, folders, rename, parent: each was met
    assert whole == list(range(whole[0], moments + 1))  # once renamed, always whole
    assert os.path.exists(tmp_path / "aside-1")
