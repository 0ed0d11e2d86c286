"""Mistakes to be caught: small patches of `impl`, each of which some engine must refute."""
