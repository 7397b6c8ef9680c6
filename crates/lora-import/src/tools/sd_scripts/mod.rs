//! kohya-ss/sd-scripts: the options of `train_network.py`, `sdxl_train_network.py`, `flux_train_network.py`,
//! `sd3_train_network.py` and their like, on the command line or in a TOML file whose headings mean nothing. A file for the
//! options of each subject; the GUI's fields, which have names of their own, stand in [`super::kohya_gui`].

pub(in crate::tools) mod data;
pub(crate) mod dataset_file;
pub(in crate::tools) mod flow;
pub(in crate::tools) mod loss;
pub(in crate::tools) mod memory;
pub(in crate::tools) mod network;
pub(in crate::tools) mod optimizer;
pub(in crate::tools) mod program;
pub(in crate::tools) mod save;

use super::{Table, Tool};
use crate::engine::{Field, Scope};
use crate::input::command::LAUNCH;
use crate::input::tree::{Entry, Node};
use crate::input::{self, Document, Problem, Source};
use crate::outcome::{Outcome, no_effect};
use crate::row::{Groups, Row};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::SdScripts,
    name: "sd-scripts",
    title: "sd-scripts",
    about: "Options of the command line, or the TOML file of `--config_file`, whose headings mean nothing; options win over the \
            file. Tables of `--dataset_config` become `datasets`. Variables of a shell script are put in where it sets them. \
            `max_train_steps` are optimiser steps, there and here.",
    groups: ROWS,
    own: ROWS,
    is: |has| has("pretrained_model_name_or_path") && !has("model_name_or_path"),
    prepare: flat,
    finish: data::dataset_file,
};

/// All of them, which the GUI has too unless it means another thing by a name.
static ROWS: Groups = &behind(&[]);

/// Rows of a tool that has sd-scripts' options beside its own, which win.
pub(super) const fn behind(own: &'static [Row]) -> [&'static [Row]; 9] {
    [own, program::ROWS, data::ROWS, network::ROWS, optimizer::ROWS, loss::ROWS, flow::ROWS, memory::ROWS, save::ROWS]
}

/// The base that a run is for, as far as its options say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::tools) enum Base {
    Sd,
    Sdxl,
    Flux,
    Chroma,
    Sd3,
    Anima,
    /// Of musubi-tuner.
    QwenImage,
    /// Of musubi-tuner.
    ZImage,
}

pub(in crate::tools) fn base(root: &Scope<'_>) -> Base {
    let script = root.script().unwrap_or_default().to_ascii_lowercase();
    let module = root.text("network_module").unwrap_or_default();
    // The GUI's switches and kinds.
    let kind = root.text("LoRA_type").unwrap_or_default();
    if script.starts_with("flux") || module.contains("flux") || root.on("flux1_checkbox") || kind.starts_with("Flux1") {
        if root.text("model_type").as_deref() == Some("chroma") { Base::Chroma } else { Base::Flux }
    } else if script.starts_with("qwen_image") || module.contains("qwen_image") {
        Base::QwenImage
    } else if script.starts_with("zimage") || module.contains("zimage") {
        Base::ZImage
    } else if script.starts_with("anima") || module.contains("anima") || root.given("qwen3").is_some() {
        Base::Anima
    } else if script.starts_with("sd3") || module.contains("sd3") || root.on("sd3_checkbox") {
        Base::Sd3
    } else if script.starts_with("sdxl") || root.on("sdxl") || root.on("sdxl_checkbox") {
        Base::Sdxl
    } else if root.given("t5xxl").is_some() && root.given("clip_g").is_some() {
        Base::Sd3
    } else if root.given("t5xxl").is_some() {
        Base::Flux
    } else {
        Base::Sd
    }
}

pub(in crate::tools) fn is_flow(root: &Scope<'_>) -> bool {
    !matches!(base(root), Base::Sd | Base::Sdxl)
}

/// Only for bases that predict the noise or the velocity.
fn of_diffusion(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match is_flow(&field.root) {
        true => no_effect("this base is trained by flow matching"),
        false => outcome,
    }
}

/// Only for bases that are trained by flow matching.
fn of_flow(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match is_flow(&field.root) {
        true => outcome,
        false => no_effect("only bases that are trained by flow matching read it"),
    }
}

/// Headings are taken off, and the file of `--config_file` put under the options.
pub(in crate::tools) fn flat(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries: Vec<Entry> = Vec::new();
    let mut add = |entry: Entry| match entries.iter().find(|other| other.key == entry.key) {
        None => {
            entries.push(entry);
            Ok(())
        }
        Some(before) => {
            let message = format!("it is given on line {} too; keep one of them", before.line);
            Err(Problem::new(&place, entry.line, &entry.key, message))
        }
    };
    for entry in root.entries() {
        let is_heading = !entry.node.entries().is_empty() && entry.key != LAUNCH;
        match is_heading {
            true => entry.node.entries().iter().cloned().try_for_each(&mut add)?,
            false => add(entry.clone())?,
        }
    }
    if let (Some(_), Some(file)) = (&script, entries.iter().find(|entry| entry.key == "config_file")) {
        let name = values::text(&file.node.value()).unwrap_or_default();
        let name = if name.ends_with(".toml") { name } else { format!("{name}.toml") };
        let within = flat(input::read(&Source::file(&name))?)?;
        for mut entry in within.root.entries().iter().cloned() {
            if entries.iter().all(|other| other.key != entry.key) {
                // Lines are those of the command.
                entry.line = 0;
                entries.push(entry);
            }
        }
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}
