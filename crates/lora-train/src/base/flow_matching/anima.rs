//! Anima and its fine-tunes: captions through Qwen3 and a text conditioner on T5's tokens, Wan's autoencoder, Cosmos-Predict2's
//! transformer.

use lora_core::Component;
use lora_io::family::anima;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Cosmos, CosmosConditions, load_cosmos};
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::upload;

use super::FlowMatching;
use super::kind::{Guidance, Kind, Transformer, named_distilled};
use super::layout::side_by_side;
use super::text::{EncoderKind, Language, Reads, STATES, States};
use crate::Result;
use crate::base::{Inputs, PICTURES, Registration, Tensors};
use crate::config::keys::flow_matching as keys;

/// Anima.
pub(in super::super) const ANIMA: Registration = Registration {
    family: &anima::FAMILY,
    keys: keys::ANIMA,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\", offload_base = true",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

pub(super) static KIND: Kind = Kind {
    family: &anima::FAMILY,
    encoders: &[EncoderKind {
        component: Component::TEXT_ENCODER,
        title: "text encoder",
        key: "text_encoder",
        tokenizer: Some("tokenizer"),
        published: "Qwen3 0.6B, its folder, its file (qwen_3_06b_base.safetensors), or a diffusers folder that has it",
        reads: Reads::Conditioned(Language {
            around: ["", ""],
            states: States::Before(0),
            dropped: 0,
            length: 512,
            fills_up: false,
        }),
    }],
    text_columns: Some((anima::TEXT_CONDITIONER, "blocks.0.cross_attn.k_proj.weight")),
    load: |checkpoint, kind, device, held| Ok(Box::new(load_cosmos(checkpoint, kind, device, held)?)),
    layout,
    draws_latents: false,
    patch: 2,
    // sd-scripts' default.
    shift: Shift::Factor(1.0),
    sample_levels: |_, steps, _| flow::levels(steps, 3.0),
    guidance: |_| Guidance::Contrast(4.0),
    labels: |_| &[],
    is_distilled: named_distilled,
    distilled: "its name says that this base is distilled to few steps (Turbo): training it directly loses that within some \
                hundred steps; train on Anima's base model, and use the LoRA with either",
    refused: |_| None,
};

/// States that the transformer reads at least. It was trained with rows of so many, and zeros that fill them up count.
const ROW: i64 = 512;

/// Captions' states side by side, filled up with zeros.
fn layout(captions: &[&Tensors], device: Device) -> Result<Inputs> {
    let (states, _) = side_by_side(captions, 1)?;
    let missing = (ROW - states.size3()?.1).max(0);
    let states = states.f_constant_pad_nd([0, 0, 0, missing])?;
    Ok(Inputs::default().with(STATES, Some(upload(&states, device)?)))
}

impl Transformer for Cosmos {
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        Ok(self.forward(latents, &CosmosConditions { sigmas: levels, context: inputs.get(STATES)? }, pass)?)
    }

    fn as_adaptable(&mut self) -> &mut dyn Adaptable {
        self
    }
}
