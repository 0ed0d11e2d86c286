/* libkdumpfile's translation of many addresses, as a shared library for the benchmark.
 *
 * It is given memory page by page through its own callback, as for a dump held in memory.
 */
#include <libkdumpfile/addrxlat.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static const char *image;
static uint64_t image_bytes;

static void put_page(const addrxlat_buffer_t *buffer) {
    (void)buffer;
}

static addrxlat_status get_page(const addrxlat_cb_t *cb, addrxlat_buffer_t *buffer) {
    (void)cb;
    buffer->addr.addr &= ~(addrxlat_addr_t)0xfff;
    if (buffer->addr.addr >= image_bytes)
        return ADDRXLAT_ERR_NODATA;
    buffer->ptr = image + buffer->addr.addr;
    buffer->size = 4096;
    buffer->byte_order = ADDRXLAT_LITTLE_ENDIAN;
    buffer->put_page = put_page;
    return ADDRXLAT_OK;
}

static unsigned long read_caps(const addrxlat_cb_t *cb) {
    (void)cb;
    return ADDRXLAT_CAPS(ADDRXLAT_MACHPHYSADDR);
}

/* The physical addresses of `count` linear ones with 4-level paging from CR3, all ones for those
 * that do not translate. Returns how many those are. */
uint64_t addrxlat_many(const uint64_t *memory, uint64_t entries, uint64_t cr3,
                       const uint64_t *addresses, uint64_t *found, uint64_t count) {
    image = (const char *)memory;
    image_bytes = entries * 8;
    addrxlat_ctx_t *context = addrxlat_ctx_new();
    addrxlat_cb_t *callbacks = addrxlat_ctx_add_cb(context);
    callbacks->get_page = get_page;
    callbacks->read_caps = read_caps;
    addrxlat_meth_t method;
    memset(&method, 0, sizeof method);
    method.kind = ADDRXLAT_PGT;
    method.target_as = ADDRXLAT_MACHPHYSADDR;
    method.param.pgt.root.as = ADDRXLAT_MACHPHYSADDR;
    method.param.pgt.root.addr = cr3 & 0xffffffffff000;
    method.param.pgt.pf.pte_format = ADDRXLAT_PTE_X86_64;
    static const unsigned short fields[] = {12, 9, 9, 9, 9};
    method.param.pgt.pf.nfields = 5;
    memcpy(method.param.pgt.pf.fieldsz, fields, sizeof fields);
    uint64_t failed = 0;
    for (uint64_t i = 0; i < count; i++) {
        addrxlat_step_t step = {.ctx = context, .meth = &method};
        addrxlat_status status = addrxlat_launch(&step, addresses[i]);
        while (status == ADDRXLAT_OK && step.remain)
            status = addrxlat_step(&step);
        found[i] = status == ADDRXLAT_OK ? step.base.addr : ~(uint64_t)0;
        failed += status != ADDRXLAT_OK;
    }
    addrxlat_ctx_decref(context);
    return failed;
}
