/* Makes a disk fail: LD_PRELOADed, it lets the nth change of files below a folder, and perhaps all later ones, fail.
 *
 *     cc -shared -fPIC -o disk.so disk.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long count, last;
static int error, stays;

/* From now on counts changes below `path`; the `nth` (0: none) fails with `number`, and all after it if it `remains`. */
void kestrel_fail_at(const char *path, long nth, int number, int remains) {
    strncpy(folder, path, sizeof folder - 1);
    count = 0, last = nth, error = number, stays = remains;
}

long kestrel_changes(void) { return count; }

static int path_fails(const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    long now = __sync_add_and_fetch(&count, 1);
    if (!last || (stays ? now < last : now != last)) return 0;
    errno = error;
    return 1;
}

static int file_fails(int file) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path_fails(path);
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define ON_FILE(type, name, signature, ...) \
    type name signature { REAL(name); return file_fails(file) ? -1 : real(__VA_ARGS__); }
#define ON_PATH(name, signature, ...) \
    int name signature { REAL(name); return path_fails(path) ? -1 : real(__VA_ARGS__); }

ON_FILE(ssize_t, write, (int file, const void *data, size_t size), file, data, size)
ON_FILE(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), file, data, size, at)
ON_FILE(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), file, data, size, at)
ON_FILE(ssize_t, writev, (int file, const struct iovec *parts, int many), file, parts, many)
ON_FILE(int, fsync, (int file), file)
ON_FILE(int, ftruncate, (int file, off_t size), file, size)
ON_FILE(int, ftruncate64, (int file, off64_t size), file, size)
ON_PATH(mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH(rename, (const char *path, const char *to), path, to)

#define OPEN(name, signature, ...) \
    int name signature { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && path_fails(path)) return -1; \
        return real(__VA_ARGS__, flags, mode); \
    }
OPEN(open, (const char *path, int flags, ...), path)
OPEN(open64, (const char *path, int flags, ...), path)
OPEN(openat, (int at, const char *path, int flags, ...), at, path)
OPEN(openat64, (int at, const char *path, int flags, ...), at, path)
