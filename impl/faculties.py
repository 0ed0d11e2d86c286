"""What the host's memory management offers to invariants: a part of the `optimized` subject."""

from types import ModuleType
from typing import Any

from vapama.impl.hugepages import Hugetlb, Transparent
from vapama.impl.kernels import large_pages, pool, sharing
from vapama.impl.merging import Merging
from vapama.spec.subject import (
    HUGETLB,
    HUGETLB_BOOKS,
    KSM,
    KSM_HOST,
    LARGE_PAGES,
    POOL,
    SHARING,
    THP,
)


class HostMemory:
    """KSM and huge pages, as objects that are driven step by step and as functions of words."""

    OBSERVES = frozenset({KSM, KSM_HOST, SHARING, HUGETLB, HUGETLB_BOOKS, POOL, LARGE_PAGES, THP})

    def ksm(self, pages: int, **options: Any) -> Merging:
        """A process of so many pages, and the merger."""
        return Merging(pages, **options)

    def hugetlb(self, **options: Any) -> Hugetlb:
        """An empty pool."""
        return Hugetlb(**options)

    def thp(self) -> Transparent:
        """A block of memory in which nothing is mapped."""
        return Transparent()

    def sharing(self) -> ModuleType:
        """What becomes of a page's word."""
        return sharing

    def pool(self) -> ModuleType:
        """Hugetlb accounting in words."""
        return pool

    def large_pages(self) -> ModuleType:
        """Where large pages may be mapped, and what they are split into."""
        return large_pages
