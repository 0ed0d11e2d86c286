"""Snapshots: images of memory, what their page tables map, and a guest's with the truth of it."""
