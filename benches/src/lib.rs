//! Nothing here: the benches are in `benches/`, one file a subject.
