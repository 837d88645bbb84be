"""Whether the packages that a fine-tune's optimizer lives in are there."""

from importlib.metadata import PackageNotFoundError, version

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.failures import BadSpec
from tuneyard.specs.optimizers import packages_of

_LEAST_VERSIONS = {"schedule_free_radam": (1, 4)}


def check_packages(arguments: FinetuneArguments) -> None:
    """Look for the optimizer's package without importing anything. Raises: BadSpec."""
    for field, package in packages_of(arguments):
        name = arguments.optim if field == "optim" else field
        try:
            found = version(package)
        except PackageNotFoundError:
            message = f"{name} needs the package {package}, which this node's runner lacks."
            hint = f"`pip install {package}` there, or optim: adamw_torch"
            raise BadSpec(message, field=field, hint=hint) from None
        least = _LEAST_VERSIONS.get(arguments.optim)
        if least and tuple(int(part) for part in found.split(".")[:2]) < least:
            message = f"{name} needs {package} {'.'.join(map(str, least))}, here is {found}."
            raise BadSpec(message, field=field, hint=f"`pip install --upgrade {package}`")
