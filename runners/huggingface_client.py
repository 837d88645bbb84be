"""Hugging Face by its own client: what a repository lists, and its files into a folder."""

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from tuneyard.runners.hub_errors import Absent, gated, no_revision, of_the_disk, unreachable
from tuneyard.runners.listings import Listing, RemoteFile

HUB = "Hugging Face"
MAIN = "main"
PARTS = ".parts"
AT_ONCE = 4
LIST_WITHIN_S = 30.0


def list_files(repo: str, what: str, revision: str | None, token: str | None) -> Listing:
    """Raises: Absent, BadSpec (gated, no such revision), HubUnreachable."""
    from huggingface_hub import HfApi

    ref = revision or MAIN
    api: Any = HfApi(token=token)
    try:
        info = api.repo_info(
            repo, revision=ref, repo_type=what, files_metadata=True, timeout=LIST_WITHIN_S
        )
        files = [_file(each) for each in info.siblings or ()]
        commit = str(info.sha)
    except Exception as error:
        _explain(error, repo, what, ref)
    if not files:
        raise unreachable(HUB, f"it lists no files of {repo}")
    return Listing("huggingface", repo, what, ref, commit, files, api.endpoint)


def _file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    sha256 = lfs.sha256 if lfs is not None else None
    oid = sibling.blob_id if lfs is None else None
    return RemoteFile(sibling.rfilename, int(sibling.size or 0), sha256, oid)


def fetch(listing: Listing, files: Sequence[RemoteFile], folder: Path, token: str | None) -> None:
    """Bring files into a folder. Raises: BadSpec, HubUnreachable, OSError (the disk)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            large = [file for file in files if file.sha256 is not None]
            whole = pool.map(lambda file: _bring_large(listing, file, folder, token), large)
            brought = {file.path for file, there in zip(large, whole, strict=True) if there}
        if rest := [glob.escape(file.path) for file in files if file.path not in brought]:
            snapshot_download(
                listing.repo,
                repo_type=listing.what,
                revision=listing.commit,
                local_dir=folder,
                allow_patterns=rest,
                token=token,
                max_workers=AT_ONCE,
            )
    except Exception as error:
        _explain(error, listing.repo, listing.what, listing.ref)


def _bring_large(listing: Listing, file: RemoteFile, folder: Path, token: str | None) -> bool:
    """A large file, gone on with where an earlier process left it: snapshot_download begins anew.

    Whether it is there: one of the wrong bytes is dropped, and a client whose functions have
    changed is left to bring it in its own way.
    """
    try:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers
    except ImportError:
        return False
    url = hf_hub_url(listing.repo, file.path, repo_type=listing.what, revision=listing.commit)
    part, target = folder / PARTS / f"{file.sha256}", folder / file.path
    for parent in (part.parent, target.parent):
        parent.mkdir(parents=True, exist_ok=True)
    with part.open("r+b" if part.exists() else "w+b") as half:
        if half.seek(0, os.SEEK_END) > file.size:
            half.truncate(half.seek(0))
        headers = build_hf_headers(token=token)
        http_get(url, half, resume_size=half.tell(), headers=headers, expected_size=file.size)
    if not file.is_at(part):
        part.unlink()
        return False
    os.replace(part, target)
    return True


def _explain(error: Exception, repo: str, what: str, ref: str) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = _chain(error)
    for each in chain:
        if isinstance(each, GatedRepoError):
            kind = "datasets/" if what == "dataset" else ""
            raise gated(HUB, repo, f"{constants.ENDPOINT}/{kind}{repo}") from None
        if isinstance(each, RevisionNotFoundError):
            raise no_revision(HUB, repo, ref, ()) from None
        if isinstance(each, RepositoryNotFoundError):
            raise Absent(HUB, " that can be seen without a token") from None
    for each in chain:
        if of_the_disk(each):
            raise each
    raise unreachable(HUB, f"{str(error) or type(error).__name__}".split("\n")[0]) from None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found
