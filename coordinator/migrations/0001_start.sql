-- Numbered and append-only: a released migration never changes. Hashes are lower-case hexadecimal SHA-256,
-- times milliseconds since 1970.

CREATE TABLE tasks (
    population        TEXT   NOT NULL,
    name              TEXT   NOT NULL,
    created_unix_ms   BIGINT NOT NULL,
    rounds            BIGINT NOT NULL,
    -- The next round and attempt, and the blobs they start from; null until the first commit.
    round             BIGINT,
    attempt           BIGINT,
    checkpoint        TEXT,
    checkpoint_bytes  BIGINT,
    optimizer         TEXT,
    optimizer_bytes   BIGINT,
    -- The commit before: devices may still be reading its checkpoint.
    checkpoint_before TEXT,
    optimizer_before  TEXT,
    PRIMARY KEY (population, name)
);

CREATE TABLE rounds (
    population       TEXT   NOT NULL,
    task             TEXT   NOT NULL,
    round            BIGINT NOT NULL,
    attempt          BIGINT NOT NULL,
    -- Null for a finished attempt, else why it failed.
    failure          TEXT,
    selected         BIGINT NOT NULL,
    completed        BIGINT NOT NULL,
    withdrawn        BIGINT NOT NULL,
    update_norm      DOUBLE PRECISION,
    opened_unix_ms   BIGINT NOT NULL,
    finished_unix_ms BIGINT NOT NULL,
    PRIMARY KEY (population, task, round, attempt)
);

CREATE TABLE releases (
    population TEXT   NOT NULL,
    version    BIGINT NOT NULL,
    task       TEXT   NOT NULL,
    adapter    TEXT   NOT NULL,
    manifest   BLOB   NOT NULL,
    envelope   BLOB   NOT NULL,
    PRIMARY KEY (population, version)
);
