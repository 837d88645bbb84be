"""One stream of random numbers per purpose, so that no choice disturbs another."""

import hashlib


def stream_seed(seed: int, *purpose: object) -> int:
    """A seed of 63 bits for one purpose, such as ``(42, "order", epoch)``.

    Streams of different purposes are independent: the order of the data does not depend on
    whether the adapter was initialised before it, nor on anything that was logged.
    """
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
