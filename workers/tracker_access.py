"""What a fine-tune's trackers get of the worker's environment: what the setting names, no more.

Values go by a file that only this account reads, never by a spec, an event or a runner's environ.
"""

import json
from collections.abc import Mapping
from typing import Any

from tuneyard.specs.runner import TRACKER_FILE
from tuneyard.specs.settings import Settings
from tuneyard.specs.tracking import trackers_of
from tuneyard.workers.hub_access import Environment, private_file


def tracker_environment(
    environ: Environment, settings: Settings, arguments: Mapping[str, Any]
) -> dict[str, str]:
    """The variable that names the file, for a runner whose job asks for a tracker."""
    asked, _ = trackers_of(
        arguments.get("report_to", "none"), bool(arguments.get("use_swanlab", False))
    )
    given = {name: environ[name] for name in settings.tracked_variables if environ.get(name)}
    if not asked or not given:
        return {}
    path = settings.home / "tokens" / "trackers.json"
    return {TRACKER_FILE: str(private_file(path, json.dumps(given, sort_keys=True)))}
