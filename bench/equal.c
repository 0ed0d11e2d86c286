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

void translate_many(const word *memory, word entries, word mode, word reserved, word cr3, word pkru,
                    word pkrs, const word *addresses, word access, word *statuses, word *values,
                    word count) {
    for (word i = 0; i < count; i++)
        statuses[i] = walk(memory, entries, mode, reserved, cr3, pkru, pkrs, addresses[i], access,
                           &values[i]);
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
