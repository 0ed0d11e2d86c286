"""Oracles: systems that nobody here wrote, behind the subject protocol."""
