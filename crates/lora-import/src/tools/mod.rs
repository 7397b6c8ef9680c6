//! The trainers, a file each: the table of its keys, how its files are told, and what is done with an input before and after
//! the walk through it.

mod ai_toolkit;
mod axolotl;
mod diffusion_pipe;
mod kohya_gui;
mod language;
mod llama_factory;
mod musubi;
mod onetrainer;
mod optimisers;
pub(crate) mod sd_scripts;
mod shared;
mod tracking;

use std::fmt;
use std::str::FromStr;

use crate::config::Draft;
use crate::engine::Scope;
use crate::input::{Document, Problem};
use crate::report::Accounted;
use crate::row::{self, Groups};

/// A trainer whose configurations are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tool {
    /// kohya-ss/sd-scripts.
    SdScripts,
    /// bmaltais/kohya_ss, the GUI of sd-scripts.
    KohyaGui,
    /// Nerogar/OneTrainer.
    OneTrainer,
    /// ostris/ai-toolkit.
    AiToolkit,
    /// axolotl-ai-cloud/axolotl.
    Axolotl,
    /// hiyouga/LLaMA-Factory.
    LlamaFactory,
    /// kohya-ss/musubi-tuner.
    Musubi,
    /// tdrussell/diffusion-pipe.
    DiffusionPipe,
}

impl Tool {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::SdScripts,
        Self::KohyaGui,
        Self::Musubi,
        Self::OneTrainer,
        Self::AiToolkit,
        Self::DiffusionPipe,
        Self::Axolotl,
        Self::LlamaFactory,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        table(self).name
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tool {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|tool| tool.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| format!("no such trainer; known are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// Whether a file is of a trainer, told by whether it has keys.
type Told = fn(&dyn Fn(&str) -> bool) -> bool;
/// What is done before the walk.
type Prepare = fn(Document) -> Result<Document, Problem>;
/// What is done after it: what several keys together make, and files that the input names.
type Finish = fn(&Scope<'_>, &mut Draft, &mut Vec<Accounted>) -> Result<(), Problem>;

/// All about one trainer.
pub(crate) struct Table {
    tool: Tool,
    pub(crate) name: &'static str,
    /// What messages call its files.
    pub(crate) title: &'static str,
    /// What the page says before the table of keys.
    pub(crate) about: &'static str,
    pub(crate) groups: Groups,
    /// The groups that the page shows here.
    pub(crate) own: Groups,
    /// Whether a file with these keys at the top is its.
    is: Told,
    pub(crate) prepare: Prepare,
    pub(crate) finish: Finish,
}

/// All trainers; of two that claim a file, the first has it.
pub(crate) static ALL: &[&Table] = &[
    &ai_toolkit::TABLE,
    &onetrainer::TABLE,
    &kohya_gui::TABLE,
    &axolotl::TABLE,
    &llama_factory::TABLE,
    &diffusion_pipe::TABLE,
    &musubi::TABLE,
    &sd_scripts::TABLE,
];

/// The table of a trainer.
pub(crate) fn table(tool: Tool) -> &'static Table {
    ALL.iter().copied().find(|table| table.tool == tool).unwrap_or(&sd_scripts::TABLE)
}

/// The trainer that a document is for.
pub(crate) fn of(document: &Document) -> Option<Tool> {
    let entries = document.root.entries();
    if document.script.is_some() {
        let is_musubi = entries.iter().any(|entry| entry.key == "dit");
        return Some(if is_musubi { Tool::Musubi } else { Tool::SdScripts });
    }
    // sd-scripts takes tables of any name for headings.
    let within = |key: &str| entries.iter().any(|entry| entry.key != "meta" && entry.node.get(key).is_some());
    let has = |key: &str| entries.iter().any(|entry| entry.key == key);
    let found = ALL.iter().find(|table| match table.tool {
        Tool::SdScripts | Tool::Musubi => (table.is)(&|key| has(key) || within(key)),
        _ => (table.is)(&has),
    });
    found.map(|table| table.tool)
}

/// What is said of an input that no trainer claims.
pub(crate) fn unknown(document: &Document) -> Problem {
    let entries = document.root.entries();
    let known = |table: &Table| entries.iter().filter(|entry| row::find(table.groups, &entry.key).is_some()).count();
    let near = ALL.iter().map(|table| (known(table), table)).max_by_key(|(known, _)| *known);
    let near = match near {
        Some((known, table)) if known > 1 => {
            format!("; {known} of its {} keys are of {} (--from {})", entries.len(), table.title, table.name)
        }
        _ => String::new(),
    };
    let message = match document.root.get("base_model").is_some() {
        true => "it is a configuration of this program, or of none of the known trainers".to_owned(),
        false => format!("no configuration of a known trainer ({}){near}", Tool::ALL.map(Tool::name).join(", ")),
    };
    Problem::of(&document.place, message)
}

/// Nothing is done before the walk.
fn as_it_is(document: Document) -> Result<Document, Problem> {
    Ok(document)
}

/// Nothing is left to do after it.
fn done(_: &Scope<'_>, _: &mut Draft, _: &mut Vec<Accounted>) -> Result<(), Problem> {
    Ok(())
}
