//! Nerogar/OneTrainer: the JSON of a run and its presets, with the concepts and samples that it names. A file for the keys of
//! each subject.

mod adapter;
mod data;
mod files;
mod loss;
mod optimizer;
mod parts;
mod run;
mod samples;

use super::{Table, Tool};
use crate::engine::Scope;
use crate::row::Groups;

pub(crate) static TABLE: Table = Table {
    tool: Tool::OneTrainer,
    name: "onetrainer",
    title: "OneTrainer",
    about: "JSON of a run or a preset. Concepts are read from `concepts`, or from the file that `concept_file_name` names; those \
            that are not enabled are left out, those of validation become `validation_data_dir`. `resolution` is an area: \
            pictures go to buckets by sd-scripts' rule, whose sides differ a little from OneTrainer's.",
    groups: ROWS,
    own: ROWS,
    is: |has| has("training_method") && has("model_type") || has("base_model_name") && has("concept_file_name"),
    prepare: files::with_files,
    finish: data::split_resolutions,
};

static ROWS: Groups = &[run::ROWS, data::ROWS, optimizer::ROWS, adapter::ROWS, loss::ROWS, parts::ROWS, samples::ROWS];

fn is_full(root: &Scope<'_>) -> bool {
    root.text("training_method").is_some_and(|method| method != "LORA")
}

fn kind_is(root: &Scope<'_>, starts: &[&str]) -> bool {
    root.text("model_type").is_some_and(|kind| starts.iter().any(|start| kind.starts_with(start)))
}

fn is_sdxl(root: &Scope<'_>) -> bool {
    kind_is(root, &["STABLE_DIFFUSION_XL"])
}

fn is_flow(root: &Scope<'_>) -> bool {
    kind_is(root, &["FLUX", "Z_IMAGE", "STABLE_DIFFUSION_3", "CHROMA", "QWEN", "ANIMA"])
}
