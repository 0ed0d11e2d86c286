"""The running Linux' memory management as subjects: KSM and huge pages, driven step by step."""
