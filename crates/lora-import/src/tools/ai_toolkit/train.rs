//! ai-toolkit's `train`: lengths, rates, noise levels, losses, preservation of the base.

use serde_json::Value;

use super::data::rate;
use super::{is_flow, precision};
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, Settings, becomes, instead, lost, no_effect, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same, table};
use crate::tools::optimisers;
use crate::values;

pub(super) static TRAIN: &[Row] = &[
    same("batch_size", "batch_size", Kind::Count),
    by("steps", &["max_train_steps"], "1000 where none are given; divided by gradient_accumulation_steps", |field| {
        let accumulation = field.here.count("gradient_accumulation_steps").unwrap_or(1).max(1);
        match field.count() {
            Some(steps) if accumulation > 1 => {
                becomes("max_train_steps", (steps / accumulation).max(1), "counted before accumulation there")
            }
            _ => field.count_as("max_train_steps"),
        }
    })
    .default("1000"),
    by("gradient_accumulation_steps", &["gradient_accumulation_steps"], "steps are counted before it", accumulation),
    by("gradient_accumulation", &["gradient_accumulation_steps"], "steps are counted after it", accumulation),
    by("train_unet", &["train_unet"], "adapted", |field| match field.on() {
        true => no_effect("adapted, as without it"),
        false => taken("train_unet", false),
    }),
    by("train_text_encoder", &["train_text_encoder"], "off where it is not given", |field| {
        match (field.on(), is_flow(&field.root)) {
            (true, true) => lost("text encoders of this base are never trained here"),
            (false, true) => no_effect("text encoders of this base are never trained here"),
            (on, false) => taken("train_text_encoder", on),
        }
    })
    .default("false"),
    same("gradient_checkpointing", "gradient_checkpointing", Kind::Flag).default("true"),
    nothing("noise_scheduler", "the base's own"),
    by("timestep_type", &["timestep_sampling"], "for bases that are trained by flow matching", |field| {
        match (is_flow(&field.root), field.text().as_str()) {
            (false, _) => no_effect("timesteps of this base are drawn evenly"),
            (true, "sigmoid") => taken("timestep_sampling", "sigmoid"),
            (true, "linear") => taken("timestep_sampling", "uniform"),
            (true, "weighted") => instead(
                vec![("timestep_sampling", "uniform".into())],
                "drawn evenly, as there, but without its weights by noise level",
            ),
            (true, "shift" | "flux_shift" | "lumina2_shift") => instead(
                vec![("timestep_sampling", "flux_shift".into())],
                "moved by the picture's size, as there, but from the sigmoid of normal numbers instead of evenly drawn ones",
            ),
            (true, other) => instead(
                vec![("timestep_sampling", "sigmoid".into())],
                format!("noise levels are not drawn by {other}"),
            ),
        }
    })
    .default("\"sigmoid\""),
    gone("content_or_style", &["\"balanced\""], "noise levels are drawn alike for content and style"),
    gone("linear_timesteps linear_timesteps2", OFF, "no weights by noise level"),
    by("min_denoising_steps", &["min_timestep"], "for bases that are trained by flow matching", |field| {
        bound(field, "min_timestep", &[0.0])
    }),
    by("max_denoising_steps", &["max_timestep"], "for bases that are trained by flow matching", |field| {
        bound(field, "max_timestep", &[999.0, 1000.0])
    }),
    by("optimizer", &["optimizer"], "by its name", |field| optimisers::named(&field.text())),
    table("optimizer_params", &[OPTIMIZER]),
    by("lr", &["learning_rate"], "1e-6 where none is given; Prodigy's is 1", |field| match field.number() {
        Some(rate) if rate < 0.1 && optimiser(&field.root) == "prodigy" => {
            becomes("learning_rate", 1, "below 0.1 it is 1 there")
        }
        _ => field.number_as("learning_rate"),
    })
    .default("0.000001"),
    by("unet_lr", &["unet_lr", "learning_rate"], "lr where none is given", |field| match field.number() {
        Some(rate) if is_flow(&field.root) => lost(format!("{rate}: lr holds for the transformer")),
        _ => field.number_as("unet_lr"),
    }),
    by("text_encoder_lr", &["text_encoder_lr"], "lr where none is given (here half of it)", |field| {
        let trained = field.here.on("train_text_encoder") && !is_flow(&field.root);
        match (trained, &field.value, field.here.number("lr"), field.number()) {
            (false, ..) => no_effect("text encoders are not trained"),
            (true, Value::String(text), Some(rate), _) if text == "lr" => {
                becomes("text_encoder_lr", values::of_number(rate), "lr")
            }
            (true, _, _, Some(rate)) => taken("text_encoder_lr", values::of_number(rate)),
            _ => field.expected("a number"),
        }
    })
    .default("\"lr\""),
    nothing("embedding_lr", "no embeddings are trained"),
    nothing("adapter_lr", "no control adapters are trained"),
    nothing("refiner_lr train_refiner", "no refiner is trained"),
    by("lr_scheduler", &["lr_scheduler"], "by its name", |field| optimisers::schedule(&field.text())),
    gone("lr_scheduler_params", OFF, "schedules have no numbers of their own; lr_warmup_steps is the warm-up"),
    by("dtype", &["precision"], "fp32 where none is given", |field| precision(field, "precision")).default("\"fp32\""),
    same("max_grad_norm", "max_grad_norm", Kind::Number),
    by("ema_config", &["ema_decay"], "use_ema and ema_decay", |field| {
        let on = field.value.get("use_ema").is_none_or(|on| values::switch(on) != Some(false));
        match (on && field.value.is_object(), field.value.get("ema_decay").and_then(values::number)) {
            (false, _) => no_effect("off, as without it"),
            (true, decay) => taken("ema_decay", decay.unwrap_or(0.999)),
        }
    }),
    same("min_snr_gamma", "min_snr_gamma", Kind::Positive),
    gone("snr_gamma", OFF, "a fixed weight by SNR is min_snr_gamma"),
    gone("learnable_snr_gos", OFF, "no weights that are learned"),
    same("noise_offset", "noise_offset", Kind::Positive),
    gone("dynamic_noise_offset", OFF, "the noise offset does not follow the latents' mean"),
    by("loss_type", &["loss_type"], "`mse` and `mae`", |field| match field.text().as_str() {
        "mse" => no_effect("as without it"),
        "mae" => taken("loss_type", "l1"),
        other => lost(format!("no loss {other}; it is the squared difference")),
    }),
    gone("loss_target", &["\"noise\""], "what is predicted is the base's"),
    nothing(
        "skip_first_sample force_first_sample",
        "samples are drawn before the first step, too, where there are prompts",
    ),
    by("disable_sampling", &[], "no prompts are taken", |field| {
        field.when_on(translated(Settings::new(), "no prompts are taken"))
    }),
    by("prompt_dropout_prob", &["caption_dropout_rate"], "captions that are left out", |field| {
        rate(field, "caption_dropout_rate")
    }),
    same("reg_weight", "prior_loss_weight", Kind::Number),
    nothing("cache_text_embeddings unload_text_encoder", "captions are encoded once wherever they may be"),
    nothing("xformers sdp attention_backend", "how attention is computed"),
    gone("start_step", OFF, "a run goes on from its own state alone"),
    gone("weight_jitter", OFF, "weights are not jittered"),
    nothing("merge_network_on_save", "lora merge does it"),
    gone("free_u", OFF, "the U-Net is the base's"),
    gone("noise_multiplier", &["1"], "noise has its usual strength"),
    gone("img_multiplier noisy_latent_multiplier latent_multiplier", &["1"], "latents have their usual strength"),
    gone("random_noise_shift", OFF, "noise is not moved"),
    gone("random_noise_multiplier", OFF, "noise has its usual strength"),
    gone("target_noise_multiplier", &["1"], "noise has its usual strength"),
    gone("negative_prompt", OFF, "no negative prompts are trained on"),
    gone("match_noise_norm", OFF, "what is predicted is not scaled"),
    gone(
        "short_and_long_captions short_and_long_captions_encoder_split",
        OFF,
        "each picture has one caption at a visit",
    ),
    nothing("single_item_batching", "how steps are computed"),
    by("inverted_mask_prior", &["prior_mask_weight"], "by inverted_mask_prior_multiplier", |field| {
        prior(field, "prior_mask_weight", field.here.number("inverted_mask_prior_multiplier").unwrap_or(0.5))
    }),
    nothing("inverted_mask_prior_multiplier", "with inverted_mask_prior"),
    by(
        "diff_output_preservation",
        &["prior_prompt", "prior_prompt_weight"],
        "for the class itself, by its class and multiplier",
        output_preservation,
    ),
    nothing("diff_output_preservation_multiplier diff_output_preservation_class", "with diff_output_preservation"),
    by("blank_prompt_preservation", &["prior_blank_weight"], "by blank_prompt_preservation_multiplier", |field| {
        prior(field, "prior_blank_weight", field.here.number("blank_prompt_preservation_multiplier").unwrap_or(1.0))
    }),
    nothing("blank_prompt_preservation_multiplier", "with blank_prompt_preservation"),
    gone("standardize_images", OFF, "pictures are as they are"),
    gone("standardize_latents", OFF, "latents are as they are"),
    gone("train_turbo", OFF, "no distilled schedule is trained"),
    gone("do_cfg do_random_cfg", OFF, "guidance is not part of training"),
    nothing("cfg_scale", "with do_cfg"),
    gone("do_guidance_loss", OFF, "guidance is not part of training"),
    nothing("guidance_loss_target", "with do_guidance_loss"),
    gone("do_differential_guidance", OFF, "guidance is not part of training"),
    nothing("differential_guidance_scale", "with do_differential_guidance"),
    gone("bypass_guidance_embedding", OFF, "FLUX.1 is told guidance_scale"),
    gone("do_paramiter_swapping", OFF, "all parameters of the adapter are trained at each step"),
    nothing("paramiter_swapping_factor", "with do_paramiter_swapping"),
    gone("optimal_noise_pairing_samples", &["1"], "noise is not paired with latents"),
    gone("force_consistent_noise", OFF, "noise is drawn anew at each visit"),
    gone("pred_scaler", &["1"], "what is predicted is not scaled"),
    gone("switch_boundary_every", &["1"], "for bases of several stages"),
    gone("do_fft_loss t0_loss_target", OFF, "the loss is the squared difference"),
    gone("max_loss", OFF, "losses are not cut off"),
    gone("latent_feature_extractor_path diffusion_feature_extractor_path", OFF, "no loss of features"),
    gone("adapter_assist_name_or_path", OFF, "no adapters assist"),
    nothing("num_train_timesteps", "the base's own"),
    nothing("next_sample_timesteps", "with timestep_type"),
];

