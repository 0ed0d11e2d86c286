/*
 * The program that has KVM run our guests: it is the init of a Linux that QEMU emulates.
 *
 * It loads KVM with the MMU that the kernel's command line names, maps the memory that it shares
 * with the host (ivshmem), and then serves batches of commands from there: each sets the machine
 * up, makes a step of a guest (by the agent in it, see agent.asm) or one of its host. What came of
 * each is written back, with the words of the guests' memory that it changed.
 *
 * The constants come in by -D from nested_kvm.py, which also tells the format of the records.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

typedef uint64_t u64;

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define MOST_EXITS 2000

/* Operations of commands, and how a step ended. */
enum { RESET, PROCESSOR, SLOT, STEP, UNMAP, MIGRATE, LOG, HARVEST, RECLAIM, END };
enum { DONE, STUCK, DIED, HUNG, SKIPPED };

struct command { u64 op, guest, number, a, b, c, d, e; };

/* What a STEP starts with; see agent.asm. The offset of its first field is 8. */
struct mailbox {
    u64 unused, address, value, rip, cs, flags, ss, unused2;
    u64 vector, error, where, fault, data;
};

struct slot { int there, logged; u64 gfn, pages, page, flags; };

struct guest {
    int vm, file, processors;
    int processor[MOST_PROCESSORS];
    struct kvm_run *run[MOST_PROCESSORS];
    char *memory, *agent;           /* where KVM finds the pages of the backing, and the agent's */
    char *linear;                   /* the same file, page by page */
    int at[BACKING], is_free[FILE_PAGES];
    struct slot slots[SLOTS];
    u64 before[BACKING * WORDS];    /* what the host was last told of the backing */
};

static struct guest guests[MOST_GUESTS];
static volatile u64 *shared;
static struct kvm_cpuid2 *cpuid;
static int kvm;
static u64 *out;                    /* where the next result goes */
static int broken;                  /* a step did not end: the rest of its program is skipped */

static void fail(const char *what)
{
    printf("server: %s: %s\n", what, strerror(errno));
    fflush(stdout);
    sleep(1);
    exit(1);
}

static int require(int result, const char *what)
{
    if (result < 0)
        fail(what);
    return result;
}

/* LINUX: modules, devices, the memory that is shared */

static void write_to(const char *path, const char *text)
{
    int file = require(open(path, O_WRONLY), path);
    require(write(file, text, strlen(text)), path);
    close(file);
}

static void load(const char *module, const char *parameters)
{
    int file = open(module, O_RDONLY);
    if (file < 0)
        return;                     /* built in */
    require(syscall(SYS_finit_module, file, parameters, 0), module);
    close(file);
}

static int argument(const char *name)
{
    char line[4096] = {0}, *found;
    int file = require(open("/proc/cmdline", O_RDONLY), "cmdline");
    require(read(file, line, sizeof line - 1), "cmdline");
    close(file);
    found = strstr(line, name);
    return found ? atoi(found + strlen(name)) : 0;
}

static volatile u64 *shared_memory(void)
{
    glob_t found;
    char id[32];
    if (glob("/sys/bus/pci/devices/*", 0, 0, &found))
        fail("no PCI devices");
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/device", found.gl_pathv[i]);
        int file = open(path, O_RDONLY);
        int length = file < 0 ? 0 : read(file, id, sizeof id - 1);
        close(file);
        if (length < 6 || strncmp(id, "0x1110", 6))
            continue;
        snprintf(path, sizeof path, "%s/enable", found.gl_pathv[i]);
        write_to(path, "1");
        snprintf(path, sizeof path, "%s/resource2", found.gl_pathv[i]);
        file = require(open(path, O_RDWR | O_SYNC), path);
        void *at = mmap(0, SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (at == MAP_FAILED)
            fail("mmap of the shared memory");
        return at;
    }
    fail("no shared memory");
    return 0;
}

/* GUESTS */

static void segment(struct kvm_segment *s, int selector, int type, int long_)
{
    *s = (struct kvm_segment){
        .limit = 0xffffffff, .selector = selector, .type = type, .present = 1,
        .s = 1, .l = long_, .db = !long_, .g = 1,
    };
}

