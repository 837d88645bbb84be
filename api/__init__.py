"""FastAPI under /api/v1: check, one transaction, a view. Knows specs, models, store and checks.

It publishes nothing and starts no job: the row that it commits is the outbox.
"""
