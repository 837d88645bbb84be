-- The first schema. Statements end with a line that holds only ";".

CREATE EXTENSION IF NOT EXISTS btree_gist
;
CREATE SEQUENCE attempt_token AS bigint
;
-- Every legal move of a job, loaded from specs/states.py; the trigger below reads it.
CREATE TABLE transitions (
    from_state text NOT NULL,
    event text NOT NULL,
    to_state text NOT NULL,
    PRIMARY KEY (from_state, event, to_state)
)
;
CREATE TABLE cluster (
    id smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    restore_epoch bigint NOT NULL DEFAULT 1
)
;
INSERT INTO cluster DEFAULT VALUES
;
-- Who leads, and since which epoch; a placing transaction reads its epoch FOR SHARE.
CREATE TABLE leases (
    name text PRIMARY KEY,
    holder text NOT NULL DEFAULT '',
    epoch bigint NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity'
)
;
INSERT INTO leases (name) VALUES ('scheduler')
;
CREATE TABLE teams (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
;
CREATE TABLE api_keys (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL REFERENCES teams (id),
    name text NOT NULL,
    hash bytea NOT NULL CONSTRAINT api_keys_hash_once UNIQUE,
    role text NOT NULL DEFAULT 'member' CHECK (role IN ('viewer', 'member', 'admin')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at timestamptz
)
;
CREATE TABLE files (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL REFERENCES teams (id),
    name text NOT NULL,
    purpose text NOT NULL,
    bytes bigint NOT NULL CHECK (bytes >= 0),
    sha256 text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    state text NOT NULL DEFAULT 'uploaded'
        CHECK (state IN ('uploaded', 'processing', 'processed', 'rejected')),
    report jsonb,
    check_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at timestamptz,
    UNIQUE (team_id, id)
)
;
CREATE INDEX files_by_team ON files (team_id, id DESC) WHERE deleted_at IS NULL
;
CREATE INDEX files_unchecked ON files (id) WHERE state IN ('uploaded', 'processing')
;
CREATE TABLE jobs (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL REFERENCES teams (id),
    kind text NOT NULL,
    name text NOT NULL,
    spec jsonb NOT NULL,
    notes jsonb NOT NULL DEFAULT '[]',
    state text NOT NULL CONSTRAINT jobs_state_known CHECK (state IN ('blocked', 'queued',
        'dispatched', 'running', 'pausing', 'paused', 'cancelling', 'succeeded', 'failed',
        'cancelled')),
    priority smallint NOT NULL DEFAULT 50,
    demand jsonb NOT NULL,
    device_kind text NOT NULL GENERATED ALWAYS AS (demand ->> 'kind') STORED,
    inputs jsonb,
    pipeline_id uuid,
    retry_of uuid,
    system boolean NOT NULL DEFAULT false,
    not_before timestamptz,
    last_seq bigint NOT NULL DEFAULT 0,
    wait_reason text,
    wait_reason_at timestamptz,
    error jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    UNIQUE (team_id, id),
    FOREIGN KEY (team_id, retry_of) REFERENCES jobs (team_id, id),
    -- A terminal job has an end, and nothing else has one.
    CONSTRAINT jobs_end_is_terminal CHECK
        ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
)
;
CREATE INDEX jobs_queued ON jobs (priority DESC, id) WHERE state = 'queued'
;
CREATE INDEX jobs_by_team ON jobs (team_id, id DESC)
;
CREATE INDEX jobs_open ON jobs (state) WHERE finished_at IS NULL
;
CREATE TABLE job_edges (
    team_id uuid NOT NULL,
    child uuid NOT NULL,
    parent uuid NOT NULL,
    output text NOT NULL,
    PRIMARY KEY (child, parent, output),
    FOREIGN KEY (team_id, child) REFERENCES jobs (team_id, id),
    FOREIGN KEY (team_id, parent) REFERENCES jobs (team_id, id),
    CONSTRAINT job_edges_not_itself CHECK (child <> parent)
)
;
CREATE INDEX job_edges_by_parent ON job_edges (parent)
;
CREATE TABLE nodes (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    boot_id text NOT NULL,
    state text NOT NULL DEFAULT 'up' CHECK (state IN ('up', 'draining', 'down')),
    capabilities jsonb NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
;
CREATE TABLE devices (
    id uuid PRIMARY KEY,
    node_id uuid NOT NULL REFERENCES nodes (id),
    kind text NOT NULL CHECK (kind IN ('gpu', 'cpu')),
    uuid text NOT NULL,
    name text NOT NULL DEFAULT '',
    bytes bigint NOT NULL DEFAULT 0,
    cores integer[] NOT NULL DEFAULT '{}',
    state text NOT NULL DEFAULT 'ok'
        CHECK (state IN ('ok', 'cleaning', 'unconfirmed', 'draining', 'lost')),
    state_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (node_id, uuid)
)
;
CREATE TABLE slots (
    id uuid PRIMARY KEY,
    device_id uuid NOT NULL REFERENCES devices (id),
    index integer NOT NULL CHECK (index >= 0),
    bytes bigint NOT NULL DEFAULT 0,
    cores integer[] NOT NULL DEFAULT '{}',
    retired_at timestamptz,
    UNIQUE (device_id, index)
)
;
CREATE TABLE attempts (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    job_id uuid NOT NULL,
    number integer NOT NULL CHECK (number > 0),
    token bigint NOT NULL DEFAULT nextval('attempt_token') UNIQUE,
    phase text NOT NULL DEFAULT 'staging'
        CHECK (phase IN ('staging', 'loading', 'running', 'publishing')),
    outcome text CHECK (outcome IN ('succeeded', 'failed', 'lost', 'stopped')),
    charged boolean NOT NULL DEFAULT false,
    cause text,
    evidence text,
    patch jsonb,
    progress jsonb,
    stop_reason text CHECK (stop_reason IN
        ('cancel', 'pause', 'preempt', 'drain', 'max_runtime', 'shutdown')),
    stop_asked_at timestamptz,
    events_offset bigint NOT NULL DEFAULT 0,
    log_offset bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    running_at timestamptz,
    ended_at timestamptz,
    UNIQUE (team_id, id),
    CONSTRAINT attempts_numbered_once UNIQUE (job_id, number),
    FOREIGN KEY (team_id, job_id) REFERENCES jobs (team_id, id),
    -- An ended attempt has an outcome, a live one has none.
    CONSTRAINT attempts_end_has_outcome CHECK ((outcome IS NULL) = (ended_at IS NULL))
)
;
-- One live attempt per job.
CREATE UNIQUE INDEX attempts_one_live ON attempts (job_id) WHERE ended_at IS NULL
;
CREATE TABLE members (
    attempt_id uuid NOT NULL REFERENCES attempts (id),
    rank integer NOT NULL DEFAULT 0,
    node_id uuid NOT NULL REFERENCES nodes (id),
    boot_id text NOT NULL DEFAULT '',
    lease_expires_at timestamptz NOT NULL,
    claimed_at timestamptz,
    ended_at timestamptz,
    exit jsonb,
    PRIMARY KEY (attempt_id, rank)
)
;
CREATE INDEX members_live ON members (node_id, lease_expires_at) WHERE ended_at IS NULL
;
CREATE TABLE allocations (
    attempt_id uuid NOT NULL REFERENCES attempts (id),
    slot_id uuid NOT NULL REFERENCES slots (id),
    rank integer NOT NULL DEFAULT 0,
    acquired_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    released_at timestamptz,
    PRIMARY KEY (attempt_id, slot_id),
    -- No slot in two hands, now or ever.
    CONSTRAINT allocations_one_hand EXCLUDE USING gist
        (slot_id WITH =, tstzrange(acquired_at, released_at) WITH &&)
)
;
-- The same for the present alone, as the index that placing looks free slots up in.
CREATE UNIQUE INDEX allocations_live ON allocations (slot_id) WHERE released_at IS NULL
;
CREATE TABLE events (
    job_id uuid NOT NULL,
    seq bigint NOT NULL,
    team_id uuid NOT NULL,
    attempt_id uuid,
    type text NOT NULL,
    from_state text,
    to_state text,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    data jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (job_id, seq),
    FOREIGN KEY (team_id, job_id) REFERENCES jobs (team_id, id),
    FOREIGN KEY (team_id, attempt_id) REFERENCES attempts (team_id, id)
)
;
CREATE TABLE metrics (
    attempt_id uuid NOT NULL,
    name text NOT NULL,
    step bigint NOT NULL,
    value double precision NOT NULL,
    team_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (attempt_id, name, step),
    FOREIGN KEY (team_id, attempt_id) REFERENCES attempts (team_id, id)
)
;
CREATE TABLE log_chunks (
    attempt_id uuid NOT NULL,
    seq bigint NOT NULL,
    start bigint NOT NULL,
    data bytea NOT NULL,
    team_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (attempt_id, seq),
    FOREIGN KEY (team_id, attempt_id) REFERENCES attempts (team_id, id)
)
;
CREATE TABLE artifacts (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    job_id uuid NOT NULL,
    attempt_id uuid NOT NULL,
    token bigint NOT NULL,
    kind text NOT NULL,
    step bigint,
    bytes bigint NOT NULL,
    digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
    manifest jsonb NOT NULL,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    pruned_at timestamptz,
    swept_at timestamptz,
    UNIQUE (team_id, id),
    FOREIGN KEY (team_id, job_id) REFERENCES jobs (team_id, id),
    FOREIGN KEY (team_id, attempt_id) REFERENCES attempts (team_id, id),
    CONSTRAINT artifacts_list_files CHECK (jsonb_array_length(manifest -> 'files') > 0)
)
;
CREATE INDEX artifacts_by_job ON artifacts (job_id, kind, step DESC)
;
CREATE INDEX artifacts_to_sweep ON artifacts (id) WHERE pruned_at IS NOT NULL AND swept_at IS NULL
;
CREATE TABLE base_models (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    source text NOT NULL,
    revision text NOT NULL,
    digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
    bytes bigint NOT NULL,
    manifest jsonb NOT NULL,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (name, digest)
)
;
CREATE TABLE models (
    id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    name text NOT NULL,
    job_id uuid NOT NULL,
    artifact_id uuid NOT NULL,
    base_model_id uuid REFERENCES base_models (id),
    parent_model_id uuid,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (team_id, id),
    CONSTRAINT models_name_once UNIQUE (team_id, name),
    FOREIGN KEY (team_id, job_id) REFERENCES jobs (team_id, id),
    FOREIGN KEY (team_id, artifact_id) REFERENCES artifacts (team_id, id),
    FOREIGN KEY (team_id, parent_model_id) REFERENCES models (team_id, id),
    CONSTRAINT models_one_parent CHECK (num_nonnulls(base_model_id, parent_model_id) = 1)
)
;
CREATE TABLE idempotency_keys (
    team_id uuid NOT NULL REFERENCES teams (id),
    key text NOT NULL,
    body_sha256 text NOT NULL,
    job_id uuid NOT NULL,
    expires timestamptz NOT NULL DEFAULT clock_timestamp() + interval '24 hours',
    PRIMARY KEY (team_id, key),
    -- Written before the job, so that two requests with one key meet here.
    FOREIGN KEY (team_id, job_id) REFERENCES jobs (team_id, id) DEFERRABLE INITIALLY DEFERRED
)
;
-- A move that specs/states.py does not know cannot be written, by whoever tries.
CREATE FUNCTION check_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM transitions WHERE from_state = OLD.state AND to_state = NEW.state
    ) THEN
        RAISE EXCEPTION 'a job cannot go from % to %', OLD.state, NEW.state
            USING ERRCODE = 'check_violation', CONSTRAINT = 'jobs_transition_legal';
    END IF;
    RETURN NEW;
END $$
;
CREATE TRIGGER jobs_transition_legal BEFORE UPDATE OF state ON jobs
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION check_transition()
;
-- The one way from a key's hash to its team, for a role that may not read keys.
CREATE FUNCTION key_team(key_hash bytea)
RETURNS TABLE (team_id uuid, team_name text, role text, key_name text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT t.id, t.name, k.role, k.name FROM api_keys k JOIN teams t ON t.id = k.team_id
    WHERE k.hash = key_hash AND k.revoked_at IS NULL
$$
;
-- Hands one unchecked file to an API process for a while; files of all teams take their turn.
CREATE FUNCTION claim_unchecked_file(seconds double precision)
RETURNS TABLE (team_id uuid, file_id uuid, purpose text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    UPDATE files f SET state = 'processing',
        check_until = clock_timestamp() + make_interval(secs => seconds)
    WHERE f.id = (
        SELECT c.id FROM files c
        WHERE c.deleted_at IS NULL AND (c.state = 'uploaded'
            OR (c.state = 'processing' AND c.check_until < clock_timestamp()))
        ORDER BY c.id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING f.team_id, f.id, f.purpose
$$
