//! The loss on pictures that are not trained on, with the same draws at every look, so that two looks can be compared.

use std::path::Path;

use lora_core::random::Stream;
use lora_data::Source;
use lora_models::diffusion::NoiseSchedule;
use lora_models::layers::Pass;
use lora_torch::dry;
use lora_torch::tch::{Tensor, no_grad_guard};
use lora_torch::tensor::from_f32;

use super::Session;
use crate::Result;
use crate::encode::{Encoder, sample_latents};
use crate::loss::{LossWeights, denoising_loss};

/// Timesteps at which each picture is looked at, spread evenly.
const TIMESTEPS: usize = 16;

/// Pictures to validate with, encoded.
#[derive(Debug)]
pub struct Validation {
    /// Latents `[4, height, width]`, scaled, on the host; and the caption.
    items: Vec<(Tensor, String)>,
}

impl Validation {
    /// Their captions, in order.
    pub fn captions(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|(_, caption)| caption.as_str())
    }
}

impl Session {
    /// Encodes the pictures of a folder, framed and captioned as the first training dataset is, without what is random in
    /// its captions.
    pub fn load_validation(&self, folder: &Path) -> Result<Validation> {
        let _scope = self.scope()?;
        let pictures = self.pictures.of_another(folder)?;
        let mut encoder =
            Encoder::load(&self.checkpoint, self.precision, self.device)?.in_tiles(self.config.vae_tiling);
        let mut items = Vec::new();
        for index in 0..pictures.count() {
            let random = Stream::new(self.config.seed).at("validation").with(index as u64);
            let sample = pictures.load(index, &random)?;
            let distribution = encoder.encode(&self.checkpoint, pictures.path(index), &sample.picture)?;
            let latents = sample_latents(&distribution, encoder.scaling_factor(), &random.at("latent"))?;
            items.push((latents.f_to_device(dry::host_of(self.device))?, pictures.plain_caption(index)));
        }
        Ok(Validation { items })
    }

    /// The mean denoising loss of each picture over evenly spread timesteps, unweighted, without dropout. `caption` says which
    /// caption a picture is looked at with, by its index; its own is the second argument.
    pub fn validation_losses(
        &mut self,
        validation: &Validation,
        caption: impl Fn(usize, &str) -> String,
    ) -> Result<Vec<f64>> {
        let _scope = self.scope()?;
        let _guard = no_grad_guard();
        self.with_averages(|session| {
            session.beside_recordings(|session| {
                let mut losses = Vec::with_capacity(validation.items.len());
                for (index, (latents, own)) in validation.items.iter().enumerate() {
                    let random = Stream::new(session.config.seed).at("validation").with(index as u64);
                    let count = TIMESTEPS as i64;
                    let (channels, height, width) = latents.size3()?;
                    let many = latents.f_to_device(session.device)?.f_unsqueeze(0)?.f_repeat([count, 1, 1, 1])?;
                    let shape = [TIMESTEPS, channels as usize, height as usize, width as usize];
                    let noise = from_f32(&random.at("noise").normals(shape.iter().product()), &shape, session.device)?;
                    let times: Vec<usize> = (0..TIMESTEPS)
                        .map(|step| (2 * step + 1) * NoiseSchedule::TIMESTEPS / (2 * TIMESTEPS))
                        .collect();
                    let context = session.states_of(&caption(index, own))?.f_repeat([count, 1, 1])?;
                    let loss = denoising_loss(
                        &session.unet,
                        &session.schedule,
                        &many,
                        &noise,
                        &times,
                        &context,
                        &LossWeights::default(),
                        &Pass::default(),
                    )?;
                    losses.push(f64::try_from(loss)?);
                }
                Ok(losses)
            })
        })
    }

    /// The mean of [`Session::validation_losses`] with the pictures' own captions.
    pub fn validation_loss(&mut self, validation: &Validation) -> Result<f64> {
        let losses = self.validation_losses(validation, |_, own| own.to_owned())?;
        Ok(losses.iter().sum::<f64>() / losses.len() as f64)
    }
}
