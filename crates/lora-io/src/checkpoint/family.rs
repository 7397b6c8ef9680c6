//! Telling families of models apart by their tensor names, never by widths.

use std::fmt;

/// What a file of tensors is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Stable Diffusion 1.x.
    StableDiffusion1,
    /// Stable Diffusion 2.x.
    StableDiffusion2,
    /// Stable Diffusion XL.
    StableDiffusionXl,
    /// Stable Diffusion 3.
    StableDiffusion3,
    /// Flux.
    Flux,
    /// An autoencoder alone.
    Vae,
    /// A U-Net alone.
    UnetOnly,
    /// A language model in the Hugging Face layout.
    LanguageModel,
    /// A LoRA or another adapter.
    Adapter,
    /// None of these.
    Unknown,
}

impl Family {
    /// From the names of a file's tensors.
    pub fn of_names<S: AsRef<str>>(names: &[S]) -> Self {
        let any = |part: &str| names.iter().any(|name| name.as_ref().starts_with(part));
        let within = |part: &str| names.iter().any(|name| name.as_ref().contains(part));
        if within("lora_down") || within("lora_A") || within("lora_up") || within("hada_w1") || within("lokr_w1") {
            Family::Adapter
        } else if any("conditioner.embedders.") {
            Family::StableDiffusionXl
        } else if any("cond_stage_model.model.") {
            Family::StableDiffusion2
        } else if any("cond_stage_model.transformer.") {
            Family::StableDiffusion1
        } else if within("joint_blocks.") {
            Family::StableDiffusion3
        } else if within("double_blocks.") {
            Family::Flux
        } else if any("model.diffusion_model.") || any("down_blocks.") {
            Family::UnetOnly
        } else if any("first_stage_model.") || any("encoder.down") {
            Family::Vae
        } else if any("model.layers.") {
            Family::LanguageModel
        } else {
            Family::Unknown
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::StableDiffusion1 => "Stable Diffusion 1.x",
            Family::StableDiffusion2 => "Stable Diffusion 2.x",
            Family::StableDiffusionXl => "Stable Diffusion XL",
            Family::StableDiffusion3 => "Stable Diffusion 3",
            Family::Flux => "Flux",
            Family::Vae => "an autoencoder alone",
            Family::UnetOnly => "a U-Net alone, without text encoder and autoencoder",
            Family::LanguageModel => "a language model",
            Family::Adapter => "a LoRA, not a base model",
            Family::Unknown => "no model that is known here",
        })
    }
}