static OPTIMIZER: &[Row] = optimisers::argument_rows!(|field: &Field<'_>| optimiser(&field.root));

fn optimiser(root: &Scope<'_>) -> &'static str {
    optimisers::ours(&root.text("train.optimizer").unwrap_or_else(|| "adamw".to_owned()))
}

fn accumulation(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(0 | 1) => no_effect("1, as without it"),
        Some(count) => taken("gradient_accumulation_steps", count),
        // -1 is a whole epoch.
        None => lost("batches of a whole epoch are not accumulated"),
    }
}

fn bound(field: &Field<'_>, ours: &'static str, neutral: &[f64]) -> Outcome {
    match field.number() {
        Some(step) if neutral.contains(&step) => no_effect("off, as without it"),
        Some(step) if is_flow(&field.root) => becomes(ours, values::of_number(step), "in thousandths"),
        Some(_) => lost("all timesteps are drawn"),
        None => field.expected("a number"),
    }
}

/// A switch of prior preservation whose weight is a key of its own.
fn prior(field: &Field<'_>, ours: &'static str, weight: f64) -> Outcome {
    if field.on() { taken(ours, values::of_number(weight)) } else { no_effect("off, as without it") }
}

/// The base's answer to each caption with the class in the place of the trigger word.
fn output_preservation(field: &Field<'_>) -> Outcome {
    if !field.on() {
        return no_effect("off, as without it");
    }
    let class = field.here.text("diff_output_preservation_class").unwrap_or_default();
    let weight = field.here.number("diff_output_preservation_multiplier").unwrap_or(1.0);
    let settings = vec![("prior_prompt", class.into()), ("prior_prompt_weight", values::of_number(weight))];
    translated(settings, "its class, in the place of the trigger word, as there")
}
