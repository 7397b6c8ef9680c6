//! Keys of texts and of language models: how records become rows of tokens, what of them is learned, and how answers
//! are sampled. Which files there are is in `keys/data.rs`.

use super::{Given, Group, Key, Reads, Resumed, Setting};

/// The keys of a language model.
pub static KEYS: &[&Group] = &[&WHOLE, &ATTENTION, &LOSS, &SAMPLES];

/// What is trained beside the adapter.
static WHOLE: Group = Group {
    section: "Adapter",
    behind: Some("target_modules"),
    keys: &[
        Key {
            name: "modules_to_save",
            values: "list of names",
            default: "[]",
            meaning: "Layers of a language model whose weights are trained themselves and saved whole, as PEFT does: linear layers, norms, `embed_tokens`, `lm_head`. They carry no adapter.",
            memory: "Of each layer the weight in fp32, its gradient and the optimiser's numbers, beside the base's.",
            resumed: Resumed::Fixed(|config| config.extra.shown("modules_to_save")),
            reads: Reads::Extra(|given| Setting::Texts(given.texts().unwrap_or_default())),
        },
        Key {
            name: "target_parameters",
            values: "list of names",
            default: "[]",
            meaning: "Weights of a mixture's experts that carry an adapter with factors for each expert, as in PEFT: `mlp.experts.gate_up_proj`, `mlp.experts.down_proj`. Plain LoRA without dropout.",
            memory: "Factors of all experts, which are many: rank × (inputs + outputs) × experts a layer.",
            resumed: Resumed::FixedSince("[]", |config| config.extra.shown("target_parameters")),
            reads: Reads::Extra(|given| Setting::Texts(given.texts().unwrap_or_default())),
        },
        Key {
            name: "trainable_token_indices",
            values: "list of token numbers",
            default: "[]",
            meaning: "Tokens of a language model whose rows of `embed_tokens` are trained themselves and saved, as PEFT does; of a tied model the head reads them too. For tokens that are new, where a whole embedding would be more than is needed.",
            memory: "Of each token a row in fp32, its gradient and the optimiser's numbers.",
            resumed: Resumed::FixedSince("[]", |config| config.extra.shown("trainable_token_indices")),
            reads: Reads::Extra(|given| {
                let tokens = given.whole_numbers("token numbers, each once and below 16777216", |all| {
                    let distinct: std::collections::BTreeSet<_> = all.iter().collect();
                    distinct.len() == all.len() && all.iter().all(|token| *token < 1 << 24)
                });
                Setting::Texts(tokens.unwrap_or_default().iter().map(usize::to_string).collect())
            }),
        },
        Key {
            name: "bias",
            values: "none, all, lora_only",
            default: "\"none\"",
            meaning: "Which biases of a language model's linear layers are trained themselves: none, all, or those of layers that are adapted, as in PEFT.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("bias")),
            reads: Reads::Extra(|given| {
                let known = ["none", "all", "lora_only"].map(|name| (name, name));
                Setting::Text(given.choice(&known).unwrap_or("none").to_owned())
            }),
        },
    ],
};

/// How records become rows.
pub static TEXTS: Group = Group {
    section: "Texts",
    behind: None,
    keys: &[
        Key {
            name: "max_seq_length",
            values: "16 …",
            default: "2048",
            meaning: "Tokens of a row at most; of a preference pair those of both answers, each with its prompt. What is longer is treated as `long_documents` says.",
            memory: "Activations grow with it; attention's work with its square.",
            resumed: Resumed::Fixed(|config| config.extra.shown("max_seq_length")),
            reads: Reads::Extra(|given| {
                let length = given.count(1).unwrap_or(2048);
                if !(16..=1 << 20).contains(&length) {
                    given.problem(format!("expected 16 to {}, found {length}", 1 << 20));
                }
                Setting::Whole(length)
            }),
        },
        Key {
            name: "packing",
            values: "true/false",
            default: "false",
            meaning: "Fill rows with several documents, up to `max_seq_length`. Each attends to itself alone and counts its positions from 0, so that the loss is that of single rows; fewer tokens are padding.",
            memory: "Every row is as long as the longest.",
            resumed: Resumed::Fixed(|config| config.extra.shown("packing")),
            reads: Reads::Extra(|given| Setting::Switch(given.boolean(false))),
        },
        Key {
            name: "train_on_inputs",
            values: "true/false",
            default: "false",
            meaning: "Learn what the user and the system say, too. By default only answers are learned, with the token that ends them.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("train_on_inputs")),
            reads: Reads::Extra(|given| Setting::Switch(given.boolean(false))),
        },
        Key {
            name: "chat_template",
            values: "a name or a path",
            default: "the base's own",
            meaning: "How conversations are laid out: the name of a known template, or a file with one (Jinja).",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("chat_template")),
            reads: Reads::Extra(|given| given.text().map_or(Setting::Nothing, Setting::Text)),
        },
        Key {
            name: "system_prompt",
            values: "text",
            default: "none",
            meaning: "What the system says at the beginning of conversations in which it says nothing.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("system_prompt")),
            reads: Reads::Extra(|given| given.text().map_or(Setting::Nothing, Setting::Text)),
        },
        Key {
            name: "long_documents",
            values: "split, truncate, skip, error",
            default: "\"split\"",
            meaning: "What becomes of documents longer than `max_seq_length`: `split` makes several rows of one, `truncate` leaves its end out, `skip` leaves it out, `error` ends the run. Whatever is left out is counted and named.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("long_documents")),
            reads: Reads::Extra(|given| {
                let known = ["split", "truncate", "skip", "error"].map(|name| (name, name));
                Setting::Text(given.choice(&known).unwrap_or("split").to_owned())
            }),
        },
        Key {
            name: "overlap",
            values: "0 …",
            default: "0",
            meaning: "Tokens that the rows of a split document share: the second row sees them as context and learns only what comes after.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("overlap")),
            reads: Reads::Extra(|given| Setting::Whole(given.count(0).unwrap_or(0))),
        },
    ],
};

