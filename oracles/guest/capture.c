/*
 * The init of a Linux whose page tables are captured: processes with memory of every kind.
 *
 * Each maps, touches and protects some; then one says so on the console, and all run on in ring 3,
 * for the machine to be stopped there.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096UL
#define LARGE (2UL << 20)
#define FAR (1UL << 48)             /* beyond it only 5-level paging goes */

static char *map(void *at, size_t size, int rights, int flags)
{
    char *there = mmap(at, size, rights, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return there == MAP_FAILED ? 0 : there;
}

static void touch(char *at, size_t size, size_t step)
{
    for (size_t i = 0; at && i < size; i += step)
        at[i] = 1;
}

static void fill(int seed)
{
    const int rights[] = { PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC, PROT_NONE };
    srand(seed);
    for (int i = 0; i < 40; i++) {
        size_t size = (1 + rand() % 64) * PAGE;
        void *at = (void *)((unsigned long)(rand() % 512) << 37 | (unsigned long)(rand() % 512) << 30
                            | (unsigned long)(rand() % 4096) << 12);
        char *there = map(at, size, PROT_READ | PROT_WRITE, 0);
        touch(there, size, (1 + rand() % 3) * PAGE);
        if (there)
            mprotect(there, size, rights[rand() % 4]);
    }
    touch(map((void *)FAR, 16 * PAGE, PROT_READ | PROT_WRITE, 0), 16 * PAGE, PAGE);
    touch(map(0, 2 * LARGE, PROT_READ | PROT_WRITE, MAP_HUGETLB), 2 * LARGE, LARGE);
    char *likely = map(0, 4 * LARGE, PROT_READ | PROT_WRITE, 0);
    if (likely)
        madvise(likely, 4 * LARGE, MADV_HUGEPAGE);
    touch(likely, 4 * LARGE, LARGE);
    char *read_only = map(0, 8 * PAGE, PROT_READ, 0);   /* the zero page */
    for (int i = 0; read_only && i < 8; i++)
        (void)*(volatile char *)(read_only + i * PAGE);
    char *keyed = map(0, 4 * PAGE, PROT_READ | PROT_WRITE, 0);
    touch(keyed, 4 * PAGE, PAGE);
    int key = pkey_alloc(0, PKEY_DISABLE_WRITE);
    if (keyed && key > 0)
        pkey_mprotect(keyed, 4 * PAGE, PROT_READ | PROT_WRITE, key);
    char *shared = mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared != MAP_FAILED)
        touch(shared, 8 * PAGE, 2 * PAGE);
}

int main(void)
{
    mkdir("/dev", 0755), mkdir("/proc", 0755);
    mount("none", "/proc", "proc", 0, 0);
    mount("none", "/dev", "devtmpfs", 0, 0);
    int console = open("/dev/console", O_RDWR);
    int pool = open("/proc/sys/vm/nr_hugepages", O_WRONLY);
    if (pool >= 0 && write(pool, "8", 1) == 1)
        close(pool);
    fill(1);
    for (int i = 0; i < 2; i++)
        if (!fork())
            fill(2 + i), pause();
    fill(7);
    sleep(1);
    if (console >= 0)
        dprintf(console, "\ncapture: ready\n");
    for (volatile unsigned long n = 0;; n++)
        ;
}
