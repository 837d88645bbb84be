"""Which job gets which devices, leases that ran out, and the hints that carry placements.

Knows specs and models; knows no Celery app of the workers (it publishes tasks by name), no files.
"""
