//! Keys of prior preservation without pictures: what the base answers without its adapter is kept. Regularisation pictures are
//! in `keys/data.rs`.

use super::{Group, Key, Reads, Resumed, shown};

/// What a further answer of the network costs.
const MEMORY: &str =
    "Activations of a second pass (none outside masks: that is the first), and a pass of the base without gradients.";

/// All of them.
pub(super) static PRIOR: Group = Group {
    section: "Pictures and captions",
    behind: Some("masked_loss"),
    keys: &[
        Key {
            name: "prior_prompt",
            values: "text",
            default: "none",
            meaning: "What the adapter is not to change: the class that the subject is of (`person`). For each caption with the class in the place of its `trigger_word`, or for the class alone where it has none, the base's own answer, adapter off, is a further target. Empty: the caption without the word. No pictures are needed.",
            memory: MEMORY,
            resumed: Resumed::FixedSince("none", |config| shown(&config.prior_prompt)),
            reads: Reads::Adapter(|given, config| config.prior_prompt = given.text()),
        },
        Key {
            name: "prior_prompt_weight",
            values: "0 …",
            default: "1",
            meaning: "How much that counts beside the loss of the pictures.",
            memory: "",
            resumed: Resumed::FixedSince("1.0", |config| shown(&config.prior_prompt_weight)),
            reads: Reads::Adapter(|given, config| config.prior_prompt_weight = given.not_negative().unwrap_or(1.0)),
        },
        Key {
            name: "prior_blank_weight",
            values: "0 …",
            default: "0",
            meaning: "The same for the empty caption: how much the base's own answer to it counts.",
            memory: MEMORY,
            resumed: Resumed::FixedSince("0.0", |config| shown(&config.prior_blank_weight)),
            reads: Reads::Adapter(|given, config| config.prior_blank_weight = given.not_negative().unwrap_or(0.0)),
        },
        Key {
            name: "prior_mask_weight",
            values: "0 …",
            default: "0",
            meaning: "The same for a picture's own caption in the places that its mask leaves out (`masked_loss`).",
            memory: "",
            resumed: Resumed::FixedSince("0.0", |config| shown(&config.prior_mask_weight)),
            reads: Reads::Adapter(|given, config| config.prior_mask_weight = given.not_negative().unwrap_or(0.0)),
        },
    ],
};
