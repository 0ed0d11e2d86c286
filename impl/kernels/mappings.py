"""Every page that paging structures map: one loop over any radix tables, resumable and bounded.

Like all kernels it is nothing but words, indexing and loops (see `vapama.impl.kernels.long_mode`).
What distinguishes 4-level paging from 32-bit paging or from EPT stands in `form`, a row of words:
by level, how the tables of that level are indexed and which bits of their entries mean what.

Memory is given by its pieces, as an image holds it: `memory[p]` is the 8 bytes at *position* p,
which need not be a multiple of 8; physical addresses from `firsts[k]` up to `ends[k]` are at the
positions from `places[k]` on. Pieces are sorted, and do not overlap. What lies in none is absent.

Hostile tables cannot make the loop long without making its result long: a table below which no page
was found is remembered and not entered again. (A cycle ends, as each step goes a level down.) And
the caller bounds both, by `room` and `reads`: the loop then stops, and goes on when called again.
"""

from typing import Protocol

from vapama.spec.words import Word

NOWHERE = (1 << 64) - 1

# `form`, by level: the position of the index in an address, the number of entries of a table, the
# bits of which one set means that an entry maps a page, the bits that must be 0 in an entry that
# references a table and in one that maps a page, the rights that an entry does not take away.
SHIFT, COUNT, PAGE, TABLE_ZERO, PAGE_ZERO, KEEPS = 0, 8, 16, 24, 32, 40
# `form`, of all levels: the top level; the bits of which one set means that an entry is present;
# 1 if entries are 4 bytes; bits of an entry that forbid when they are set, where others allow; bits
# 39:32 of a large page's address that stand in its bits 20:13; the uppermost bit of an address, and
# the bits above it that are equal to it; 1 if the rules of EPT for misconfigured entries apply, and
# 3 if besides an entry may allow execution without reads.
TOP, PRESENT, NARROW, FORBIDS, HIGH, SIGN, UPPER, EPT = 48, 49, 50, 51, 52, 53, 54, 55
FORM_WORDS = 56

# `state`, by level: the next index, the position and the linear address of the table that the loop
# is in, the rights left above it, and how many pages were found below it.
NEXT, PLACE, BASE, RIGHTS, BELOW = 0, 8, 16, 24, 32
# `state`, of all levels: the level that the loop is at; runs found; how many entries were read; and
# how many of those met were malformed, or named a table that is absent; tables remembered.
LEVEL, FOUND, READS, MALFORMED, ABSENT, REMEMBERED = 40, 41, 42, 43, 44, 45
STATE_WORDS = 46

FRAME = 0x000FFFFFFFFFF000
DONE, FULL, TIRED = 0, 1, 2
PROBES = 32
BAD_TYPES = 1 << 2 | 1 << 3 | 1 << 7


class Words(Protocol):
    """Words by index, to read."""

    def __getitem__(self, index: int, /) -> Word:
        """The word at `index`."""


class Store(Words, Protocol):
    """Words to read and write."""

    def __setitem__(self, index: int, word: Word, /) -> None:
        """Put `word` at `index`."""


def find(
    firsts: Words, ends: Words, places: Words, pieces: Word, address: Word, size: Word
) -> Word:
    """The position of `size` bytes at a physical address, or NOWHERE if no piece holds them all."""
    low, high = 0, pieces
    while low < high:
        middle = (low + high) >> 1
        if firsts[middle] <= address:
            low = middle + 1
        else:
            high = middle
    if low == 0 or address + size > ends[low - 1]:
        return NOWHERE
    return places[low - 1] + (address - firsts[low - 1])


def slot_of(keys: Words, mask: Word, place: Word, level: Word) -> Word:
    """Where `keys` has, or can take, a table; NOWHERE if its neighbourhood is full."""
    key = place << 3 | level
    slot = (key >> 15 ^ key >> 33 ^ level << 9) & mask
    for _ in range(PROBES):
        if keys[slot] == key or keys[slot] == 0:
            return slot
        slot = (slot + 1) & mask
    return NOWHERE


