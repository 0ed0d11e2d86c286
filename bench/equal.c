/* The loops that the compiled kernels are measured against: the same walks with the same checks, as
 * a C programmer would write them. gcc -O3 -march=native.
 *
 * The words that they take and give are those of impl/kernels: see long_mode.py and ept.py there.
 */
#include <stdint.h>

typedef uint64_t word;

enum { FAULT = 8, NONCANONICAL = 9, OUTSIDE = 10 };
enum { WP, NXE, SMEP, SMAP, PKE, CET, PKS, LA57, PAGE1GB, AC, LAM_SUP };
#define FRAME 0x000ffffffffff000ull

static word bit(word value, unsigned position) { return value >> position & 1; }

static word without_metadata(word mode, word cr3, word address, word access) {
    if (bit(access, 4))
        return address;
    int width;
    if (bit(address, 63)) {
        if (!bit(mode, LAM_SUP))
            return address;
        width = bit(mode, LA57) ? 57 : 48;
    } else {
        if (!(cr3 >> 61 & 3))
            return address;
        width = bit(cr3, 61) ? 57 : 48;
    }
    word metadata = (((word)1 << (63 - width)) - 1) << width;
    return bit(address, width - 1) ? address | metadata : address & ~metadata;
}

static inline word finish(word mode, word pkru, word pkrs, word address, word code, word access,
                          word entry, word rights, word above, word no_execute, int level,
                          int shift, word *value) {
    word write = bit(access, 1), user = bit(access, 2), fetch = bit(access, 4);
    word user_page = bit(rights, 2), strict = write & (user | bit(mode, WP));
    word keys = user_page ? pkru * bit(mode, PKE) : pkrs * bit(mode, PKS);
    keys = keys >> (entry >> 59 & 15) * 2;
    word key_denies = (fetch ^ 1) & ((keys & 1) | (keys >> 1 & 1 & strict));
    word denied;
    if (code >> 6)
        denied = (user ^ user_page) | !(above & 2) | bit(entry, 1) | !bit(entry, 6) | key_denies;
    else
        denied = (user & (user_page ^ 1)) | (strict & (bit(rights, 1) ^ 1)) | (fetch & no_execute) |
                 ((user ^ 1) & user_page &
                  ((fetch & bit(mode, SMEP)) |
                   ((fetch ^ 1) & bit(mode, SMAP) & ~(bit(mode, AC) & ~access & 1)))) |
                 key_denies;
    if (denied & 1) {
        *value = code | 1 | key_denies << 5;
        return FAULT;
    }
    word offset = ((word)1 << shift) - 1;
    *value = (entry & FRAME & ~offset) | (address & offset);
    return level;
}

static inline word walk(const word *memory, word entries, word mode, word reserved, word cr3,
                        word pkru, word pkrs, word address, word access, word *value) {
    int level = bit(mode, LA57) ? 5 : 4;
    int shift = 12 + 9 * level;
    if (cr3 >> 61 || bit(mode, LAM_SUP))
        address = without_metadata(mode, cr3, address, access);
    int64_t upper = (int64_t)address >> (shift - 1);
    if (upper != 0 && upper != -1) {
        *value = 0;
        return NONCANONICAL;
    }
    word write = bit(access, 1), user = bit(access, 2), fetch = bit(access, 4);
    word code = write << 1 | user << 2 | (fetch & (bit(mode, NXE) | bit(mode, SMEP))) << 4 |
                (bit(access, 6) & bit(mode, CET)) << 6;
    word table = cr3 & FRAME, rights = 6, above = 6, no_execute = 0, entry;
    for (;;) {
        shift -= 9;
        word index = table >> 3 | (address >> shift & 0x1ff);
        if (index >= entries) {
            *value = index << 3;
            return OUTSIDE;
        }
        entry = memory[index];
        if (!(entry & 1)) {
            *value = code;
            return FAULT;
        }
        word must_be_zero = reserved;
        int leaf = level == 1;
        if (level > 3)
            must_be_zero |= 0x80;
        else if (level > 1 && entry & 0x80) {
            leaf = 1;
            must_be_zero |= level == 2 ? 0x1fe000 : 0x3fffe000 | (bit(mode, PAGE1GB) ^ 1) << 7;
        }
        if (entry & must_be_zero) {
            *value = code | 9;
            return FAULT;
        }
        above = rights;
        rights &= entry;
        no_execute |= entry >> 63;
        if (leaf)
            break;
        table = entry & FRAME;
        level--;
    }
    return finish(mode, pkru, pkrs, address, code, access, entry, rights, above, no_execute, level,
                  shift, value);
}

