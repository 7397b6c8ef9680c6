//! How the threads of libtorch's kernels wait for each other. An OpenMP library lets them spin, which is fastest where the cores
//! are theirs. Beside any other busy program each barrier then waits for a thread that the system has put aside for a
//! spinning one, and steps take many times as long (measured in `docs/reliability.md`). A library reads how to wait when it is
//! loaded, before `main`; who wants it otherwise sets a variable before the program starts. Nothing here needs libtorch.

use std::time::{Duration, Instant};

/// The variables by which people say it themselves; where one is set, nothing is changed.
pub(crate) const VARIABLES: [&str; 3] = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"];

/// What this program sets beside busy programs: threads that wait sleep, whichever library it is. On a quiet machine that
/// takes up to three times as long with small networks, as each barrier wakes a core.
const SETTING: (&str, &str) = ("OMP_WAIT_POLICY", "PASSIVE");

/// How long other programs are watched before the choice. The system counts in hundredths of a second.
const WATCHED: Duration = Duration::from_millis(250);

/// Cores that other programs keep busy before threads get into each other's way.
pub const CROWDED: f64 = 0.4;

/// Which of the variables that say how OpenMP's threads wait are set, each as `name=value`.
pub fn setting() -> Option<String> {
    let set = VARIABLES.iter().filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)));
    Some(set.collect::<Vec<_>>().join(" ")).filter(|set| !set.is_empty())
}

/// Whether threads wait without keeping a core busy for long.
pub fn yields() -> bool {
    let value = |name: &str| std::env::var(name).ok();
    let number = |name: &str| value(name).and_then(|text| text.trim().parse::<u64>().ok());
    // The count has the last word over the policy.
    match (number("GOMP_SPINCOUNT"), value("OMP_WAIT_POLICY"), number("KMP_BLOCKTIME")) {
        (Some(count), ..) => count <= 20_000,
        (None, Some(policy), _) => policy.trim().eq_ignore_ascii_case("passive"),
        (None, None, Some(time)) => time <= 1,
        (None, None, None) => false,
    }
}

/// What all programs and this one have computed until a moment.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    at: Instant,
    all: f64,
    own: f64,
}

impl Load {
    /// Until now; `None` where the system does not say, as everywhere but on Linux.
    pub fn now() -> Option<Self> {
        let all = std::fs::read_to_string("/proc/stat").ok()?;
        let own = std::fs::read_to_string("/proc/self/stat").ok()?;
        Some(Self { at: Instant::now(), all: all_seconds(&all)?, own: own_seconds(&own)? })
    }

    /// Cores that other programs kept busy since, on average.
    pub fn others_since(&self) -> Option<f64> {
        let now = Self::now()?;
        let seconds = (now.at - self.at).as_secs_f64();
        Some(((now.all - self.all) - (now.own - self.own)).max(0.0) / seconds.max(f64::MIN_POSITIVE))
    }
}

/// The system counts processor time in these parts of a second, whatever its clock.
const TICKS: f64 = 100.0;

/// Seconds that all cores were busy, of `/proc/stat`: user, nice, system, interrupts and what other machines on the same
/// hardware took; idle and waiting for disks are left out.
fn all_seconds(stat: &str) -> Option<f64> {
    let numbers: Vec<f64> =
        stat.lines().next()?.split_whitespace().skip(1).map_while(|text| text.parse().ok()).collect();
    let busy: f64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|&index| numbers.get(index)).sum();
    (numbers.len() >= 4).then_some(busy / TICKS)
}

/// Seconds of this process, of `/proc/self/stat`: the 14th and 15th value. The second, its name, may have spaces in it.
fn own_seconds(stat: &str) -> Option<f64> {
    let mut values = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (values.next()?.parse().ok()?, values.next()?.parse().ok()?);
    Some((user + system) / TICKS)
}

/// The variable, and its value, that a program which trains is to be started with beside busy programs. It watches for a quarter
/// of a second. `None` where the machine is quiet, where a variable says already how threads wait, and everywhere but on Linux.
pub fn for_busy_programs() -> Option<(&'static str, &'static str)> {
    if cfg!(not(target_os = "linux")) || setting().is_some() {
        return None;
    }
    let load = Load::now()?;
    std::thread::sleep(WATCHED);
    load.others_since().filter(|&cores| cores >= CROWDED).map(|_| SETTING)
}

/// Starts the program again, in the same process and with the same arguments, where [`for_busy_programs`] has a variable to set.
/// Call it first in `main` of a program that trains; a program that starts another one sets the variable for that one instead.
///
/// ```no_run
/// lora_core::openmp::yield_to_busy_programs();
/// // … train …
/// ```
pub fn yield_to_busy_programs() {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::process::CommandExt;

        let Some((name, value)) = for_busy_programs() else { return };
        let Ok(program) = std::env::current_exe() else { return };
        let mut arguments = std::env::args_os();
        let mut command = std::process::Command::new(program);
        if let Some(own) = arguments.next() {
            command.arg0(own);
        }
        // It comes back only where it could not be started, and then goes on as it is.
        let _error = command.args(arguments).env(name, value).exec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_times_are_read_as_the_system_writes_them() {
        assert_eq!(all_seconds("cpu  100 20 30 4000 500 6 7 8 9 1\ncpu0 1 2 3"), Some(1.71));
        assert_eq!(all_seconds("cpu 1"), None);
        let stat = "12 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 99";
        assert_eq!(own_seconds(stat), Some(3.0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn another_program_that_computes_is_seen_and_this_one_is_not() {
        let cores = |load: Load| {
            std::thread::sleep(Duration::from_millis(500));
            load.others_since().unwrap()
        };
        let mut other = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let seen = cores(Load::now().unwrap());
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(seen > 0.3, "{seen}");
        // What this process computes itself is taken off: it is in both counts.
        let (load, begun) = (Load::now().unwrap(), Instant::now());
        let own = || Load::now().unwrap().own - load.own;
        while own() < 0.3 && begun.elapsed() < Duration::from_secs(60) {}
        assert!(own() >= 0.3 && Load::now().unwrap().all - load.all >= own() - 0.1);
    }
}
