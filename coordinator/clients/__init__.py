"""Who takes part: the roster, enrolments, refusals, and what is known of each."""
