//! What makes a run the run that it is: with another value of one of these its continuation would be another run. And what
//! may change in the middle, which is noted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Debug};

use lora_core::DType;
use lora_data::Source;
use serde::{Deserialize, Serialize};

use crate::config::TrainConfig;

/// What tells base models apart.
const BASE: &str = "base_model";

/// The settings of a run, by the names of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Settings {
    /// Those that must stay.
    pub fixed: BTreeMap<String, String>,
    /// Those that may change.
    pub free: BTreeMap<String, String>,
    /// Names of those that only a look at the items themselves tells.
    #[serde(skip)]
    items: BTreeSet<String>,
}

/// A setting that is another than it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key.
    pub key: String,
    /// What it was.
    pub was: String,
    /// What it is.
    pub is: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {}, is {}", self.key, self.was, self.is)
    }
}

impl Settings {
    /// The settings of a run, but for its base.
    pub fn new(config: &TrainConfig, source: &dyn Source, precision: DType) -> Self {
        // Every key is named here, so that a new one cannot be forgotten.
        let TrainConfig {
            base_model: _,
            datasets: _,
            output_dir: _,
            output_name: _,
            init_from: _,
            strict: _,
            train,
            ema_decay,
            lora_rank,
            lora_alpha,
            use_rslora,
            lora_dropout,
            rank_dropout,
            module_dropout,
            variant,
            variant_options,
            rank_pattern,
            alpha_pattern,
            loraplus_lr_ratio,
            target_modules,
            train_unet,
            train_text_encoder,
            save_precision: _,
            learning_rate,
            unet_lr,
            text_encoder_lr,
            optimizer,
            optimizer_args,
            lr_scheduler,
            lr_warmup,
            max_grad_norm,
            batch_size,
            gradient_accumulation_steps,
            length,
            seed,
            max_resolution,
            clip_skip,
            max_token_length,
            text_cleaning,
            weighted_captions,
            prior_loss_weight,
            masked_loss: _,
            noise_offset,
            min_snr_gamma,
            precision: _,
            device,
            base_storage,
            offload_base,
            gradient_checkpointing,
            cpu_offload_checkpointing,
            cuda_graphs,
            recompute_feed_forward,
            cache_latents,
            vae_tiling,
            // What a plan changed is in the keys that it set.
            vram_budget: _,
            auto: _,
            allow_lower_resolution: _,
            cache_dir: _,
            save_every_n_steps: _,
            save_every_n_epochs: _,
            save_state: _,
            save_state_every_n_steps: _,
            resume: _,
            validation_data_dir: _,
            validate_every_n_steps: _,
            samples: _,
            callbacks: _,
        } = config;
        let mut settings = Self::default();
        let mut fixed = |key: &str, value: &dyn Debug| settings.fixed.insert(key.to_owned(), shown(value));
        fixed("train", train);
        fixed("ema_decay", ema_decay);
        fixed("optimizer", &Plain(optimizer));
        fixed("lora_rank", lora_rank);
        fixed("lora_alpha", lora_alpha);
        fixed("use_rslora", use_rslora);
        fixed("lora_dropout", lora_dropout);
        fixed("rank_dropout", rank_dropout);
        fixed("module_dropout", module_dropout);
        fixed("variant", &Plain(variant));
        fixed("variant_options", variant_options);
        fixed("rank_pattern", rank_pattern);
        fixed("alpha_pattern", alpha_pattern);
        fixed("target_modules", target_modules);
        fixed("train_unet", train_unet);
        fixed("train_text_encoder", train_text_encoder);
        fixed("batch_size", batch_size);
        fixed("gradient_accumulation_steps", gradient_accumulation_steps);
        fixed("seed", seed);
        fixed("max_resolution", &Plain(format!("{}×{}", max_resolution.0, max_resolution.1)));
        fixed("clip_skip", clip_skip);
        fixed("max_token_length", max_token_length);
        fixed("text_cleaning", &Plain(text_cleaning.name()));
        fixed("weighted_captions", weighted_captions);
        fixed("prior_loss_weight", prior_loss_weight);
        fixed("noise_offset", noise_offset);
        fixed("min_snr_gamma", min_snr_gamma);
        fixed("precision", &Plain(precision));
        fixed("base_storage", base_storage);
        // A picture's latents are drawn once or at each visit.
        fixed("cache_latents", cache_latents);
        fixed("vae_tiling", vae_tiling);
        let data = source.identity();
        settings.items = data.items.iter().map(|(name, _)| name.clone()).collect();
        settings.fixed.extend(data.options.into_iter().chain(data.items));

        let mut free = |key: &str, value: &dyn Debug| settings.free.insert(key.to_owned(), shown(value));
        free("learning_rate", learning_rate);
        free("unet_lr", unet_lr);
        free("text_encoder_lr", text_encoder_lr);
        free("loraplus_lr_ratio", loraplus_lr_ratio);
        free("optimizer_args", optimizer_args);
        free("lr_scheduler", lr_scheduler);
        free("lr_warmup_steps", lr_warmup);
        free("max_grad_norm", max_grad_norm);
        free("length of the run", length);
        free("device", &Plain(device));
        free("offload_base", offload_base);
        free("gradient_checkpointing", gradient_checkpointing);
        free("cpu_offload_checkpointing", cpu_offload_checkpointing);
        free("cuda_graphs", cuda_graphs);
        free("recompute_feed_forward", recompute_feed_forward);
        settings
    }

