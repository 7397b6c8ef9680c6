//! Nothing here: the examples are in `examples/`, one file each.
