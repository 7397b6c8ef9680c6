//! What other programs would make of an adapter file, key by key: loaded, ignored or refused, and what cures it.
//!
//! Pure functions over what a file shows; nothing is read here. A consumer's rules stand in its own file, each with the
//! version it follows; rules that were read from a program's code and not seen running are marked "read, not run".
//!
//! | here | what |
//! |---|---|
//! | `inventory` | what a file shows, and which base model it speaks of |
//! | `layers` | the layers of Stable Diffusion models and their names in the layouts |
//! | `builder` | collecting fates and problems into an opinion |
//! | `webui`, `comfyui`, `diffusers`, `sd_scripts` | consumers of image adapters |
//! | `transformers`, `conversions` | the same four on adapters for transformers that denoise by flow matching; diffusers' conversions of these |
//! | `folder` | names and config of a PEFT folder, for the four that read one |
//! | `peft`, `vllm`, `llama_cpp`, `mistral_rs` | consumers of PEFT folders |

mod builder;
mod comfyui;
mod conversions;
mod diffusers;
mod folder;
mod inventory;
mod layers;
mod llama_cpp;
mod mistral_rs;
mod peft;
#[cfg(test)]
mod samples;
mod sd_scripts;
mod transformers;
mod vllm;
mod webui;

pub use inventory::Inventory;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};

use crate::family::{self, Family, language};

/// A program that loads adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Consumer {
    /// AUTOMATIC1111's WebUI.
    #[serde(rename = "webui")]
    WebUi,
    /// ComfyUI; the Forge family loads with the same rules.
    #[serde(rename = "comfyui")]
    ComfyUi,
    /// diffusers' `load_lora_weights`.
    Diffusers,
    /// kohya's sd-scripts, `networks.lora`.
    SdScripts,
    /// Hugging Face PEFT.
    Peft,
    /// vLLM.
    Vllm,
    /// llama.cpp's converter to GGUF and its runtime.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
    /// mistral.rs.
    #[serde(rename = "mistral.rs")]
    MistralRs,
}

impl Consumer {
    /// All of them, in the order of [`opinions`].
    pub const ALL: [Consumer; 8] = [
        Consumer::WebUi,
        Consumer::ComfyUi,
        Consumer::Diffusers,
        Consumer::SdScripts,
        Consumer::Peft,
        Consumer::Vllm,
        Consumer::LlamaCpp,
        Consumer::MistralRs,
    ];

    /// The name that its users know.
    pub fn name(self) -> &'static str {
        match self {
            Consumer::WebUi => "WebUI",
            Consumer::ComfyUi => "ComfyUI",
            Consumer::Diffusers => "diffusers",
            Consumer::SdScripts => "sd-scripts",
            Consumer::Peft => "PEFT",
            Consumer::Vllm => "vLLM",
            Consumer::LlamaCpp => "llama.cpp",
            Consumer::MistralRs => "mistral.rs",
        }
    }

    /// The version whose rules these are.
    pub fn version(self) -> &'static str {
        match self {
            Consumer::WebUi => webui::VERSION,
            Consumer::ComfyUi => comfyui::VERSION,
            Consumer::Diffusers => diffusers::VERSION,
            Consumer::SdScripts => sd_scripts::VERSION,
            Consumer::Peft => peft::VERSION,
            Consumer::Vllm => vllm::VERSION,
            Consumer::LlamaCpp => llama_cpp::VERSION,
            Consumer::MistralRs => mistral_rs::VERSION,
        }
    }
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What becomes of one tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "fate", rename_all = "snake_case")]
pub enum Fate {
    /// It takes effect.
    Loaded,
    /// It has no effect; the rest may still load.
    Ignored {
        /// Why.
        reason: Cow<'static, str>,
    },
    /// It makes the whole load fail.
    Refused {
        /// Why.
        reason: Cow<'static, str>,
    },
}

/// What becomes of the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// Every tensor takes effect as it was trained.
    Loads,
    /// A part takes effect as it was trained, the rest not at all.
    LoadsPart,
    /// It loads, and the weights are others than the trained ones.
    LoadsWrong,
    /// Nothing takes effect, and there may be no message.
    NothingLoaded,
    /// The load fails with an error.
    Refuses,
    /// No rules are known here for adapters of this base model.
    Unknown,
}

