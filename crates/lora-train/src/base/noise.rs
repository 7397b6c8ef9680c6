//! The noise of a micro-batch, which bases of pictures share: drawn for each item from its own counters, so that neither
//! micro-batches nor resuming nor the device change it. What offsets, several resolutions and perturbed inputs are is
//! sd-scripts' definition, but that one draw is an item's and not a batch's: strengths are drawn, and noise of several
//! resolutions is brought to unit variance, for each item.

use lora_core::Component;
use lora_core::random::Stream;
use lora_models::Result as Made;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::from_f32;

use super::Item;
use crate::config::TrainConfig;
use crate::{Error, Result};

/// What is done to noise, as keys say it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NoiseSettings {
    /// `noise_offset`, and whether it is the most of an even draw.
    offset: f64,
    offset_is_random: bool,
    /// `adaptive_noise_scale`.
    adaptive: f64,
    /// `multires_noise_iterations` and `multires_noise_discount`.
    iterations: usize,
    discount: f64,
    /// `ip_noise_gamma`, and whether it is the most of an even draw.
    perturbation: f64,
    perturbation_is_random: bool,
}

/// Noise, `[batch, channels, height, width]` f32 each.
#[derive(Debug)]
pub(super) struct Noise {
    /// What the target is made of.
    pub(super) target: Tensor,
    /// What is added to latents.
    pub(super) added: Tensor,
}

impl NoiseSettings {
    pub(super) fn of(config: &TrainConfig) -> Result<Self> {
        let number = |key| config.extra.number(key).unwrap_or(0.0);
        let switch = |key| config.extra.switch(key).unwrap_or(false);
        let adaptive = number("adaptive_noise_scale");
        if adaptive != 0.0 && config.noise_offset == 0.0 {
            let message = "changes noise_offset, which is 0; give one, or take this out".to_owned();
            return Err(config.refused([("adaptive_noise_scale", message)]).into());
        }
        Ok(Self {
            offset: config.noise_offset,
            offset_is_random: switch("noise_offset_random_strength"),
            adaptive,
            iterations: config.extra.whole("multires_noise_iterations").unwrap_or(0),
            discount: number("multires_noise_discount"),
            perturbation: number("ip_noise_gamma"),
            perturbation_is_random: switch("ip_noise_gamma_random_strength"),
        })
    }

    /// What a file says of it, in sd-scripts' words.
    pub(super) fn record(&self) -> Vec<(&'static str, String)> {
        let mut said = Vec::new();
        if self.offset_is_random && self.offset > 0.0 {
            said.push(("ss_noise_offset_random_strength", "True".to_owned()));
        }
        if self.adaptive != 0.0 {
            said.push(("ss_adaptive_noise_scale", self.adaptive.to_string()));
        }
        if self.iterations > 0 {
            said.push(("ss_multires_noise_iterations", self.iterations.to_string()));
            said.push(("ss_multires_noise_discount", self.discount.to_string()));
        }
        if self.perturbation > 0.0 {
            said.push(("ss_ip_noise_gamma", self.perturbation.to_string()));
            if self.perturbation_is_random {
                said.push(("ss_ip_noise_gamma_random_strength", "True".to_owned()));
            }
        }
        said
    }

    /// The noise of items with latents of a shape `[batch, channels, height, width]`, on a device.
    ///
    /// # Errors
    /// Where an item has no latents, and where memory runs out.
    pub(super) fn draw(&self, items: &[Item], shape: &[i64], device: Device) -> Result<Noise> {
        let shape: Vec<usize> = shape.iter().map(|&side| side as usize).collect();
        let mut target = Vec::with_capacity(shape.iter().product());
        for item in items {
            target.extend(self.of_item(item, [shape[1], shape[2], shape[3]])?);
        }
        let mut added = None;
        if self.perturbation > 0.0 {
            let count = shape[1] * shape[2] * shape[3];
            let perturbed = |(own, item): (&[f32], &Item)| {
                let strength =
                    strength(self.perturbation, self.perturbation_is_random, &item.draw.at("ip_noise_strength"));
                let further = item.draw.at("ip_noise").normals(count);
                own.iter().zip(further).map(|(value, further)| value + strength * further).collect::<Vec<_>>()
            };
            let values: Vec<f32> = target.chunks(count).zip(items).flat_map(perturbed).collect();
            added = Some(from_f32(&values, &shape, device)?);
        }
        let target = from_f32(&target, &shape, device)?;
        Ok(Noise { added: added.unwrap_or_else(|| target.shallow_clone()), target })
    }

