"""hugetlb pool accounting in words: each operation without loops, for any number of pages.

A pool is six words: total, free, reserved and surplus pages, the limit of surplus pages
(`nr_overcommit_hugepages`), and whether the last operation was refused. Nothing here is shared with
`vapama.spec.hugepages`, against which it is proved.
"""

from typing import TypeAlias

from vapama.spec.words import Flag, Word, flag

Pool: TypeAlias = tuple[Word, Word, Word, Word, Word, Flag]
"""(total, free, reserved, surplus, overcommit, refused)"""


def less(a: Word, b: Word) -> Word:
    """What is left of a without b, or 0 if that is negative."""
    if a > b:
        return a - b
    return 0


def least(a: Word, b: Word) -> Word:
    """The smaller of two."""
    if a < b:
        return a
    return b


def resize(pool: Pool, count: Word) -> Pool:
    """Ask for `count` persistent pages: surplus pages become persistent before any are added.

    To shrink, free pages that are not reserved go; what is still too much becomes surplus.
    """
    total, free, reserved, surplus, overcommit, _ = pool
    persistent = total - surplus
    if count > persistent:
        short = count - persistent
        adopted = least(short, surplus)
        total, free = total + (short - adopted), free + (short - adopted)
        return total, free, reserved, surplus - adopted, overcommit, 0
    floor = total - free + reserved
    floor = max(floor, count)
    removed = least(free, less(persistent, floor))
    total, free = total - removed, free - removed
    return total, free, reserved, total - count, overcommit, 0


def reserve(pool: Pool, count: Word) -> Pool:
    """Promise `count` pages to a mapping; surplus pages make up for what is not free."""
    total, free, reserved, surplus, overcommit, _ = pool
    lacking = less(reserved + count, free)
    if lacking != 0 and surplus + lacking > overcommit:
        return total, free, reserved, surplus, overcommit, 1
    return (
        total + lacking,
        free + lacking,
        reserved + count,
        surplus + lacking,
        overcommit,
        0,
    )


def unreserve(pool: Pool, count: Word) -> Pool:
    """Take back the promise of `count` pages; as many surplus pages go, as far as they are free."""
    total, free, reserved, surplus, overcommit, _ = pool
    returned = least(least(count, surplus), free)
    return (
        total - returned,
        free - returned,
        reserved - count,
        surplus - returned,
        overcommit,
        0,
    )


def take(pool: Pool, promised: Flag) -> Pool:
    """A page is faulted in. One that was not promised may not use a promised page."""
    total, free, reserved, surplus, overcommit, _ = pool
    if promised or free > reserved:
        return total, free - 1, reserved - promised, surplus, overcommit, 0
    extra = flag(surplus < overcommit)
    return total + extra, free, reserved, surplus + extra, overcommit, extra ^ 1


def give(pool: Pool, promise_again: Flag) -> Pool:
    """A page is freed: promised again to its mapping, or gone if it was surplus, or just free."""
    total, free, reserved, surplus, overcommit, _ = pool
    if surplus > 0 and not promise_again:
        return total - 1, free, reserved, surplus - 1, overcommit, 0
    return total, free + 1, reserved + promise_again, surplus, overcommit, 0


# Subpools: what a hugetlbfs mount with sizes of its own may use

NO_LIMIT = (1 << 40) - 1
"""The largest size of a mount without one: more pages than there can be."""
Subpool: TypeAlias = tuple[Word, Word, Word, Word, Flag]
"""(most, used, least, spare, refused): `spare` pages of the least size are promised already, and
not used by a mapping yet."""


def get(mount: Subpool, count: Word) -> tuple[Subpool, Word]:
    """Use `count` pages of a mount: how many of them the pool has yet to promise."""
    most, used, least_size, spare, _ = mount
    if used + count > most:
        return (most, used, least_size, spare, 1), 0
    own = least(count, spare)
    return (most, used + count, least_size, spare - own, 0), count - own


def put(mount: Subpool, count: Word) -> Subpool:
    """Use `count` pages less of a mount; pages below its least size are spare again."""
    most, used, least_size, spare, _ = mount
    used = used - count
    if used < least_size:
        spare = least(spare + count, least_size - used)
    return most, used, least_size, spare, 0


def reserve_in(pool: Pool, mount: Subpool, count: Word) -> tuple[Pool, Subpool]:
    """Promise `count` pages to a mapping in a mount: by both, or by none of them."""
    after, lacking = get(mount, count)
    if after[4]:
        return refused(pool), after
    promised = reserve(pool, lacking)
    if promised[5]:
        # The mount gives back what it had let go: what it used, and what it had spare.
        most, _, least_size, _, _ = after
        return promised, (most, mount[1], least_size, mount[3], 1)
    return promised, after


def refused(pool: Pool) -> Pool:
    """The pool as it is, with the word that the operation was refused."""
    return (*pool[:5], 1)
