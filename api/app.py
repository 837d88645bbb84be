"""The application: routes, limits around them, and what lives as long as the process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from tuneyard.api import artifacts, chat, files, flower, following, jobs, login, problems, things
from tuneyard.api.access import Login, Yard
from tuneyard.api.broker import Broker
from tuneyard.api.checking import FileChecker
from tuneyard.api.limits import Limits
from tuneyard.api.paging import refuse_unknown_names
from tuneyard.api.passages import Passages
from tuneyard.api.prefix import Prefix
from tuneyard.api.streams import Streams
from tuneyard.api.uploads import Uploads
from tuneyard.specs.settings import Settings
from tuneyard.specs.views import ErrorBody

DESCRIPTION = """
Submit fine-tune, merge, inference and download jobs; follow their events, metrics and logs; fetch
what they bring forth. Every request but /healthz and /readyz bears `Authorization: Bearer KEY`.

An error is always `{"error": {"code", "message", "field", "line", "hint"}}`; a refused spec adds
all its problems as `details`. 503 comes with `Retry-After`: nothing is lost by asking again, with
an `Idempotency-Key` where something is to be made. Each answer has an `x-request-id`.
"""

ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody, "description": "No key, or one that is not known."},
    404: {"model": ErrorBody, "description": "No such thing, or not yours."},
    422: {"model": ErrorBody, "description": "What was asked is wrong; the mend is said."},
    503: {"model": ErrorBody, "description": "Away or busy: ask again after Retry-After."},
}

ROUTERS = (
    jobs.router,
    jobs.pipelines,
    chat.router,
    following.router,
    artifacts.router,
    files.router,
    things.router,
)
PAGES = (login.router, flower.router)


def create_app(settings: Settings) -> FastAPI:
    """Build the application; it starts while the database is away."""
    yard = Yard(settings)
    streams, checker = Streams(yard.db, yard.store), FileChecker(yard)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        streams.start()
        checker.start()
        yield
        await app.state.flower.close()
        checker.stop()
        streams.stop()
        yard.db.close()

    app = FastAPI(
        title="Tuneyard",
        version=version("tuneyard"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.yard, app.state.streams, app.state.checker = yard, streams, checker
    app.state.uploads = Uploads(yard.store, max_file_bytes=settings.max_file_bytes)
    app.state.flower = flower.Flower(settings.flower_url)
    app.state.passages = Passages()
    app.state.broker = Broker(settings.broker_url.get_secret_value())
    _include_routes(app)
    problems.register(app, (*ROUTERS, *PAGES, things.health))
    # The last one added is the outermost.
    app.add_middleware(Login, yard=yard)
    app.add_middleware(
        Limits, max_body_bytes=settings.max_body_bytes, max_file_bytes=settings.max_file_bytes
    )
    app.add_middleware(Prefix, root_path=settings.root_path, trusted=settings.trusted_networks)
    return app


def _include_routes(app: FastAPI) -> None:
    # Login has looked at the key by then; this one only tells the docs of it.
    documented = Depends(HTTPBearer(auto_error=False, description="An API key of a team."))
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(refuse_unknown_names), documented])
    for router in (things.health, *PAGES):
        app.include_router(router)