/// What a problem does to the load, from harmless to fatal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The weights load as they were trained; worth knowing all the same.
    Note,
    /// Some tensors have no effect.
    Part,
    /// The weights are others than the trained ones.
    Wrong,
    /// The load fails.
    Fatal,
}

/// Something that keeps an adapter from loading as it was trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Problem {
    /// What it does to the load.
    pub effect: Effect,
    /// What is the matter.
    pub what: Cow<'static, str>,
    /// How many tensors it concerns; 0 where it is a matter of the config or of the whole file.
    pub keys: usize,
    /// The first few of them.
    pub examples: Vec<String>,
    /// What cures it, where something does.
    pub cure: Option<Cure>,
}

/// What makes a problem go away.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cure {
    /// Conversion to the kohya layout.
    ToKohya,
    /// Conversion to diffusers' layout.
    ToDiffusers,
    /// Conversion to a PEFT folder.
    ToPeft,
    /// Conversion to the PEFT folder that the strictest consumer takes.
    ToPortable,
    /// Turning the variant into plain LoRA.
    Flatten,
    /// Turning the variant into plain LoRA in a PEFT folder.
    FlattenToPeft,
    /// Merging into the base model.
    Merge,
    /// Lowering the rank.
    Resize,
    /// Something to set when loading.
    Setting(Cow<'static, str>),
}

impl fmt::Display for Cure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cure::ToKohya => "lora convert --to kohya",
            Cure::ToDiffusers => "lora convert --to diffusers",
            Cure::ToPeft => "lora convert --to peft",
            Cure::ToPortable => "lora convert --to portable",
            Cure::Flatten => "lora convert --flatten RANK --base BASE",
            Cure::FlattenToPeft => "lora convert --to peft --flatten RANK --base BASE",
            Cure::Merge => "lora merge",
            Cure::Resize => "lora resize",
            Cure::Setting(setting) => setting,
        })
    }
}

impl Serialize for Cure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What one consumer makes of a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Opinion {
    /// Who.
    pub consumer: Consumer,
    /// What becomes of the file.
    pub verdict: Verdict,
    /// Each tensor's fate; empty where one reason stands for the whole file.
    pub keys: BTreeMap<String, Fate>,
    /// What is the matter, worst first.
    pub problems: Vec<Problem>,
}

impl Opinion {
    /// How many tensors take effect.
    pub fn loaded(&self) -> usize {
        self.keys.values().filter(|fate| **fate == Fate::Loaded).count()
    }

    /// One reason for the whole file.
    fn whole(
        consumer: Consumer,
        verdict: Verdict,
        what: impl Into<Cow<'static, str>>,
        cure: impl Into<Option<Cure>>,
    ) -> Self {
        let effect = match verdict {
            Verdict::Refuses => Effect::Fatal,
            Verdict::LoadsWrong => Effect::Wrong,
            Verdict::LoadsPart | Verdict::NothingLoaded => Effect::Part,
            Verdict::Loads | Verdict::Unknown => Effect::Note,
        };
        let problem = Problem { effect, what: what.into(), keys: 0, examples: Vec::new(), cure: cure.into() };
        Self { consumer, verdict, keys: BTreeMap::new(), problems: vec![problem] }
    }
}

/// Each consumer's opinion, in the order of [`Consumer::ALL`].
pub fn opinions(inventory: &Inventory) -> Vec<Opinion> {
    let base = inventory.base();
    let layers = base.map(layers::layers).unwrap_or_default();
    let title = family::title(base);
    let judge = |consumer| match consumer {
        Consumer::LlamaCpp if inventory.gguf => llama_cpp::opinion_of_gguf(inventory),
        _ if inventory.gguf => Opinion::whole(
            consumer,
            Verdict::Refuses,
            format!("GGUF is llama.cpp's format; {consumer} does not read adapters in it"),
            Cure::ToPeft,
        ),
        Consumer::Peft => peft::opinion(inventory, base),
        Consumer::Vllm | Consumer::LlamaCpp | Consumer::MistralRs if is_image(base) => Opinion::whole(
            consumer,
            Verdict::Refuses,
            format!("an adapter for an image model ({title}); {consumer} serves language models"),
            None,
        ),
        Consumer::Vllm => vllm::opinion(inventory),
        Consumer::LlamaCpp => llama_cpp::opinion(inventory),
        Consumer::MistralRs => mistral_rs::opinion(inventory),
        _ if base == Some(&language::FAMILY) => Opinion::whole(
            consumer,
            Verdict::NothingLoaded,
            format!("an adapter for a language model; {consumer} is for image models"),
            None,
        ),
        _ => match base.filter(|base| !layers.is_empty() || transformers::judges(base)) {
            Some(base) if transformers::judges(base) => transformers::opinion(consumer, inventory, base),
            Some(base) => image_opinion(consumer, inventory, base, &layers),
            None => unknown(consumer, title),
        },
    };
    Consumer::ALL.into_iter().map(judge).collect()
}

