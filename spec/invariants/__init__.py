"""The invariants, one file a topic. A new file here is found by itself."""
