-- The clients' own evaluations, and all numbers by name for whoever draws them.

CREATE TABLE evaluations (
    number INTEGER PRIMARY KEY,
    record TEXT NOT NULL,
    round  INTEGER NOT NULL AS (json_extract(record, '$.round')) VIRTUAL
);

CREATE VIEW metrics (round, name, value) AS
    SELECT rounds.round, entry.key, entry.value
    FROM rounds, json_each(rounds.record) AS entry
    WHERE entry.type IN ('integer', 'real') AND entry.key != 'round';