/// How far tokens see.
static ATTENTION: Group = Group {
    section: "Texts",
    behind: None,
    keys: &[
        Key {
            name: "sliding_window",
            values: "16 …",
            default: "the base's own",
            meaning: "Tokens that a token sees at most, itself among them, in layers of the base that see more: for documents so long that attention to all of them takes too much time. Places of tokens stay what they are.",
            memory: "Attention's work and its masks grow with the tokens, and not with their square.",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("sliding_window")),
            reads: Reads::Extra(|given| match given.count(16) {
                Some(window) => Setting::Whole(window),
                None => Setting::Nothing,
            }),
        },
        Key {
            name: "attention_sink_size",
            values: "0 …",
            default: "4 with sliding_window",
            meaning: "The first tokens of each document, which all its tokens see beside their window (attention sinks, as in StreamingLLM).",
            memory: "",
            resumed: Resumed::FixedSince("none", |config| config.extra.shown("attention_sink_size")),
            reads: Reads::Extra(|given| given.count(0).map_or(Setting::Nothing, Setting::Whole)),
        },
    ],
};

/// What is made of the loss.
static LOSS: Group = Group {
    section: "Texts",
    behind: None,
    keys: &[
        Key {
            name: "objective",
            values: "sft, dpo, orpo",
            default: "\"sft\"",
            meaning: "What is learned: `sft` the texts themselves; of preference pairs (`chosen`, `rejected`) `dpo` to prefer the better answer more than the base does, `orpo` the better answer and its odds against the worse one.",
            memory: "A pair is one row. `dpo` runs each row through the base without the adapter first, which keeps nothing.",
            resumed: Resumed::Fixed(|config| config.extra.shown("objective")),
            reads: Reads::Extra(|given| {
                let known = ["sft", "dpo", "orpo"].map(|name| (name, name));
                Setting::Text(given.choice(&known).unwrap_or("sft").to_owned())
            }),
        },
        Key {
            name: "dpo_beta",
            values: "above 0",
            default: "0.1 with dpo",
            meaning: "How closely `dpo` holds to the base: the factor on log-probabilities against the base's.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("dpo_beta")),
            reads: Reads::Extra(|given| given.positive().map_or(Setting::Nothing, Setting::Number)),
        },
        Key {
            name: "orpo_lambda",
            values: "above 0",
            default: "0.1 with orpo",
            meaning: "How much the odds ratio counts in `orpo`, beside the loss of the better answer.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("orpo_lambda")),
            reads: Reads::Extra(|given| given.positive().map_or(Setting::Nothing, Setting::Number)),
        },
        Key {
            name: "label_smoothing",
            values: "0 … below 1",
            default: "0",
            meaning: "Share of each target that goes to all other tokens; with `objective = \"dpo\"` the share of pairs that are taken to be the wrong way round.",
            memory: "",
            resumed: Resumed::Fixed(|config| config.extra.shown("label_smoothing")),
            reads: Reads::Extra(|given| Setting::Number(given.probability().unwrap_or(0.0))),
        },
        Key {
            name: "neftune_noise_alpha",
            values: "above 0",
            default: "none",
            meaning: "Noise on the embeddings while training (NEFTune); 5 in the paper.",
            memory: "A number for each element of the embedded rows.",
            resumed: Resumed::Fixed(|config| config.extra.shown("neftune_noise_alpha")),
            reads: Reads::Extra(|given| given.positive().map_or(Setting::Nothing, Setting::Number)),
        },
    ],
};

/// How answers are sampled.
static SAMPLES: Group = Group {
    section: "Saving and looking",
    behind: Some("sample_every_n_steps"),
    keys: &[
        Key {
            name: "sample_max_new_tokens",
            values: "1 …",
            default: "128",
            meaning: "Tokens of a sampled answer at most.",
            memory: "Keys and values of its tokens, while it is sampled.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Extra(|given| Setting::Whole(within(given, 128, 1 << 16))),
        },
        Key {
            name: "sample_temperature",
            values: "0 …",
            default: "0",
            meaning: "Temperature of sampled answers; 0 takes the likeliest token.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Extra(|given| Setting::Number(given.not_negative().unwrap_or(0.0))),
        },
        Key {
            name: "sample_top_p",
            values: "above 0 … 1",
            default: "1",
            meaning: "Of sampled answers: the likeliest tokens that together have this probability.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Extra(|given| {
                Setting::Number(given.number("a number above 0, up to 1", |p| p > 0.0 && p <= 1.0).unwrap_or(1.0))
            }),
        },
    ],
};

fn within(given: &mut Given<'_>, default: usize, most: usize) -> usize {
    let count = given.count(1).unwrap_or(default);
    if count > most {
        given.problem(format!("expected 1 to {most}, found {count}"));
    }
    count
}
