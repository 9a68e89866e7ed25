// Preloaded: at the n-th call that changes files below a directory, the disk is full from then on, or the process dies.
// Only such calls count: see test_cache_faults_injected.py, which counts through all of them.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char below[4096];
static int countdown = -1, error = 0;  // error 0: kill
static int seen = 0;

extern "C" void arm(const char* directory, int calls, int number) {
  strncpy(below, directory, sizeof below - 1);
  seen = 0, error = number, countdown = calls;
}
extern "C" int calls_seen() { return seen; }

static bool inside(const char* path) { return below[0] && path && !strncmp(path, below, strlen(below)); }
static bool inside(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return false;
  path[length] = 0;
  return inside(path);
}
// Whether this call has to fail.
static bool strikes() {
  ++seen;
  if (countdown < 0) return false;
  if (countdown > 0) { --countdown; return false; }
  if (error == 0) kill(getpid(), SIGKILL);
  errno = error;
  return true;
}

#define REAL(name) reinterpret_cast<decltype(&name)>(dlsym(RTLD_NEXT, #name))
extern "C" {
ssize_t write(int fd, const void* data, size_t size) {
  static const auto real = REAL(write);
  if (!inside(fd) || !strikes()) return real(fd, data, size);
  // what fits is written, as a full disk does
  return error == ENOSPC && size > 1 && countdown == 0 && seen % 2 ? real(fd, data, size / 2) : -1;
}
int open64(const char* path, int flags, ...) {
  static const auto real = REAL(open64);
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  if ((flags & O_CREAT) && inside(path) && strikes()) return -1;
  return real(path, flags, mode);
}
int mkdir(const char* path, mode_t mode) {
  static const auto real = REAL(mkdir);
  return inside(path) && strikes() ? -1 : real(path, mode);
}
int rename(const char* from, const char* to) {
  static const auto real = REAL(rename);
  return inside(to) && strikes() ? -1 : real(from, to);
}
int fsync(int fd) {
  static const auto real = REAL(fsync);
  return inside(fd) && strikes() ? -1 : real(fd);
}
int chmod(const char* path, mode_t mode) {
  static const auto real = REAL(chmod);
  return inside(path) && strikes() ? -1 : real(path, mode);
}
int unlink(const char* path) {
  static const auto real = REAL(unlink);
  if (inside(path) && error == 0) strikes();  // a full disk does not stop removing
  return real(path);
}
}
