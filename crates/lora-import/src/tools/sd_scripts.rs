//! kohya-ss/sd-scripts: the options of `train_network.py`, `sdxl_train_network.py`, `flux_train_network.py`,
//! `sd3_train_network.py` and their like, on the command line or in a TOML file whose headings mean nothing.

use std::path::Path;

use serde_json::{Value, json};

use super::sd_scripts_network::{self as network, alpha};
use super::{Table, Tool, optimisers, tracking};
use crate::config::Draft;
use crate::engine::{Field, Scope};
use crate::input::command::LAUNCH;
use crate::input::tree::{Entry, Node};
use crate::input::{self, Document, Problem, Source};
use crate::outcome::{Outcome, Settings, becomes, instead, lost, no_effect, refused, taken, translated};
use crate::report::{Accounted, Verdict};
use crate::row::{Kind, OFF, Row, arguments, by, gone, nothing, same, table};
use crate::{sd_scripts, values};

pub(crate) static TABLE: Table = Table {
    tool: Tool::SdScripts,
    name: "sd-scripts",
    title: "sd-scripts",
    about: "Options of the command line, or the TOML file of `--config_file`, whose headings mean nothing; options win over the \
            file. Tables of `--dataset_config` become `datasets`. Variables of a shell script are put in where it sets them. \
            `max_train_steps` are optimiser steps, there and here.",
    groups: &[OWN, SHARED, FLOW, AROUND],
    own: &[OWN, SHARED, FLOW, AROUND],
    is: |has| has("pretrained_model_name_or_path") && !has("model_name_or_path"),
    prepare: flat,
    finish: dataset_file,
};

/// The base that a run is for, as far as its options say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    Sd,
    Sdxl,
    Flux,
    Chroma,
    Sd3,
    Anima,
}

pub(super) fn base(root: &Scope<'_>) -> Base {
    let script = root.script().unwrap_or_default().to_ascii_lowercase();
    let module = root.text("network_module").unwrap_or_default();
    // The GUI's switches and kinds.
    let kind = root.text("LoRA_type").unwrap_or_default();
    if script.starts_with("flux") || module.contains("flux") || root.on("flux1_checkbox") || kind.starts_with("Flux1") {
        if root.text("model_type").as_deref() == Some("chroma") { Base::Chroma } else { Base::Flux }
    } else if script.starts_with("anima") || module.contains("anima") || root.given("qwen3").is_some() {
        Base::Anima
    } else if script.starts_with("sd3") || module.contains("sd3") || root.on("sd3_checkbox") {
        Base::Sd3
    } else if script.starts_with("sdxl") || root.on("sdxl") || root.on("sdxl_checkbox") {
        Base::Sdxl
    } else if root.given("t5xxl").is_some() && root.given("clip_g").is_some() {
        Base::Sd3
    } else if root.given("t5xxl").is_some() {
        Base::Flux
    } else {
        Base::Sd
    }
}

pub(super) fn is_flow(root: &Scope<'_>) -> bool {
    matches!(base(root), Base::Flux | Base::Chroma | Base::Sd3 | Base::Anima)
}

/// Only for bases that predict the noise or the velocity.
fn of_diffusion(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match is_flow(&field.root) {
        true => no_effect("this base is trained by flow matching"),
        false => outcome,
    }
}

/// Only for bases that are trained by flow matching.
fn of_flow(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match is_flow(&field.root) {
        true => outcome,
        false => no_effect("only bases that are trained by flow matching read it"),
    }
}

