//! FLUX.1 and its fine-tunes: captions through CLIP-L, whose pooled state goes beside the time, and through T5; an autoencoder of
//! 16 channels; a transformer that may be told a strength of guidance.

use lora_core::Component;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::flux;
use lora_models::diffusion::flow::{self, Shift};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{Flux, FluxConditions, load_flux};
use lora_torch::tch::{Device, Tensor};
use lora_torch::tensor::upload;

use super::FlowMatching;
use super::kind::{GUIDANCE, Guidance, Kind, Transformer, named_distilled, transformer_contains};
use super::layout::{LENGTHS, stacked};
use super::text::{Clip, EncoderKind, Reads, STATES, T5};
use crate::Result;
use crate::base::{Inputs, PICTURES, Registration, Tensors};
use crate::config::keys::flow_matching as keys;

/// FLUX.1.
pub(in super::super) const FLUX: Registration = Registration {
    family: &flux::FAMILY,
    keys: keys::FLUX,
    data: PICTURES,
    remedies: "a lower max_resolution (1024 to 768 to 512), base_storage = \"nf4\", offload_base = true",
    open: |opening| Ok(Box::new(FlowMatching::open(opening, &KIND)?)),
};

/// The name of the pooled state.
const POOLED: &str = "pooled";

pub(super) static KIND: Kind = Kind {
    family: &flux::FAMILY,
    encoders: &[
        EncoderKind {
            component: Component::TEXT_ENCODER,
            title: "CLIP-L text encoder",
            key: "text_encoder",
            published: "CLIP-L, its folder, its file (clip_l.safetensors), or a diffusers folder that has it",
            tokenizer: None,
            reads: Reads::Clip(Clip::End(POOLED)),
        },
        EncoderKind {
            component: Component::TEXT_ENCODER_2,
            title: "T5 text encoder",
            key: "text_encoder_2",
            published: "T5-XXL's encoder, its folder, its file (t5xxl_fp16.safetensors), or a diffusers folder that has it",
            tokenizer: Some("tokenizer_2"),
            reads: Reads::T5(T5 { length: |checkpoint| if is_guided(checkpoint) { 512 } else { 256 }, fills_up: true }),
        },
    ],
    text_columns: None,
    load: |checkpoint, kind, device, held| Ok(Box::new(load_flux(checkpoint, kind, device, held)?)),
    layout,
    draws_latents: true,
    patch: 2,
    shift: Shift::FLUX,
    sample_levels: |checkpoint, steps, tokens| {
        flow::levels(steps, if is_guided(checkpoint) { Shift::FLUX.factor(tokens) } else { 1.0 })
    },
    // Few-step models are sampled without any.
    guidance: |checkpoint| if is_guided(checkpoint) { Guidance::Told(3.5) } else { Guidance::Contrast(1.0) },
    labels: |checkpoint| match is_guided(checkpoint) {
        true => &[("modelspec.architecture", "flux-1-dev/lora")],
        false => &[("modelspec.architecture", "flux-1-schnell/lora")],
    },
    is_distilled: named_distilled,
    distilled: "its name says that this base is distilled to few steps (schnell): training it directly loses that within some \
                hundred steps; train on FLUX.1 dev where its license allows it",
    refused: |_| None,
};

/// Whether the transformer is told a strength of guidance: dev's is, schnell's is not.
fn is_guided(checkpoint: &Checkpoint) -> bool {
    transformer_contains(checkpoint, "time_text_embed.guidance_embedder.linear_1.weight")
}

fn layout(captions: &[&Tensors], device: Device) -> Result<Inputs> {
    let of = |component, name| -> Result<Tensor> { Ok(upload(&stacked(captions, component, name)?, device)?) };
    Ok(Inputs::default()
        .with(STATES, Some(of(Component::TEXT_ENCODER_2, STATES)?))
        .with(POOLED, Some(of(Component::TEXT_ENCODER, POOLED)?)))
}

impl Transformer for Flux {
    fn velocity(&self, latents: &Tensor, levels: &Tensor, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let conditions = FluxConditions {
            sigmas: levels,
            context: inputs.get(STATES)?,
            pooled: inputs.find(POOLED),
            guidance: inputs.find(GUIDANCE),
            lengths: inputs.find(LENGTHS),
        };
        Ok(self.forward(latents, &conditions, pass)?)
    }

    fn as_adaptable(&mut self) -> &mut dyn Adaptable {
        self
    }
}
