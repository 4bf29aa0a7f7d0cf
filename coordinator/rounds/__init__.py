"""One round: from its invitations to what has been collected."""