/// Options that the GUI calls otherwise, or does not have.
pub(super) static OWN: &[Row] = &[
    by("config_file", &[], "read, under the options of the command line", |_| {
        no_effect("its keys are read with these")
    }),
    nothing("output_config", "nothing is written but what `--out` names"),
    nothing("v2", "the base's files say it"),
    by(
        "v_parameterization",
        &["v_parameterization"],
        "off means that the noise is predicted, whatever the base says",
        |field| {
            of_diffusion(
                field,
                match field.on() {
                    true => taken("v_parameterization", true),
                    false => becomes("v_parameterization", false, "the noise is predicted unless it is given"),
                },
            )
        },
    )
    .default("false"),
    by("resolution", &["max_resolution"], "an area where there are buckets, there and here", resolution),
    by("caption_extension", &["caption_extension"], "captions are looked for with this extension alone", |field| {
        taken("caption_extension", field.text())
    })
    .default("\".caption\""),
    by("caption_extention", &["caption_extension"], "an old spelling", |field| {
        taken("caption_extension", field.text())
    }),
    by("in_json", &["metadata_file", "train_data_dir"], "a metadata file", |field| {
        let mut settings: Settings = vec![("metadata_file", field.text().into())];
        if field.root.given("train_data_dir").is_none() {
            settings.push(("train_data_dir", ".".into()));
        }
        translated(settings, "its pictures are trained on")
    }),
    by("dataset_repeats", &["repeats"], "with `in_json`", |field| match field.root.given("in_json") {
        Some(_) => taken("repeats", field.count().unwrap_or(1)),
        None => no_effect("only with in_json"),
    }),
    by("output_name", &["output_name"], "the file's name", |field| taken("output_name", field.text()))
        .default("\"last\""),
    by("save_precision", &["save_precision"], "`float` is fp32, and so is none", save_precision).default("\"float\""),
    by("max_train_epochs", &["epochs"], "wins over max_train_steps", |field| match field.count() {
        Some(0) => no_effect("0: max_train_steps counts"),
        _ => field.count_as("epochs"),
    }),
    by("max_train_steps", &["max_train_steps"], "optimiser steps, unless max_train_epochs is given", |field| {
        match (field.root.count("max_train_epochs").filter(|&epochs| epochs > 0), field.count()) {
            (Some(_), _) => no_effect("max_train_epochs wins over it"),
            (None, Some(steps)) => taken("max_train_steps", steps),
            (None, None) => field.expected("a whole number"),
        }
    })
    .default("1600"),
    by("train_batch_size", &["batch_size"], "pictures at once", |field| field.count_as("batch_size")),
    by(
        "optimizer_type",
        &["optimizer"],
        "by its name, in capitals or not, with its module or not",
        |field| match field.root.on("use_8bit_adam") || field.root.on("use_lion_optimizer") {
            true => refused("contradicts use_8bit_adam or use_lion_optimizer; keep one of them"),
            false => optimisers::named(&field.text()),
        },
    ),
    by("use_8bit_adam", &["optimizer"], "`adamw8bit`", |field| switched(field, "adamw8bit")),
    by("use_lion_optimizer", &["optimizer"], "`lion`", |field| switched(field, "lion")),
    by("lr_warmup_steps", &["lr_warmup_steps"], "steps, or a share below 1", |field| match field.number() {
        Some(steps) if steps > 0.0 && field.root.text("lr_scheduler").as_deref() == Some("constant") => {
            refused("lr_scheduler = constant has no warm-up in sd-scripts, which ends there; take constant_with_warmup")
        }
        Some(0.0) => no_effect("off, as without it"),
        Some(steps) => taken("lr_warmup_steps", values::of_number(steps)),
        None => field.expected("steps, or a share below 1"),
    }),
    by("network_weights", &["init_from"], "a LoRA to go on from", |field| taken("init_from", field.text())),
    by(
        "network_module",
        &["variant", "target_modules", "train"],
        "`networks.lora` and its like: LoRA; `lycoris.kohya`: by `algo`",
        network::module,
    ),
    by("network_dim", &["lora_rank"], "the rank", |field| field.count_as("lora_rank")).default("4"),
    by("network_alpha", &["lora_alpha"], "1 where none is given, 0 is the rank", |field| alpha(field, "network_dim"))
        .default("1"),
    by("network_train_unet_only", &["train_text_encoder"], "off there", |field| match field.on() {
        true if field.root.on("network_train_text_encoder_only") => {
            refused("contradicts network_train_text_encoder_only; keep one of them")
        }
        true if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        true => becomes("train_text_encoder", false, "the U-Net alone"),
        false => no_effect("off, as without it"),
    }),
    by("network_train_text_encoder_only", &["train_unet"], "off there", |field| match field.on() {
        true if is_flow(&field.root) => refused("text encoders of this base cannot be trained here"),
        true => becomes("train_unet", false, "the text encoders alone"),
        false => no_effect("off, as without it"),
    }),
    arguments("network_args", network::ARGUMENTS),
    by("no_half_vae", &[], "an autoencoder that overflows goes on in fp32", |_| {
        no_effect("an autoencoder that overflows goes on in fp32")
    }),
    by("clip_skip", &["clip_skip"], "SDXL reads a layer of its own", |field| {
        match (base(&field.root), field.count()) {
            (Base::Sd, Some(layers @ 1..)) => taken("clip_skip", layers),
            (_, Some(_)) => no_effect("the layer that is read is the base's own"),
            (_, None) => field.expected("a whole number"),
        }
    }),
    by("max_token_length", &["max_token_length"], "75, 150 or 225", max_token_length),
    nothing("xformers", "how attention is computed"),
    nothing("cache_text_encoder_outputs", "captions are encoded once wherever they may be"),
    nothing("cache_text_encoder_outputs_to_disk", "with `cache_dir`"),
];

