"""The Python client of Tuneyard's HTTP API. Knows specs; knows no database and no torch."""

from tuneyard.client.http import Client, Refused, Unreachable

__all__ = ["Client", "Refused", "Unreachable"]
