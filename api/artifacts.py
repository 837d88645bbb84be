"""/api/v1/jobs/{job}/artifacts: what jobs bring forth, file by file, with checksums."""

from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from tuneyard.api.access import TheCaller, TheYard, path_id
from tuneyard.api.ranges import BINARY, part_of, saved
from tuneyard.models import reading
from tuneyard.specs.errors import NotFound
from tuneyard.specs.views import ArtifactFileList, ArtifactList

router = APIRouter(prefix="/api/v1/jobs/{job}/artifacts", tags=["artifacts"])


@router.get("")
def list_artifacts(
    job: str,
    caller: TheCaller,
    yard: TheYard,
    kind: Annotated[str | None, Query(max_length=40, examples=["checkpoint", "log"])] = None,
) -> ArtifactList:
    """What a job brought forth: checkpoints, and its result once it succeeded.

    Ended attempts' logs are artifacts of the kind `log`, listed when they are asked for; `/logs`
    has what is in them.
    """
    job_id = path_id("job", job)
    with yard.begin(caller.team_id) as tx:
        reading.standing(tx, job_id)
        return ArtifactList(data=reading.list_artifacts(tx, job_id, kind=kind))


@router.get("/{artifact}/files")
def list_files(job: str, artifact: str, caller: TheCaller, yard: TheYard) -> ArtifactFileList:
    """The files of an artifact, with size and sha256."""
    job_id, artifact_id = path_id("job", job), path_id("artifact", artifact)
    with yard.begin(caller.team_id) as tx:
        manifest = reading.manifest_of(tx, job_id, artifact_id)
    return ArtifactFileList.model_validate({"data": manifest["files"]})


@router.get("/{artifact}/files/{path:path}", response_class=StreamingResponse, responses=BINARY)
def content(
    job: str,
    artifact: str,
    path: str,
    caller: TheCaller,
    yard: TheYard,
    range_: Annotated[str | None, Header(alias="Range")] = None,
) -> StreamingResponse:
    """One file of an artifact; its sha256 is the ETag."""
    job_id, artifact_id = path_id("job", job), path_id("artifact", artifact)
    with yard.begin(caller.team_id) as tx:
        manifest = reading.manifest_of(tx, job_id, artifact_id)
    entry = next((each for each in manifest["files"] if each["path"] == path), None)
    if entry is None:
        hint = "…/files lists its files"
        raise NotFound("This artifact has no such file.", field="path", hint=hint)
    part = part_of(range_, int(entry["size"]))
    pieces = yard.store.read_within(
        "artifacts", artifact_id, path, first=part.first, last=part.last
    )
    return saved(pieces, part, name=path.rpartition("/")[2], sha256=entry["sha256"])
