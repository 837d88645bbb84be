"""ModelScope by its own client: what a repository lists, and its files into a folder."""

import glob
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tuneyard.runners.hub_errors import Absent, gated, no_revision, of_the_disk, unreachable
from tuneyard.runners.listings import Listing, RemoteFile

HUB = "ModelScope"
MAIN = "master"


def list_files(repo: str, what: str, revision: str | None, token: str | None) -> Listing:
    """Raises: Absent, BadSpec (gated, no such revision), HubUnreachable."""
    ref = revision or MAIN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its own renamings
        api = _api(token)
        try:
            endpoint = api.resolve_endpoint_for_read(repo, repo_type=what)
            entries = api.legacy.list_repo_files(repo_id=repo, repo_type=what, revision=ref)
        except Exception as error:
            _explain(error, api, repo, what, ref)
    if not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise unreachable(HUB, f"it lists no files of {repo}")
    blobs = [entry for entry in entries if entry.get("Type", "blob") != "tree"]
    files = [_file(entry) for entry in blobs]
    return Listing("modelscope", repo, what, ref, _commit(blobs), files, endpoint)


def _api(token: str | None) -> Any:
    from modelscope_hub.api import HubApi

    return HubApi(token=token)


def _file(entry: dict[str, Any]) -> RemoteFile:
    path = str(entry.get("Path") or entry.get("Name") or "")
    sha256 = str(entry.get("Sha256") or "").lower()
    return RemoteFile(path, int(entry.get("Size") or 0), sha256 or None)


def _commit(entries: Sequence[dict[str, Any]]) -> str:
    """The newest commit that any of the files was last changed by: ModelScope lists no other."""
    newest = max(entries, key=lambda entry: int(entry.get("CommittedDate") or 0))
    return str(newest.get("Revision") or newest.get("Id") or "unknown")


def fetch(listing: Listing, files: Sequence[RemoteFile], folder: Path, token: str | None) -> None:
    """Bring files into a folder; a partial one is gone on with. Raises: BadSpec, HubUnreachable."""
    import modelscope

    download = {
        "model": modelscope.snapshot_download,
        "dataset": modelscope.dataset_snapshot_download,
    }[listing.what]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            download(
                listing.repo,
                revision=listing.ref,
                local_dir=str(folder),
                allow_patterns=[glob.escape(file.path) for file in files],
                endpoint=listing.endpoint,
                token=token,
            )
        except Exception as error:
            _explain_fetch(error, listing)


def _explain_fetch(error: Exception, listing: Listing) -> NoReturn:
    failed = list(getattr(error, "failed_files", {}).values())
    for each in [error, *failed]:
        if _status(each) in (401, 403):
            raise gated(HUB, listing.repo, _page(listing.endpoint, listing)) from None
    for each in [*failed, error]:
        if of_the_disk(each):
            raise each
    reason = str(failed[0] if failed else error).split("\n")[0]
    raise unreachable(HUB, reason) from None


def _explain(error: Exception, api: Any, repo: str, what: str, ref: str) -> NoReturn:
    """What went wrong with a listing, in the words of whoever asked for it."""
    status = _status(error)
    if status in (401, 403):
        raise gated(HUB, repo, f"{api.endpoint}/{what}s/{repo}") from None
    if status != 404:
        raise unreachable(HUB, str(error).split("\n")[0]) from None
    try:
        revisions = api.list_repo_revisions(repo, what)
    except Exception:
        raise Absent(HUB) from None
    names = [str(each.get("Revision")) for each in revisions if each.get("Revision")]
    if not names or ref in names:
        raise Absent(HUB) from None
    raise no_revision(HUB, repo, ref, names) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client's, wherever it keeps it."""
    for each in (error, error.__cause__):
        status = getattr(each, "status_code", None)
        if status is None:
            status = getattr(getattr(each, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        if type(each).__name__ == "NotExistError":
            return 404
    return None


def _page(endpoint: str, listing: Listing) -> str:
    return f"{endpoint}/{listing.what}s/{listing.repo}"
