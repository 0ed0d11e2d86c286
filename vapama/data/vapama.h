/* The C interface of a subject: a shared library with the two functions at the end of this file.
 *
 * vapama check --subject cabi:./mmu.so
 *
 * The library is loaded in a process of its own, so that it may crash. See spec/cpu.py and
 * spec/access.py for the meaning of each field, and docs/how-to/check-another-language.md.
 */
#ifndef VAPAMA_H
#define VAPAMA_H

#include <stdint.h>

/* The control state: registers, and from CPUID page1gb, maxphyaddr and pse36. */
struct vapama_cpu {
    uint64_t cr0, cr3, cr4, efer, rflags, pkru, pkrs, page1gb, maxphyaddr, pse36;
    const uint64_t *pdptes; /* the four PDPTE registers, or NULL: read them from memory */
};

/* An access; each field but the address is 0 or 1. */
struct vapama_access {
    uint64_t address, write, fetch, user, implicit, shadow_stack;
};

/* Physical memory: load() gives the 8 bytes at an 8-byte aligned address below limit. */
struct vapama_memory {
    uint64_t limit;
    uint64_t (*load)(uint64_t address);
};

enum vapama_kind {
    VAPAMA_TRANSLATED = 1,     /* value: the physical address; level: of the entry that maps it */
    VAPAMA_PAGE_FAULT = 2,     /* value: the error code */
    VAPAMA_NON_CANONICAL = 3,
    VAPAMA_OUTSIDE_MEMORY = 4, /* value: the address of the entry that memory does not hold */
};

/* An outcome, all 0 at first. updates are the bits set in entries, by address. */
struct vapama_outcome {
    uint64_t kind, value, level, updates;
    struct {
        uint64_t address, bits;
    } update[8];
};

/* What the library observes, separated by commas: "pa", "level", "error code", and "updates" or
 * "effects". */
const char *vapama_observes(void);

/* Translates. Returns 0, or 1 for a case that the library does not cover. */
int vapama_translate(const struct vapama_cpu *cpu, const struct vapama_memory *memory,
                     const struct vapama_access *access, struct vapama_outcome *outcome);

#endif