/// What GUI and command line call the same.
pub(super) static SHARED: &[Row] = &[
    by("pretrained_model_name_or_path", &["base_model"], "a file or a folder", base_model),
    by("train_data_dir", &["train_data_dir"], "a folder of `N_name` folders", |field| folder(field, "train_data_dir")),
    by("reg_data_dir", &["reg_data_dir"], "regularisation pictures", |field| folder(field, "reg_data_dir")),
    by("dataset_config", &["datasets"], "each of its subsets becomes a dataset", |_| {
        translated(vec![], "each of its subsets is a dataset")
    }),
    by("conditioning_data_dir", &["mask_dir"], "masks", |field| match field.root.on("masked_loss") {
        true => taken("mask_dir", field.text()),
        false => no_effect("only with masked_loss"),
    }),
    same("masked_loss", "masked_loss", Kind::Flag),
    by("alpha_mask", &["alpha_mask", "masked_loss"], "counts in the loss without masked_loss, there", |field| {
        field.when_on(translated(
            vec![("alpha_mask", true.into()), ("masked_loss", true.into())],
            "transparency weights the loss",
        ))
    }),
    same("prior_loss_weight", "prior_loss_weight", Kind::Number),
    same("output_dir", "output_dir", Kind::Text),
    same("logging_dir", "logging_dir", Kind::Text),
    same("enable_bucket", "enable_bucket", Kind::Flag),
    same("min_bucket_reso", "min_bucket_reso", Kind::Count),
    same("max_bucket_reso", "max_bucket_reso", Kind::Count),
    by("bucket_reso_steps", &["bucket_reso_steps"], "multiples of 8", bucket_steps),
    same("bucket_no_upscale", "bucket_no_upscale", Kind::Flag),
    same("shuffle_caption", "shuffle_caption", Kind::Flag),
    same("caption_separator", "caption_separator", Kind::Text),
    same("keep_tokens", "keep_tokens", Kind::AtLeastOne),
    same("keep_tokens_separator", "keep_tokens_separator", Kind::Text),
    same("secondary_separator", "secondary_separator", Kind::Text),
    same("enable_wildcard", "enable_wildcard", Kind::Flag),
    same("caption_prefix", "caption_prefix", Kind::Text),
    same("caption_suffix", "caption_suffix", Kind::Text),
    same("caption_dropout_rate", "caption_dropout_rate", Kind::Positive),
    same("caption_dropout_every_n_epochs", "caption_dropout_every_n_epochs", Kind::AtLeastOne),
    same("caption_tag_dropout_rate", "caption_tag_dropout_rate", Kind::Positive),
    same("token_warmup_min", "token_warmup_min", Kind::Count),
    same("token_warmup_step", "token_warmup_step", Kind::Positive),
    by("flip_aug", &["processors"], "`flip`", processors),
    by("color_aug", &["processors"], "`color_jitter`", processors),
    by("random_crop", &["processors"], "`random_crop`", processors),
    gone("face_crop_aug_range", OFF, "no crops around faces"),
    gone("resize_interpolation", &["\"lanczos\"", "null"], "pictures are always resized with Lanczos filters"),
    same("weighted_captions", "weighted_captions", Kind::Flag),
    by("cache_latents", &["cache_latents"], "on here even without it", |field| match field.on() {
        true => taken("cache_latents", true),
        false => no_effect("latents are cached without it; the result is the same"),
    }),
    nothing("cache_latents_to_disk", "`cache_dir` keeps them for the next run"),
    nothing("vae_batch_size", "how many pictures are encoded at once"),
    same("vae", "vae", Kind::Text),
    same("learning_rate", "learning_rate", Kind::Number).default("0.000002"),
    by("unet_lr", &["unet_lr"], "learning_rate where none is given", |field| match field.number() {
        Some(_) if is_flow(&field.root) => {
            becomes("learning_rate", values::of_number(field.number().unwrap_or_default()), "the transformer's")
        }
        _ => field.number_as("unet_lr"),
    }),
    by(
        "text_encoder_lr",
        &["text_encoder_lr", "text_encoder_1_lr", "text_encoder_2_lr"],
        "learning_rate where none is given (here half of it); two numbers are SDXL's two encoders",
        text_encoder_lr,
    )
    .default("\"learning_rate\""),
    same("max_grad_norm", "max_grad_norm", Kind::Number),
    by("lr_scheduler", &["lr_scheduler"], "by its name", |field| optimisers::schedule(&field.text())),
    arguments(
        "optimizer_args",
        optimisers::argument_rows!(|field: &Field<'_>| optimisers::ours(
            &field.root.text("optimizer_type").or_else(|| field.root.text("optimizer")).unwrap_or_else(|| {
                if field.root.on("use_8bit_adam") {
                    "adamw8bit"
                } else if field.root.on("use_lion_optimizer") {
                    "lion"
                } else {
                    "adamw"
                }
                .to_owned()
            })
        )),
    ),
    by("lr_scheduler_type", &[], "a schedule of another program", |field| {
        lost(format!("no schedule {}", field.text()))
    }),
    by("lr_scheduler_args", &[], "numbers of a schedule", |_| lost("schedules have no numbers of their own")),
    by("lr_scheduler_num_cycles", &["lr_scheduler_num_cycles"], "of `cosine_with_restarts`", |field| {
        schedules_own(field, "cosine_with_restarts", "lr_scheduler_num_cycles")
    }),
    by("lr_scheduler_power", &["lr_scheduler_power"], "of `polynomial`, which ends at 1e-7 there", |field| {
        schedules_own(field, "polynomial", "lr_scheduler_power")
    }),
    by("lr_decay_steps", &["lr_decay_steps"], "of `warmup_stable_decay`", |field| {
        schedules_own(field, "warmup_stable_decay", "lr_decay_steps")
    }),
    by("lr_scheduler_timescale", &[], "of `inverse_sqrt`: its warm-up", |field| {
        match field.root.text("lr_scheduler").as_deref() == Some("inverse_sqrt")
            && field.number().is_some_and(|scale| scale > 0.0)
        {
            true => lost("the time scale of inverse_sqrt is its warm-up"),
            false => no_effect("a number of inverse_sqrt"),
        }
    }),
    by("lr_scheduler_min_lr_ratio", &["lr_min_ratio"], "of `cosine_with_min_lr` and `warmup_stable_decay`", |field| {
        match field.root.text("lr_scheduler").as_deref() {
            Some("warmup_stable_decay") => schedules_own(field, "warmup_stable_decay", "lr_min_ratio"),
            _ => schedules_own(field, "cosine_with_min_lr", "lr_min_ratio"),
        }
    }),
    same("gradient_accumulation_steps", "gradient_accumulation_steps", Kind::Count),
    same("gradient_checkpointing", "gradient_checkpointing", Kind::Flag),
    by("cpu_offload_checkpointing", &["cpu_offload_checkpointing"], "with gradient_checkpointing", |field| {
        field.when_on(taken("cpu_offload_checkpointing", true))
    }),
    by("mixed_precision", &["precision"], "`no` is fp32", |field| match field.text().as_str() {
        precision @ ("fp16" | "bf16") => taken("precision", precision),
        "no" => becomes("precision", "fp32", "no mixed precision"),
        _ => field.expected("no, fp16 or bf16"),
    })
    .default("\"no\""),
    gone("full_fp16 full_bf16", OFF, "trained numbers and their optimiser's stay in fp32"),
    by("fp8_base", &["base_storage"], "`fp8`, with a factor for each output", fp8),
    by("fp8_base_unet", &["base_storage"], "`fp8`, with a factor for each output, for the text encoders too", fp8),
    by("seed", &["seed"], "other random numbers follow from it here", |field| match field.value.as_i64() {
        // The GUI's 0 is a seed; negative ones wrap there.
        Some(seed) if seed >= 0 => taken("seed", seed),
        _ => match values::count(&field.value) {
            Some(seed) => taken("seed", seed),
            None => field.expected("a whole number from 0 on"),
        },
    }),
    by("noise_offset", &["noise_offset"], "a constant for each channel", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(offset) => of_diffusion(field, taken("noise_offset", values::of_number(offset))),
        None => field.expected("a number"),
    }),
    by(
        "noise_offset_random_strength",
        &["noise_offset_random_strength"],
        "drawn for each picture of a batch",
        |field| of_diffusion(field, random_strength(field, "noise_offset_random_strength")),
    ),
    by(
        "multires_noise_iterations",
        &["multires_noise_iterations"],
        "each picture's noise has unit variance",
        |field| match field.count() {
            Some(0) => no_effect("off, as without it"),
            Some(count) => of_diffusion(
                field,
                becomes("multires_noise_iterations", count, "each picture's noise has unit variance, not a batch's"),
            ),
            None => field.expected("a whole number"),
        },
    ),
    by("multires_noise_discount", &["multires_noise_discount"], "of `multires_noise_iterations`", |field| match field
        .root
        .number("multires_noise_iterations")
        .is_some_and(|iterations| iterations > 0.0)
    {
        true => of_diffusion(field, number_of(field, "multires_noise_discount")),
        false => no_effect("only with multires_noise_iterations"),
    }),
    by("adaptive_noise_scale", &["adaptive_noise_scale"], "with noise_offset", adaptive_noise_scale),
    same("ip_noise_gamma", "ip_noise_gamma", Kind::Positive),
    by(
        "ip_noise_gamma_random_strength",
        &["ip_noise_gamma_random_strength"],
        "drawn for each picture of a batch",
        |field| random_strength(field, "ip_noise_gamma_random_strength"),
    ),
    same("zero_terminal_snr", "zero_terminal_snr", Kind::Flag),
    by("min_timestep", &["min_timestep"], "0 is none", |field| timestep(field, "min_timestep", 0.0)),
    by("max_timestep", &["max_timestep"], "1000 is none", |field| timestep(field, "max_timestep", 1000.0)),
    by("min_snr_gamma", &["min_snr_gamma"], "0 is none", |field| match field.number() {
        Some(gamma) if gamma > 0.0 => of_diffusion(field, taken("min_snr_gamma", values::of_number(gamma))),
        Some(_) => no_effect("off, as without it"),
        None => field.expected("a number"),
    }),
    same("scale_v_pred_loss_like_noise_pred", "scale_v_pred_loss_like_noise_pred", Kind::Flag),
    same("v_pred_like_loss", "v_pred_like_loss", Kind::Positive),
    same("debiased_estimation_loss", "debiased_estimation_loss", Kind::Flag),
    by("loss_type", &["loss_type"], "by its name", |field| match field.text().as_str() {
        "l2" => no_effect("as without it"),
        loss @ ("l1" | "huber" | "smooth_l1") => taken("loss_type", loss),
        _ => field.expected("l2, l1, huber or smooth_l1"),
    }),
    by("huber_schedule", &["huber_schedule"], "of `huber` and `smooth_l1`", |field| {
        let schedule = field.text();
        match schedule.as_str() {
            "snr" if is_flow(&field.root) && has_threshold(&field.root) => {
                refused("snr is for bases that predict the noise, there too; take constant or exponential")
            }
            "constant" | "snr" | "exponential" => of_huber(field, taken("huber_schedule", schedule)),
            _ => field.expected("constant, snr or exponential"),
        }
    }),
    by("huber_c", &["huber_c"], "of `huber` and `smooth_l1`", |field| of_huber(field, number_of(field, "huber_c"))),
    by("huber_scale", &["huber_scale"], "of `huber` and `smooth_l1`", |field| {
        of_huber(field, number_of(field, "huber_scale"))
    }),
    same("scale_weight_norms", "scale_weight_norms", Kind::Positive),
    same("network_dropout", "lora_dropout", Kind::Positive),
    gone("dim_from_weights", OFF, "lora_rank says the rank; init_from is brought to it"),
    by("base_weights", &["fuse_adapters"], "each with its base_weights_multiplier", base_weights),
    nothing("base_weights_multiplier", "with base_weights"),
    same("save_every_n_epochs", "save_every_n_epochs", Kind::AtLeastOne),
    same("save_every_n_steps", "save_every_n_steps", Kind::AtLeastOne),
    gone("save_n_epoch_ratio", OFF, "no saves by a share of the epochs"),
    by("save_last_n_epochs", &["save_total_limit"], "so many saves are kept", |field| match field.count() {
        Some(0) => no_effect("off, as without it"),
        Some(count) if field.root.count("save_every_n_steps").unwrap_or(0) == 0 => {
            becomes("save_total_limit", count, "so many saves are kept")
        }
        Some(_) => lost("saves by steps and by epochs are counted together here: set save_total_limit"),
        None => field.expected("a whole number"),
    }),
    by("save_last_n_steps", &["save_total_limit"], "divided by save_every_n_steps, and one", save_last_n_steps),
    nothing("save_last_n_epochs_state save_last_n_steps_state", "a state takes the place of the one before"),
    by("save_state", &["save_state", "save_state_every_n_steps"], "and every save_every_n_steps", |field| match field
        .on()
    {
        false => no_effect("off, as without it"),
        true => {
            let mut settings: Settings = vec![("save_state", true.into())];
            let steps = field.root.count("save_every_n_steps").filter(|&steps| steps > 0);
            settings.extend(steps.map(|steps| ("save_state_every_n_steps", steps.into())));
            translated(settings, "one file, which takes the place of the one before")
        }
    }),
    by("save_state_on_train_end", &["save_state"], "the state of the whole run", |field| {
        field.when_on(taken("save_state", true))
    }),
    gone("resume", OFF, "a state of accelerate cannot be gone on from; init_from goes on from its LoRA"),
    gone("resume_from_huggingface", OFF, "nothing is fetched"),
    gone("skip_until_initial_step initial_epoch initial_step", OFF, "a run goes on from its own state alone"),
    gone("save_model_as", &["\"safetensors\"", "\"same as source model\""], "files are safetensors"),
    same("validation_split", "validation_split", Kind::Positive),
    by("validation_seed", &[], "which pictures are held out, `seed` says", |_| {
        no_effect("which pictures are held out, seed says")
    }),
    same("validate_every_n_steps", "validate_every_n_steps", Kind::AtLeastOne),
    gone("validate_every_n_epochs", OFF, "held-out loss is told by steps, and before and after training"),
    gone("max_validation_steps", OFF, "all that is held out is looked at"),
    by("sample_every_n_steps", &["sample_every_n_steps"], "with prompts", |field| {
        match (field.count(), has_prompts(field)) {
            (Some(0), _) => no_effect("off, as without it"),
            (Some(_), false) => no_effect("there are no prompts"),
            (Some(steps), true) => taken("sample_every_n_steps", steps),
            (None, _) => field.expected("a whole number"),
        }
    }),
    by("sample_every_n_epochs", &[], "by steps alone", |field| match (field.count(), has_prompts(field)) {
        (Some(1..), true) => lost("samples are drawn before and after training, and by steps"),
        (Some(_), _) => no_effect("off, as without it"),
        (None, _) => field.expected("a whole number"),
    }),
    nothing("sample_at_first", "samples are always drawn before the first step, too"),
    by("sample_prompts", &["sample_prompts"], "a .txt file of a line each", |field| {
        let text = field.text();
        match Path::new(&text).extension().is_some_and(|name| name == "toml" || name == "json") {
            true => lost("prompts are read from a .txt file of a line each"),
            false => taken("sample_prompts", text),
        }
    }),
    by("sample_sampler", &["sample_sampler"], "ddim where none is given; of those that there are", |field| {
        match (has_prompts(field), field.text().trim_start_matches("k_")) {
            (false, _) => no_effect("there are no prompts"),
            (true, sampler @ ("euler" | "euler_a" | "ddim")) => taken("sample_sampler", sampler),
            (true, "dpmsolver++") => taken("sample_sampler", "dpmpp_2m"),
            (true, other) => instead(
                vec![("sample_sampler", "ddim".into())],
                format!("no sampler {other}; samples alone look otherwise"),
            ),
        }
    })
    .default("\"ddim\""),
    nothing("lowram", "where models are loaded to"),
    nothing("highvram", "what is kept on the device"),
    nothing("mem_eff_attn sdpa", "how attention is computed"),
    nothing("torch_compile dynamo_backend", "how steps are computed"),
    nothing("max_data_loader_n_workers persistent_data_loader_workers", "how pictures are read"),
    nothing("no_metadata", "the file says what it was trained with"),
    nothing(
        "training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags",
        "a note for the file's metadata",
    ),
    by("log_with", &["log_with"], "files for TensorBoard", tracking::trackers),
    nothing("log_prefix log_tracker_name log_tracker_config log_config", "metrics.jsonl and loss.png are written"),
    nothing(
        "wandb_api_key wandb_run_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo \
         huggingface_token huggingface_repo_visibility save_state_to_huggingface async_upload",
        "nothing is sent anywhere",
    ),
];

