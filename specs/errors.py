"""Errors that a person or a caller can act on. Bugs are not here: they crash.

    TuneyardError
    ├── InputError            the request is wrong; nothing was kept            (CLI 2 or 3)
    │   ├── SpecRejected      one or more fields of a spec, each with its mend
    │   ├── BadId             not the id of such a thing
    │   ├── NotFound          no such thing, or not yours: the answer is the same
    │   ├── Conflict          the thing's state does not allow it
    │   └── Unauthenticated, Forbidden
    ├── Unavailable           try again later: the database is away or busy     (CLI 4)
    └── StaleToken            a writer's attempt is over: it must stop

Each class has a stable ``code``; its docstring is the default message.
"""

from collections.abc import Sequence
from typing import Any


class TuneyardError(Exception):
    """Something went wrong."""

    code = "error"
    http_status = 500

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        field: str | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip().split("\n")[0]
        if code is not None:
            self.code = code
        self.field = field
        self.line = line
        self.hint = hint
        super().__init__(self.message)

    def as_dict(self) -> dict[str, Any]:
        """The error as /api/v1 answers it."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "line": self.line,
            "hint": self.hint,
        }


class InputError(TuneyardError):
    """The request is wrong."""

    code = "bad_request"
    http_status = 422


class SpecRejected(InputError):
    """The job was refused."""

    code = "spec_rejected"

    def __init__(self, problems: Sequence[InputError]) -> None:
        first = problems[0]
        more = f" ({len(problems)} problems)" if len(problems) > 1 else ""
        super().__init__(
            first.message + more,
            code=first.code,
            field=first.field,
            line=first.line,
            hint=first.hint,
        )
        self.problems = list(problems)

    def as_dict(self) -> dict[str, Any]:
        """As the first problem, with all of them under ``details``."""
        return super().as_dict() | {"details": [p.as_dict() for p in self.problems]}


class BadId(InputError):
    """This is not an id of the right form."""

    code = "bad_id"


class NotFound(InputError):
    """There is no such thing here."""

    code = "not_found"
    http_status = 404


class Conflict(InputError):
    """The state of this thing does not allow that."""

    code = "conflict"
    http_status = 409


class Unauthenticated(InputError):
    """A valid API key is needed."""

    code = "unauthenticated"
    http_status = 401


class Forbidden(InputError):
    """This key may not do that."""

    code = "forbidden"
    http_status = 403


class Unavailable(TuneyardError):
    """Tuneyard cannot answer right now; nothing is lost by asking again."""

    code = "unavailable"
    http_status = 503


class StaleToken(TuneyardError):
    """This attempt is over: its token opens nothing any more."""

    code = "stale_token"
    http_status = 409


class IllegalEvent(TuneyardError):
    """A job in this state cannot meet this event."""

    code = "illegal_event"
    http_status = 409
