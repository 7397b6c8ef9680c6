//! Stable Diffusion 3 and 3.5: captions through CLIP-L, OpenCLIP's bigG and T5, whose states stand one behind the other; an
//! autoencoder of 16 channels.

use lora_core::Component;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::sd3;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Sd3, Sd3Conditions, load_sd3};
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::upload;

use super::FlowMatching;
use super::kind::{Guidance, Kind, Transformer, named_distilled, transformer_contains};
use super::layout::stacked;
use super::text::{Clip, EncoderKind, Reads, STATES, T5};
use crate::Result;
use crate::base::{Inputs, PICTURES, Registration, Tensors};
use crate::config::keys::flow_matching as keys;

/// Stable Diffusion 3 and 3.5.
pub(in super::super) const SD3: Registration = Registration {
    family: &sd3::FAMILY,
    keys: keys::SD3,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\"",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

const FIRST: [&str; 2] = ["states_l", "pooled_l"];
const SECOND: [&str; 2] = ["states_g", "pooled_g"];
/// What the transformer is told of pooled states.
const POOLED: &str = "pooled";

pub(super) static KIND: Kind = Kind {
    family: &sd3::FAMILY,
    encoders: &[
        EncoderKind {
            component: Component::TEXT_ENCODER,
            title: "CLIP-L text encoder",
            key: "text_encoder",
            published: "CLIP-L, its folder, its file (clip_l.safetensors), or a diffusers folder that has it",
            tokenizer: None,
            reads: Reads::Clip(Clip::StatesAndPooled { names: FIRST, open: false }),
        },
        EncoderKind {
            component: Component::TEXT_ENCODER_2,
            title: "CLIP-bigG text encoder",
            key: "text_encoder_2",
            published: "OpenCLIP's bigG, its folder, its file (clip_g.safetensors), or a diffusers folder that has it",
            tokenizer: None,
            reads: Reads::Clip(Clip::StatesAndPooled { names: SECOND, open: true }),
        },
        EncoderKind {
            component: Component::TEXT_ENCODER_3,
            title: "T5 text encoder",
            key: "text_encoder_3",
            published: "T5-XXL's encoder, its folder, its file (t5xxl_fp16.safetensors), or a diffusers folder that has it",
            tokenizer: Some("tokenizer_3"),
            reads: Reads::T5(T5 { length: |_| 256, fills_up: true }),
        },
    ],
    text_columns: None,
    load: |checkpoint, kind, device, held| Ok(Box::new(load_sd3(checkpoint, kind, device, held)?)),
    layout,
    draws_latents: true,
    patch: 2,
    shift: Shift::Factor(3.0),
    sample_levels: |_, steps, _| flow::levels(steps, 3.0),
    guidance: |_| Guidance::Contrast(4.5),
    labels: |checkpoint| match size_of(checkpoint) {
        Size::Medium => {
            &[("ss_base_model_version", "medium"), ("modelspec.architecture", "stable-diffusion-3-medium/lora")]
        }
        Size::NewMedium => &[],
        Size::NewLarge => {
            &[("ss_base_model_version", "5-large"), ("modelspec.architecture", "stable-diffusion-3-5-large/lora")]
        }
    },
    is_distilled: named_distilled,
    distilled: "its name says that this base is distilled to few steps (turbo): training it directly loses that within some \
                hundred steps; train on the model that it was made of",
    refused: |_| None,
};

/// Which of the published models a transformer is built as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// Stable Diffusion 3 medium.
    Medium,
    /// Stable Diffusion 3.5 medium.
    NewMedium,
    /// Stable Diffusion 3.5 large.
    NewLarge,
}

/// Told by what the first block has: 3.5 norms queries and keys, its medium model attends to the picture twice.
fn size_of(checkpoint: &Checkpoint) -> Size {
    let has = |weight: &str| transformer_contains(checkpoint, &format!("transformer_blocks.0.{weight}.weight"));
    match (has("attn.norm_q"), has("attn2.to_q")) {
        (false, _) => Size::Medium,
        (true, true) => Size::NewMedium,
        (true, false) => Size::NewLarge,
    }
}

/// CLIP's states side by side and filled up with zeros to T5's width, T5's behind them; pooled states side by side.
fn layout(captions: &[&Tensors], device: Device) -> Result<Inputs> {
    let of = |component, name| stacked(captions, component, name);
    let (first, second) = (Component::TEXT_ENCODER, Component::TEXT_ENCODER_2);
    let long = of(Component::TEXT_ENCODER_3, STATES)?;
    let wide = Tensor::f_cat(&[of(first, FIRST[0])?, of(second, SECOND[0])?], -1)?;
    let missing = long.size3()?.2 - wide.size3()?.2;
    let states = Tensor::f_cat(&[wide.f_constant_pad_nd([0, missing])?, long], 1)?;
    let pooled = Tensor::f_cat(&[of(first, FIRST[1])?, of(second, SECOND[1])?], -1)?;
    Ok(Inputs::default().with(STATES, Some(upload(&states, device)?)).with(POOLED, Some(upload(&pooled, device)?)))
}

impl Transformer for Sd3 {
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let conditions = Sd3Conditions { sigmas: levels, context: inputs.get(STATES)?, pooled: inputs.get(POOLED)? };
        Ok(self.forward(latents, &conditions, pass)?)
    }

    fn as_adaptable(&mut self) -> &mut dyn Adaptable {
        self
    }
}