def list_pages(
    memory: Words,
    firsts: Words,
    ends: Words,
    places: Words,
    pieces: Word,
    form: Words,
    state: Store,
    keys: Store,
    counts: Store,
    mask: Word,
    counting: Word,
    same: Word,
    room: Word,
    reads: Word,
    found_address: Store,
    found_pa: Store,
    found_shift: Store,
    found_pages: Store,
    found_rights: Store,
    found_entry: Store,
) -> Word:
    """Go on from `state` listing pages, in the order of linear addresses, as *runs* into the last
    six rows: address, physical address, size of a page (as a power of two), number of pages, rights
    that the walk leaves, and the entry that maps the first page. Malformed entries map nothing, nor
    do absent tables.

    A run has one page if `same` is 0. Otherwise neighbours with equal rights, and equal bits `same`
    of their entries, are one run. With `counting` set nothing is listed, `state[BELOW + top]` comes
    to how many pages there are, and a table met again is not entered again.

    `keys` and `counts` remember tables: `mask + 1` words each, a power of two. Returns DONE; FULL
    if there was `room` for no further run; TIRED if `reads` entries did not suffice.
    """
    top, present, narrow, forbids = form[TOP], form[PRESENT], form[NARROW], form[FORBIDS]
    level = state[LEVEL]
    while level <= top:
        shift, last, is_page = form[SHIFT + level], form[COUNT + level], form[PAGE + level]
        table_zero, page_zero = form[TABLE_ZERO + level], form[PAGE_ZERO + level]
        keeps, left = form[KEEPS + level], state[RIGHTS + level]
        place, base = state[PLACE + level], state[BASE + level]
        i = state[NEXT + level]
        below = NOWHERE
        while i < last:
            # ENTRY
            if narrow:
                entry = memory[place + (i >> 1 << 3)] >> ((i & 1) << 5) & 0xFFFFFFFF
            else:
                entry = memory[place + (i << 3)]
            i = i + 1
            if not entry & present:
                continue
            page = entry & is_page
            bad = entry & page_zero if page else entry & table_zero
            if form[EPT]:
                bad = bad | misconfigured(entry, page, form[EPT])
            if bad:
                state[MALFORMED] = state[MALFORMED] + 1
                continue
            allowed = left & (entry ^ forbids | keeps)
            address = base | (i - 1) << shift

            # PAGE
            if page:
                if not counting:
                    pa = entry & FRAME & ~((1 << shift) - 1)
                    if narrow and level == 2:
                        pa = pa | (entry >> 13 & form[HIGH]) << 32
                    if address >> form[SIGN]:
                        address = address | form[UPPER]
                    n = state[FOUND]
                    if (
                        same != 0
                        and n > 0
                        and found_shift[n - 1] == shift
                        and found_rights[n - 1] == allowed
                        and (found_entry[n - 1] ^ entry) & same == 0
                        and found_address[n - 1] + (found_pages[n - 1] << shift) == address
                        and found_pa[n - 1] <= pa
                        and pa - found_pa[n - 1] == found_pages[n - 1] << shift
                    ):
                        found_pages[n - 1] = found_pages[n - 1] + 1
                    elif n == room:
                        state[LEVEL], state[NEXT + level] = level, i - 1
                        return FULL
                    else:
                        found_address[n], found_pa[n] = address, pa
                        found_shift[n], found_pages[n] = shift, 1
                        found_rights[n], found_entry[n] = allowed, entry
                        state[FOUND] = n + 1
                state[BELOW + level] = state[BELOW + level] + 1
                continue

            # TABLE
            size = form[COUNT + level - 1] << (3 - narrow)
            below = find(firsts, ends, places, pieces, entry & FRAME, size)
            if below == NOWHERE:
                state[ABSENT] = state[ABSENT] + 1
                continue
            slot = slot_of(keys, mask, below, level - 1)
            if slot != NOWHERE and keys[slot] != 0 and (counting or counts[slot] == 0):
                state[BELOW + level] = state[BELOW + level] + counts[slot]
                below = NOWHERE
                continue
            if reads < state[READS] + form[COUNT + level - 1]:
                state[LEVEL], state[NEXT + level] = level, i - 1
                return TIRED
            state[NEXT + level] = i
            level = level - 1
            state[NEXT + level], state[BELOW + level] = 0, 0
            state[PLACE + level], state[BASE + level], state[RIGHTS + level] = (
                below,
                address,
                allowed,
            )
            state[READS] = state[READS] + form[COUNT + level]
            break
        if below != NOWHERE:
            continue

        # END OF A TABLE
        if counting or state[BELOW + level] == 0:
            slot = slot_of(keys, mask, place, level)
            if slot != NOWHERE and state[REMEMBERED] <= mask >> 1:
                keys[slot], counts[slot] = place << 3 | level, state[BELOW + level]
                state[REMEMBERED] = state[REMEMBERED] + 1
        level = level + 1
        if level <= top:
            state[BELOW + level] = state[BELOW + level] + state[BELOW + level - 1]
    state[LEVEL] = level
    return DONE