static void set_slot(struct guest *g, int number, struct slot slot)
{
    struct kvm_userspace_memory_region region = {
        .slot = number,
        .guest_phys_addr = slot.gfn * PAGE,
        .userspace_addr = (u64)(g->memory + slot.page * PAGE),
        .memory_size = slot.there ? slot.pages * PAGE : 0,
        .flags = slot.flags | (slot.logged ? KVM_MEM_LOG_DIRTY_PAGES : 0),
    };
    require(ioctl(g->vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    g->slots[number] = slot;
}

static void put_page(struct guest *g, int page, int at)
{
    void *where = g->memory + page * PAGE;
    if (mmap(where, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, g->file, at * PAGE) != where)
        fail("mmap of a page");
    g->at[page] = at;
    g->is_free[at] = 0;
}

static void create(struct guest *g)
{
    g->vm = require(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    require(ioctl(g->vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
    for (int p = 0; p < MOST_PROCESSORS; p++) {
        g->processor[p] = require(ioctl(g->vm, KVM_CREATE_VCPU, p), "KVM_CREATE_VCPU");
        require(ioctl(g->processor[p], KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
        int size = require(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
        g->run[p] = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, g->processor[p], 0);
        if (g->run[p] == MAP_FAILED)
            fail("mmap of a processor");
    }
}

static void prepare(struct guest *g)
{
    int flags = MAP_SHARED, rights = PROT_READ | PROT_WRITE;
    g->file = require(memfd_create("guest", 0), "memfd_create");
    require(ftruncate(g->file, FILE_PAGES * PAGE), "ftruncate");
    g->linear = mmap(0, FILE_PAGES * PAGE, rights, flags, g->file, 0);
    g->memory = mmap(0, (BACKING + AGENT_PAGES) * PAGE, rights, flags | MAP_ANONYMOUS, -1, 0);
    if (g->linear == MAP_FAILED || g->memory == MAP_FAILED)
        fail("mmap of a guest");
    g->agent = g->memory + BACKING * PAGE;
    memset(g->at, -1, sizeof g->at);
    create(g);
}

/* The machine at power-on: no slots, and so no shadow pages; then memory as it is to be. */
static void reset(struct guest *g, int there)
{
    for (int n = 0; n < SLOTS; n++)
        if (g->slots[n].there)
            set_slot(g, n, (struct slot){0});
    if (!there)
        return;
    for (int i = 0; i < FILE_PAGES; i++)
        g->is_free[i] = 1;
    for (int page = 0; page < BACKING; page++) {
        if (g->at[page] != page)
            put_page(g, page, page);
        g->is_free[page] = 0;
    }
    memcpy(g->linear, (void *)(shared + IMAGE / 8), BACKING * PAGE);
    memcpy(g->before, g->linear, BACKING * PAGE);
    memcpy(g->agent, (void *)(shared + AGENT_IMAGE / 8), AGENT_PAGES * PAGE);
    set_slot(g, SLOTS - 1, (struct slot){1, 0, AGENT_FRAME, AGENT_PAGES, BACKING, 0});
}

static void set_registers(struct guest *g, int p)
{
    u64 mailbox = AGENT_BASE + (5 + p) * PAGE;
    struct kvm_regs r = {
        /* Behind the OUT: KVM may still have to finish one. */
        .rip = AGENT_BASE + PAGE + 2, .rflags = 2, .rsp = mailbox + PAGE, .r15 = mailbox,
    };
    require(ioctl(g->processor[p], KVM_SET_REGS, &r), "KVM_SET_REGS");
}

static void set_processor(struct guest *g, struct command *c)
{
    int p = c->number, vcpu = g->processor[p];
    struct kvm_mp_state running = { KVM_MP_STATE_RUNNABLE };
    struct kvm_vcpu_events events = {0};
    struct kvm_sregs s;
    require(ioctl(vcpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
    segment(&s.cs, CODE, 11, 1);
    segment(&s.ss, DATA, 3, 0);
    s.ds = s.es = s.fs = s.gs = s.ss;
    s.tr = (struct kvm_segment){
        .base = AGENT_BASE + (5 + p) * PAGE + TSS, .limit = 0x67, .type = 11, .present = 1,
    };
    s.ldt = (struct kvm_segment){ .unusable = 1 };
    s.idt = (struct kvm_dtable){ AGENT_BASE + 3 * PAGE, 0x1ff };
    s.gdt = (struct kvm_dtable){ AGENT_BASE + 4 * PAGE, 0x27 };
    s.cr0 = c->a | 0x31;
    s.cr3 = c->b;
    s.cr4 = c->c | 0x600;
    s.efer = c->d;
    s.cr2 = 0;
    require(ioctl(vcpu, KVM_SET_SREGS, &s), "KVM_SET_SREGS");
    require(ioctl(vcpu, KVM_SET_MP_STATE, &running), "KVM_SET_MP_STATE");
    require(ioctl(vcpu, KVM_SET_VCPU_EVENTS, &events), "KVM_SET_VCPU_EVENTS");
    set_registers(g, p);
}

/* RESULTS: a word that says how it ended and how much follows; devices; frames; words changed. */

static u64 *begin(int kind)
{
    u64 *head = out;
    out += 6;
    memset(head, 0, 6 * 8);
    head[0] = kind;
    return head;
}

static void compare(u64 *head, int whole)
{
    for (int n = 0; n < MOST_GUESTS; n++) {
        struct guest *g = &guests[n];
        if (!g->slots[SLOTS - 1].there)
            continue;
        for (int page = 0; page < BACKING; page++) {
            u64 *now = (u64 *)(g->linear + g->at[page] * PAGE), *before = g->before + page * WORDS;
            for (u64 i = 0; i < WORDS; i++) {
                if (!whole && i == USED_WORDS)
                    i = WORDS - 8;
                if (now[i] == before[i])
                    continue;
                before[i] = now[i];
                *out++ = (u64)n << 32 | (page * WORDS + i);
                *out++ = now[i];
                head[0] += 1UL << 32;
            }
        }
    }
}

/* What a device gives: see device_word in spec/steps.py. */
static void device_gives(u64 address, void *data, int size)
{
    for (int i = 0; i < size; i++, address++) {
        u64 word = (address & ~7UL) ^ 0x5A5A000000000000UL;
        ((uint8_t *)data)[i] = word >> (address & 7) * 8;
    }
}

/* How often guests have been left so far: one that is left over and over gets no further. */
static long exits(void)
{
    char text[32] = {0};
    int file = require(open("/sys/kernel/debug/kvm/exits", O_RDONLY), "exits");
    require(read(file, text, sizeof text - 1), "exits");
    close(file);
    return atol(text);
}

/* Run a processor until its agent has ended the step. */
static int run_step(struct guest *g, int p, u64 *head)
{
    struct kvm_run *run = g->run[p];
    struct timeval often = { .tv_usec = 200000 };
    struct itimerval limit = { often, often }, none = {0};
    long before = -1, looks = 0;
    int how = -1;
    run->immediate_exit = 0;
    setitimer(ITIMER_REAL, &limit, 0);
    while (how < 0) {
        if (ioctl(g->processor[p], KVM_RUN, 0) < 0) {
            if (errno != EINTR && errno != EAGAIN)
                fail("KVM_RUN");
            if (before < 0)
                before = exits();
            if (exits() - before > MOST_EXITS || ++looks > 300)
                how = HUNG;
            continue;
        }
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            how = DONE;
            break;
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write) {
                device_gives(run->mmio.phys_addr, run->mmio.data, run->mmio.len);
                break;
            }
            *out++ = run->mmio.phys_addr;
            *out++ = run->mmio.len;
            *out = 0;
            memcpy(out++, run->mmio.data, run->mmio.len);
            head[0] += 1 << 8;
            break;
        case KVM_EXIT_INTERNAL_ERROR:
            how = STUCK;
            head[5] = run->internal.suberror;
            break;
        default:
            how = DIED;
            head[5] = run->exit_reason;
        }
    }
    setitimer(ITIMER_REAL, &none, 0);
    return how;
}

static void step(struct guest *g, struct command *c)
{
    int p = c->number, user = c->d & 1;
    struct mailbox *mail = (void *)(g->agent + (AGENT_MAIL + p) * PAGE);
    u64 *head = begin(DONE);
    *mail = (struct mailbox){
        .address = c->b, .value = c->c, .flags = c->e,
        .rip = AGENT_BASE + (user ? 2 : 1) * PAGE + STEPS + 32 * c->a,
        .cs = user ? USER_CODE : CODE, .ss = user ? USER_DATA : DATA, .vector = 0xff,
    };
    int how = run_step(g, p, head);
    head[0] |= how;
    broken = how != DONE;
    head[1] = mail->vector | mail->error << 8;
    head[2] = mail->fault;
    head[3] = mail->data;
    head[4] = mail->where;
    compare(head, 0);
}

static void harvest(struct guest *g, int number)
{
    u64 *head = begin(DONE), bitmap[4] = {0};
    struct kvm_dirty_log log = { .slot = number, .dirty_bitmap = bitmap };
    if (g->slots[number].there && g->slots[number].logged) {
        require(ioctl(g->vm, KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG");
        head[1] = bitmap[0];
        head[2] = g->slots[number].gfn;
    }
}

static void migrate(struct guest *g, int page)
{
    int old = g->at[page], new = old;
    while (!g->is_free[new])
        new = (new + 1) % FILE_PAGES;
    memcpy(g->linear + new * PAGE, g->linear + old * PAGE, PAGE);
    put_page(g, page, new);
    g->is_free[old] = 1;
    memset(g->linear + old * PAGE, 0xd5, PAGE);     /* who still has it is found out */
}

static void serve(struct command *c)
{
    struct guest *g = &guests[c->guest];
    struct slot slot;
    if (broken && c->op != RESET) {
        begin(SKIPPED);
        return;
    }
    switch (c->op) {
    case RESET:
        broken = 0;
        for (int n = 0; n < MOST_GUESTS; n++)
            reset(&guests[n], n < (int)c->a);
        break;
    case PROCESSOR:
        set_processor(g, c);
        break;
    case SLOT:
        slot = (struct slot){ c->a & 1, 0, c->b, c->c, c->d, c->a & 2 ? KVM_MEM_READONLY : 0 };
        if (g->slots[c->number].there)
            set_slot(g, c->number, (struct slot){0});
        if (slot.there)
            set_slot(g, c->number, slot);
        break;
    case STEP:
        step(g, c);
        return;
    case UNMAP:
        require(madvise(g->memory + c->a * PAGE, PAGE, MADV_DONTNEED), "MADV_DONTNEED");
        break;
    case MIGRATE:
        migrate(g, c->a);
        break;
    case LOG:
        slot = g->slots[c->number];
        if (slot.there && slot.logged != (int)c->a) {
            slot.logged = c->a;
            set_slot(g, c->number, slot);
        }
        break;
    case HARVEST:
        harvest(g, c->number);
        return;
    case RECLAIM:
        write_to("/proc/sys/vm/drop_caches", "2");
        break;
    case END:
        compare(begin(DONE), 1);
        return;
    }
    begin(DONE);
}

static void nothing(int signal)
{
}

int main(void)
{
    setvbuf(stdout, 0, _IOLBF, 0);
    mkdir("/dev", 0755), mkdir("/proc", 0755), mkdir("/sys", 0755);
    mount("none", "/proc", "proc", 0, 0);
    mount("none", "/sys", "sysfs", 0, 0);
    mount("none", "/sys/kernel/debug", "debugfs", 0, 0);
    mount("none", "/dev", "devtmpfs", 0, 0);
    int console = open("/dev/console", O_RDWR);
    if (console >= 0)
        dup2(console, 0), dup2(console, 1), dup2(console, 2);
    load("/irqbypass.ko", "");
    load("/kvm.ko", "");
    load("/kvm-amd.ko", argument("vapama.npt=") ? "npt=1" : "npt=0");
    shared = shared_memory();
    kvm = require(open("/dev/kvm", O_RDWR), "/dev/kvm");
    cpuid = calloc(1, sizeof *cpuid + 256 * sizeof *cpuid->entries);
    cpuid->nent = 256;
    require(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    struct sigaction action = { .sa_handler = nothing };
    sigaction(SIGALRM, &action, 0);
    for (unsigned i = 0; i < cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *e = &cpuid->entries[i];
        if (e->function == 0)       /* "GenuineIntel": Intel's rules of what is reserved */
            e->ebx = 0x756e6547, e->edx = 0x49656e69, e->ecx = 0x6c65746e;
        if (e->function == 1)
            shared[4] = e->ecx;
        if (e->function == 7 && !e->index)
            shared[5] = e->ebx;
        if (e->function == 0x80000008)
            shared[6] = e->eax & 0xff;
        if (e->function == 0x80000001)
            shared[7] = e->edx;
    }
    for (int n = 0; n < MOST_GUESTS; n++)
        prepare(&guests[n]);
    shared[0] = 0;
    shared[3] = ALIVE;
    for (;;) {
        while (shared[0] != 1)
            usleep(20);
        struct command *commands = (struct command *)(shared + COMMANDS / 8);
        out = (u64 *)(shared + RESULTS / 8);
        u64 count = shared[1];
        for (u64 i = 0; i < count; i++) {
            struct command command = commands[i];
            serve(&command);
            shared[2] = i + 1;
        }
        __asm__ volatile("" ::: "memory");
        shared[0] = 0;
    }
}
