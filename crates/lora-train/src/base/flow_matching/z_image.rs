//! Z-Image and its fine-tunes: captions through Qwen3 4B, FLUX.1's autoencoder, a transformer that reads both as one sequence.

use lora_core::Component;
use lora_io::family::z_image;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{ZImage, ZImageCaptions, load_z_image};
use lora_torch::tch::{Device, Kind as Number, Tensor};
use lora_torch::tensor::upload;

use super::FlowMatching;
use super::kind::{Guidance, Kind, Transformer, named_distilled};
use super::layout::{LENGTHS, side_by_side};
use super::text::{EncoderKind, Language, Reads, STATES, States};
use crate::Result;
use crate::base::{Inputs, PICTURES, Registration, Tensors};
use crate::config::keys::flow_matching as keys;

/// Z-Image.
pub(in super::super) const Z_IMAGE: Registration = Registration {
    family: &z_image::FAMILY,
    keys: keys::KEYS,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\"",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

pub(super) static KIND: Kind = Kind {
    family: &z_image::FAMILY,
    encoders: &[EncoderKind {
        component: Component::TEXT_ENCODER,
        title: "text encoder",
        key: "text_encoder",
        tokenizer: Some("tokenizer"),
        published: "Qwen3 4B, its folder, its file (qwen_3_4b.safetensors), or a diffusers folder that has it",
        reads: Reads::Language(Language {
            // Qwen3's template of one message, with thinking left open.
            around: ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"],
            states: States::Before(1),
            dropped: 0,
            length: 512,
            fills_up: false,
        }),
    }],
    text_columns: Some((Component::TRANSFORMER, "cap_embedder.1.weight")),
    load: |checkpoint, kind, device, held| Ok(Box::new(load_z_image(checkpoint, kind, device, held)?)),
    layout,
    draws_latents: false,
    patch: 2,
    shift: Shift::FLUX,
    sample_levels: |_, steps, _| flow::levels(steps, 3.0),
    guidance: |_| Guidance::Contrast(5.0),
    labels: |_| &[],
    is_distilled: named_distilled,
    distilled: "its name says that this base is distilled to few steps (Turbo): training it directly loses that within some \
                hundred steps; train on Z-Image's base model, and use the LoRA with either",
    refused: |_| None,
};

/// There where captions need different multiples of 32 tokens; its values say nothing.
const RAGGED: &str = "captions_are_ragged";

/// Tokens that captions are filled up to multiples of.
const MULTIPLE: usize = 32;

/// Captions' states side by side; numbers behind a caption are not read.
fn layout(captions: &[&Tensors], device: Device) -> Result<Inputs> {
    let (states, lengths) = side_by_side(captions, MULTIPLE)?;
    let longest = states.size3()?.1 as usize;
    let ragged = lengths.iter().any(|&length| (length as usize).next_multiple_of(MULTIPLE) != longest);
    let ragged = ragged.then(|| Tensor::f_zeros([1], (Number::Float, device))).transpose()?;
    Ok(Inputs::default()
        .with(STATES, Some(upload(&states, device)?))
        .with(LENGTHS, Some(upload(&Tensor::from_slice(&lengths), device)?))
        .with(RAGGED, ragged))
}

impl Transformer for ZImage {
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let captions = ZImageCaptions {
            states: inputs.get(STATES)?,
            lengths: inputs.get(LENGTHS)?,
            ragged: inputs.find(RAGGED).is_some(),
        };
        Ok(self.forward(latents, levels, captions, pass)?)
    }

    fn as_adaptable(&mut self) -> &mut dyn Adaptable {
        self
    }
}
