//! How it is trained: learning rates, the optimiser and its numbers, batches, the length of the run.

use std::collections::BTreeMap;

use super::{Given, Group, Key, Reads, Resumed, Setting, shown};
use crate::config::{LrScheduler, RunLength, TrainConfig};

/// `epochs` and `max_train_steps` are two ways to say one thing.
const LENGTH_OF_THE_RUN: Resumed = Resumed::FreeAs("length of the run", |config| shown(&config.length));

/// How the learning rate goes, by the names that trainers have for it.
const SCHEDULES: &[(&str, LrScheduler)] = &[
    ("constant", LrScheduler::Constant),
    ("constant_with_warmup", LrScheduler::Constant),
    ("linear", LrScheduler::Linear),
    ("cosine", LrScheduler::Cosine),
    ("cosine_with_restarts", LrScheduler::CosineWithRestarts),
    ("polynomial", LrScheduler::Polynomial),
    ("rex", LrScheduler::Rex),
    ("inverse_sqrt", LrScheduler::InverseSqrt),
    ("warmup_stable_decay", LrScheduler::Cosine),
];

/// The learning rate as the state of a run records it: with those of some layers, where there are such.
fn learning_rate(config: &TrainConfig) -> String {
    let all = shown(&config.learning_rate);
    match config.learning_rate_pattern.is_empty() {
        true => all,
        false => format!("{all} ({:?})", config.learning_rate_pattern),
    }
}

/// A schedule as the state of a run records it: its numbers with it, where they are not the usual ones.
fn schedule(config: &TrainConfig) -> String {
    let kind = shown(&config.lr_scheduler);
    let numbers = [
        (config.lr_scheduler_num_cycles != 1).then(|| format!("cycles {}", config.lr_scheduler_num_cycles)),
        (config.lr_scheduler_power != 1.0).then(|| format!("power {}", config.lr_scheduler_power)),
        (config.lr_min_ratio != 0.0).then(|| format!("min ratio {}", config.lr_min_ratio)),
        config.lr_decay_steps.map(|steps| format!("decay over {steps} steps")),
    ];
    let numbers: Vec<String> = numbers.into_iter().flatten().collect();
    if numbers.is_empty() { kind } else { format!("{kind} ({})", numbers.join(", ")) }
}

