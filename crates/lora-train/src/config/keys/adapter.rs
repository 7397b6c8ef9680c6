//! The adapter: what is trained of the base, and how.

use std::collections::BTreeMap;

use lora_core::DType;
use lora_core::target::Targets;

use super::memory::PRECISIONS;
use super::{Given, Group, Key, Reads, Resumed, shown};
use crate::config::TrainMode;

/// The keys, in the order of the reference.
pub(super) static KEYS: Group = Group {
    section: "Adapter",
    behind: None,
    keys: &[
        Key {
            name: "train",
            values: "lora, full",
            default: "\"lora\"",
            meaning: "`lora` trains an adapter; `full` trains all weights of the networks and writes a whole checkpoint (one file in the original layout), where the other keys of this group mean nothing but `train_unet`, `train_text_encoder` and `save_precision`.",
            memory: "`full` holds 16 bytes for each weight: value, gradient and two averages in fp32.",
            resumed: Resumed::Fixed(|config| shown(&config.train)),
            reads: Reads::Run(|given, config| {
                config.train =
                    given.choice(&[("lora", TrainMode::Adapter), ("full", TrainMode::Full)]).unwrap_or_default()
            }),
        },
        Key {
            name: "lora_rank",
            values: "1 …",
            default: "16",
            meaning: "Rank of the update.",
            memory: "Small: SD 1.5 with all default targets holds 9.4 MB of weights, gradients and optimiser state per unit of rank.",
            resumed: Resumed::Fixed(|config| shown(&config.lora_rank)),
            reads: Reads::Adapter(|given, config| config.lora_rank = given.count_to(1, MOST_RANK).unwrap_or(16)),
        },
        Key {
            name: "lora_alpha",
            values: "above 0",
            default: "lora_rank",
            meaning: "The update is scaled by alpha / rank.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.lora_alpha)),
            reads: Reads::Adapter(|given, config| {
                config.lora_alpha = given.positive().unwrap_or(config.lora_rank as f64)
            }),
        },
        Key {
            name: "use_rslora",
            values: "true/false",
            default: "false",
            meaning: "Scale by alpha / √rank instead (rsLoRA); the file holds alpha · √rank, so that every tool applies the same.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.use_rslora)),
            reads: Reads::Adapter(|given, config| config.use_rslora = given.boolean(false)),
        },
        Key {
            name: "rank_pattern",
            values: "table",
            default: "{}",
            meaning: "Other ranks for some layers, by layer name, glob or `re:` expression; of several that match, the longest counts.",
            memory: "As lora_rank.",
            resumed: Resumed::Fixed(|config| shown(&config.rank_pattern)),
            reads: Reads::Adapter(|given, config| config.rank_pattern = ranks(given)),
        },
        Key {
            name: "alpha_pattern",
            values: "table",
            default: "{}",
            meaning: "Other alphas for some layers, in the same way.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.alpha_pattern)),
            reads: Reads::Adapter(|given, config| config.alpha_pattern = alphas(given)),
        },
        Key {
            name: "lora_dropout",
            values: "0 … below 1",
            default: "0",
            meaning: "Dropout between the two factors.",
            memory: "A mask per module.",
            resumed: Resumed::Fixed(|config| shown(&config.lora_dropout)),
            reads: Reads::Adapter(|given, config| config.lora_dropout = given.probability().unwrap_or(0.0)),
        },
        Key {
            name: "rank_dropout",
            values: "0 … below 1",
            default: "0",
            meaning: "Dropout of whole ranks.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.rank_dropout)),
            reads: Reads::Adapter(|given, config| config.rank_dropout = given.probability().unwrap_or(0.0)),
        },
        Key {
            name: "module_dropout",
            values: "0 … below 1",
            default: "0",
            meaning: "Dropout of whole modules.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.module_dropout)),
            reads: Reads::Adapter(|given, config| config.module_dropout = given.probability().unwrap_or(0.0)),
        },
        Key {
            name: "variant",
            values: "name",
            default: "\"lora\"",
            meaning: "Adapter variant: `lora`, `dora`, `pissa`, `pissa-fast`, `olora`, `loha`, `lokr`, `oft`, `boft`, `ia3`, `vera`, `glora`, `full`, the other tools' conventions of them (`lycoris-dora`, `lycoris-dora-loha`, `lycoris-dora-lokr`, `peft-oft`, `peft-oft-neumann`, `peft-boft`, `lycoris-ia3`, `peft-glora`), PEFT's `peft-hra`, or one that your program registers.",
            memory: "All but `lora`, `dora`, `pissa`, `olora`, `vera`, `ia3` and `lokr` on linear layers form the whole update of a layer.",
            resumed: Resumed::Fixed(|config| config.variant.clone()),
            reads: Reads::Adapter(|given, config| config.variant = given.text().unwrap_or_else(|| "lora".into())),
        },
        Key {
            name: "variant_options",
            values: "table",
            default: "{}",
            meaning: "The variant's own numbers and switches, such as `factor` of `lokr` or `tucker` of `loha`.",
            memory: "",
            resumed: Resumed::Fixed(|config| shown(&config.variant_options)),
            reads: Reads::Adapter(|given, config| config.variant_options = given.numbers()),
        },
        Key {
            name: "target_modules",
            values: "preset, name or list",
            default: "\"attention-mlp\"",
            meaning: "Layers to adapt: `attention`, `attention-mlp` (what sd-scripts adapts), `all-linear` (PEFT's), `all-conv`, layer names (`q_proj` means the U-Net's `to_q` too), globs, or `re:` expressions.",
            memory: "More layers, more of the above, and more activations kept.",
            resumed: Resumed::Fixed(|config| shown(&config.target_modules)),
            reads: Reads::Adapter(|given, config| config.target_modules = target_modules(given)),
        },
        Key {
            name: "save_precision",
            values: "fp32, fp16, bf16",
            default: "\"fp16\"",
            meaning: "Number type of the written LoRA. Trained weights are always kept in fp32.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.save_precision = given.choice(PRECISIONS).unwrap_or(DType::F16)),
        },
    ],
};

/// Far beyond any layer, and what LyCORIS' users write for all of one.
const MOST_RANK: u64 = 1_000_000;

fn ranks(given: &mut Given<'_>) -> BTreeMap<String, f64> {
    let ranks = given.numbers();
    for (name, &rank) in &ranks {
        if rank.fract() != 0.0 || !(1.0..=MOST_RANK as f64).contains(&rank) {
            given.problem(format!("`{name}`: expected a whole number from 1 to {MOST_RANK}, found {rank}"));
        }
    }
    ranks
}

fn alphas(given: &mut Given<'_>) -> BTreeMap<String, f64> {
    let alphas = given.numbers();
    for (name, &alpha) in alphas.iter().filter(|(_, alpha)| **alpha <= 0.0) {
        given.problem(format!("`{name}`: expected a number above 0, found {alpha}"));
    }
    alphas
}

fn target_modules(given: &mut Given<'_>) -> Vec<String> {
    let targets = given.texts().unwrap_or_else(|| vec!["attention-mlp".into()]);
    if let Err(error) = Targets::parse(&targets) {
        given.problem(error.to_string());
    }
    targets
}
