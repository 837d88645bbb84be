"""Objects below one root of an object store, by fsspec: read a range, write, list, remove.

Every failure is FileNotFoundError (no such object) or StoreUnreachable. One request is tried again
a few times by the library that makes it; who can wait longer asks again later. fsspec and s3fs are
imported when a bucket is opened, never before.
"""

import importlib.util
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuneyard.specs.errors import InputError
from tuneyard.store.shelves import StoreUnreachable

log = logging.getLogger(__name__)

TRIES = 3
CONNECT_S = 5.0
ANSWERS_FOR_S = 1.0
"""After a failure nobody asks for so long: a store that is away must not hold all threads."""

BROKEN_OFF = ("ClientPayloadError", "ConnectionClosedError", "IncompleteRead")

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
}


@dataclass(frozen=True)
class Credentials:
    """How an S3 store is reached; what is empty is found as AWS's own tools find it."""

    endpoint: str = ""
    region: str = ""
    access_key: str = ""
    secret_key: str = ""


@dataclass(frozen=True)
class Entry:
    """What a listing says of an object."""

    size: int
    written_at: float | None  # Unix time


class Bucket:
    """The objects whose keys begin with the URL's path; a key here is the rest."""

    def __init__(self, url: str, credentials: Credentials, *, timeout_s: float) -> None:
        self._protocol = url.partition("://")[0]
        _check_package(self._protocol)
        _silence()
        import fsspec

        options = _s3_options(credentials, timeout_s) if self._is_s3 else {}
        # Another bucket of this process may have other credentials; and listings must be true.
        self._fs, root = fsspec.core.url_to_fs(
            url, skip_instance_cache=True, use_listings_cache=False, **options
        )
        if self._is_s3:
            self._fs.retries = 1  # botocore's are enough: both together would wait for minutes
        self._root = root.rstrip("/")
        self._away_until, self._away = 0.0, ""

    @property
    def _is_s3(self) -> bool:
        return self._protocol in ("s3", "s3a")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def read(self, key: str, first: int, last: int) -> bytes:
        """Bytes first..last of an object, all of them. Raises: FileNotFoundError."""
        with self._asking():
            content = self._read(key, first, last)
        if len(content) != last - first + 1:
            raise StoreUnreachable("The store answered with too few bytes.")
        return content

    def _read(self, key: str, first: int, last: int, tries: int = TRIES) -> bytes:
        try:
            content: bytes = self._fs.cat_file(self._path(key), start=first, end=last + 1)
        except Exception as error:
            # An answer that broke off is the one thing that the library does not ask for again.
            if tries > 1 and type(error).__name__ in BROKEN_OFF:
                return self._read(key, first, last, tries - 1)
            raise
        return content

    def read_whole(self, key: str) -> bytes:
        """A small object. Raises: FileNotFoundError."""
        with self._asking():
            content: bytes = self._fs.cat_file(self._path(key))
        return content

    def write(self, key: str, content: bytes) -> None:
        """Write a small object, in one request."""
        with self._asking(writes=True):
            self._fs.pipe_file(self._path(key), content)

    @contextmanager
    def writing(self, key: str, *, block_bytes: int) -> Iterator["Upload"]:
        """Write an object as it comes; it is there when the block ends well, and else never."""
        with self._asking(writes=True):
            file = self._fs.open(self._path(key), "wb", block_size=block_bytes)
        upload = Upload(self, file)
        try:
            yield upload
            with self._asking(writes=True):
                file.close()
        except BaseException:
            _discard(file)
            raise

    def find(self, key: str) -> Entry:
        """One object. Raises: FileNotFoundError."""
        with self._asking():
            info = self._fs.info(self._path(key))
            if info.get("type") != "file":
                raise FileNotFoundError(key)
        return Entry(int(info["size"]), _written_at(info))

    def names(self, prefix: str) -> list[str]:
        """What stands directly below a prefix."""
        try:
            with self._asking():
                found = self._fs.ls(self._path(prefix), detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def entries(self, prefix: str) -> dict[str, Entry]:
        """Every object below a prefix, by its key below it."""
        start = self._path(prefix) + "/"
        try:
            with self._asking():
                found = self._fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        return {
            path.removeprefix(start): Entry(int(info.get("size") or 0), _written_at(info))
            for path, info in found.items()
            if path.startswith(start) and info.get("type") == "file"
        }

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects. One that is not there is fine."""
        if keys:
            try:
                with self._asking():
                    self._fs.rm([self._path(key) for key in keys])
            except FileNotFoundError:
                pass

    def abort_uploads(self, *, older_than_s: float) -> int:
        """End multipart uploads that were begun so long ago; how many. S3 keeps them for ever."""
        if not self._is_s3:
            return 0
        bucket, _, prefix = self._root.partition("/")
        with self._asking(writes=True):
            old = [
                upload
                for upload in self._uploads(bucket, f"{prefix}/" if prefix else "")
                if time.time() - upload["Initiated"].timestamp() > older_than_s
            ]
            for upload in old:
                try:
                    self._fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                except FileNotFoundError:
                    continue  # ended by another at this moment
        return len(old)

    def _uploads(self, bucket: str, prefix: str) -> Iterator[Mapping[str, Any]]:
        marks: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marks)
            yield from page.get("Uploads") or ()
            if not page.get("IsTruncated"):
                return
            marks = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    @contextmanager
    def _asking(self, *, writes: bool = False) -> Iterator[None]:
        """Turn what goes wrong into one of two errors. Of a write, nothing can be not found."""
        if time.monotonic() < self._away_until:
            raise StoreUnreachable(self._away)
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not writes and _code(error) != NO_BUCKET:
                raise
            if not _is_the_stores(error):
                raise
            raise self._unreachable(error) from error
        self._note("")

    def _unreachable(self, error: Exception) -> StoreUnreachable:
        """The library's own words may name hosts and keys: they go to our log alone."""
        refused = isinstance(error, PermissionError)
        said = "The store refuses this process" if refused else "The store does not answer"
        self._note(f"{said} ({_code(error) or type(error).__name__}).", error)
        self._away_until = time.monotonic() + ANSWERS_FOR_S
        return StoreUnreachable(self._away)

    def _note(self, away: str, error: Exception | None = None) -> None:
        if bool(away) != bool(self._away):
            fields = {"event": "store_changed", "error": str(error)[:300] if error else ""}
            log.warning(away or "The store is back.", extra=fields)
        self._away = away


class Upload:
    """An object that is being written."""

    def __init__(self, bucket: Bucket, file: Any) -> None:
        self._bucket, self._file = bucket, file

    def write(self, piece: bytes) -> None:
        """The next bytes; now and then they travel as a part."""
        with self._bucket._asking(writes=True):
            self._file.write(piece)


def _discard(file: Any) -> None:
    try:
        file.discard()
    except Exception as error:
        # The store is away: the parts lie there until the sweep.
        log.debug("upload not discarded", extra={"event": "upload_left", "error": str(error)})
    # Else its finaliser would close it, and closing is what makes an object.
    file.closed = True


NO_BUCKET = "NoSuchBucket"


def _code(error: Exception) -> str:
    """S3's own word for what is wrong, where there is one."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    found = response.get("Error", {}).get("Code", "") if isinstance(response, Mapping) else ""
    return str(found)


def _is_the_stores(error: Exception) -> bool:
    """Libraries raise errors of their own and OSError; Python's other errors are bugs."""
    return isinstance(error, OSError) or type(error).__module__ not in ("builtins", __name__)


def _written_at(info: Mapping[str, Any]) -> float | None:
    for name in ("LastModified", "last_modified", "updated", "mtime"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def _s3_options(credentials: Credentials, timeout_s: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "config_kwargs": {
            "connect_timeout": CONNECT_S,
            "read_timeout": timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": TRIES},
            "max_pool_connections": 50,
            # Newer checksums are unknown to many servers; every byte is checked by sha256 anyway.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    }
    if credentials.endpoint:
        options["endpoint_url"] = credentials.endpoint
    if credentials.region:
        options["client_kwargs"] = {"region_name": credentials.region}
    if credentials.access_key:
        options |= {"key": credentials.access_key, "secret": credentials.secret_key}
    return options


def _check_package(protocol: str) -> None:
    package = PACKAGES.get(protocol, "fsspec")
    if importlib.util.find_spec(package) is None:
        extra = "s3" if package == "s3fs" else "worker"
        mend = f"pip install 'tuneyard[{extra}]'" if package in ("s3fs", "fsspec") else package
        raise InputError(
            f"A store at {protocol}:// needs the package {package}, which is not installed.",
            code="bad_setting",
            field="store_url",
            hint=mend if mend.startswith("pip") else f"pip install {package}",
        )


def _silence() -> None:
    """At DEBUG these write whole requests, signatures and key ids among them, into the log."""
    for name in ("aiobotocore", "botocore", "fsspec", "s3fs"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logging.INFO, logger.level))
