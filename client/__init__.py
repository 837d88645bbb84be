"""The Python client of Tuneyard's HTTP API. Knows specs; knows no database and no torch."""

from tuneyard.client.errors import Refused, Unreachable
from tuneyard.client.http import Client

__all__ = ["Client", "Refused", "Unreachable"]
