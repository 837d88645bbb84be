"""Requests to one server: who asks, what is asked again, and what an answer means.

Asked again is only what cannot happen twice by it: a GET, a POST under an Idempotency-Key, and
whatever found no connection at all. All of it is bounded.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from tuneyard.client.errors import Refused, Unreachable
from tuneyard.specs.errors import InputError

TIMEOUT_S = 30.0
TRIES = 5
TRIES_TO_CONNECT = 3
"""A server that restarts is back within a second; one that is away is named as soon."""

FIRST_PAUSE_S = 0.2
GIVE_UP_AFTER_S = 10.0
AWAY = (502, 503, 504)
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class Connection:
    """One server's /api/v1, as one team."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/api/v1").rstrip("/")
        address = _address(self.url)
        self.local = address.hostname in LOCAL_HOSTS
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise InputError("The API key holds characters that no key has.", code="bad_api_key")
        self._http = httpx.Client(
            base_url=self.url + "/api/v1",
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=TIMEOUT_S,
            # A proxy of the environment has no business with a server on this machine.
            trust_env=not self.local,
            # Loading the authorities takes longer than most requests; http:// needs none.
            verify=address.scheme != "http",
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(
        self, method: str, path: str, *, key: str | None = None, **request: Any
    ) -> dict[str, Any]:
        """Ask, and read the JSON object that is answered. Raises: Refused, Unreachable.

        key: an Idempotency-Key; with it a lost answer is asked for again.
        """
        answer = self._answer(method, path, key=key, **request)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._no_tuneyard(answer)
        return found

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        silence_s: float | None = TIMEOUT_S,
        **request: Any,
    ) -> Iterator[httpx.Response]:
        """Open an answer that is read as it comes; ``silence_s`` without a byte ends it."""
        timeout = httpx.Timeout(TIMEOUT_S, read=silence_s)
        try:
            with self._http.stream(method, path, timeout=timeout, **request) as answer:
                self._check(answer)
                yield answer
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    def _answer(
        self, method: str, path: str, *, key: str | None = None, **request: Any
    ) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        safe = method == "GET" or key is not None
        deadline = time.monotonic() + GIVE_UP_AFTER_S
        for tries in range(1, TRIES + 1):
            pause_s = FIRST_PAUSE_S * 2 ** (tries - 1)
            try:
                answer = self._http.request(method, path, headers=headers, **request)
            except httpx.TransportError as error:
                failed: Exception = self._unreachable(error)
                unsent = isinstance(error, httpx.ConnectError)
                again = tries < TRIES_TO_CONNECT if unsent else safe
            else:
                if answer.status_code not in AWAY:
                    return self._check(answer)
                failed, again = self._away(answer), safe
                pause_s = max(pause_s, _retry_after_s(answer))
            if not again or tries == TRIES or time.monotonic() + pause_s > deadline:
                raise failed
            time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _check(self, answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        answer.read()
        if answer.status_code in AWAY:
            raise self._away(answer)
        if (error := _error_of(answer)) is None:
            raise self._no_tuneyard(answer)
        raise Refused(answer.status_code, error)

    def _away(self, answer: httpx.Response) -> Unreachable:
        error = _error_of(answer) or {}
        message = error.get("message") or f"{self.url} answers {answer.status_code}."
        code = str(error.get("code") or "unavailable")
        return Unreachable(str(message), code=code, hint=error.get("hint") or "try again later")

    def _unreachable(self, error: Exception) -> Unreachable:
        if self.local:
            hint = "is it running? `tuneyard status` tells, `tuneyard up` starts it"
        else:
            hint = "check TUNEYARD_URL and the network"
        # httpx leaves some messages empty, such as those of timeouts.
        reason = str(error) or type(error).__name__
        return Unreachable(f"{self.url} cannot be reached: {reason}.", hint=hint)

    def _no_tuneyard(self, answer: httpx.Response) -> Refused:
        shown = " ".join(answer.text[:100].split())
        message = f"{self.url} answers {answer.status_code}, but not as Tuneyard does: {shown}"
        hint = "check TUNEYARD_URL: the address without /api/v1"
        return Refused(
            answer.status_code, {"code": "not_tuneyard", "message": message, "hint": hint}
        )


def _address(url: str) -> SplitResult:
    hint = "an address looks like http://127.0.0.1:8800"
    try:
        parts = urlsplit(url)
        httpx.URL(url)
        _ = parts.port
    except (ValueError, httpx.InvalidURL):
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"{url[:100]!r} is not the address of a server.", code="bad_url", hint=hint
        )
    return parts


def _error_of(answer: httpx.Response) -> Mapping[str, Any] | None:
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, Mapping) else None


def _retry_after_s(answer: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 for none, and for its other form, a date."""
    value = answer.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0