fn unknown(consumer: Consumer, title: &str) -> Opinion {
    let what = format!("no rules are known here for {consumer} and this base model ({title})");
    Opinion::whole(consumer, Verdict::Unknown, what, None)
}

/// The opinion of a consumer of image adapters.
fn image_opinion(consumer: Consumer, inventory: &Inventory, base: &Family, layers: &[layers::Layer]) -> Opinion {
    match consumer {
        Consumer::WebUi => webui::opinion(inventory, base, layers),
        Consumer::ComfyUi => comfyui::opinion(inventory, base, layers),
        Consumer::Diffusers => diffusers::opinion(inventory, base, layers),
        _ => sd_scripts::opinion(inventory, base, layers),
    }
}

fn is_image(base: Option<&Family>) -> bool {
    base.is_some_and(|family| family.image)
}

#[cfg(test)]
mod tests {
    use super::samples::*;
    use super::*;

    #[test]
    fn the_native_layout_loads_wherever_image_adapters_load() {
        for inventory in [sd1(), sd2(), sdxl()] {
            for opinion in &opinions(&inventory)[..4] {
                assert_eq!(opinion.verdict, Verdict::Loads, "{}: {:?}", opinion.consumer, opinion.problems);
                assert_eq!(opinion.loaded(), inventory.tensors.len());
                assert!(opinion.problems.is_empty(), "{:?}", opinion.problems);
            }
        }
    }

    #[test]
    fn the_other_world_gets_one_reason_and_no_list() {
        for opinion in &opinions(&sd1())[5..] {
            assert_eq!(opinion.verdict, Verdict::Refuses, "{}", opinion.consumer);
            assert!(opinion.keys.is_empty());
            assert!(opinion.problems[0].what.contains("image model (Stable Diffusion 1.x)"));
        }
        for opinion in &opinions(&language_model())[..4] {
            assert_eq!(opinion.verdict, Verdict::NothingLoaded, "{}", opinion.consumer);
            assert!(opinion.keys.is_empty());
            assert_eq!(opinion.problems.len(), 1);
        }
    }

    #[test]
    fn an_adapter_that_everyone_takes_loads_everywhere() {
        for opinion in &opinions(&language_model())[4..] {
            assert_eq!(opinion.verdict, Verdict::Loads, "{}: {:?}", opinion.consumer, opinion.problems);
            assert_eq!(opinion.loaded(), language_model().tensors.len());
        }
    }

    #[test]
    fn results_serialise() {
        let inventory = language_model().set("bias", "all".into());
        let json = serde_json::to_value(opinions(&inventory)).unwrap();
        let vllm = &json[5];
        assert_eq!(vllm["consumer"], "vllm");
        assert_eq!(vllm["verdict"], "refuses");
        assert_eq!(vllm["problems"][0]["effect"], "fatal");
        assert_eq!(vllm["problems"][0]["cure"], "lora merge");
        assert_eq!(vllm["keys"].as_object().unwrap().values().next().unwrap()["fate"], "ignored");
    }

    #[test]
    fn every_consumer_has_a_name_and_a_version() {
        for (consumer, opinion) in Consumer::ALL.into_iter().zip(opinions(&sd1())) {
            assert_eq!(opinion.consumer, consumer);
            assert!(!consumer.version().is_empty() && !consumer.name().is_empty());
        }
    }
}