/// Bases that are trained by flow matching: FLUX.1, Chroma, Stable Diffusion 3 and Anima.
pub(super) static FLOW: &[Row] = &[
    by("clip_l", &["text_encoder"], "CLIP-L", |field| of_flow(field, taken("text_encoder", field.text()))),
    by("clip_g", &["text_encoder_2"], "CLIP-G of Stable Diffusion 3", |field| {
        of_flow(field, taken("text_encoder_2", field.text()))
    }),
    by(
        "t5xxl",
        &["text_encoder", "text_encoder_2", "text_encoder_3"],
        "T5-XXL: Chroma's text encoder, FLUX.1's second, Stable Diffusion 3's third",
        |field| {
            let ours = match base(&field.root) {
                Base::Chroma => "text_encoder",
                Base::Sd3 => "text_encoder_3",
                _ => "text_encoder_2",
            };
            of_flow(field, taken(ours, field.text()))
        },
    ),
    nothing("model_type", "the base's files say whether they are FLUX.1's or Chroma's"),
    same("qwen3", "text_encoder", Kind::Text),
    same("t5_tokenizer_path", "t5_tokenizer", Kind::Text),
    nothing("qwen3_max_token_length t5_max_token_length", "the text conditioner reads 512 states"),
    gone("llm_adapter_path", &["\"\""], "the text conditioner is read from the base's own file"),
    by("ae", &["vae"], "the autoencoder", |field| of_flow(field, taken("vae", field.text()))),
    by("guidance_scale", &["guidance_scale"], "3.5 where none is given; here 1", |field| match base(&field.root) {
        Base::Flux => taken("guidance_scale", field.number().map_or(Value::Null, values::of_number)),
        _ => no_effect("only FLUX.1 is told it"),
    })
    .default("3.5"),
    by("timestep_sampling", &["timestep_sampling"], "`sigma` draws evenly", |field| {
        let sampling = field.text();
        of_flow(
            field,
            match sampling.as_str() {
                "uniform" | "sigmoid" | "shift" | "flux_shift" => taken("timestep_sampling", sampling),
                // Its script has another default.
                "sigma" if base(&field.root) == Base::Anima && field.root.given("timestep_sampling").is_none() => {
                    no_effect("`sigmoid`, as here")
                }
                "sigma" => becomes("timestep_sampling", "uniform", "sigmas of evenly drawn timesteps"),
                _ => field.expected("sigma, uniform, sigmoid, shift or flux_shift"),
            },
        )
    })
    .default("\"sigma\""),
    by("sigmoid_scale", &["sigmoid_scale"], "of sigmoid, shift and flux_shift", |field| {
        of_flow(field, taken("sigmoid_scale", field.number().map_or(Value::Null, values::of_number)))
    }),
    by("discrete_flow_shift", &["discrete_flow_shift"], "of shift; 3 where none is given", |field| {
        match field.root.text("timestep_sampling").as_deref() {
            Some("shift") => {
                of_flow(field, taken("discrete_flow_shift", field.number().map_or(Value::Null, values::of_number)))
            }
            _ => no_effect("only with timestep_sampling = shift"),
        }
    }),
    by("model_prediction_type", &[], "`raw` alone", |field| {
        of_flow(
            field,
            match field.text().as_str() {
                "raw" => no_effect("the velocity is what is predicted"),
                _ => lost("the loss is that of the velocity, without a weight by sigma"),
            },
        )
    })
    .default("\"sigma_scaled\""),
    by("weighting_scheme", &["timestep_sampling"], "`none`; `logit_normal` and `mode` are ways of drawing", |field| {
        let scheme = field.text();
        of_flow(
            field,
            match scheme.as_str() {
                "none" | "uniform" => no_effect("off, as without it"),
                "logit_normal" | "mode" => becomes("timestep_sampling", scheme, "a way of drawing noise levels"),
                _ => lost("no weights by noise level"),
            },
        )
    }),
    same("logit_mean", "logit_mean", Kind::Number),
    same("logit_std", "logit_std", Kind::Positive),
    same("mode_scale", "mode_scale", Kind::Positive),
    by("t5xxl_max_token_length", &["max_sequence_length"], "tokens of a caption", |field| {
        of_flow(field, taken("max_sequence_length", field.count().unwrap_or(512)))
    }),
    by("apply_t5_attn_mask", &[], "captions' padding in attention", |field| match field.on() {
        true if base(&field.root) == Base::Chroma => no_effect("nothing reads captions' padding"),
        true => of_flow(field, lost("padding of captions is attended to, as FLUX.1 was trained")),
        false => no_effect("off, as without it"),
    }),
    by("blocks_to_swap", &["offload_base"], "`offload_base`: all frozen weights are streamed", |field| {
        match field.count() {
            Some(1..) => becomes("offload_base", true, "all frozen weights are streamed, not so many blocks"),
            _ => no_effect("off, as without it"),
        }
    }),
    nothing("split_mode", "how memory is saved"),
    nothing("split_qkv", "how weights are laid out"),
    nothing("disable_mmap_load_safetensors", "how files are read"),
    nothing("text_encoder_batch_size", "how many captions are encoded at once"),
    nothing("t5xxl_device", "where captions are encoded"),
    nothing("t5xxl_dtype", "in what captions are encoded"),
    gone(
        "train_blocks train_double_block_indices train_single_block_indices",
        &["\"all\""],
        "blocks are chosen by target_modules",
    ),
    gone("apply_lg_attn_mask", OFF, "padding of captions is attended to"),
    gone("pos_emb_random_crop_rate enable_scaled_pos_embed", OFF, "positions are those of the whole picture"),
    gone(
        "clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate",
        OFF,
        "captions are dropped whole: caption_dropout_rate",
    ),
    gone("training_shift", &["1", "1.0"], "noise levels are moved by discrete_flow_shift"),
];

