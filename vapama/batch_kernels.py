"""Kernels that make and judge whole batches of 4- and 5-level cases; see `vapama.oracle_batches`.

Like those of `impl/kernels` they are plain functions over words, compiled by
`vapama.impl.kernels.compiled`. A row of `cases` is cr0, cr3, cr4, efer, rflags, pkru, pkrs,
address and access (as the walk kernel takes it); a row of `records` is a record of guest/guest.asm
as words.
"""

from typing import Any

from vapama.impl.kernels.long_mode import FAULT, NONCANONICAL, mode_word, reserved_word, walk
from vapama.oracles import machine, native
from vapama.spec import domains
from vapama.spec.domains import entry_of

address_of: Any = domains.ADDRESS.bias
cr3_of: Any = domains.CR3.bias
keys_of: Any = domains.KEYS.bias

SERVER, RAM = machine.SERVER, machine.RAM_BYTES
HOLE, HOLE_END = machine.HOLE.start, machine.HOLE.stop
MARKED, MARKER = machine.MARKED, native.MARKER
PAGE = machine.PAGE
MOST_KEYS = machine.KEYS
NOT_READ = (1 << 64) - 1
PKS, MOST_POKES = 1 << 24, 7
FIRST_POKE, VECTOR, CODE, ADDRESS_FAULTED, DATA, WHERE = 18, 11, 12, 13, 14, 15
BREAKPOINT, GENERAL_PROTECTION, PAGE_FAULT = 3, 13, 14

# Verdicts
AGREES, LOOK, KNOWN, UNKNOWN_PLACE = 0, 1, 2, 3


def draw_entries(raws: Any, image: Any) -> None:
    """Entries of random words, into the first words of memory."""
    for i in range(len(raws)):
        image[i] = entry_of(raws[i])


def draw_words(raws: Any, cases: Any) -> None:
    """The biased columns of cases: CR3, PKRU, PKRS and the address."""
    for i in range(len(raws)):
        cases[i, 1] = cr3_of(raws[i, 0]) & 0x1FFFFFF
        cases[i, 5] = keys_of(raws[i, 1])
        cases[i, 6] = keys_of(raws[i, 2])
        cases[i, 7] = address_of(raws[i, 3])


def free(address: int) -> int:
    """1 if a case may use the word of RAM there."""
    if address >= SERVER:
        return 0
    if address >= HOLE and address < HOLE_END:
        return 0
    return 1


def make(
    image: Any,
    entries: int,
    maxphyaddr: int,
    page1gb: int,
    cases: Any,
    worlds: Any,
    path: Any,
    records: Any,
    expected: Any,
) -> int:
    """Write the record of each case that the guest can be asked, one after the other.

    A row of `worlds` is a root entry's number, the base and the stub frame; those of 4 levels come
    first, then those of 5. A row of `expected` is the case, the status and value of the walk, how
    many entries it read, and the level that it ended at. Returns how many records there are.
    """
    made = 0
    for i in range(len(cases)):
        cr4 = cases[i, 2]
        cr3 = cases[i, 1]
        address = cases[i, 7]
        access = cases[i, 8]
        mode = mode_word(cases[i, 0], cr4, cases[i, 3], cases[i, 4], page1gb)
        levels = 4 + (cr4 >> 12 & 1)
        for level in range(7):
            path[level] = NOT_READ
        status, value = walk(
            image,
            entries,
            mode,
            reserved_word(cases[i, 3], maxphyaddr),
            cr3,
            cases[i, 5],
            cases[i, 6],
            address,
            access,
            path,
        )
        write = access >> 1 & 1
        fetch = access >> 4 & 1
        word = address & 0xFFFFFFFFFFFFFFF8
        root = cr3 & 0xFFFFFFFFFF000
        good = free(root)
        if fetch == 1 and status < FAULT and free(value) == 0:
            good = 0
        # THE ENTRIES THAT THE WALK READS
        row = records[made]
        count = 0
        lowest = levels + 1
        for down in range(levels):
            index = path[levels - down]
            if index != NOT_READ:
                lowest = levels - down
                known = 0
                for k in range(count):
                    if row[FIRST_POKE + 2 * k] == index << 3:
                        known = 1
                if known == 0:
                    row[FIRST_POKE + 2 * count] = index << 3
                    row[FIRST_POKE + 2 * count + 1] = image[index]
                    count = count + 1
                    if free(index << 3) == 0:
                        good = 0
        # A WAY IN THAT IT DOES NOT READ
        chosen = 99
        for w in range(4):
            which = w + (levels - 4) * 4
            entrance = root | worlds[which, 0] << 3
            taken = 0
            for k in range(count):
                if row[FIRST_POKE + 2 * k] == entrance:
                    taken = 1
            if taken == 0 and chosen == 99:
                chosen = which
        key = 0
        if cr4 & PKS:
            key = 99
            for candidate in range(MOST_KEYS):
                if key == 99 and cases[i, 6] >> 2 * candidate & 3 == 0:
                    key = candidate
        if chosen == 99 or key == 99:
            continue
        entrance = root | worlds[chosen, 0] << 3
        row[FIRST_POKE + 2 * count] = entrance
        row[FIRST_POKE + 2 * count + 1] = worlds[chosen, 2] + key * PAGE | MARKED
        # WHERE THE ACCESS MAY GO, whatever the entries mean
        for k in range(count):
            for bits in (12, 21, 30):
                offset = (1 << bits) - 1
                entry = row[FIRST_POKE + 2 * k + 1]
                page = entry & 0xFFFFFFFFFF000 & ~offset | word & offset
                if page >= SERVER and page < RAM:
                    good = 0
                if write == 1 and page == entrance:
                    good = 0
                if fetch == 1:
                    for other in range(count + 1):
                        if row[FIRST_POKE + 2 * other] == page:
                            good = 0
        if good == 0:
            continue
        row[0] = worlds[chosen, 1]
        row[1] = word
        row[2] = fetch << 5 | write << 4 | (access >> 2 & 1) << 8 | MARKER << 16
        row[2] = row[2] | (count + 1) << 32
        row[3] = cases[i, 0]
        row[4] = cr3
        row[5] = cr4
        row[6] = cases[i, 3]
        row[7] = cases[i, 4]
        row[8] = cases[i, 5] | cases[i, 6] << 32
        for k in range(9, FIRST_POKE):
            row[k] = 0
        expected[made, 0] = i
        expected[made, 1] = status
        expected[made, 2] = value
        expected[made, 3] = count
        expected[made, 4] = lowest
        made = made + 1
    return made