    /// The noise of one item, `[channels, height, width]`.
    fn of_item(&self, item: &Item, [channels, height, width]: [usize; 3]) -> Result<Vec<f32>> {
        let plane = height * width;
        let mut own = item.draw.at("noise").normals(channels * plane);
        if self.offset > 0.0 {
            let offsets = item.draw.at("noise_offset").normals(channels);
            let strengths = self.strengths(item, channels)?;
            for ((plane, offset), strength) in own.chunks_exact_mut(plane).zip(offsets).zip(strengths) {
                plane.iter_mut().for_each(|value| *value += strength * offset);
            }
        }
        if self.iterations == 0 {
            return Ok(own);
        }
        let factors = self.factors(&item.draw.at("multires_factor"));
        let coarse = sides((height, width), &factors).into_iter().enumerate().map(|(level, (height, width))| {
            let normals = item.draw.at("multires").with(level as u64).normals(channels * height * width);
            Ok(from_f32(&normals, &[channels, height, width], Device::Cpu)?)
        });
        let own = from_f32(&own, &[channels, height, width], Device::Cpu)?;
        let mixed = of_resolutions(&own, &coarse.collect::<Result<Vec<_>>>()?, self.discount)?;
        Ok(Vec::<f32>::try_from(mixed.f_view([-1])?)?)
    }

    /// How strong the offset of each channel is.
    fn strengths(&self, item: &Item, channels: usize) -> Result<Vec<f32>> {
        let offset = strength(self.offset, self.offset_is_random, &item.draw.at("noise_offset_strength"));
        if self.adaptive == 0.0 {
            return Ok(vec![offset; channels]);
        }
        let (network, name) = (Component::VAE, "latents");
        let latents = item.encoded.get(&network).and_then(|kept| kept.get(name));
        let latents = latents.ok_or(Error::MissingEncoding { network, name })?;
        let means = Vec::<f32>::try_from(latents.f_mean_dim([1i64, 2].as_slice(), false, Kind::Float)?)?;
        Ok(means.into_iter().map(|mean| (offset + self.adaptive as f32 * mean.abs()).max(0.0)).collect())
    }

    /// By what sides are divided from one resolution to the next: 2 to 4 to the power of the level.
    fn factors(&self, stream: &Stream) -> Vec<f64> {
        let mut stream = stream.clone();
        (0..self.iterations as i32).map(|level| (2.0 + 2.0 * f64::from(stream.uniform())).powi(level)).collect()
    }
}

/// A strength, or an even draw up to it.
fn strength(most: f64, is_random: bool, stream: &Stream) -> f32 {
    most as f32 * if is_random { stream.clone().uniform() } else { 1.0 }
}

/// Height and width of each resolution, up to the first of which a side is 1.
fn sides((height, width): (usize, usize), factors: &[f64]) -> Vec<(usize, usize)> {
    let divided = |side: usize, factor: f64| ((side as f64 / factor) as usize).max(1);
    let all: Vec<_> = factors.iter().map(|&factor| (divided(height, factor), divided(width, factor))).collect();
    let last = all.iter().position(|&(height, width)| height == 1 || width == 1);
    all[..last.map_or(all.len(), |last| last + 1)].to_vec()
}