void translate_many(const word *memory, word entries, word mode, word reserved, word cr3, word pkru,
                    word pkrs, const word *addresses, word access, word *statuses, word *values,
                    word count) {
    for (word i = 0; i < count; i++)
        statuses[i] = walk(memory, entries, mode, reserved, cr3, pkru, pkrs, addresses[i], access,
                           &values[i]);
}

/* The same in groups, level by level, as the kernels do it: what is not plain goes to `walk`. */
enum { GROUP = 64 };

void translate_many_in_groups(const word *restrict memory, word entries, word mode, word reserved,
                              word cr3, word pkru, word pkrs, const word *restrict addresses,
                              word access, word *restrict statuses, word *restrict values,
                              word count) {
    word index[GROUP], entry[GROUP], left[GROUP], offset[GROUP], odd[GROUP];
    int levels = bit(mode, LA57) ? 5 : 4, width = 12 + 9 * levels;
    word ones = ((word)1 << (65 - width)) - 1, write = bit(access, 1), fetch = bit(access, 4);
    word code = write << 1 | bit(access, 2) << 2 |
                (fetch & (bit(mode, NXE) | bit(mode, SMEP))) << 4 |
                (bit(access, 6) & bit(mode, CET)) << 6;
    word special = !entries | code >> 6, no_large = 0x30 | (bit(mode, PAGE1GB) ^ 1) << 3;
    for (word first = 0; first < count; first += GROUP) {
        int size = count - first < GROUP ? (int)(count - first) : GROUP;
        const word *address = addresses + first;
        for (int j = 0; j < size; j++) {
            word upper = address[j] >> (width - 1);
            word at = (cr3 & FRAME) >> 3 | (address[j] >> (width - 9) & 0x1ff);
            odd[j] = special | (upper != 0 && upper != ones) | (at >= entries);
            index[j] = at < entries ? at : 0;
            left[j] = ~(word)0;
            offset[j] = 0;
        }
        for (int level = special ? 0 : levels; level > 0; level--) {
            int shift = 3 + 9 * level;
            word below = ((word)1 << shift) - 1, maps = level == 1 ? 0x80 : 0;
            word may_map = level > 3 ? 0 : 0x80, zero = reserved | (no_large >> level & 1) << 7;
            for (int j = 0; j < size; j++)
                entry[j] = memory[index[j]];
            for (int j = 0; j < size; j++) {
                word on = offset[j] == 0, page = ((entry[j] & may_map) | maps) != 0;
                word bad = (entry[j] & (zero | (page ? below & FRAME : 0))) | ((entry[j] & 1) ^ 1);
                word next = (entry[j] & FRAME) >> 3 | (address[j] >> (shift - 9) & 0x1ff);
                odd[j] |= on ? bad : 0;
                left[j] &= entry[j] ^ (word)1 << 63;
                offset[j] = on & page ? below : offset[j];
                on = offset[j] == 0;
                odd[j] |= on & (next >= entries);
                index[j] = on & (next < entries) ? next : index[j];
            }
        }
        for (int j = 0; j < size; j++)
            if (!odd[j]) {
                word value, status;
                status = finish(mode, pkru, pkrs, address[j], code, access, entry[j], left[j] & 6, 6,
                                left[j] >> 63 ^ 1, 1, 12, &value);
                if (status != FAULT) {
                    status = 1 + (offset[j] > 0xfff) + (offset[j] > 0x1fffff);
                    value = (entry[j] & FRAME & ~offset[j]) | (address[j] & offset[j]);
                }
                statuses[first + j] = status;
                values[first + j] = value;
            }
        for (int j = 0; j < size; j++)
            if (odd[j])
                statuses[first + j] = walk(memory, entries, mode, reserved, cr3, pkru, pkrs,
                                           address[j], access, &values[first + j]);
    }
}

/* The second stage, EPT, and the guest's walk through it. */

