"""One shape for every error: {"error": {"code", "message", "field", "line", "hint"}}."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from tuneyard.specs.errors import (
    Conflict,
    InputError,
    TuneyardError,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

ROUTING = {
    404: ("not_found", "There is nothing at this address.", "/docs lists the addresses"),
    405: ("method_not_allowed", "This address does not take that method.", None),
}


def answer(error: TuneyardError) -> JSONResponse:
    """An error of ours as a response."""
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = "1"
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.as_dict()}, error.http_status, headers)


def internal(request_id: str) -> JSONResponse:
    """A bug, as a client sees it; the log has the rest under the same id."""
    problem = TuneyardError(
        "Something went wrong on our side.",
        code="internal",
        hint=f"the server's log has it under {request_id}",
    )
    return answer(problem)


def register(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Translate errors at the edge, once. What is not named here is a bug: see limits.py.

    routers: where all addresses are.
    """

    @app.exception_handler(TuneyardError)
    async def ours(_: Request, error: TuneyardError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_parameter_problem(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def routes(request: Request, error: HTTPException) -> JSONResponse:
        plain = ("bad_request", f"{error.detail}.", None)
        code, message, hint = ROUTING.get(error.status_code, plain)
        if hint:
            hint = request.scope["root_path"] + hint
        body = {"error": InputError(message, code=code, hint=hint).as_dict()}
        headers = dict(error.headers or {})
        if error.status_code == 405 and (methods := _methods_at(routers, request)):
            headers["Allow"] = ", ".join(methods)
        return JSONResponse(body, error.status_code, headers)

    @app.exception_handler(IntegrityError)
    async def constraints(_: Request, error: IntegrityError) -> JSONResponse:
        name = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
        log.warning("constraint refused", extra={"event": "constraint_refused", "name_": name})
        return answer(Conflict("This was changed by someone else at the same moment; ask again."))


def _methods_at(routers: Sequence[APIRouter], request: Request) -> list[str]:
    """All methods of an address: the framework names those of the first route that has it."""
    routes = [route for router in routers for route in router.routes]
    at = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in at for method in getattr(route, "methods", None) or ()})


def _parameter_problem(found: Mapping[str, Any]) -> InputError:
    where, *names = found["loc"]
    field = ".".join(map(str, names)) or str(where)
    if found["type"] == "missing":
        return InputError(f"{field} is missing.", code="missing_field", field=field)
    code = "wrong_type" if "parsing" in found["type"] or "type" in found["type"] else "out_of_range"
    return InputError(f"{field}: {found['msg'].lower()}.", code=code, field=field)
