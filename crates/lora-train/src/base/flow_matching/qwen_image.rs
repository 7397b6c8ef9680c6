//! Qwen-Image and its fine-tunes: captions through Qwen2.5-VL's language model, inside of a template whose own states are not
//! read; Wan's autoencoder; a transformer of double blocks. Models that edit pictures are trained as those that draw them:
//! without a second picture.

use lora_core::Component;
use lora_io::family::qwen_image;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{QwenImage, QwenImageConditions, load_qwen_image};
use lora_torch::tch::Tensor;

use super::FlowMatching;
use super::kind::{Guidance, Kind, Transformer, name_of, named_distilled, transformer_contains};
use super::layout::{LENGTHS, ragged};
use super::text::{EncoderKind, Language, Reads, STATES, States};
use crate::Result;
use crate::base::{Inputs, PICTURES, Registration};
use crate::config::keys::flow_matching as keys;

/// Qwen-Image.
pub(in super::super) const QWEN_IMAGE: Registration = Registration {
    family: &qwen_image::FAMILY,
    keys: keys::KEYS,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\", offload_base = true",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

pub(super) static KIND: Kind = Kind {
    family: &qwen_image::FAMILY,
    encoders: &[EncoderKind {
        component: Component::TEXT_ENCODER,
        title: "text encoder",
        key: "text_encoder",
        tokenizer: Some("tokenizer"),
        published: "Qwen2.5-VL 7B, its folder, its file (qwen_2.5_vl_7b.safetensors), or a diffusers folder that has it",
        reads: Reads::Language(Language {
            around: [
                "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial \
                 relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>\n<|im_start|>assistant\n",
            ],
            states: States::Before(0),
            // What stands before a caption, in the published vocabulary.
            dropped: 34,
            length: 1024,
            fills_up: false,
        }),
    }],
    text_columns: Some((Component::TRANSFORMER, "txt_in.weight")),
    load: |checkpoint, kind, device, held| Ok(Box::new(load_qwen_image(checkpoint, kind, device, held)?)),
    layout: ragged,
    draws_latents: false,
    patch: 2,
    shift: Shift::QWEN_IMAGE,
    sample_levels: |_, steps, tokens| flow::levels_to(LAST_LEVEL, steps, Shift::QWEN_IMAGE.factor(tokens)),
    guidance: |_| Guidance::Rescaled(4.0),
    labels: |_| &[],
    is_distilled: |checkpoint| named_distilled(checkpoint) || name_of(checkpoint).contains("lightning"),
    distilled: "its name says that this base is distilled to few steps (Lightning): training it directly loses that within some \
                hundred steps; train on Qwen-Image, and use the LoRA with either",
    refused: |checkpoint| {
        let layered = transformer_contains(checkpoint, "time_text_embed.addition_t_embedding.weight")
            || checkpoint.unused().iter().any(|name| name.contains("addition_t_embedding"));
        layered.then_some("Qwen-Image-Layered, whose layers of a picture are not trained here")
    },
};

/// The last noise level above 0 that samples go through.
const LAST_LEVEL: f64 = 0.02;

impl Transformer for QwenImage {
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let (context, lengths) = (inputs.get(STATES)?, inputs.find(LENGTHS));
        Ok(self.forward(latents, &QwenImageConditions { sigmas: levels, context, lengths }, pass)?)
    }

    fn as_adaptable(&mut self) -> &mut dyn Adaptable {
        self
    }
}
