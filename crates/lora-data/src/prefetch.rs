//! Work done ahead on several threads: results come in the order of the jobs, and no more than a window of them waits, so
//! that memory stays bounded however fast the threads are.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

struct State<J, T> {
    jobs: J,
    /// Number of the next job to be begun.
    begun: u64,
    /// Number of the next result to be handed out.
    wanted: u64,
    /// Results ahead of that, by number; a panic travels as its payload.
    done: BTreeMap<u64, Result<T, Box<dyn Any + Send>>>,
    exhausted: bool,
    stopped: bool,
}

struct Shared<J, T> {
    state: Mutex<State<J, T>>,
    changed: Condvar,
}

impl<J, T> Shared<J, T> {
    fn lock(&self) -> MutexGuard<'_, State<J, T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Work<J, T> = dyn Fn(<J as Iterator>::Item) -> T + Send + Sync;

/// Results of jobs in their order, made ahead; see [`ahead`]. Dropping it ends the threads.
pub struct Ahead<J: Iterator, T> {
    shared: Arc<Shared<J, T>>,
    work: Arc<Work<J, T>>,
    threads: Vec<JoinHandle<()>>,
}

impl<J: Iterator, T> std::fmt::Debug for Ahead<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ahead").field("threads", &self.threads.len()).finish()
    }
}

/// As many threads as the machine has cores.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` for each job on `threads` threads. At most `window` results, begun ones included, are ahead of what was
/// taken.
pub fn ahead<J, T>(
    jobs: J,
    threads: usize,
    window: usize,
    work: impl Fn(J::Item) -> T + Send + Sync + 'static,
) -> Ahead<J, T>
where
    J: Iterator + Send + 'static,
    T: Send + 'static,
{
    let state = State { jobs, begun: 0, wanted: 0, done: BTreeMap::new(), exhausted: false, stopped: false };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    let work: Arc<Work<J, T>> = Arc::new(work);
    let window = window.max(1) as u64;
    let run = |shared: Arc<Shared<J, T>>, work: Arc<Work<J, T>>| {
        move || {
            loop {
                let mut state = shared.lock();
                while !state.stopped && !state.exhausted && state.begun >= state.wanted + window {
                    state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.stopped || state.exhausted {
                    return;
                }
                let Some(job) = state.jobs.next() else {
                    state.exhausted = true;
                    shared.changed.notify_all();
                    return;
                };
                let number = state.begun;
                state.begun += 1;
                drop(state);
                let result = catch_unwind(AssertUnwindSafe(|| work(job)));
                shared.lock().done.insert(number, result);
                shared.changed.notify_all();
            }
        }
    };
    let threads = (0..threads.max(1))
        .filter_map(|_| {
            let run = run(Arc::clone(&shared), Arc::clone(&work));
            std::thread::Builder::new().name("lora-prefetch".into()).spawn(run).ok()
        })
        .collect();
    Ahead { shared, work, threads }
}

impl<J: Iterator, T> Iterator for Ahead<J, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let mut state = self.shared.lock();
        loop {
            let wanted = state.wanted;
            if let Some(result) = state.done.remove(&wanted) {
                state.wanted += 1;
                self.shared.changed.notify_all();
                drop(state);
                // A panic of the work is the caller's, as if it had been done here.
                return Some(result.unwrap_or_else(|payload| resume_unwind(payload)));
            }
            if state.exhausted && state.begun == wanted {
                return None;
            }
            if self.threads.is_empty() {
                // No thread could be had: the work is done here.
                let job = state.jobs.next()?;
                drop(state);
                return Some((self.work)(job));
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J: Iterator, T> Drop for Ahead<J, T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // Its work cannot have panicked out of it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_order_and_never_more_than_the_window_wait() {
        let (begun, taken) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (count, seen) = (Arc::clone(&begun), Arc::clone(&taken));
        let results = ahead(0..200u64, 4, 5, move |job| {
            let ahead = count.fetch_add(1, Ordering::SeqCst) + 1 - seen.load(Ordering::SeqCst);
            // Jobs take turns at being slow.
            std::thread::sleep(Duration::from_micros(job % 7 * 100));
            (job, ahead)
        });
        let mut all = Vec::new();
        for (job, ahead) in results {
            assert!(ahead <= 6, "{ahead} begun beyond what was taken");
            all.push(job);
            taken.fetch_add(1, Ordering::SeqCst);
        }
        assert_eq!(all, (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn it_can_be_dropped_in_the_middle_and_a_panic_reaches_the_caller() {
        let mut endless = ahead(0.., 3, 4, |job: u64| job * 2);
        assert_eq!(endless.next(), Some(0));
        drop(endless);
        assert_eq!(ahead(0..0, 2, 2, |job: u64| job).next(), None);
        let mut failing = ahead(0..3, 2, 2, |job: u64| assert!(job != 1, "job 1 failed"));
        assert_eq!(failing.next(), Some(()));
        assert!(catch_unwind(AssertUnwindSafe(|| failing.next())).is_err());
        assert_eq!(failing.next(), Some(()));
        assert_eq!(failing.next(), None);
    }
}
