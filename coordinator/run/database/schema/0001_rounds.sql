-- Closed rounds, their clients, and whose name is whose. A `record` is the JSON of a struct in records.py, as in the
-- exports; what people filter by is a column.

CREATE TABLE clients (
    name        TEXT PRIMARY KEY,
    public_key  BLOB NOT NULL,
    last_round  INTEGER,
    last_digest BLOB
) WITHOUT ROWID;

-- A round has closed when its row is here.
CREATE TABLE rounds (
    round    INTEGER PRIMARY KEY,
    record   TEXT NOT NULL,
    accepted INTEGER NOT NULL AS (json_extract(record, '$.accepted')) VIRTUAL,
    loss     REAL AS (json_extract(record, '$.loss')) VIRTUAL,
    accuracy REAL AS (json_extract(record, '$.accuracy')) VIRTUAL
);

CREATE TABLE client_rounds (
    round    INTEGER NOT NULL REFERENCES rounds (round),
    position INTEGER NOT NULL,
    record   TEXT NOT NULL,
    client   TEXT NOT NULL AS (json_extract(record, '$.client')) VIRTUAL,
    status   TEXT NOT NULL AS (json_extract(record, '$.status')) VIRTUAL,
    PRIMARY KEY (round, position)
) WITHOUT ROWID;
