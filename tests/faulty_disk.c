// A disk that fails, for programs that are started with LD_PRELOAD=faulty_disk.so and
// FAULT=ERRNO:OPERATIONS:PART:FILE. While FILE exists, each of the operations (letters below) on a
// path that contains PART fails with the error; with ERRNO -1 the operation never returns.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

// Whether an operation fails; sets errno.
static int fails(char operation, const char *path) {
  const char *fault = getenv("FAULT");
  int code;
  char operations[32], part[256], file[512];
  if (!fault || !path) return 0;
  if (sscanf(fault, "%d:%31[^:]:%255[^:]:%511s", &code, operations, part, file) != 4) abort();
  if (!strchr(operations, operation) || !strstr(path, part) || access(file, F_OK)) return 0;
  while (code < 0) pause();
  errno = code;
  return 1;
}

static int fails_fd(char operation, int fd) {
  char link[64], path[4096];
  if (!getenv("FAULT")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return fails(operation, path);
}

#define NEXT(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

// o: open to read, c: open to write
static int opens(const char *path, int flags) {
  return fails((flags & (O_WRONLY | O_RDWR | O_CREAT)) ? 'c' : 'o', path);
}

#define OPEN(name)                                                            \
  int name(const char *path, int flags, ...) {                                \
    va_list rest;                                                             \
    va_start(rest, flags);                                                    \
    mode_t mode = va_arg(rest, mode_t);                                       \
    va_end(rest);                                                             \
    if (opens(path, flags)) return -1;                                        \
    return NEXT(int, #name, const char *, int, ...)(path, flags, mode);       \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                          \
  int name(int folder, const char *path, int flags, ...) {                    \
    va_list rest;                                                             \
    va_start(rest, flags);                                                    \
    mode_t mode = va_arg(rest, mode_t);                                       \
    va_end(rest);                                                             \
    if (opens(path, flags)) return -1;                                        \
    return NEXT(int, #name, int, const char *, int, ...)(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

// r: read
#define READ(name, ...)                                                       \
  if (fails_fd('r', fd)) return -1;                                           \
  return NEXT(ssize_t, name, __VA_ARGS__)
ssize_t read(int fd, void *to, size_t n) { READ("read", int, void *, size_t)(fd, to, n); }
ssize_t pread(int fd, void *to, size_t n, off_t at) {
  READ("pread", int, void *, size_t, off_t)(fd, to, n, at);
}
ssize_t pread64(int fd, void *to, size_t n, off64_t at) {
  READ("pread64", int, void *, size_t, off64_t)(fd, to, n, at);
}

// w: write
#define WRITE(name, ...)                                                      \
  if (fails_fd('w', fd)) return -1;                                           \
  return NEXT(ssize_t, name, __VA_ARGS__)
ssize_t write(int fd, const void *from, size_t n) {
  WRITE("write", int, const void *, size_t)(fd, from, n);
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
  WRITE("pwrite", int, const void *, size_t, off_t)(fd, from, n, at);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
  WRITE("pwrite64", int, const void *, size_t, off64_t)(fd, from, n, at);
}

// m: rename and mkdir
int rename(const char *from, const char *to) {
  if (fails('m', to)) return -1;
  return NEXT(int, "rename", const char *, const char *)(from, to);
}
int mkdir(const char *path, mode_t mode) {
  if (fails('m', path)) return -1;
  return NEXT(int, "mkdir", const char *, mode_t)(path, mode);
}

// s: look at a path
#define STAT(name)                                                            \
  int name(const char *path, struct stat64 *to) {                             \
    if (fails('s', path)) return -1;                                          \
    return NEXT(int, #name, const char *, struct stat64 *)(path, to);         \
  }
STAT(stat64)
STAT(lstat64)

// d: list a folder
DIR *opendir(const char *path) {
  if (fails('d', path)) return NULL;
  return NEXT(DIR *, "opendir", const char *)(path);
}