def misconfigured(entry: Word, page: Word, rules: Word) -> Word:
    """1 if an EPT entry that is present breaks the rules beyond its reserved bits.

    It allows writes but no reads; or execution but no reads, which not every processor has (`rules`
    is 3 if it has); or maps a page with memory type 2, 3 or 7.
    """
    bad = entry >> 1 & (entry & 1 ^ 1)
    if rules == 1:
        bad = bad | (entry >> 2 | entry >> 10) & (entry & 1 ^ 1)
    if page:
        bad = bad | BAD_TYPES >> (entry >> 3 & 7)
    return bad & 1


def compose(
    addresses: Words,
    gpas: Words,
    shifts: Words,
    pages: Words,
    runs: Word,
    stage_gpas: Words,
    stage_pas: Words,
    stage_shifts: Words,
    stage_pages: Words,
    stage_runs: Word,
    state: Store,
    room: Word,
    found_address: Store,
    found_pa: Store,
    found_shift: Store,
    found_pages: Store,
    found_run: Store,
    found_stage: Store,
) -> Word:
    """Go on from `state` putting two stages together: runs of linear addresses, in any order of
    guest-physical addresses, and the second stage's runs, in theirs. Each part of a run that is of
    one run of the second stage goes to the last six rows: linear and physical address, the smaller
    page size of the two, number of pages of that size, and the numbers of both runs.

    `state` holds the run to go on with, how much of it is done, how many parts were found, and how
    many bytes the second stage does not map. Returns DONE, or FULL if there is no more `room`.
    """
    while state[0] < runs:
        k, done = state[0], state[1]
        size = pages[k] << shifts[k]
        gpa = gpas[k] + done

        # THE LAST RUN OF THE SECOND STAGE THAT BEGINS HERE OR BEFORE
        low, high = 0, stage_runs
        while low < high:
            middle = (low + high) >> 1
            if stage_gpas[middle] <= gpa:
                low = middle + 1
            else:
                high = middle

        # WHAT THE TWO HAVE IN COMMON
        left = size - done
        part = left
        covered = 0
        if low > 0:
            j = low - 1
            end = stage_gpas[j] + (stage_pages[j] << stage_shifts[j])
            if gpa < end:
                covered = 1
                if end - gpa < left:
                    part = end - gpa
        if not covered and low < stage_runs and stage_gpas[low] - gpa < left:
            part = stage_gpas[low] - gpa
        if covered:
            n = state[2]
            if n == room:
                return FULL
            shift = shifts[k]
            shift = min(shift, stage_shifts[j])
            found_address[n] = addresses[k] + done
            found_pa[n] = stage_pas[j] + (gpa - stage_gpas[j])
            found_shift[n], found_pages[n] = shift, part >> shift
            found_run[n], found_stage[n] = k, j
            state[2] = n + 1
        else:
            state[3] = state[3] + part
        if part == left:
            state[0], state[1] = k + 1, 0
        else:
            state[1] = done + part
    return DONE
