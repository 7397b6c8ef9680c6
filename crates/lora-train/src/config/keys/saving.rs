//! What is written along the way, going on from it, samples and validation.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lora_data::PromptLine;
use lora_data::source::HeldOut;

use super::{Given, Group, Key, Reads, Resumed};
use crate::config::{Resume, Tracker, sampler_named};

/// The keys, in the order of the reference.
pub(super) static KEYS: Group = Group {
    section: "Saving and looking",
    behind: None,
    keys: &[
        Key {
            name: "save_every_n_steps",
            values: "1 …",
            default: "none",
            meaning: "Also save the LoRA every so many steps.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_every_n_steps = given.count(1)),
        },
        Key {
            name: "save_every_minutes",
            values: "above 0",
            default: "none",
            meaning: "Also save the LoRA at the first step after so many minutes of training, and again after as many.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_every_minutes = given.positive()),
        },
        Key {
            name: "save_every_n_epochs",
            values: "1 …",
            default: "none",
            meaning: "Also save the LoRA every so many epochs.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_every_n_epochs = given.count(1)),
        },
        Key {
            name: "save_total_limit",
            values: "1 …",
            default: "none",
            meaning: "Keep so many of these saves, the last ones. The run's own LoRA and the best one do not count.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_total_limit = given.count(1)),
        },
        Key {
            name: "validation_data_dir",
            values: "path",
            default: "none",
            meaning: "Pictures or texts that are not trained on: their loss, with the same noise at each look, is told before and after training and written to `validation.jsonl`.",
            memory: "The autoencoder again, for a moment.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.validation_data_dir = given.text().map(PathBuf::from)),
        },
        Key {
            name: "validation_split",
            values: "above 0 … below 1, or 1 …",
            default: "none",
            meaning: "Instead of that: this share of the training data, or so many pictures or records of it, are not trained on. Which ones, the `seed` says.",
            memory: "As `validation_data_dir`.",
            resumed: Resumed::FixedSince("None", |config| format!("{:?}", config.validation_split)),
            reads: Reads::Run(|given, config| {
                let expected = "a share above 0 and below 1, or a whole number from 1 on";
                let number = given.number(expected, |number| number > 0.0 && (number < 1.0 || number.fract() == 0.0));
                config.validation_split = number.map(|number| match number < 1.0 {
                    true => HeldOut::Share(number),
                    false => HeldOut::Records(number as usize),
                });
                if config.validation_split.is_some() && given.has("validation_data_dir") {
                    given.problem("there is a validation_data_dir; take one of the two out");
                }
            }),
        },
        Key {
            name: "validate_every_n_steps",
            values: "1 …",
            default: "none",
            meaning: "Also tell it every so many steps.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.validate_every_n_steps = given.count(1)),
        },
        Key {
            name: "early_stopping_patience",
            values: "1 …",
            default: "none",
            meaning: "Stop once the held-out loss has not fallen below its lowest for so many looks in a row. The look before training does not count.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.early_stopping_patience = given.count(1);
                looks(given, config.early_stopping_patience.is_some());
            }),
        },
        Key {
            name: "early_stopping_threshold",
            values: "0 …",
            default: "0",
            meaning: "How much lower it must be for that.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.early_stopping_threshold = given.not_negative().unwrap_or(0.0);
                if config.early_stopping_threshold > 0.0 && !given.has("early_stopping_patience") {
                    given.problem("means nothing without early_stopping_patience");
                }
            }),
        },
        Key {
            name: "save_best",
            values: "true/false",
            default: "false",
            meaning: "Keep what had the lowest held-out loss as `<output_name>-best`, beside the last.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.save_best = given.boolean(false);
                looks(given, config.save_best);
            }),
        },
        Key {
            name: "save_state_every_n_steps",
            values: "1 …",
            default: "none",
            meaning: "Write the whole state of the run every so many steps, in the place of the one before: `<output_name>-state.safetensors`. Whatever happens, no more than the steps since then are lost.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_state_every_n_steps = given.count(1)),
        },
        Key {
            name: "save_state",
            values: "true/false",
            default: "true with save_state_every_n_steps",
            meaning: "Write the state when the run ends, is interrupted or fails. It holds 12 bytes for each trained number.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.save_state = given.boolean(config.save_state_every_n_steps.is_some())
            }),
        },
        Key {
            name: "resume",
            values: "true, false, auto, path",
            default: "false",
            meaning: "Go on from a state, exactly as if the run had never stopped: `true` from this `output_dir`'s, `auto` where there is one, or from a file or folder. The run may be made longer; what would make it another run is refused.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.resume = resume(given)),
        },
        Key {
            name: "log_with",
            values: "list of tensorboard, csv; all, none",
            default: "none; tensorboard with logging_dir",
            meaning: "Besides `metrics.jsonl`, which every run writes: files for TensorBoard with losses, learning rates, norms, memory and samples; a table in `metrics.csv`.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.log_with = trackers(given)),
        },
        Key {
            name: "logging_dir",
            values: "path",
            default: "`logs` in output_dir",
            meaning: "Where TensorBoard's files go, in a folder of the name `output_name`.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.logging_dir = given.text().map_or_else(|| config.output_dir.join("logs"), PathBuf::from);
            }),
        },
        Key {
            name: "sample_prompts",
            values: "list of texts, or a .txt file of a line each",
            default: "[]",
            meaning: "Prompts drawn before, during and after training, into one grid. For pictures a prompt may say more of its own, as in sd-scripts' files: `a cat --n blurry --w 512 --h 768 --d 7 --s 28 --l 6.5 --ss dpmpp_2m` (negative prompt, size, seed, steps, guidance, sampler).",
            memory: "Drawing needs the autoencoder again, for a moment.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.samples.prompts = prompts(given)),
        },
        Key {
            name: "sample_every_n_steps",
            values: "1 …",
            default: "none",
            meaning: "Also draw samples every so many steps.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.samples.every_n_steps = given.count(1);
                if config.samples.every_n_steps.is_some() && !given.has("sample_prompts") {
                    given.problem("there are no sample_prompts to draw");
                }
            }),
        },
        Key {
            name: "sample_every_minutes",
            values: "above 0",
            default: "none",
            meaning: "Also draw samples at the first step after so many minutes of training, and again after as many.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.sample_every_minutes = given.positive();
                if config.sample_every_minutes.is_some() && !given.has("sample_prompts") {
                    given.problem("there are no sample_prompts to draw");
                }
            }),
        },
        Key {
            name: "sample_seed",
            values: "0 …",
            default: "seed",
            meaning: "Seed of the samples' noise: the same in every row of the grid.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.samples.seed = given.seed().unwrap_or(config.seed)),
        },
        Key {
            name: "callbacks",
            values: "list of names",
            default: "[]",
            meaning: "Callbacks that your program registers.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.callbacks = given.texts().unwrap_or_default()),
        },
    ],
};

