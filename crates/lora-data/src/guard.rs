//! Libraries that decode pictures, tables and tokenizers have been known to panic on damaged files; such a file is an error as
//! any other, and must not end a run.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Result};

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Whether a panic on this thread would be caught and become an error. A program's panic hook may stay silent then.
pub fn is_guarded() -> bool {
    DEPTH.with(|depth| depth.get() > 0)
}

/// Calls a library; its panic is the error that `failed` gives.
pub(crate) fn guarded<T>(failed: impl FnOnce() -> Error, decode: impl FnOnce() -> Result<T>) -> Result<T> {
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    // What a panic leaves behind is dropped with it or never looked at again.
    let result = catch_unwind(AssertUnwindSafe(decode));
    DEPTH.with(|depth| depth.set(depth.get() - 1));
    result.unwrap_or_else(|_| Err(failed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_library_is_an_error_and_nothing_stays_guarded() {
        let failed = || Error::picture("a.png".as_ref(), "it gave up");
        let result = guarded(failed, || {
            assert!(is_guarded());
            guarded(failed, || -> Result<()> { panic!("inside") }).unwrap_err();
            assert!(is_guarded());
            if is_guarded() { panic!("outside") } else { Ok(()) }
        });
        assert!(result.unwrap_err().to_string().contains("it gave up"));
        assert!(!is_guarded());
        assert_eq!(guarded(failed, || Ok(3)).unwrap(), 3);
    }
}
