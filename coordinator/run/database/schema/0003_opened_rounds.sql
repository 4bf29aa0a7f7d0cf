-- How the open round was opened, a second time beside its journal: so that damage to the journal's first record does
-- not cost the others.

CREATE TABLE opened_rounds (
    round  INTEGER PRIMARY KEY,
    opened BLOB NOT NULL
);
