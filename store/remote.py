"""Where the store lies: a folder, or any URL that fsspec knows. Workers and the API alone ask.

Runners do not know this module: they write into WORKDIR, and their worker copies.
"""

from tuneyard.specs.errors import InputError
from tuneyard.specs.settings import Settings
from tuneyard.store.bucket import Bucket, Credentials
from tuneyard.store.disk import DiskStore
from tuneyard.store.objects import ObjectStore
from tuneyard.store.scratch import Scratch
from tuneyard.store.shelves import OtherContent, Shelf, Store, StoreUnreachable

__all__ = ["OtherContent", "Shelf", "Store", "StoreUnreachable", "open_store"]

ANSWER_WITHIN_S = 60.0


def open_store(settings: Settings, *, answer_within_s: float = ANSWER_WITHIN_S) -> Store:
    """The store that the settings name; nothing is asked of an object store yet.

    Raises: InputError not_writable (a folder), bad_setting (a package is missing).
    """
    if settings.store_root is None:
        credentials = Credentials(
            settings.store_endpoint,
            settings.store_region,
            *(
                key.get_secret_value() if key else ""
                for key in (settings.store_access_key, settings.store_secret_key)
            ),
        )
        bucket = Bucket(settings.store_url, credentials, timeout_s=answer_within_s)
        scratch = Scratch(settings.home / "scratch")
        return ObjectStore(bucket, scratch, max_file_bytes=settings.max_file_bytes)
    try:
        return DiskStore(settings.store_root)
    except OSError as error:
        raise InputError(
            f"The store in {settings.store_root} cannot be written: {error.strerror}.",
            code="not_writable",
            field="store_url",
            hint="set TUNEYARD_STORE_URL to a folder that this user may write",
        ) from None
