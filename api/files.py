"""/api/v1/files: uploads, streamed to disk and checked by a child process."""

import re
import unicodedata
from collections.abc import Iterator
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from tuneyard.api.access import Reader, TheYard, Writer, path_id
from tuneyard.api.jobs import disposition
from tuneyard.api.paging import page, read_cursor
from tuneyard.models import files
from tuneyard.specs.errors import InputError
from tuneyard.specs.ids import new_id
from tuneyard.specs.views import DeletedView, FileList, FileView

router = APIRouter(prefix="/api/v1/files", tags=["files"])

PIECE_BYTES = 1024**2
MAX_NAME_BYTES = 200


@router.post("", status_code=201)
def upload(
    file: UploadFile,
    caller: Writer,
    yard: TheYard,
    request: Request,
    purpose: Annotated[Literal["dataset", "prompts"], Form()] = "dataset",
    sha256: Annotated[str | None, Form()] = None,
) -> FileView:
    """Upload a data set or a file of prompts; its check begins at once."""
    name = clean_name(file.filename or "")

    def pieces() -> Iterator[bytes]:
        while piece := file.file.read(PIECE_BYTES):
            yield piece

    file_id = new_id()
    size, digest = yard.store.put_file(pieces(), file_id)
    try:
        if sha256 is not None and sha256 != digest:
            message = "What arrived has another sha256 than was declared."
            hint = "send it again"
            raise InputError(message, code="checksum_mismatch", field="sha256", hint=hint)
        with yard.begin(caller.team_id) as tx:
            stored = files.StoredFile(file_id, name, purpose, size, digest)
            view = files.add_file(tx, caller.team_id, stored)
    except BaseException:
        yard.store.remove_file(file_id)
        raise
    request.app.state.checker.wake()
    return view


def clean_name(name: str) -> str:
    """A file's name as it is shown: no folders, no control characters. Raises: InputError."""
    last = re.split(r"[/\\]", name)[-1]
    shown = "".join(c for c in last if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    shown = shown.strip().strip(".").strip()
    shown = shown.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    if not shown:
        raise InputError("The file needs a name.", code="bad_name", field="file")
    return shown


@router.get("")
def list_files(
    caller: Reader,
    yard: TheYard,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: str | None = None,
) -> FileList:
    """A page of the team's files, newest first."""
    before = read_cursor(cursor)
    with yard.begin(caller.team_id) as tx:
        rows = files.list_files(tx, before=before, limit=limit + 1)
    shown, next_cursor = page(rows, limit)
    return FileList(data=shown, next_cursor=next_cursor)


@router.get("/{file}")
def show(file: str, caller: Reader, yard: TheYard) -> FileView:
    """One file, with its check's report."""
    with yard.begin(caller.team_id) as tx:
        return files.show_file(tx, path_id("file", file))


@router.get("/{file}/content", response_class=FileResponse)
def content(file: str, caller: Reader, yard: TheYard) -> FileResponse:
    """A file's bytes."""
    file_id: UUID = path_id("file", file)
    with yard.begin(caller.team_id) as tx:
        view = files.show_file(tx, file_id)
    headers = {"Content-Disposition": disposition(view.name), "ETag": f'"{view.sha256}"'}
    path = yard.store.file(file_id)
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


@router.delete("/{file}")
def delete(file: str, caller: Writer, yard: TheYard) -> DeletedView:
    """Delete a file that no open job needs."""
    file_id = path_id("file", file)
    with yard.begin(caller.team_id) as tx:
        files.delete_file(tx, file_id)
    yard.store.remove_file(file_id)
    return DeletedView(id=file)