/// What stands around training, and options of `accelerate launch`.
pub(super) static AROUND: &[Row] = &[
    nothing("tokenizer_cache_dir", "the tokenizer is in the program"),
    nothing("cache_info", "headers are read each time"),
    nothing("skip_cache_check", "a cache is never stale"),
    gone("debug_dataset", OFF, "lora dataset looks at the pictures"),
    gone("dataset_class", OFF, "no datasets of one's own code"),
    nothing(
        "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph deepspeed zero_stage offload_optimizer_device \
         offload_optimizer_nvme_path offload_param_device offload_param_nvme_path zero3_init_flag \
         zero3_save_16bit_model fp16_master_weights_and_gradients",
        "one device trains",
    ),
    nothing("fused_backward_pass fused_optimizer_groups blockwise_fused_optimizers", "how steps are computed"),
    nothing("console_log_level console_log_file console_log_simple", "what is printed"),
    nothing("use_safetensors", "files are safetensors"),
    table(LAUNCH, LAUNCHED),
];

static LAUNCHED: &[Row] = &[
    by("num_processes", &[], "one device trains", |field| match field.count() {
        Some(0 | 1) => no_effect("one device trains"),
        _ => lost("one device trains: a step has the pictures of one of them; raise gradient_accumulation_steps"),
    }),
    gone("multi_gpu", OFF, "one device trains; raise gradient_accumulation_steps by their number"),
    nothing("mixed_precision", "the script's own option decides"),
    nothing("num_machines machine_rank main_process_ip main_process_port", "one machine trains"),
    nothing("num_cpu_threads_per_process", "how steps are computed"),
    nothing("gpu_ids", "`device` says which"),
    nothing("dynamo_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic", "how steps are computed"),
    nothing("config_file", "one device trains"),
    nothing("quiet", "what is printed"),
    nothing("use_deepspeed", "one device trains"),
];

