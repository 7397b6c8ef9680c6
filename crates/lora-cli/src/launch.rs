//! Commands that the second program has: how it is found, what its environment must be before libtorch is loaded, and its exit
//! status. It gets the arguments as they are.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lora_cli::{Failure, training};
use lora_core::openmp;

/// The command of the second program that is asked for, and that program's arguments; `lora help train` is `lora train --help`.
pub(crate) fn passed_on(arguments: &[OsString]) -> Option<(training::Command, Vec<OsString>)> {
    let named = |name: &OsString| training::COMMANDS.into_iter().find(|command| *name == *command.name);
    match arguments {
        [help, name, ..] if help == "help" => Some((named(name)?, vec![name.clone(), "--help".into()])),
        [name, ..] => Some((named(name)?, arguments.to_vec())),
        [] => None,
    }
}

/// How a system's loader ends a program whose libraries it does not find.
const NOT_LOADED: i32 = 127;

/// Becomes the second program; elsewhere than on Unix starts it and waits for it.
pub(crate) fn launch(command: training::Command, arguments: &[OsString]) -> ExitCode {
    let mut program = std::process::Command::new(found());
    program.args(arguments);
    // An OpenMP library reads it before `main`.
    if let Some((name, value)) = command.computes.then(openmp::for_busy_programs).flatten() {
        program.env(name, value);
    }
    // The doctor says what is the matter even where the program behind it cannot be loaded.
    if command.name == training::DOCTOR.name
        && let Ok(status) = program.status()
    {
        return match status.code() {
            Some(NOT_LOADED) => Failure::Work(not_loaded(program.get_program().as_ref())).tell(),
            code => exit_code(code),
        };
    }
    match start(&mut program) {
        Ok(status) => status,
        Err(error) => Failure::Work(missing(&command, program.get_program().as_ref(), &error)).tell(),
    }
}

/// The program: the one that a variable names, else one beside this one, else what `PATH` has.
fn found() -> PathBuf {
    if let Some(path) = std::env::var_os(training::VARIABLE).filter(|path| !path.is_empty()) {
        return path.into();
    }
    let name = file_name();
    let beside = folder().map(|folder| folder.join(&name)).filter(|path| path.is_file());
    beside.unwrap_or_else(|| name.into())
}

fn file_name() -> String {
    format!("{}{}", training::PROGRAM, std::env::consts::EXE_SUFFIX)
}

/// Where this program lies, not where links to it do.
fn folder() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.canonicalize().ok()?.parent()?.to_owned())
}

fn missing(command: &training::Command, program: &Path, error: &std::io::Error) -> String {
    let training::Command { name, .. } = command;
    if error.kind() != std::io::ErrorKind::NotFound || std::env::var_os(training::VARIABLE).is_some() {
        return format!("`lora {name}`: cannot start {}: {error}", program.display());
    }
    let folder = folder().map_or_else(String::new, |folder| format!(" ({})", folder.display()));
    format!(
        "`lora {name}` is done by the program {}, which is neither beside `lora`{folder} nor in PATH.\n\
         Put both programs of a release into one folder, or build them: `make build` leaves both in target/release, `cargo \
         install --path crates/lora-trainer` needs a libtorch (`make setup`). {}=FILE names one that lies elsewhere",
        file_name(),
        training::VARIABLE
    )
}

fn not_loaded(program: &Path) -> String {
    format!(
        "{} was not loaded, for the reason above. It takes libtorch from `lib` in its own folder, or from where it was built; a \
         libtorch of another version lacks what it calls. In the repository `make setup build` mends both; in an archive, `lib` \
         has to be the archive's own",
        program.display()
    )
}

/// The exit status of another program; 1 where a signal ended it.
fn exit_code(code: Option<i32>) -> ExitCode {
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// In the same process, so that signals, the terminal and the exit status are the program's own.
#[cfg(unix)]
fn start(program: &mut std::process::Command) -> std::io::Result<ExitCode> {
    Err(std::os::unix::process::CommandExt::exec(program))
}

/// In a process of its own. Ctrl-C goes to all programs of a console: the second one decides, and this one waits for it.
#[cfg(not(unix))]
fn start(program: &mut std::process::Command) -> std::io::Result<ExitCode> {
    let _ = ctrlc::set_handler(|| {});
    Ok(exit_code(program.status()?.code()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_second_program_has_is_passed_on_as_it_is() {
        let passed = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
            passed_on(&arguments).map(|(command, arguments)| (command.name, arguments))
        };
        assert_eq!(passed(&["train", "--", "--x"]), Some(("train", vec!["train".into(), "--".into(), "--x".into()])));
        assert_eq!(passed(&["help", "plan"]), Some(("plan", vec!["plan".into(), "--help".into()])));
        assert_eq!(passed(&["help", "merge"]), None);
        assert_eq!(passed(&["--help", "train"]), None);
        assert_eq!(passed(&[]), None);
    }
}