def judge(
    made: int,
    records: Any,
    results: Any,
    expected: Any,
    lacks_p: int,
    verdicts: Any,
) -> None:
    """Say of each record whether what came back agrees with what the walk kernel says."""
    for i in range(made):
        before = records[i]
        after = results[i]
        status = expected[i, 1]
        value = expected[i, 2]
        count = expected[i, 3]
        write = before[2] >> 4 & 1
        fetch = before[2] >> 5 & 1
        user = before[2] >> 8 & 1
        word = before[1]
        accessed = word | 7 * write
        start = before[0] + 0x1000 + user * 0x1000 + (before[2] & 0xFF)
        vector = after[VECTOR]
        where = after[WHERE]
        verdicts[i] = LOOK
        at_access = 0
        if where == start or (fetch == 1 and where == accessed):
            at_access = 1
        if status < FAULT:
            end = start + 9 + write
            if fetch == 1:
                end = word + 6
            if vector != BREAKPOINT or where != end:
                continue
            if free(value) == 0:
                verdicts[i] = UNKNOWN_PLACE
                continue
            place = value & 0xFFFFFFFFFFFFFFF8
            beside = 0
            for k in range(count + 1):
                poked = before[FIRST_POKE + 2 * k]
                if poked == place or poked == place ^ 8:
                    beside = 1
            if beside == 1:
                continue
            if after[DATA] & 0xFFFFFFFF != place >> 3:
                continue
            if fetch == 0 and after[DATA] >> 32 != (place >> 3) ^ 1:
                continue
            same = 1
            for k in range(count):
                flags = 0x20
                # The last entry read is the leaf; a table that is its own is left to the reference.
                if k == count - 1:
                    flags = flags | write << 6
                old = before[FIRST_POKE + 2 * k + 1]
                if after[FIRST_POKE + 2 * k + 1] != old | flags:
                    same = 0
            if same == 1:
                verdicts[i] = AGREES
        elif status == FAULT:
            if vector != PAGE_FAULT or after[ADDRESS_FAULTED] != accessed or at_access == 0:
                continue
            # Accessed flags of what was passed, and of the last entry if a right was missing.
            passed = count - 1
            if value & 9 == 1:
                passed = count
            same = 1
            for k in range(count):
                changed = before[FIRST_POKE + 2 * k + 1] ^ after[FIRST_POKE + 2 * k + 1]
                if changed != 0 and (changed != 0x20 or k >= passed):
                    same = 0
            if same == 1 and after[CODE] == value:
                verdicts[i] = AGREES
            if same == 1 and lacks_p == 1 and value & 9 == 9 and after[CODE] == value ^ 1:
                verdicts[i] = KNOWN
        elif status == NONCANONICAL and vector == GENERAL_PROTECTION and at_access == 1:
            verdicts[i] = AGREES
