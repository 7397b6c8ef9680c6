//! FLUX.2's smaller relatives, called klein, and their fine-tunes: captions through Qwen3, three of whose layers' states are read
//! side by side, an autoencoder of 32 channels, FLUX.1's blocks in a new arrangement. FLUX.2 dev, whose captions another language
//! model reads, is not trained here.

use lora_core::Component;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::flux2;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Flux2, Flux2Conditions, load_flux2};
use lora_torch::tch::Tensor;
use lora_torch::tensor::upload;

use super::FlowMatching;
use super::kind::{Guidance, Kind, Transformer, name_of, transformer_contains};
use super::layout::stacked;
use super::text::{EncoderKind, Language, Reads, STATES, States};
use crate::Result;
use crate::base::{Inputs, PICTURES, Registration};
use crate::config::keys::flow_matching as keys;

/// FLUX.2.
pub(in super::super) const FLUX2: Registration = Registration {
    family: &flux2::FAMILY,
    keys: keys::KEYS,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\"",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

pub(super) static KIND: Kind = Kind {
    family: &flux2::FAMILY,
    encoders: &[EncoderKind {
        component: Component::TEXT_ENCODER,
        title: "text encoder",
        key: "text_encoder",
        tokenizer: Some("tokenizer"),
        published: "Qwen3 4B (klein 9B: 8B), its folder, its file (qwen_3_4b.safetensors), or a diffusers folder that has it",
        reads: Reads::Language(Language {
            // Qwen3's template of one message, with thinking switched off.
            around: ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"],
            states: States::Behind(&[9, 18, 27]),
            dropped: 0,
            length: 512,
            fills_up: true,
        }),
    }],
    text_columns: Some((Component::TRANSFORMER, CONTEXT)),
    load: |checkpoint, kind, device, held| Ok(Box::new(load_flux2(checkpoint, kind, device, held)?)),
    layout: |captions, device| {
        let states = stacked(captions, Component::TEXT_ENCODER, STATES)?;
        Ok(Inputs::default().with(STATES, Some(upload(&states, device)?)))
    },
    draws_latents: false,
    patch: 2,
    shift: Shift::FLUX,
    sample_levels: |_, steps, tokens| flow::levels(steps, flow::flux2_factor(tokens, steps)),
    // Few-step models are sampled without any.
    guidance: |checkpoint| Guidance::Contrast(if is_distilled(checkpoint) { 1.0 } else { 4.0 }),
    labels: |checkpoint| match context(checkpoint) {
        Some(KLEIN_9B) => {
            &[("ss_base_model_version", "flux_2_klein_9b"), ("modelspec.architecture", "Flux.2-klein-9b/lora")]
        }
        _ => &[],
    },
    is_distilled,
    distilled: "this base is klein distilled to four steps: training it directly loses that within some hundred steps; train on \
                the base model of the same size (FLUX.2-klein-base), and use the LoRA with either",
    refused: |checkpoint| {
        let guided = transformer_contains(checkpoint, "time_guidance_embed.guidance_embedder.linear_1.weight");
        guided.then_some("FLUX.2 dev, whose text encoder is not read here; klein 4B and 9B are trained")
    },
};

/// The weight whose columns are the numbers of text states.
const CONTEXT: &str = "context_embedder.weight";

/// Numbers of klein 9B's text states.
const KLEIN_9B: usize = 12_288;

/// Numbers of the text states that a transformer reads.
fn context(checkpoint: &Checkpoint) -> Option<usize> {
    let transformer = checkpoint.component(Component::TRANSFORMER).ok()?;
    transformer.shape(CONTEXT)?.get(1).copied()
}

/// As the folder says it; of files, the published name of one that is not distilled has the word.
fn is_distilled(checkpoint: &Checkpoint) -> bool {
    match checkpoint.index().and_then(|index| index.get("is_distilled")?.as_bool()) {
        Some(said) => said,
        None => {
            let name = name_of(checkpoint);
            name.contains("distilled") || name.contains("klein") && !name.contains("base")
        }
    }
}

impl Transformer for Flux2 {
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let conditions = Flux2Conditions { sigmas: levels, context: inputs.get(STATES)?, guidance: None };
        Ok(self.forward(latents, &conditions, pass)?)
    }

    fn as_adaptable(&mut self) -> &mut dyn Adaptable {
        self
    }
}
