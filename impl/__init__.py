"""The optimized implementation. It shares words, outcomes and state with `spec`, and no code."""
