"""One worker per node: it claims what is placed on its node, keeps each attempt, tells Postgres.

The supervisor owns attempts; a guard stands between it and each runner; Celery tasks observe.
Knows specs, models and store; has no torch.
"""
