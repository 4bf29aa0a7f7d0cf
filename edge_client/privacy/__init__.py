"""What the device sees to itself: its own budgets, and its part in secure aggregation."""
