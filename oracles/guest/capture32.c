/*
 * The same as capture.c for a 32-bit Linux, without a C library: processes with memory of every
 * kind, of which one says on the console that it is ready, and runs on in ring 3.
 */
enum { FORK = 2, WRITE = 4, OPEN = 5, MOUNT = 21, PAUSE = 29, MKDIR = 39, MPROTECT = 125, MMAP2 = 192 };

#define PAGE 4096UL
#define READ_WRITE 3
#define PRIVATE_ANONYMOUS 0x22
#define FIXED 0x10

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    /* EBP holds the sixth argument, and cannot be named. */
    __asm__ volatile("push %[f]; push %%ebp; mov 4(%%esp), %%ebp; int $0x80; pop %%ebp; add $4, %%esp"
                     : "=a"(result)
                     : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e), [f] "m"(f)
                     : "memory");
    return result;
}

static void fill(unsigned seed)
{
    static const int rights[] = { 1, 3, 5, 0 };
    for (int i = 0; i < 40; i++) {
        seed = seed * 1103515245 + 12345;
        unsigned long size = (1 + (seed >> 16) % 64) * PAGE;
        unsigned long at = 0x10000000UL + ((seed >> 8) % 0x900) * 0x100000UL;
        volatile char *there = (void *)call(MMAP2, at, size, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
        if ((unsigned long)there > -4096UL)
            continue;
        for (unsigned long n = 0; n < size; n += (1 + seed % 3) * PAGE)
            there[n] = 1;
        call(MPROTECT, (long)there, size, rights[seed >> 20 & 3], 0, 0, 0);
    }
}

void _start(void)
{
    static const char ready[] = "\ncapture: ready\n";
    call(MKDIR, (long)"/dev", 0755, 0, 0, 0, 0);
    call(MOUNT, (long)"none", (long)"/dev", (long)"devtmpfs", 0, 0, 0);
    long console = call(OPEN, (long)"/dev/console", 2, 0, 0, 0, 0);
    fill(1);
    for (unsigned i = 0; i < 2; i++)
        if (!call(FORK, 0, 0, 0, 0, 0, 0)) {
            fill(2 + i);
            for (;;)
                call(PAUSE, 0, 0, 0, 0, 0, 0);
        }
    fill(7);
    call(WRITE, console, (long)ready, sizeof ready - 1, 0, 0, 0);
    for (volatile unsigned long n = 0;; n++)
        ;
}
