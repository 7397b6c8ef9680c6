//! How the threads of libtorch's kernels wait for each other. An OpenMP library lets them spin: beside any other busy program
//! each barrier then waits for a thread that the system has put aside for a spinning one, and steps take many times as long
//! (measured in `docs/reliability.md`). A library reads how to wait when it is loaded, before `main`; a program that
//! wants it otherwise sets it and starts itself again.

/// The variables by which people say it themselves; where one is set, nothing is changed.
pub(crate) const VARIABLES: [&str; 3] = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"];

/// What this program sets where people say nothing: threads that wait sleep, whichever library it is. Looking a thousand
/// times before that (GNU's `GOMP_SPINCOUNT`) took three times as long on a machine with much else to do.
const SETTING: (&str, &str) = ("OMP_WAIT_POLICY", "PASSIVE");

/// Which of [`VARIABLES`] are set, each as `name=value`.
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

/// Starts the program again, in the same process and with the same arguments, with threads that yield to other programs. Call
/// it first in `main` of a program that trains; it returns where one of [`VARIABLES`] is set, as it is in the
/// program that was started again, and everywhere but on Linux.
///
/// ```no_run
/// lora_torch::openmp::let_threads_yield();
/// // … train …
/// ```
pub fn let_threads_yield() {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::process::CommandExt;

        if setting().is_some() {
            return;
        }
        let Ok(program) = std::env::current_exe() else { return };
        let mut arguments = std::env::args_os();
        let mut command = std::process::Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        // It comes back only where it could not be started, and then goes on as it is.
        let _error = command.args(arguments).env(SETTING.0, SETTING.1).exec();
    }
}
