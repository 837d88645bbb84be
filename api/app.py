"""The application: routes, limits around them, and what lives as long as the process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from tuneyard.api import files, jobs, problems, things
from tuneyard.api.access import Yard
from tuneyard.api.checking import FileChecker
from tuneyard.api.limits import Limits
from tuneyard.api.streams import Streams
from tuneyard.specs.settings import Settings

DESCRIPTION = """
Submit fine-tune, inference and download jobs; follow their events, metrics and logs; fetch what
they bring forth. Every request but /healthz and /readyz bears `Authorization: Bearer KEY`.
"""


def create_app(settings: Settings) -> FastAPI:
    """Build the application; it starts while the database is away."""
    yard = Yard(settings)
    streams, checker = Streams(yard.db), FileChecker(yard)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        streams.start()
        checker.start()
        yield
        checker.stop()
        streams.stop()
        yard.db.close()

    app = FastAPI(
        title="Tuneyard",
        version=version("tuneyard"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.yard, app.state.streams, app.state.checker = yard, streams, checker
    app.state.broker = things.Broker(settings.broker_url.get_secret_value())
    for router in (jobs.router, files.router, things.router):
        app.include_router(router)
    problems.register(app)
    app.add_middleware(
        Limits,
        max_body_bytes=settings.max_body_bytes,
        max_file_bytes=settings.max_file_bytes,
    )
    return app
