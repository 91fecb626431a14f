// How the process's allocator treats large blocks. Owns settings, no memory.
#pragma once

namespace fewfire {

// From now on freed memory stays with the process, so that the next large block is one that already has pages: an
// allocator that returns each to the kernel makes every training step fault all its activations in again.
// Settles after a few steps; peak resident memory rises by what fragments meanwhile. False where the C library has
// no such setting.
bool keep_freed_memory();

// From now on large blocks go back to the kernel as they are freed, however large they come, so that a process that keeps
// a memory budget does not hold what it no longer uses; what is free already goes back now. The other way round than
// keep_freed_memory; the last call counts.
bool return_freed_memory();

}  // namespace fewfire
