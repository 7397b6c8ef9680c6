//! Programs behind measurements and assets, for those who change this project: nothing here is an example of how to use the libraries.
//! What several of them share is here, pictures as tensors and how well an autoencoder keeps them; each program is a file in `bin/`.

use std::path::Path;

use lora_core::random::Stream;
use lora_data::Pictures;
use lora_data::processor::ProcessorRegistry;
use lora_models::networks::Vae;
use lora_torch::tch::{Kind, Tensor};
use lora_train::config::TrainConfig;

/// What a program answers.
pub type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// All pictures of a folder, or of the folders in it, at 64 × 64 pixels, `[count, 3, 64, 64]` in bytes.
///
/// # Errors
/// Where a picture cannot be read.
pub fn load_pictures(folder: &Path) -> Answer<Tensor> {
    let (options, _) = TrainConfig::datasets_of(None, Some(folder), &["max_resolution=64"])?;
    let pictures = Pictures::open(options, &ProcessorRegistry::default())?;
    let mut all = Vec::new();
    for index in 0..pictures.items().len() {
        let picture = pictures.load(index, &Stream::new(0))?.picture;
        let (width, height) = (picture.width() as i64, picture.height() as i64);
        let pixels = Tensor::from_slice(picture.data()).f_view([height, width, 3])?;
        all.push(pixels.f_permute([2, 0, 1])?.f_contiguous()?);
    }
    Ok(Tensor::f_stack(&all, 0)?)
}

/// Bytes as networks see them: f32 from -1 to 1.
///
/// # Errors
/// Where memory runs out.
pub fn scaled(bytes: &Tensor) -> Answer<Tensor> {
    Ok(bytes.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1.0)?)
}

/// Peak signal-to-noise ratio in dB of reconstructions from the latents' means: the mean over pictures in bytes.
///
/// # Errors
/// Where the sizes are not the autoencoder's, and where memory runs out.
pub fn psnr(vae: &Vae, pictures: &Tensor) -> Answer<f64> {
    let mut errors = Vec::new();
    for chunk in pictures.f_split(32, 0)? {
        let pixels = scaled(&chunk)?;
        let made = vae.decode(&vae.encode(&pixels)?.mean)?.f_clamp(-1.0, 1.0)?;
        errors.push((made - pixels).f_square()?.f_flatten(1, -1)?.f_mean_dim(1, false, Kind::Float)?);
    }
    let each: Vec<f32> = Vec::try_from(Tensor::f_cat(&errors, 0)?)?;
    Ok(each.iter().map(|&error| decibels(f64::from(error))).sum::<f64>() / each.len() as f64)
}

/// Of a mean squared error where values span 2.
pub fn decibels(error: f64) -> f64 {
    10.0 * (4.0 / error).log10()
}
