"""/api/v1/files: uploads, streamed to disk and checked by a child process."""

import logging
import re
import unicodedata
from typing import Annotated
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from tuneyard.api.access import TheCaller, TheYard, Yard, path_id
from tuneyard.api.examples import BAD_REQUEST, CONFLICT
from tuneyard.api.paging import Cursor, page, read_cursor
from tuneyard.api.ranges import BINARY, part_of, saved
from tuneyard.api.uploads import Upload
from tuneyard.models import files
from tuneyard.models.keys import Caller
from tuneyard.specs.errors import InputError
from tuneyard.specs.views import DeletedView, FileList, FileView
from tuneyard.store.remote import StoreUnreachable

log = logging.getLogger(__name__)

router = APIRouter(prefix="/api/v1/files", tags=["files"])

MAX_NAME_BYTES = 200
PURPOSES = ("dataset", "prompts")

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": PURPOSES, "default": "dataset"},
                        "sha256": {"type": "string", "description": "Checked where it is given."},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=FORM, responses=BAD_REQUEST)
async def upload(request: Request, caller: TheCaller, yard: TheYard) -> FileView:
    """Upload a data set or a file of prompts; its check begins at once."""
    received = await request.app.state.uploads.receive(request)
    view = await to_thread.run_sync(_record, yard, caller, received)
    request.app.state.checker.wake()
    return view


def _record(yard: Yard, caller: Caller, upload: Upload) -> FileView:
    """Write the row of a stored upload; a refused one leaves no file behind."""
    try:
        file = _described(upload)
        with yard.begin(caller.team_id) as tx:
            return files.add_file(tx, caller.team_id, file)
    except BaseException:
        _let_go(yard, upload.id)
        raise


def _let_go(yard: Yard, file_id: UUID) -> None:
    """Remove a file's bytes; a store that is away is swept later."""
    try:
        yard.store.remove_file(file_id)
    except StoreUnreachable:
        log.info("file left to the sweep", extra={"event": "file_left", "file": file_id.hex})


def _described(upload: Upload) -> files.StoredFile:
    purpose = upload.fields.get("purpose", PURPOSES[0])
    if purpose not in PURPOSES:
        hint = f"one of {', '.join(PURPOSES)}"
        message = f"There is no purpose {purpose[:60]!r}."
        raise InputError(message, code="bad_choice", field="purpose", hint=hint)
    declared = upload.fields.get("sha256", upload.sha256)
    if declared.strip().lower() != upload.sha256:
        message = "What arrived has another sha256 than was declared."
        raise InputError(
            message, code="checksum_mismatch", field="sha256", hint=f"arrived: {upload.sha256}"
        )
    name = clean_name(upload.name)
    return files.StoredFile(upload.id, name, purpose, upload.bytes, upload.sha256)


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
    caller: TheCaller,
    yard: TheYard,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Cursor = None,
) -> FileList:
    """A page of the team's files, newest first."""
    listing = ("files", caller.team_id.hex)
    before = read_cursor(cursor, *listing)
    with yard.begin(caller.team_id) as tx:
        rows = files.list_files(tx, before=before, limit=limit + 1)
    shown, next_cursor = page(rows, limit, *listing)
    return FileList(data=shown, next_cursor=next_cursor)


@router.get("/{file}")
def show(file: str, caller: TheCaller, yard: TheYard) -> FileView:
    """One file, with its check's report."""
    with yard.begin(caller.team_id) as tx:
        return files.show_file(tx, path_id("file", file))


@router.get("/{file}/content", response_class=StreamingResponse, responses=BINARY)
def content(
    file: str,
    caller: TheCaller,
    yard: TheYard,
    range_: Annotated[str | None, Header(alias="Range")] = None,
) -> StreamingResponse:
    """A file's bytes; its sha256 is the ETag."""
    file_id = path_id("file", file)
    with yard.begin(caller.team_id) as tx:
        view = files.show_file(tx, file_id)
    part = part_of(range_, view.bytes)
    pieces = yard.store.read_file(file_id, first=part.first, last=part.last)
    return saved(pieces, part, name=view.name, sha256=view.sha256)


@router.delete("/{file}", responses=CONFLICT)
def delete(file: str, caller: TheCaller, yard: TheYard) -> DeletedView:
    """Delete a file that no open job needs."""
    file_id = path_id("file", file)
    with yard.begin(caller.team_id) as tx:
        files.delete_file(tx, file_id)
    _let_go(yard, file_id)
    return DeletedView(id=file)
