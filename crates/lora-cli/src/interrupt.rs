//! Signals that end a command in an orderly way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Becomes true at the first signal, which says `message`; the second ends the program at once.
pub fn flag(message: &'static str) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let handler = ctrlc::set_handler(move || {
        // The second signal ends at once, for those who mean it.
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\n{message}");
    });
    if let Err(error) = handler {
        tracing::warn!("signals are not caught ({error}): an interrupt will lose the run");
    }
    stop
}