/// The keys, in the order of the reference.
pub(super) static KEYS: Group = Group {
    section: "Optimisation",
    behind: None,
    keys: &[
        Key {
            name: "learning_rate",
            values: "above 0",
            default: "1e-4; lion 3e-5, prodigy 1",
            meaning: "Learning rate.",
            memory: "",
            resumed: Resumed::Free(learning_rate),
            reads: Reads::Run(|given, config| {
                if let Some(rate) = given.positive() {
                    config.learning_rate = rate;
                }
            }),
        },
        Key {
            name: "optimizer",
            values: "adamw, adamw8bit, adafactor, lion, prodigy, adamw_schedulefree, came, muon, stable_adamw, or one that your program registers",
            default: "\"adamw\"",
            meaning: "Optimiser; what each is for and what it takes: docs/optimisers.md.",
            memory: "Bytes per trained number: adamw, stable_adamw and adamw_schedulefree 8, adamw8bit 2, lion, came and muon 4, adafactor near 0, prodigy 12 to 16.",
            resumed: Resumed::Fixed(|config| config.optimizer.clone()),
            reads: Reads::Run(|given, config| {
                let name = given.text().unwrap_or_else(|| "adamw".into());
                config.optimizer = given.optimisers().canonical(&name);
                if !given.has("learning_rate") {
                    config.learning_rate = given.optimisers().usual_learning_rate(&config.optimizer);
                }
            }),
        },
        Key {
            name: "optimizer_args",
            values: "table of numbers by name, or list of texts \"name=value\"",
            default: "the optimiser's own",
            meaning: "Numbers of the optimiser, named as elsewhere: `{ d_coef = 2.0, weight_decay = 0.01 }`.",
            memory: "",
            resumed: Resumed::Free(|config| shown(&config.optimizer_args)),
            reads: Reads::Run(|given, config| config.optimizer_args = given.number_lists()),
        },
        Key {
            name: "adam_betas",
            values: "two numbers",
            default: "the optimiser's own; adamw: [0.9, 0.999]",
            meaning: "Short for `betas` of `optimizer_args`: averaging of gradients and their squares.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| {
                let values = given.pair().map(|(first, second)| vec![first, second]);
                argument("betas", values, given, config);
            }),
        },
        Key {
            name: "adam_eps",
            values: "above 0",
            default: "the optimiser's own; adamw: 1e-8",
            meaning: "Short for `eps` of `optimizer_args`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| {
                let values = given.not_negative().map(|value| vec![value]);
                argument("eps", values, given, config);
            }),
        },
        Key {
            name: "loraplus_lr_ratio",
            values: "above 0",
            default: "1",
            meaning: "Learning rate of the up-projections relative to the rest (LoRA+; 16 is usual).",
            memory: "",
            resumed: Resumed::Free(|config| shown(&config.loraplus_lr_ratio)),
            reads: Reads::Adapter(|given, config| config.loraplus_lr_ratio = given.positive().unwrap_or(1.0)),
        },
        Key {
            name: "learning_rate_pattern",
            values: "table",
            default: "{}",
            meaning: "Other learning rates for some adapted layers, by layer name, glob or `re:` expression; of several that match, the longest counts. 0 leaves a layer as it is. The schedule and loraplus_lr_ratio hold for them too.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Adapter(|given, config| config.learning_rate_pattern = rates(given)),
        },
        Key {
            name: "scale_weight_norms",
            values: "above 0",
            default: "none",
            meaning: "Limit of the Frobenius norm of a layer's update (1 is usual): after each step both factors of a layer beyond it are scaled down to it. `metrics.jsonl` has how many were, as `scaled_layers`. For variant = \"lora\".",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("scale_weight_norms")),
            reads: Reads::Extra(|given| given.positive().map_or(Setting::Nothing, Setting::Number)),
        },
        Key {
            name: "weight_decay",
            values: "0 …",
            default: "the optimiser's own; adamw: 0.01",
            meaning: "Short for `weight_decay` of `optimizer_args`: decoupled weight decay.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| {
                let values = given.not_negative().map(|value| vec![value]);
                argument("weight_decay", values, given, config);
            }),
        },
        Key {
            name: "lr_scheduler",
            values: "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, rex, inverse_sqrt, warmup_stable_decay",
            default: "\"constant\"",
            meaning: "How the learning rate goes over the run; every one begins with the warm-up, if there is one. `warmup_stable_decay` stays, and falls along half a cosine over the last `lr_decay_steps`.",
            memory: "",
            resumed: Resumed::Free(schedule),
            reads: Reads::Run(|given, config| {
                config.lr_scheduler = given.choice(SCHEDULES).unwrap_or_default();
                if given.text().as_deref() == Some("warmup_stable_decay") && !given.has("lr_decay_steps") {
                    given.problem("needs lr_decay_steps");
                }
            }),
        },
        Key {
            name: "lr_scheduler_num_cycles",
            values: "1 …",
            default: "1",
            meaning: "How often `cosine_with_restarts` falls from the top.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| config.lr_scheduler_num_cycles = given.count(1).unwrap_or(1)),
        },
        Key {
            name: "lr_scheduler_power",
            values: "above 0",
            default: "1",
            meaning: "The power of `polynomial`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| config.lr_scheduler_power = given.positive().unwrap_or(1.0)),
        },
        Key {
            name: "lr_min_ratio",
            values: "0 … 1",
            default: "0",
            meaning: "The share of the learning rate that a schedule ends at instead of 0; not of `constant` and `inverse_sqrt`.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| config.lr_min_ratio = given.share().unwrap_or(0.0)),
        },
        Key {
            name: "lr_decay_steps",
            values: "1 …",
            default: "none",
            meaning: "The learning rate stays, and falls over so many steps at the end of the run alone.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Run(|given, config| config.lr_decay_steps = given.count(1)),
        },
        Key {
            name: "lr_warmup_steps",
            values: "steps, or a share below 1",
            default: "0",
            meaning: "Steps over which the learning rate rises from 0.",
            memory: "",
            resumed: Resumed::Free(|config| shown(&config.lr_warmup)),
            reads: Reads::Run(|given, config| config.lr_warmup = given.steps_or_share().unwrap_or_default()),
        },
        Key {
            name: "ema_decay",
            values: "0 … below 1",
            default: "0",
            meaning: "Decay of a running average of the trained numbers, which is then what is saved and drawn; 0 for none. 0.999 is usual.",
            memory: "4 bytes per trained number.",
            resumed: Resumed::Fixed(|config| shown(&config.ema_decay)),
            reads: Reads::Run(|given, config| config.ema_decay = given.probability().unwrap_or(0.0)),
        },
        Key {
            name: "max_grad_norm",
            values: "0 …",
            default: "1.0",
            meaning: "Limit of the gradient's norm; 0 for none.",
            memory: "",
            resumed: Resumed::Free(|config| shown(&config.max_grad_norm)),
            reads: Reads::Run(|given, config| config.max_grad_norm = given.not_negative().unwrap_or(1.0)),
        },
        Key {
            name: "batch_size",
            values: "1 …",
            default: "1",
            meaning: "Pictures at once.",
            memory: "The largest lever: activations grow with it.",
            resumed: Resumed::Fixed(|config| shown(&config.batch_size)),
            reads: Reads::Both(
                |given, config| config.batch_size = given.count_to(1, 65_536).unwrap_or(1),
                |given, dataset| dataset.options.batch_size = given.count_to(1, 65_536).unwrap_or(1),
            ),
        },
        Key {
            name: "gradient_accumulation_steps",
            values: "1 …",
            default: "1",
            meaning: "Micro-batches for one step; with batch_size 1 and 8 of these the update is that of batch_size 8.",
            memory: "None: this is how to have a large batch on a small card.",
            resumed: Resumed::Fixed(|config| shown(&config.gradient_accumulation_steps)),
            reads: Reads::Run(|given, config| {
                config.gradient_accumulation_steps = given.count_to(1, 1_000_000).unwrap_or(1)
            }),
        },
        Key {
            name: "epochs",
            values: "1 …",
            default: "10",
            meaning: "Times through all pictures; not together with max_train_steps.",
            memory: "",
            resumed: LENGTH_OF_THE_RUN,
            reads: Reads::Run(|given, config| {
                config.length = given.count(1).map(RunLength::Epochs).unwrap_or_default()
            }),
        },
        Key {
            name: "max_train_steps",
            values: "1 …",
            default: "by epochs; 1000 with sliders",
            meaning: "Optimiser steps.",
            memory: "",
            resumed: LENGTH_OF_THE_RUN,
            reads: Reads::Run(|given, config| match given.count(1) {
                Some(_) if given.has("epochs") => given.problem("give epochs or max_train_steps, not both"),
                Some(steps) => config.length = RunLength::Steps(steps),
                None => {}
            }),
        },
        Key {
            name: "repeats",
            values: "1 …",
            default: "1",
            meaning: "Visits of each picture in an epoch.",
            memory: "",
            resumed: Resumed::Elsewhere,
            reads: Reads::Dataset(|given, dataset| {
                dataset.options.scan.repeats = given.count_to(1, 1_000_000).unwrap_or(1)
            }),
        },
        Key {
            name: "seed",
            values: "0 …",
            default: "42",
            meaning: "All randomness follows from it.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.seed)),
            reads: Reads::Run(|given, config| config.seed = given.seed().unwrap_or(42)),
        },
    ],
};

/// A number of the optimiser that has a key of its own. Whether an optimiser takes it is known once the optimiser is
/// made.
fn argument(name: &str, values: Option<Vec<f64>>, given: &mut Given<'_>, config: &mut TrainConfig) {
    let Some(values) = values else { return };
    if config.optimizer_args.insert(name.to_owned(), values).is_some() {
        given.problem(format!("optimizer_args has `{name}` too; give one of them"));
    }
}

/// Learning rates by pattern.
fn rates(given: &mut Given<'_>) -> BTreeMap<String, f64> {
    let rates = given.numbers();
    for (entry, rate) in &rates {
        if !(rate.is_finite() && *rate >= 0.0) {
            given.problem(format!("`{entry}`: {rate} is no learning rate; expected a number from 0 on"));
        }
    }
    rates
}
