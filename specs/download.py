"""What ``kind: download`` may say."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import DataFile, ModelName, Spec, check_text, refusal
from tuneyard.specs.sources import read_source


def _check_source(text: str) -> str:
    check_text(text)
    try:
        return read_source(text).text
    except InputError as error:
        message = error.message.removeprefix("source ").rstrip(".")
        raise refusal(error.code, message, error.hint) from None


class DownloadSpec(Spec):
    """Bring a model or a data set to the cluster."""

    kind: Literal["download"] = "download"
    source: Annotated[str, AfterValidator(_check_source)] = Field(
        min_length=1,
        max_length=400,
        description="A hub's id (modelscope:… or huggingface:… for one hub), node:/path, a wheel.",
    )
    revision: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$",
        description="Branch, tag or commit of the hub; unset: its main branch.",
    )
    what: Literal["model", "dataset"] = Field("model", description="What the source holds.")
    data_file: DataFile | None = Field(
        None, description="Of a data set only this file; unset: all of its data files."
    )
    model_name: ModelName = Field(
        description="What it is called here; unset: the job's name, else the source's."
    )

    @property
    def wants_gpu(self) -> bool:
        """A download never takes a GPU."""
        return False


def implied_download(name: str) -> DownloadSpec | None:
    """The download that would bring a model of this name; None where no source is called so."""
    try:
        origin = read_source(name)
    except InputError:
        return None
    return DownloadSpec(source=origin.text, model_name=origin.likely_name)
