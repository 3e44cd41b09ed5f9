-- The next round's clipping norm under adaptive clipping; null before it has moved and without it.
ALTER TABLE tasks ADD COLUMN clipping_norm DOUBLE PRECISION;

-- The protection that all rounds so far ran under: protocol, and a hash of the privacy; empty before this column.
ALTER TABLE tasks ADD COLUMN protection TEXT NOT NULL DEFAULT '';

-- What every sum that was opened gave away: written before it was opened, and never changed.
CREATE TABLE privacy_ledger (
    population      TEXT   NOT NULL,
    task            TEXT   NOT NULL,
    round           BIGINT NOT NULL,
    attempt         BIGINT NOT NULL,
    cohort          BIGINT NOT NULL,
    -- 'training', 'evaluation' or 'telemetry'.
    purpose         TEXT   NOT NULL,
    -- Vectors in the sum, and how many of them are counted on for their noise.
    survivors       BIGINT NOT NULL,
    honest          BIGINT NOT NULL,
    rho             DOUBLE PRECISION NOT NULL,
    epsilon         DOUBLE PRECISION NOT NULL,
    delta           DOUBLE PRECISION NOT NULL,
    charged_unix_ms BIGINT NOT NULL,
    PRIMARY KEY (population, task, round, attempt, cohort, purpose)
);
