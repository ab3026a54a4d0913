"""Single ops beside their references: the cases, and how they are timed."""