pub(super) fn base_model(field: &Field<'_>) -> Outcome {
    let name = field.text();
    match values::is_hub_name(&name) {
        true => becomes("base_model", name, "a name on a hub: fetch it and put its folder here"),
        false => taken("base_model", name),
    }
}

fn folder(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.root.given("dataset_config") {
        Some(_) => no_effect("dataset_config takes its place"),
        None => taken(ours, field.text()),
    }
}

/// A size in pixels, which here has sides of multiples of 8.
pub(crate) fn resolution(field: &Field<'_>) -> Outcome {
    let sides: Option<Vec<u64>> = match &field.value {
        Value::Array(items) => items.iter().map(values::count).collect(),
        Value::String(text) => text.split([',', 'x']).map(|side| side.trim().parse().ok()).collect(),
        value => values::count(value).map(|side| vec![side]),
    };
    let (width, height) = match sides.as_deref() {
        Some(&[side]) => (side, side),
        Some(&[width, height]) => (width, height),
        _ => return field.expected("\"width,height\" or one number"),
    };
    let eights = |side: u64| side / 8 * 8;
    let value = match (eights(width), eights(height)) {
        (width, height) if width == height => Value::from(width),
        (width, height) => format!("{width},{height}").into(),
    };
    match width % 8 == 0 && height % 8 == 0 {
        true => taken("max_resolution", value),
        false => becomes("max_resolution", value, "sides are multiples of 8"),
    }
}

