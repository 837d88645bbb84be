"""What may be told of a text that still grows: whole characters, and no part of a stop string."""

from collections.abc import Sequence

HALF = "\ufffd"
"""What a decoder shows for a character of which not all bytes have come."""


class Deltas:
    """Cuts a growing text into pieces; joined they are the text that ``rest`` was given."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.told = ""
        self._stops = tuple(stops)

    def more(self, text: str) -> str:
        """What is new and certain in the text so far."""
        return self._tell(certain(text, self._stops))

    def rest(self, text: str) -> str:
        """What is missing to the whole text, from which a stop string was cut."""
        return self._tell(text)

    def _tell(self, text: str) -> str:
        if not text.startswith(self.told):
            return ""  # the decoder reads its last bytes otherwise for a moment
        new, self.told = text[len(self.told) :], text
        return new


def certain(text: str, stops: Sequence[str] = ()) -> str:
    """The part of a growing text that nothing to come can change.

    >>> certain("one tw", ["two"]), certain("one two three", ["two"]), certain("a \\ufffd")
    ('one ', 'one ', 'a ')
    """
    cut = first_stop(text, stops)
    if cut is not None:
        return text[:cut]
    text = text.rstrip(HALF)
    return text[: len(text) - max((_begun(text, stop) for stop in stops), default=0)]


def _begun(text: str, stop: str) -> int:
    """How many characters at the text's end may be the stop string's beginning."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins.

    >>> first_stop("one two", ["two", "ne"]), first_stop("one", ["x"])
    (1, None)
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)
