"""/api/v1: models, nodes, who am I; and whether this process lives and is ready."""

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

router = APIRouter()
health = APIRouter(tags=["health"])


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
    broker = "ok" if request.app.state.broker.answers() else "unavailable"
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