/// How samples that are pictures are drawn.
pub(super) static PICTURES: Group = Group {
    section: "Saving and looking",
    behind: Some("sample_seed"),
    keys: &[
        Key {
            name: "sample_negative_prompt",
            values: "text",
            default: "\"\"",
            meaning: "Negative prompt of the samples.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.samples.negative_prompt = given.text().unwrap_or_default()),
        },
        Key {
            name: "sample_steps",
            values: "1 … 1000",
            default: "20",
            meaning: "Steps of the sampler.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.samples.steps = given.count(1).unwrap_or(20);
                if config.samples.steps > 1000 {
                    given.problem(format!("expected 1 to 1000, found {}", config.samples.steps));
                }
            }),
        },
        Key {
            name: "sample_guidance_scale",
            values: "1 …",
            default: "the base's usual",
            meaning: "Classifier-free guidance; 7.5 for Stable Diffusion.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.samples.guidance_scale = given.number("a number from 1 on", |scale| scale >= 1.0);
            }),
        },
        Key {
            name: "sample_resolution",
            values: "\"W,H\" or a side",
            default: "max_resolution",
            meaning: "Size of the samples.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.samples.resolution = given.size().unwrap_or(config.max_resolution)
            }),
        },
    ],
};

/// Asks for what the lowest held-out loss cannot be told without.
fn looks(given: &mut Given<'_>, wanted: bool) {
    let held_out = given.has("validation_data_dir") || given.has("validation_split");
    if wanted && !(held_out && given.has("validate_every_n_steps")) {
        given.problem("needs validation_data_dir or validation_split, and validate_every_n_steps");
    }
}

/// What a run is logged for.
fn trackers(given: &mut Given<'_>) -> Vec<Tracker> {
    let Some(names) = given.texts() else {
        return if given.has("logging_dir") { vec![Tracker::TensorBoard] } else { Vec::new() };
    };
    let mut all = BTreeSet::new();
    for name in names {
        match name.as_str() {
            "tensorboard" => drop(all.insert(Tracker::TensorBoard)),
            "csv" => drop(all.insert(Tracker::Csv)),
            "all" => all.extend([Tracker::TensorBoard, Tracker::Csv]),
            "none" => {}
            other => given.problem(format!("`{other}` is not among tensorboard, csv, all, none")),
        }
    }
    all.into_iter().collect()
}

/// Prompts, each as it is given; one that names a text file stands for the file's lines.
fn prompts(given: &mut Given<'_>) -> Vec<String> {
    let mut all = Vec::new();
    for prompt in given.texts().unwrap_or_default() {
        let named = |ending: &str| Path::new(&prompt).extension().is_some_and(|own| own.eq_ignore_ascii_case(ending));
        let is_file = named("txt");
        // sd-scripts reads such files of prompts; here one would be drawn by its name.
        if ["json", "toml", "yaml", "yml"].into_iter().any(named) && !prompt.contains(char::is_whitespace) {
            given.problem(format!("{prompt} is not read; expected prompts, or a .txt with one in each line"));
            continue;
        }
        match PromptLine::lines_of(Path::new(&prompt)) {
            _ if !is_file => all.push(prompt),
            Ok(lines) if lines.is_empty() => given.problem(format!("{prompt} holds no prompts")),
            Ok(lines) => all.extend(lines),
            Err(error) => given.problem(error.to_string()),
        }
    }
    for sampler in all.iter().filter_map(|prompt| PromptLine::parse(prompt).sampler) {
        if let Err(error) = sampler_named(&sampler) {
            given.problem(error.to_string());
        }
    }
    all
}

fn resume(given: &mut Given<'_>) -> Resume {
    match given.word().as_deref() {
        None | Some("false") => Resume::No,
        Some("true") => Resume::Yes,
        Some("auto") => Resume::Auto,
        Some("") => {
            given.problem("expected true, false, auto or a path");
            Resume::No
        }
        Some(path) => Resume::From(path.into()),
    }
}
