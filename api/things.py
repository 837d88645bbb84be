"""/api/v1: models, nodes, who am I; and whether this process lives and is ready."""

import logging
import threading
import time

import redis
from fastapi import APIRouter, Request, Response
from sqlalchemy import text

from tuneyard.api.access import TheCaller, TheYard, Yard
from tuneyard.models import catalogue
from tuneyard.specs.errors import Unavailable
from tuneyard.specs.views import (
    HealthView,
    MeView,
    ModelList,
    ModelView,
    NodeList,
    ReadyView,
)

log = logging.getLogger(__name__)

router = APIRouter()
health = APIRouter(tags=["health"])

BROKER_TIMEOUT_S = 0.5
BROKER_KNOWN_S = 2.0


@router.get("/api/v1/models", tags=["models"])
def list_models(caller: TheCaller, yard: TheYard) -> ModelList:
    """Base models, and the team's tuned ones."""
    with yard.begin(caller.team_id) as tx:
        return ModelList(data=catalogue.list_models(tx))


@router.get("/api/v1/models/{name:path}", tags=["models"])
def show_model(name: str, caller: TheCaller, yard: TheYard) -> ModelView:
    """One model by its name or id."""
    with yard.begin(caller.team_id) as tx:
        return catalogue.show_model(tx, name)


@router.get("/api/v1/nodes", tags=["nodes"])
def list_nodes(caller: TheCaller, yard: TheYard) -> NodeList:
    """Nodes with their devices, and what is free."""
    with yard.begin(caller.team_id) as tx:
        return NodeList(data=catalogue.list_nodes(tx, silence_s=yard.settings.lease_s))


@router.get("/api/v1/me", tags=["access"])
def me(caller: TheCaller) -> MeView:
    """Whose key this is."""
    return MeView.model_validate({"team": caller.team, "role": caller.role, "key": caller.key})


@health.get("/healthz")
async def healthz() -> HealthView:
    """This process lives."""
    return HealthView()


@health.get("/readyz")
def readyz(yard: TheYard, request: Request, response: Response) -> ReadyView:
    """ready; degraded (no broker: jobs run all the same); or unavailable (503: no database)."""
    broker = "ok" if request.app.state.broker.reachable() else "unavailable"
    if not _database_answers(yard):
        response.status_code, response.headers["Retry-After"] = 503, "1"
        found = {"status": "unavailable", "database": "unavailable", "broker": broker}
        return ReadyView.model_validate(found)
    status = "ready" if broker == "ok" else "degraded"
    return ReadyView.model_validate({"status": status, "database": "ok", "broker": broker})


def _database_answers(yard: Yard) -> bool:
    try:
        with yard.db.begin_reserved() as tx:
            tx.execute(text("SELECT 1"))
    except Unavailable:
        return False
    return True


class Broker:
    """Whether Valkey answers; asked at most every two seconds, said once when it changes."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(
            url, socket_timeout=BROKER_TIMEOUT_S, socket_connect_timeout=BROKER_TIMEOUT_S
        )
        self._lock = threading.Lock()
        self._asked_at, self._answered = 0.0, True

    def reachable(self) -> bool:
        """The newest answer."""
        with self._lock:
            if time.monotonic() - self._asked_at > BROKER_KNOWN_S:
                self._asked_at = time.monotonic()
                self._note(self._ping())
            return self._answered

    def _ping(self) -> bool:
        try:
            return bool(self._client.ping())
        except (redis.RedisError, OSError):
            return False

    def _note(self, answered: bool) -> None:
        if answered != self._answered:
            log.warning(
                "broker is back" if answered else "broker unreachable: jobs run without hints",
                extra={"event": "broker"},
            )
        self._answered = answered
