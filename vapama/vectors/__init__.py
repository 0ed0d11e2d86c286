"""Test vectors: questions about translation with the answers that are right, as JSON lines."""
