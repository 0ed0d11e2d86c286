"""The symbolic engine: invariants proved for all inputs, and what makes a proof worth trusting."""