/// Noise `[channels, height, width]` with coarser noise added, each level `discount` times as much as the one before, at unit
/// variance (Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023).
fn of_resolutions(noise: &Tensor, coarse: &[Tensor], discount: f64) -> Made<Tensor> {
    let (_, height, width) = noise.size3()?;
    let mut sum = noise.f_unsqueeze(0)?;
    for (level, coarse) in coarse.iter().enumerate() {
        let stretched = coarse.f_unsqueeze(0)?.f_upsample_bilinear2d([height, width], false, None, None)?;
        sum = sum.f_add(&stretched.f_mul_scalar(discount.powi(level as i32))?)?;
    }
    Ok(sum.f_div(&sum.f_std(true)?)?.f_squeeze_dim(0)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Format;

    const SHAPE: [i64; 4] = [2, 4, 12, 20];

    fn settings(keys: &[&str]) -> NoiseSettings {
        let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\n";
        NoiseSettings::of(&TrainConfig::from_text(text, Format::Yaml, keys).unwrap()).unwrap()
    }

    /// An item whose latents are a number, channel by channel.
    fn item(key: u64, latents: [f32; 4]) -> Item {
        let latents = Tensor::from_slice(&latents).view([4, 1, 1]).expand([4, 12, 20], false);
        let encoded = BTreeMap::from([(Component::VAE, BTreeMap::from([("latents".to_owned(), latents)]))]);
        Item {
            caption: String::new(),
            encoded,
            beside: BTreeMap::new(),
            example: None,
            weight: 1.0,
            draw: Stream::new(key),
        }
    }

    fn drawn(keys: &[&str], items: &[Item]) -> Noise {
        settings(keys).draw(items, &[&[items.len() as i64][..], &SHAPE[1..]].concat(), Device::Cpu).unwrap()
    }

    fn items() -> Vec<Item> {
        vec![item(3, [0.5, -2.0, 0.0, 1.0]), item(4, [0.0, 1.0, 1.0, 1.0])]
    }

    #[test]
    fn noise_is_the_same_in_any_batch() {
        for keys in [
            &[][..],
            &["noise_offset=0.1", "noise_offset_random_strength=true", "adaptive_noise_scale=0.05"],
            &["multires_noise_iterations=6", "multires_noise_discount=0.3"],
            &["ip_noise_gamma=0.1", "ip_noise_gamma_random_strength=true"],
        ] {
            let (both, last) = (drawn(keys, &items()), drawn(keys, &items()[1..]));
            assert_eq!(both.target.select(0, 1), last.target.select(0, 0), "{keys:?}");
            assert_eq!(both.added.select(0, 1), last.added.select(0, 0), "{keys:?}");
        }
    }

    #[test]
    fn offsets_are_one_number_a_channel_of_the_strength_that_keys_say() {
        let plain = drawn(&[], &items()).target;
        let offset = |keys: &[&str]| {
            let apart = drawn(keys, &items()).target - &plain;
            assert!(f64::try_from(apart.std_dim([2i64, 3].as_slice(), false, false).max()).unwrap() < 1e-6);
            Vec::<f64>::try_from(apart.mean_dim([2i64, 3].as_slice(), false, Kind::Double).view([-1])).unwrap()
        };
        let normals: Vec<f64> =
            items().iter().flat_map(|item| item.draw.at("noise_offset").normals(4)).map(f64::from).collect();
        let near = |found: Vec<f64>, strengths: [f64; 8]| {
            for ((found, normal), strength) in found.iter().zip(&normals).zip(strengths) {
                assert!((found - strength * normal).abs() < 1e-6, "{found} {strength}");
            }
        };
        near(offset(&["noise_offset=0.1"]), [0.1; 8]);
        // Means of 0.5, 2, 0 and 1, and of 0, 1, 1 and 1, in absolute value; nothing below 0.
        let adaptive = ["noise_offset=0.1", "adaptive_noise_scale=0.05"];
        near(offset(&adaptive), [0.125, 0.2, 0.1, 0.15, 0.1, 0.15, 0.15, 0.15]);
        near(offset(&["noise_offset=0.1", "adaptive_noise_scale=-0.1"]), [0.05, 0.0, 0.1, 0.0, 0.1, 0.0, 0.0, 0.0]);
        let shares = [3, 4].map(|key| f64::from(Stream::new(key).at("noise_offset_strength").uniform()));
        let random: Vec<f64> = (0..8).map(|channel| 0.1 * shares[channel / 4]).collect();
        near(offset(&["noise_offset=0.1", "noise_offset_random_strength=true"]), random.try_into().unwrap());
        assert!((0.0..1.0).contains(&shares[0]) && shares[0] != shares[1]);
    }

    #[test]
    fn inputs_are_perturbed_and_targets_are_not() {
        let plain = drawn(&[], &items());
        assert_eq!(plain.added, plain.target);
        let perturbed = drawn(&["ip_noise_gamma=0.1"], &items());
        assert_eq!(perturbed.target, plain.target);
        let further = (&perturbed.added - &perturbed.target) / 0.1;
        let (mean, deviation) = (f64::try_from(further.mean(Kind::Double)), f64::try_from(further.std(true)));
        // Of 1920 normal numbers.
        assert!(mean.unwrap().abs() < 0.07 && (deviation.unwrap() - 1.0).abs() < 0.05);
    }

    #[test]
    fn noise_of_several_resolutions_has_unit_variance_and_is_coarser() {
        let noise = drawn(&["multires_noise_iterations=8", "multires_noise_discount=0.9"], &items()).target;
        for item in 0..2 {
            assert!((f64::try_from(noise.select(0, item).std(true)).unwrap() - 1.0).abs() < 1e-5);
        }
        // Neighbours are alike, which those of plain noise are not.
        let alike = |noise: &Tensor| {
            let product = noise.narrow(3, 0, 19) * noise.narrow(3, 1, 19);
            f64::try_from(product.mean(Kind::Double)).unwrap()
        };
        assert!(alike(&noise) > 0.2 && alike(&drawn(&[], &items()).target).abs() < 0.1);
    }

    #[test]
    fn resolutions_end_where_a_side_is_one() {
        assert_eq!(sides((12, 20), &[1.0, 2.5, 9.0, 64.0]), [(12, 20), (4, 8), (1, 2)]);
        assert_eq!(sides((12, 20), &[1.0, 3.0]), [(12, 20), (4, 6)]);
    }

    /// A 2 × 2 plane and its mean, stretched by bilinear interpolation between centres, computed by hand.
    #[test]
    fn resolutions_are_added_as_they_are_defined() {
        let plane = |values: &[f32], side: i64| Tensor::from_slice(values).view([1, side, side]);
        let noise = Tensor::zeros([1, 4, 4], (Kind::Float, Device::Cpu));
        let coarse = [noise.shallow_clone(), plane(&[0.0, 4.0, 8.0, 12.0], 2), plane(&[2.0], 1)];
        let found = of_resolutions(&noise, &coarse, 0.5).unwrap();
        let steps = [0.0, 0.25, 0.75, 1.0];
        let sums: Vec<f64> = steps
            .iter()
            .flat_map(|down| steps.iter().map(move |right| 0.5 * (8.0 * down + 4.0 * right) + 0.25 * 2.0))
            .collect();
        let mean = sums.iter().sum::<f64>() / 16.0;
        let deviation = (sums.iter().map(|sum| (sum - mean).powi(2)).sum::<f64>() / 15.0).sqrt();
        let found = Vec::<f64>::try_from(found.view([-1]).to_kind(Kind::Double)).unwrap();
        assert!(found.iter().zip(&sums).all(|(found, sum)| (found - sum / deviation).abs() < 1e-6), "{found:?}");
    }

    #[test]
    fn a_scale_of_an_offset_that_there_is_not_is_refused() {
        let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\nadaptive_noise_scale: 0.1\n";
        let config = TrainConfig::from_text::<&str>(text, Format::Yaml, &[]).unwrap();
        assert!(NoiseSettings::of(&config).unwrap_err().to_string().contains("noise_offset"));
    }
}