/// Sides are multiples of it; here it is a multiple of 8 itself.
pub(crate) fn bucket_steps(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(steps) if steps > 0 && steps % 8 == 0 => taken("bucket_reso_steps", steps),
        Some(steps) => becomes("bucket_reso_steps", steps.max(1).next_multiple_of(8), "sides are multiples of 8"),
        None => field.expected("a whole number"),
    }
}

/// Switches that become processors, all together.
pub(crate) fn processors(field: &Field<'_>) -> Outcome {
    if !field.on() {
        return match values::switch(&field.value) {
            Some(_) => no_effect("off, as without it"),
            None => field.expected("true or false"),
        };
    }
    let mut all = vec![if field.here.on("random_crop") { "random_crop" } else { "center_crop" }];
    all.extend(field.here.on("flip_aug").then_some("flip"));
    all.extend(field.here.on("color_aug").then_some("color_jitter"));
    becomes("processors", json!(all), "a step of what pictures go through")
}

pub(super) fn save_precision(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        precision @ ("fp16" | "bf16") => taken("save_precision", precision),
        "float" | "fp32" | "None" => taken("save_precision", "fp32"),
        _ => field.expected("float, fp16 or bf16"),
    }
}

pub(super) fn max_token_length(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(tokens @ (75 | 150 | 225)) if !is_flow(&field.root) => taken("max_token_length", tokens),
        Some(75 | 150 | 225) => no_effect("captions have the length of this base's encoders"),
        _ => field.expected("75, 150 or 225"),
    }
}

fn switched(field: &Field<'_>, optimiser: &'static str) -> Outcome {
    field.when_on(taken("optimizer", optimiser))
}

fn text_encoder_lr(field: &Field<'_>) -> Outcome {
    let only_unet = field.root.on("network_train_unet_only");
    let number = |value: &Value| values::number(value).map(values::of_number);
    match &field.value {
        _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        _ if only_unet => no_effect("text encoders are not trained"),
        Value::String(text) if text == "learning_rate" => match field.root.number("learning_rate") {
            Some(rate) => becomes("text_encoder_lr", values::of_number(rate), "learning_rate, as for the U-Net"),
            None => no_effect("learning_rate is not given"),
        },
        Value::Array(items) => match items.iter().map(number).collect::<Option<Vec<_>>>().as_deref() {
            Some([rate]) => taken("text_encoder_lr", rate.clone()),
            Some([first, second, ..]) => translated(
                vec![("text_encoder_1_lr", first.clone()), ("text_encoder_2_lr", second.clone())],
                "one for each text encoder of SDXL",
            ),
            _ => field.expected("numbers"),
        },
        value => match number(value) {
            Some(rate) => taken("text_encoder_lr", rate),
            None => field.expected("a number"),
        },
    }
}

