//! The commands that need libtorch or the configuration of a run, which the program `lora-trainer` has, and the one that needs it
//! where a configuration is named.

/// The file name of that program, but for what the system puts behind names of programs.
pub const PROGRAM: &str = "lora-trainer";

/// Names its file, over the folder of `lora` and `PATH`.
pub const VARIABLE: &str = "LORA_TRAINER";

/// A command, and what a list of commands says of it.
#[derive(Debug, Clone, Copy)]
pub struct Command {
    /// As it stands on the command line.
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// Whether it computes for long, so that it matters how its threads wait for each other.
    pub computes: bool,
}

/// Those that are always done there, in the order of the list.
pub const COMMANDS: [Command; 7] = [TRAIN, PLAN, KEYS, SAMPLE, GENERATE, EVALUATE, DOCTOR];

/// `lora train`.
pub const TRAIN: Command = Command {
    name: "train",
    about: "Train a LoRA from a configuration file, of this program or of another trainer",
    computes: true,
};
/// `lora plan`.
pub const PLAN: Command = Command {
    name: "plan",
    about: "Predict the memory of a run by part, without running it, and what would make it fit",
    computes: false,
};
/// `lora keys`.
pub const KEYS: Command =
    Command { name: "keys", about: "Print the reference of all configuration keys (Markdown)", computes: false };
/// `lora dataset`, where a configuration is named.
pub const DATASET: Command = Command {
    name: "dataset",
    about: "Look at a dataset before training: sizes, crops, captions, duplicates, blur, and what to do about them",
    computes: false,
};
/// `lora sample`.
pub const SAMPLE: Command =
    Command { name: "sample", about: "Draw pictures with adapters, or without beside with", computes: true };
/// `lora generate`.
pub const GENERATE: Command =
    Command { name: "generate", about: "Let a language model answer, with adapters or without", computes: true };
/// `lora evaluate`.
pub const EVALUATE: Command = Command {
    name: "evaluate",
    about: "Loss and perplexity of a language model on texts, with adapters or without",
    computes: true,
};
/// `lora doctor`.
pub const DOCTOR: Command =
    Command { name: "doctor", about: "Show which libtorch and devices are used, and what is missing", computes: false };
