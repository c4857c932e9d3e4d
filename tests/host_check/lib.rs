//! Links `cuda/host_check.cpp` into a test: `use dflash_host_check as _;` beside the test's own `unsafe extern "C"` block.
