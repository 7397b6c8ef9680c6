#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod engine;
mod input;
mod outcome;
mod page;
mod report;
mod row;
pub mod sd_scripts;
mod tools;
mod values;

pub use input::{Format, Problem, Problems, Source};
pub use page::page;
pub use report::{Accounted, Import, Verdict};
pub use tools::Tool;

/// What an import may do.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The trainer whose configuration it is; told by its content without.
    pub tool: Option<Tool>,
    /// Keys that are not known are listed as having no counterpart instead of being refused.
    pub allow_unknown: bool,
}

/// Translates the configuration of a run of another trainer.
///
/// # Errors
/// All that is wrong with it: what is no TOML, YAML or JSON, what no known trainer reads, keys that its trainer does not
/// have, values that it would refuse, keys that contradict each other. Each names its line.
pub fn import(source: &Source, options: &Options) -> Result<Import, Problems> {
    engine::import(source, options)
}

/// The trainer whose configuration a text is, told by its keys. `None` where it is none of a known one, among others where
/// it is a configuration of this program.
///
/// # Errors
/// The source cannot be read. What is no TOML, YAML or JSON is of no trainer.
pub fn recognise(source: &Source) -> Result<Option<Tool>, Problems> {
    engine::recognise(source)
}

/// Names of all configuration keys that the tables can produce, sorted.
pub fn keys_written() -> Vec<&'static str> {
    let mut all: Vec<_> = tools::ALL.iter().flat_map(|table| row::keys_of(table.groups)).collect();
    all.sort_unstable();
    all.dedup();
    all
}
