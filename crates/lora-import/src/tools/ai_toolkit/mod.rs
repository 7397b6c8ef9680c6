//! ostris/ai-toolkit: the YAML or JSON of a job with one process. A file for each of its larger tables.

mod data;
mod model;
mod network;
mod sample;
mod train;

use super::{Table, Tool, shared};
use crate::engine::{Field, Scope};
use crate::input::tree::{Content, Entry, Node};
use crate::input::{Document, Problem};
use crate::outcome::{Outcome, becomes, lost, no_effect, refused, taken};
use crate::row::{Element, Kind, OFF, Row, by, datasets, gone, nothing, same, table};

pub(crate) static TABLE: Table = Table {
    tool: Tool::AiToolkit,
    name: "ai-toolkit",
    title: "ai-toolkit",
    about: "YAML or JSON of a job; keys of its one process stand here without `config.process[0]`. The adapter's file lies in \
            `training_folder`/`name`. A list of resolutions makes a dataset of each. With `gradient_accumulation_steps` steps are \
            counted before accumulation, with `gradient_accumulation` after it.",
    groups: &[ROWS],
    own: &[ROWS],
    is: |has| has("job") && has("config"),
    prepare: one_process,
    finish: shared::split,
};

static ROWS: &[Row] = &[
    by("job", &[], "`extension` and `train`", |field| match field.text().as_str() {
        "extension" | "train" => no_effect("a run of training"),
        other => refused(format!("a job {other} trains nothing")),
    }),
    by("type", &[], "`sd_trainer` and its like", |field| match field.text().as_str() {
        "sd_trainer" | "diffusion_trainer" | "ui_trainer" => no_effect("a run of training"),
        "slider" | "concept_slider" => {
            refused("sliders are trained here of prompts alone: give target, positive and negative in `sliders`")
        }
        other => refused(format!("a process {other} has no counterpart here; sd_trainer has")),
    }),
    by("name", &["output_name"], "the file's name, and that of its folder", |field| taken("output_name", field.text())),
    by("training_folder", &["output_dir"], "with `name` in it", |field| match field.root.text("name") {
        Some(name) => {
            becomes("output_dir", format!("{}/{name}", field.text().trim_end_matches('/')), "and the name in it")
        }
        None => taken("output_dir", field.text()),
    }),
    same("device", "device", Kind::Text),
    same("trigger_word", "trigger_word", Kind::Text),
    nothing("meta", "a note for the file's metadata"),
    nothing("performance_log_every", "what is printed"),
    nothing("sqlite_db_path", "how the program keeps its runs"),
    nothing("logging", "metrics.jsonl and loss.png are written"),
    gone("embedding", OFF, "no embeddings are trained"),
    gone("adapter", OFF, "no control adapters are trained"),
    gone("decorator", OFF, "no embeddings are trained"),
    gone("slider guidance", OFF, "sliders are trained of prompts alone, which `sliders` gives"),
    gone("first_sample", OFF, "samples are those of sample"),
    table("network", &[network::NETWORK]),
    table("save", &[SAVE]),
    datasets("datasets", data::DATASET, |_| Element::Dataset),
    table("train", &[train::TRAIN]),
    table("model", &[model::MODEL]),
    table("sample", &[sample::SAMPLE]),
];

static SAVE: &[Row] = &[
    by("dtype", &["save_precision"], "fp16 where none is given", |field| precision(field, "save_precision"))
        .default("\"float16\""),
    by("save_dtype", &["save_precision"], "an old name of dtype", |field| precision(field, "save_precision")),
    same("save_every", "save_every_n_steps", Kind::AtLeastOne).default("1000"),
    same("max_step_saves_to_keep", "save_total_limit", Kind::AtLeastOne).default("5"),
    gone("save_format", &["\"safetensors\""], "an adapter is one file of safetensors"),
    nothing("push_to_hub hf_repo_id hf_private", "nothing is sent anywhere"),
];

fn is_flow(root: &Scope<'_>) -> bool {
    root.text("train.noise_scheduler").is_some_and(|name| name == "flowmatch")
        || root.on("model.is_flux")
        || root.on("model.is_v3")
        || root.text("model.arch").is_some_and(|arch| !["sd1", "sd2", "sdxl", "ssd", "vega"].contains(&arch.as_str()))
}

fn precision(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.text().as_str() {
        "fp32" | "float32" | "float" => taken(ours, "fp32"),
        "fp16" | "float16" => taken(ours, "fp16"),
        "bf16" | "bfloat16" => taken(ours, "bf16"),
        other => lost(format!("fp32, fp16 or bf16, not {other}")),
    }
}

/// The keys of the one process, without the tables around it.
fn one_process(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries: Vec<Entry> = Vec::new();
    for entry in root.entries() {
        if entry.key != "config" {
            entries.push(entry.clone());
            continue;
        }
        for entry in entry.node.entries() {
            let Content::List(processes) = &entry.node.content else {
                entries.push(entry.clone());
                continue;
            };
            match processes.as_slice() {
                [process] => entries.extend(process.entries().iter().cloned()),
                several => {
                    let message =
                        format!("{} processes; a configuration here is of one: leave one of them", several.len());
                    return Err(Problem::new(&place, entry.line, "config.process", message));
                }
            }
        }
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}
