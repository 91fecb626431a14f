// How the process's allocator treats large blocks. Owns settings, no memory.
#pragma once

namespace fewfire {

// From now on freed memory stays with the process, so that the next large block is one that already has pages: an
// allocator that returns each to the kernel makes every training step fault all its activations in again.
// Settles after a few steps; peak resident memory rises by what fragments meanwhile. Cannot be undone. False where the C library has no such setting.
bool keep_freed_memory();

}  // namespace fewfire