enum { VIOLATION = 8, MISCONFIGURED = 9 };
enum { FIVE, AD, MBEC, EXECUTE_ONLY, PAGE2MB, EPT_PAGE1GB, ADVANCED };
enum { TABLE = 8 };
#define EXIT ((word)1 << 63)

static word table_write(word mode, word access) {
    return bit(mode, AD) & bit(access, 3) & !(access & 1);
}

static word qualification(word mode, word access, word rights) {
    word write = bit(access, 1), fetch = bit(access, 4), linear = !(access & 1);
    word final = linear & !bit(access, 3), as_write = table_write(mode, access);
    word told = (bit(access, 2) | (access >> 4 & 6)) * (final & bit(mode, ADVANCED));
    return ((write | fetch) ^ 1) | as_write | (write | as_write) << 1 | fetch << 2 | (rights & 7) << 3 |
           (bit(rights, 10) & bit(mode, MBEC)) << 6 | linear << 7 | final << 8 | told << 9 |
           bit(access, 7) << 13;
}

static inline word walk_ept(const word *memory, word entries, word mode, word reserved, word eptp,
                            word gpa, word access, word *value) {
    int level = bit(mode, FIVE) ? 5 : 4;
    int shift = 12 + 9 * level;
    if (gpa >> shift) {
        *value = qualification(mode, access, 0);
        return VIOLATION;
    }
    word present = 7 | bit(mode, MBEC) << 10, table = eptp & FRAME, rights = 0x407, entry;
    for (;;) {
        shift -= 9;
        word index = table >> 3 | (gpa >> shift & 0x1ff);
        if (index >= entries) {
            *value = index << 3;
            return OUTSIDE;
        }
        entry = memory[index];
        if (!(entry & present)) {
            *value = qualification(mode, access, 0);
            return VIOLATION;
        }
        word must_be_zero = reserved;
        int leaf = level == 1;
        if (level > 3)
            must_be_zero |= 0xf8;
        else if (level > 1 && entry & 0x80) {
            leaf = 1;
            must_be_zero |= level == 2 ? 0x1ff000 | (bit(mode, PAGE2MB) ^ 1) << 7
                                       : 0x3ffff000 | (bit(mode, EPT_PAGE1GB) ^ 1) << 7;
        } else if (level > 1)
            must_be_zero |= 0x78;
        word executable = bit(entry, 2) | (bit(mode, MBEC) & bit(entry, 10));
        int conflict = !(entry & 1) && (entry & 2 || (executable && !bit(mode, EXECUTE_ONLY)));
        word type = entry >> 3 & 7;
        if (entry & must_be_zero || conflict || (leaf && (type == 2 || type == 3 || type == 7))) {
            *value = 0;
            return MISCONFIGURED;
        }
        rights &= entry;
        if (leaf)
            break;
        table = entry & FRAME;
        level--;
    }
    word write = bit(access, 1) | table_write(mode, access), fetch = bit(access, 4);
    word user_fetch = fetch & bit(mode, MBEC) & bit(access, 2);
    word needed = ((write | fetch) ^ 1) | write << 1 | (fetch ^ user_fetch) << 2 | user_fetch << 10;
    if (needed & ~rights) {
        *value = qualification(mode, access, rights);
        return VIOLATION;
    }
    word offset = ((word)1 << shift) - 1;
    *value = (entry & FRAME & ~offset) | (gpa & offset);
    return level;
}

/* Where a guest's walk went: its entries' places in memory and their guest-physical addresses. */
struct trace {
    word entry[6], gpa[6];
};

static inline word stopped(word status, word gpa, word *where) {
    *where = status == OUTSIDE ? 0 : gpa | EXIT;
    return status;
}

