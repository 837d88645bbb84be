"""Where this node may have a file already: the caches of the hubs' clients, an earlier download.

Whoever links a file from here checks its hash first; what stands under its name is not trusted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tuneyard.runners.listings import Listing, RemoteFile


def places_of(
    listing: Listing, file: RemoteFile, *, known: Path | None, caches: Sequence[Path]
) -> Iterator[Path]:
    """Paths at which these bytes may stand, likeliest first."""
    if known is not None:
        yield known / file.path
    for cache in caches:
        yield from _in_huggingface_cache(cache, listing, file)
        yield from _in_modelscope_cache(cache, listing, file)


def _in_huggingface_cache(cache: Path, listing: Listing, file: RemoteFile) -> Iterator[Path]:
    """Blobs are called by the hash that the hub gives as their ETag."""
    repo = f"{listing.what}s--{listing.repo.replace('/', '--')}"
    for root in (cache, cache / "hub"):
        for name in (file.sha256, file.git_sha1):
            if name is not None:
                yield root / repo / "blobs" / name


def _in_modelscope_cache(cache: Path, listing: Listing, file: RemoteFile) -> Iterator[Path]:
    """Today's layout by revision, and the one before 1.38, which writes a dot as ``___``."""
    owner, _, name = listing.repo.partition("/")
    for root in (cache, cache / "hub"):
        snapshots = root / f"{listing.what}s" / f"{owner}--{name}" / "snapshots"
        if snapshots.is_dir():
            yield from (each / file.path for each in sorted(snapshots.iterdir()))
        for folder in (root / f"{listing.what}s" / owner, root / owner):
            yield folder / name.replace(".", "___") / file.path
