"""The running Linux' memory management as subjects: KSM and hugetlb, driven step by step."""
