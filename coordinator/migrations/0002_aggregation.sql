-- How an attempt added contributions up, as JSON; empty in records of earlier versions.
ALTER TABLE rounds ADD COLUMN aggregation TEXT NOT NULL DEFAULT '';
