//! Chroma and its fine-tunes: captions through T5, whose rows end one token behind them; FLUX.1's autoencoder; FLUX.1's blocks,
//! shifted and scaled by one network for all of them.

use lora_core::Component;
use lora_io::family::chroma;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::networks::load_flux;

use super::FlowMatching;
use super::kind::{Guidance, Kind, name_of, named_distilled};
use super::layout::ragged;
use super::text::{EncoderKind, Reads, T5};
use crate::base::{PICTURES, Registration};
use crate::config::keys::flow_matching as keys;

/// Chroma.
pub(in super::super) const CHROMA: Registration = Registration {
    family: &chroma::FAMILY,
    keys: keys::KEYS,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\", offload_base = true",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

pub(super) static KIND: Kind = Kind {
    family: &chroma::FAMILY,
    encoders: &[EncoderKind {
        component: Component::TEXT_ENCODER,
        title: "T5 text encoder",
        key: "text_encoder",
        published: "T5-XXL's encoder, its folder, its file (t5xxl_fp16.safetensors), or a diffusers folder that has it",
        tokenizer: Some("tokenizer"),
        // One token that fills a row up is read with the caption; the network was trained so.
        reads: Reads::T5(T5 { length: |_| 512, fills_up: false }),
    }],
    text_columns: None,
    load: |checkpoint, kind, device, held| Ok(Box::new(load_flux(checkpoint, kind, device, held)?)),
    layout: ragged,
    draws_latents: true,
    patch: 2,
    shift: Shift::FLUX,
    sample_levels: |_, steps, tokens| flow::levels(steps, Shift::FLUX.factor(tokens)),
    guidance: |_| Guidance::Contrast(5.0),
    labels: |_| &[],
    is_distilled: |checkpoint| named_distilled(checkpoint) || name_of(checkpoint).contains("flash"),
    distilled: "its name says that this base is distilled to few steps (Flash): training it directly loses that within some \
                hundred steps; train on Chroma1-Base or Chroma1-HD, and use the LoRA with either",
    refused: |_| None,
};