    /// A digest of the base, where it is known.
    pub fn base(&self) -> Option<&str> {
        self.fixed.get(BASE).map(String::as_str)
    }

    /// Names the base.
    pub fn set_base(&mut self, digest: String) {
        self.fixed.insert(BASE.to_owned(), digest);
    }

    /// What differs from an earlier run of those that must stay.
    pub fn differences(&self, earlier: &Self) -> Vec<Difference> {
        differences(&earlier.fixed, &self.fixed)
    }

    /// As [`Settings::differences`], of what the configuration alone says.
    pub fn differences_of_config(&self, earlier: &Self) -> Vec<Difference> {
        let mut all = self.differences(earlier);
        all.retain(|difference| difference.key != BASE && !self.items.contains(&difference.key));
        all
    }

    /// What differs from an earlier run of those that may change.
    pub fn changes(&self, earlier: &Self) -> Vec<Difference> {
        differences(&earlier.free, &self.free)
    }
}

fn differences(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<Difference> {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let none = || "nothing".to_owned();
    let pairs = keys.into_iter().map(|key| {
        (key, before.get(key).map_or_else(none, Clone::clone), now.get(key).map_or_else(none, Clone::clone))
    });
    pairs
        .filter(|(_, was, is)| was != is)
        .map(|(key, was, is)| {
            let (was, is) = apart(&was, &is);
            Difference { key: key.clone(), was, is }
        })
        .collect()
}

/// Two long texts from where they begin to differ.
fn apart(was: &str, is: &str) -> (String, String) {
    const SHORT: usize = 60;
    if was.chars().count().max(is.chars().count()) <= SHORT {
        return (was.to_owned(), is.to_owned());
    }
    let same = was.chars().zip(is.chars()).take_while(|(a, b)| a == b).count();
    // From the name of the field on.
    let common: String = was.chars().take(same).collect();
    let from = common.rfind([',', '{', '(']).map_or(0, |at| common[..=at].chars().count());
    let part = |text: &str| {
        let all: Vec<char> = text.chars().skip(from).collect();
        let end = if all.len() > SHORT { " …" } else { "" };
        format!("{}{}{end}", if from > 0 { "…" } else { "" }, all.iter().take(SHORT).collect::<String>())
    };
    (part(was), part(is))
}

/// Text without quotes.
struct Plain<T>(T);

impl<T: fmt::Display> Debug for Plain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

fn shown(value: &dyn Debug) -> String {
    let text = format!("{value:?}");
    match text.strip_prefix("Some(").and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => inner.to_owned(),
        None if text == "None" => "none".to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_and_long_ones_shortened() {
        let of = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let long = |value: &str| format!("Options {{ first: {}, second: {value}, third: 3 }}", "x".repeat(80));
        let (before, now) = (
            of(&[("a", "1"), ("b", "2"), ("c", &long("alpha")), ("gone", "x")]),
            of(&[("a", "1"), ("b", "3"), ("c", &long("beta"))]),
        );
        let all: Vec<String> = differences(&before, &now).iter().map(ToString::to_string).collect();
        assert_eq!(
            all,
            [
                "b was 2, is 3",
                "c was … second: alpha, third: 3 }, is … second: beta, third: 3 }",
                "gone was x, is nothing"
            ]
        );
    }

    #[test]
    fn values_are_shown_as_people_write_them() {
        assert_eq!(
            (shown(&Some(5.0)), shown(&None::<f64>), shown(&Plain("x")), shown(&1e-4)),
            ("5.0".into(), "none".into(), "x".into(), "0.0001".into())
        );
    }
}