static inline word walk_under_ept(const word *memory, word entries, word mode, word reserved,
                                  word cr3, word pkru, word pkrs, word ept, word ept_reserved,
                                  word eptp, word address, word access, word *value, word *where) {
    struct trace trace;
    int level = bit(mode, LA57) ? 5 : 4, top = level;
    int shift = 12 + 9 * level;
    *where = 0;
    if (cr3 >> 61 || bit(mode, LAM_SUP))
        address = without_metadata(mode, cr3, address, access);
    int64_t upper = (int64_t)address >> (shift - 1);
    if (upper != 0 && upper != -1) {
        *value = 0;
        return NONCANONICAL;
    }
    word fetch = bit(access, 4) & (bit(mode, NXE) | bit(mode, SMEP));
    word code = (access & 6) | fetch << 4 | (bit(access, 6) & bit(mode, CET)) << 6;
    word table = cr3 & FRAME, rights = 6, above = 6, no_execute = 0, missing = 0, entry, status;
    for (;;) {
        shift -= 9;
        word gpa = table | (address >> shift & 0x1ff) << 3;
        status = walk_ept(memory, entries, ept, ept_reserved, eptp, gpa, TABLE, value);
        if (status >= FAULT)
            return stopped(status, gpa, where);
        if (*value >= entries << 3)
            return OUTSIDE;
        entry = memory[*value >> 3];
        trace.entry[level] = *value >> 3;
        trace.gpa[level] = gpa;
        if (!(entry & 1)) {
            *value = code;
            return FAULT;
        }
        word must_be_zero = reserved;
        int leaf = level == 1;
        if (level > 3)
            must_be_zero |= 0x80;
        else if (level > 1 && entry & 0x80) {
            leaf = 1;
            must_be_zero |= level == 2 ? 0x1fe000 : 0x3fffe000 | (bit(mode, PAGE1GB) ^ 1) << 7;
        }
        if (entry & must_be_zero) {
            *value = code | 9;
            return FAULT;
        }
        above = rights;
        rights &= entry;
        no_execute |= entry >> 63;
        missing |= !bit(entry, 5);
        if (leaf)
            break;
        table = entry & FRAME;
        level--;
    }
    status = finish(mode, pkru, pkrs, address, code, access, entry, rights, above, no_execute, level,
                    shift, value);
    if (status == FAULT)
        return FAULT;
    word gpa = *value, dirty = bit(access, 1) & !bit(entry, 6);
    if ((missing || dirty) && !bit(ept, AD))
        for (int at = top; at >= level; at--) {
            word write = (bit(memory[trace.entry[at]], 5) ^ 1) | (at == level ? dirty : 0);
            status = walk_ept(memory, entries, ept, ept_reserved, eptp, trace.gpa[at],
                              TABLE | write << 1, value);
            if (status >= FAULT)
                return stopped(status, trace.gpa[at], where);
        }
    word page = (access & 0x12) | (rights & 4) | (rights & 2) << 4 | no_execute << 6 |
                (code >> 6) << 7;
    status = walk_ept(memory, entries, ept, ept_reserved, eptp, gpa, page, value);
    if (status >= FAULT)
        return stopped(status, gpa, where);
    return level < (int)status ? (word)level : status;
}

void translate_many_under_ept(const word *memory, word entries, word mode, word reserved, word cr3,
                              word pkru, word pkrs, word ept, word ept_reserved, word eptp,
                              const word *addresses, word access, word *statuses, word *values,
                              word *where, word count) {
    for (word i = 0; i < count; i++)
        statuses[i] = walk_under_ept(memory, entries, mode, reserved, cr3, pkru, pkrs, ept,
                                     ept_reserved, eptp, addresses[i], access, &values[i],
                                     &where[i]);
}

/* Every page mapped from CR3 down with 4 levels, in order: its address, level and entry. */
static word found_pages(const word *memory, word entries, word table, int level, word base,
                        word room, word count, word *addresses, word *levels, word *found) {
    if ((table >> 3) + 512 > entries)
        return count;
    int shift = 12 + 9 * (level - 1);
    for (word i = 0; i < 512; i++) {
        word entry = memory[table >> 3 | i];
        if (!(entry & 1))
            continue;
        word address = base | i << shift;
        if (level == 4 && i >= 256)
            address |= 0xffff000000000000ull;
        if (level == 1 || (level < 4 && entry & 0x80)) {
            if (count == room)
                return count;
            addresses[count] = address;
            levels[count] = level;
            found[count++] = entry;
        } else
            count = found_pages(memory, entries, entry & FRAME, level - 1, address, room, count,
                                addresses, levels, found);
    }
    return count;
}

word enumerate_mappings(const word *memory, word entries, word cr3, word room, word *addresses,
                        word *levels, word *found) {
    return found_pages(memory, entries, cr3 & FRAME, 4, 0, room, 0, addresses, levels, found);
}
