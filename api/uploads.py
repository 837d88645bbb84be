"""Uploads, parsed as they arrive: bytes go to disk once and are never held as a whole."""

import errno
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from uuid import UUID

from anyio import CapacityLimiter, WouldBlock, from_thread, to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from tuneyard.api.limits import BodyTooLarge
from tuneyard.specs.errors import InputError, Unavailable
from tuneyard.specs.ids import new_id
from tuneyard.store.remote import Store

PIECE_BYTES = 1024**2
MAX_FIELD_BYTES = 4096
FIELDS = ("purpose", "sha256")
AT_ONCE = 8


class Malformed(InputError):
    """The body is no whole multipart form."""

    code = "malformed_form"
    http_status = 400


@dataclass(frozen=True)
class Upload:
    """A file that stands in the store, and what was said about it."""

    id: UUID
    name: str  # as the client wrote it
    bytes: int
    sha256: str
    fields: dict[str, str]


DISK_FULL = "delete files that no job needs (DELETE /api/v1/files/…), or add space to the store"


class Uploads:
    """The uploads of one process; so many at once that disks and threads stand it."""

    def __init__(self, store: Store, *, max_file_bytes: int) -> None:
        self._store, self._max_file_bytes = store, max_file_bytes
        self._turns = CapacityLimiter(AT_ONCE)

    async def receive(self, request: Request) -> Upload:
        """Store the form's file. Raises: InputError, Unavailable; then nothing is left behind."""
        form = _Form(request, self._max_file_bytes)
        pieces = form.pieces(request)
        file_id = new_id()

        async def next_piece() -> bytes:
            return await anext(pieces, b"")

        def pulled() -> Iterator[bytes]:
            while piece := from_thread.run(next_piece):
                yield piece

        try:
            self._turns.acquire_on_behalf_of_nowait(form)
        except WouldBlock:
            raise Unavailable("Too many uploads at once.", code="uploads_busy") from None
        try:
            size, digest = await to_thread.run_sync(
                self._store.put_file, pulled(), file_id, limiter=CapacityLimiter(1)
            )
        except OSError as error:
            raise _no_space(error) from error
        finally:
            self._turns.release_on_behalf_of(form)
        return Upload(file_id, form.file_name or "", size, digest, form.fields)


def _no_space(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("The disk of the store is full.", code="storage_full", hint=DISK_FULL)
    return error


class _Form:
    """The state of one multipart body; the parser calls back synchronously."""

    def __init__(self, request: Request, max_file_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self._max_file_bytes, self._seen_bytes = max_file_bytes, 0
        self._pending, self._value = bytearray(), bytearray()
        self._header, self._header_value = bytearray(), bytearray()
        self._disposition = ""
        self._part = ""
        self._ended = False
        self._parser = self._parser_of(request)

    def _parser_of(self, request: Request) -> MultipartParser:
        _, options = parse_options_header(request.headers.get("content-type"))
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._enter_part,
            "on_part_data": self._take,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            return MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        except (KeyError, FormParserError):
            raise Malformed("The form has no boundary, or an impossible one.") from None

    async def pieces(self, request: Request) -> AsyncIterator[bytes]:
        """The file's bytes, about a mebibyte at a time, while the rest of the form is read."""
        async for chunk in request.stream():
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise Malformed(f"The form cannot be read: {error}.") from None
            if len(self._pending) >= PIECE_BYTES:
                yield self._taken()
        if self.file_name is None:
            message = "The form has no field `file`."
            hint = "for example: curl -F file=@rows.jsonl"
            raise InputError(message, code="missing_field", field="file", hint=hint)
        if not self._ended:
            raise Malformed("The form breaks off before its end.", hint="send it again")
        if self._pending:
            yield self._taken()

    def _taken(self) -> bytes:
        piece = bytes(self._pending)
        self._pending.clear()
        return piece

    def _begin_part(self) -> None:
        self._part, self._disposition = "", ""
        self._value.clear()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._header_value.decode("latin-1")
        self._header.clear()
        self._header_value.clear()

    def _enter_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part == "file":
            if self.file_name is not None:
                raise InputError("One file at a time.", code="conflicting_fields", field="file")
            self.file_name = options.get(b"filename", b"").decode("utf-8", "replace")
        elif self._part not in FIELDS:
            message = f"There is no field {self._part[:60]!r}."
            hint = f"file, {', '.join(FIELDS)}"
            raise InputError(message, code="unknown_field", field=self._part[:60], hint=hint)

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._seen_bytes += end - start
            if self._seen_bytes > self._max_file_bytes:
                hint = f"at most {self._max_file_bytes} bytes"
                raise BodyTooLarge("The file is too large.", field="file", hint=hint)
            self._pending += data[start:end]
        else:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise BodyTooLarge(f"{self._part} is too long.", field=self._part)

    def _end_part(self) -> None:
        if self._part in FIELDS:
            self.fields[self._part] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True
