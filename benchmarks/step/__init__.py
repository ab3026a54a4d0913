"""A chain step of the whole pair, and whole chains and sampling jobs."""
