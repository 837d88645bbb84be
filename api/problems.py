"""One shape for every error: {"error": {"code", "message", "field", "line", "hint"}}."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from tuneyard.specs.errors import Conflict, InputError, TuneyardError, Unavailable

log = logging.getLogger(__name__)

CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def answer(error: TuneyardError) -> JSONResponse:
    """An error of ours as a response."""
    headers = {"Retry-After": "1"} if isinstance(error, Unavailable) else {}
    return JSONResponse({"error": error.as_dict()}, error.http_status, headers)


def register(app: FastAPI) -> None:
    """Translate errors at the edge, once."""

    @app.exception_handler(TuneyardError)
    def ours(_: Request, error: TuneyardError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    def parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_parameter_problem(error.errors()[0]))

    @app.exception_handler(HTTPException)
    def routes(_: Request, error: HTTPException) -> JSONResponse:
        code = CODES.get(error.status_code, "bad_request")
        problem = InputError(str(error.detail) + ".", code=code)
        body = {"error": problem.as_dict()}
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(IntegrityError)
    def constraints(_: Request, error: IntegrityError) -> JSONResponse:
        log.warning("constraint refused", extra={"event": "constraint", "error": str(error.orig)})
        return answer(Conflict("This was changed at the same moment by someone else; ask again."))

    @app.exception_handler(Exception)
    def bugs(request: Request, error: Exception) -> JSONResponse:
        log.error("internal error", exc_info=error, extra={"event": "internal_error"})
        problem = TuneyardError(
            "Something went wrong on our side; the server's log has it.", code="internal"
        )
        return JSONResponse({"error": problem.as_dict()}, 500)


def _parameter_problem(found: Mapping[str, Any]) -> InputError:
    where, *names = found["loc"]
    field = ".".join(map(str, names)) or str(where)
    if found["type"] == "missing":
        return InputError(f"{field} is missing.", code="missing_field", field=field)
    code = "wrong_type" if "parsing" in found["type"] or "type" in found["type"] else "out_of_range"
    return InputError(f"{field}: {found['msg'].lower()}.", code=code, field=field)
