//! What is written along the way, going on from it, samples and validation.

use std::path::PathBuf;

use super::{Given, Group, Key, Reads, Resumed};
use crate::config::Resume;

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
            name: "save_every_n_epochs",
            values: "1 …",
            default: "none",
            meaning: "Also save the LoRA every so many epochs.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_every_n_epochs = given.count(1)),
        },
        Key {
            name: "validation_data_dir",
            values: "path",
            default: "none",
            meaning: "Pictures that are not trained on: their loss, with the same noise at each look, is told before and after training and written to `validation.jsonl`.",
            memory: "The autoencoder again, for a moment.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.validation_data_dir = given.text().map(PathBuf::from)),
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
            name: "sample_prompts",
            values: "list of texts",
            default: "[]",
            meaning: "Prompts drawn before, during and after training, into one grid.",
            memory: "Drawing needs the autoencoder again, for a moment.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.samples.prompts = given.texts().unwrap_or_default()),
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
            default: "7.5",
            meaning: "Classifier-free guidance.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| {
                config.samples.guidance_scale = given.number("a number from 1 on", |scale| scale >= 1.0).unwrap_or(7.5)
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
