"""What must never be found in the database, as SQL: every query returns no row, at any moment."""

from support.databases import TestDatabase

INVARIANTS = {
    "one live attempt per job": """
        SELECT job_id FROM attempts WHERE ended_at IS NULL GROUP BY job_id HAVING count(*) > 1""",
    "no slot in two hands, now or ever": """
        SELECT a.attempt_id, b.attempt_id FROM allocations a JOIN allocations b
        ON a.slot_id = b.slot_id AND a.attempt_id < b.attempt_id
        AND tstzrange(a.acquired_at, a.released_at) && tstzrange(b.acquired_at, b.released_at)""",
    "a job is live exactly when it has a live attempt": """
        SELECT j.id, j.state FROM jobs j
        LEFT JOIN attempts a ON a.job_id = j.id AND a.ended_at IS NULL
        WHERE (j.state IN ('dispatched', 'running', 'cancelling', 'pausing'))
              <> (a.id IS NOT NULL)""",
    "an ended attempt holds nothing": """
        SELECT l.slot_id FROM allocations l JOIN attempts a ON a.id = l.attempt_id
        WHERE l.released_at IS NULL AND a.ended_at IS NOT NULL""",
    "terminal is final": """
        SELECT job_id, seq FROM events
        WHERE to_state IS NOT NULL AND from_state IN ('succeeded', 'failed', 'cancelled')""",
    "the timeline is a chain that ends in the job's state": """
        SELECT job_id FROM (SELECT job_id, from_state, lag(to_state) OVER w AS before FROM events
            WHERE to_state IS NOT NULL WINDOW w AS (PARTITION BY job_id ORDER BY seq)) x
        WHERE from_state IS DISTINCT FROM before
        UNION SELECT j.id FROM jobs j WHERE j.state IS DISTINCT FROM (
            SELECT to_state FROM events e WHERE e.job_id = j.id AND to_state IS NOT NULL
            ORDER BY seq DESC LIMIT 1)""",
    "only moves of the table happened": """
        SELECT e.job_id, e.seq FROM events e
        LEFT JOIN transitions t ON t.from_state = e.from_state AND t.to_state = e.to_state
            AND t.event = e.type
        WHERE e.to_state IS NOT NULL AND e.type <> 'submit' AND t.event IS NULL""",
    "events are numbered without gaps": """
        SELECT job_id FROM events GROUP BY job_id
        HAVING max(seq) <> count(*) OR min(seq) <> 1""",
    "attempts are numbered 1..n and tokens rise": """
        SELECT job_id FROM (SELECT job_id, number, token, row_number() OVER w AS r,
            lag(token) OVER w AS before FROM attempts
            WINDOW w AS (PARTITION BY job_id ORDER BY number)) x
        WHERE number <> r OR token <= before""",
    "no accepted write by a stale token": """
        SELECT e.job_id FROM events e JOIN attempts a ON a.id = e.attempt_id
        JOIN attempts n ON n.job_id = a.job_id AND n.number = a.number + 1
        WHERE e.at > n.started_at AND e.type <> 'write_refused'
        UNION ALL SELECT x.job_id FROM artifacts x JOIN attempts a ON a.id = x.attempt_id
        WHERE x.published_at > a.ended_at OR x.token <> a.token""",
    "success is the last attempt's, once": """
        SELECT j.id FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id AND a.outcome = 'succeeded'
        GROUP BY j.id, j.state HAVING count(a.id) <> (j.state = 'succeeded')::int
        OR max(a.number) <> (SELECT max(number) FROM attempts z WHERE z.job_id = j.id)""",
    "an artifact lists whole, safely named files": """
        SELECT x.id FROM artifacts x, jsonb_array_elements(x.manifest -> 'files') f
        WHERE coalesce(f ->> 'sha256', '') !~ '^[0-9a-f]{64}$'
        OR coalesce((f ->> 'size')::bigint, -1) < 0
        OR f ->> 'path' ~ '(^/|^\\.|\\.\\.|\\\\|^$)'""",
    "a live attempt has the slots it asked for, on its node": """
        SELECT a.id FROM attempts a JOIN jobs j ON j.id = a.job_id
        JOIN members m ON m.attempt_id = a.id
        LEFT JOIN allocations l ON l.attempt_id = a.id AND l.released_at IS NULL
        LEFT JOIN slots s ON s.id = l.slot_id LEFT JOIN devices d ON d.id = s.device_id
        WHERE a.ended_at IS NULL AND a.phase <> 'publishing'
        GROUP BY a.id, j.demand
        HAVING count(l.slot_id) <> (j.demand ->> 'devices_each')::int
        OR bool_or(d.node_id <> m.node_id)""",
    "one key, one job, one team": """
        SELECT k.key FROM idempotency_keys k LEFT JOIN jobs j ON j.id = k.job_id
        WHERE j.id IS NULL OR j.team_id <> k.team_id""",
    "nothing crosses a team": """
        SELECT x.id FROM artifacts x JOIN jobs j ON j.id = x.job_id WHERE x.team_id <> j.team_id
        UNION ALL SELECT c.id FROM job_edges e JOIN jobs c ON c.id = e.child
        JOIN jobs p ON p.id = e.parent WHERE c.team_id <> p.team_id""",
    "a failed job has its failing event": """
        SELECT id FROM jobs j WHERE state = 'failed' AND NOT EXISTS (
            SELECT 1 FROM events e WHERE e.job_id = j.id AND e.to_state = 'failed')""",
    "nothing ran before its parents, nothing waits for the dead": """
        SELECT c.id FROM jobs c JOIN job_edges e ON e.child = c.id JOIN jobs p ON p.id = e.parent
        GROUP BY c.id, c.state
        HAVING (c.state IN ('queued', 'dispatched', 'running', 'succeeded')
                AND bool_or(p.state <> 'succeeded'))
        OR (c.state = 'blocked' AND bool_or(p.state IN ('failed', 'cancelled')))""",
}


def broken_invariants(db: TestDatabase) -> dict[str, list[object]]:
    """Name of each broken invariant -> the rows that break it."""
    found = {name: db.rows(sql.replace(":", "\\:")) for name, sql in INVARIANTS.items()}
    return {name: list(rows) for name, rows in found.items() if rows}