/// A number of one schedule: nothing for others.
fn schedules_own(field: &Field<'_>, schedule: &str, ours: &'static str) -> Outcome {
    match (field.root.text("lr_scheduler").as_deref() == Some(schedule), field.number()) {
        (true, Some(number)) if number > 0.0 => taken(ours, values::of_number(number)),
        (true, Some(_)) => no_effect("off, as without it"),
        (true, None) => field.expected("a number"),
        (false, _) => no_effect(format!("a number of {schedule}")),
    }
}

fn fp8(field: &Field<'_>) -> Outcome {
    field.when_on(becomes("base_storage", "fp8", "with a factor for each output"))
}

fn timestep(field: &Field<'_>, ours: &'static str, neutral: f64) -> Outcome {
    match field.number() {
        Some(number) if number == neutral => no_effect("off, as without it"),
        _ => field.number_as(ours),
    }
}

/// A number that means the same here.
pub(super) fn number_of(field: &Field<'_>, ours: &'static str) -> Outcome {
    field.number_as(ours)
}

/// With `noise_offset` alone, which is what it changes.
pub(super) fn adaptive_noise_scale(field: &Field<'_>) -> Outcome {
    let offset = field.root.number("noise_offset").is_some_and(|offset| offset > 0.0);
    match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if !offset => refused("changes noise_offset, which is not given, there too"),
        _ => of_diffusion(field, number_of(field, "adaptive_noise_scale")),
    }
}

fn random_strength(field: &Field<'_>, ours: &'static str) -> Outcome {
    field.when_on(becomes(ours, true, "drawn for each picture of a batch instead of once"))
}

fn has_threshold(root: &Scope<'_>) -> bool {
    matches!(root.text("loss_type").as_deref(), Some("huber" | "smooth_l1"))
}

fn of_huber(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match has_threshold(&field.root) {
        true => outcome,
        false => no_effect("a number of other losses"),
    }
}

fn save_last_n_steps(field: &Field<'_>) -> Outcome {
    match (field.count(), field.root.count("save_every_n_steps").filter(|&every| every > 0)) {
        (Some(0), _) => no_effect("off, as without it"),
        (Some(_), None) => no_effect("only with save_every_n_steps"),
        (Some(steps), Some(every)) => becomes("save_total_limit", steps / every + 1, "saves of so many steps"),
        (None, _) => field.expected("a whole number"),
    }
}

fn has_prompts(field: &Field<'_>) -> bool {
    field.root.text("sample_prompts").is_some_and(|text| !text.ends_with(".toml") && !text.ends_with(".json"))
}

/// Headings are taken off, and the file of `--config_file` put under the options.
fn flat(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries: Vec<Entry> = Vec::new();
    let mut add = |entry: Entry| match entries.iter().find(|other| other.key == entry.key) {
        None => {
            entries.push(entry);
            Ok(())
        }
        Some(before) => {
            let message = format!("it is given on line {} too; keep one of them", before.line);
            Err(Problem::new(&place, entry.line, &entry.key, message))
        }
    };
    for entry in root.entries() {
        let is_heading = !entry.node.entries().is_empty() && entry.key != LAUNCH;
        match is_heading {
            true => entry.node.entries().iter().cloned().try_for_each(&mut add)?,
            false => add(entry.clone())?,
        }
    }
    if let (Some(_), Some(file)) = (&script, entries.iter().find(|entry| entry.key == "config_file")) {
        let name = values::text(&file.node.value()).unwrap_or_default();
        let name = if name.ends_with(".toml") { name } else { format!("{name}.toml") };
        let within = flat(input::read(&Source::file(&name))?)?;
        for mut entry in within.root.entries().iter().cloned() {
            if entries.iter().all(|other| other.key != entry.key) {
                // Lines are those of the command.
                entry.line = 0;
                entries.push(entry);
            }
        }
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}

/// The subsets of `dataset_config`.
fn dataset_file(root: &Scope<'_>, draft: &mut Draft, keys: &mut Vec<Accounted>) -> Result<(), Problem> {
    let Some(name) = root.given("dataset_config").as_ref().and_then(values::text) else { return Ok(()) };
    let file = sd_scripts::read(Path::new(&name))?;
    if let Some(problem) = file.problems.into_iter().next() {
        return Err(problem);
    }
    keys.extend(file.keys.into_iter().map(|key| Accounted { key: format!("{name}: {}", key.key), ..key }));
    for subset in file.subsets {
        let dataset = Some(draft.add_dataset());
        for (key, value) in &subset.keys {
            let Some(key) = crate::keys_written().into_iter().find(|known| known == key) else { continue };
            draft.set(dataset, key, value, key, &Verdict::Taken, false).map_err(|error| Problem::of(&name, error))?;
        }
    }
    Ok(())
}

/// LoRAs in the base, each with its strength; 1 where there is none.
fn base_weights(field: &Field<'_>) -> Outcome {
    let Some(files) = values::texts(&field.value) else { return field.expected("files") };
    if files.is_empty() {
        return no_effect("no file");
    }
    let strengths = field.root.get("base_weights_multiplier");
    let of = |place: usize| match &strengths {
        Some(Value::Array(all)) => all.get(place).and_then(values::number),
        Some(one) if place == 0 => values::number(one),
        _ => None,
    };
    let fused = files.iter().enumerate().map(|(place, file)| match of(place) {
        Some(strength) => format!("{file}:{strength}"),
        None => file.clone(),
    });
    taken("fuse_adapters", fused.collect::<Vec<_>>())
}
