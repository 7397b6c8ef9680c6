//! bmaltais/kohya_ss: the JSON files and presets of the GUI, which makes options of sd-scripts out of them. What both call
//! the same stands in [`super::sd_scripts`].

use serde_json::json;

use super::sd_scripts::network::{
    BLOCKS, Side, algorithm, alpha, between, block_rates, conv_alpha, convolutions, is_lycoris, option, targets,
};
use super::sd_scripts::{self, is_flow};
use super::{Table, Tool, done, optimisers};
use crate::engine::{Field, Scope};
use crate::input::tree::Node;
use crate::input::{Document, Problem, command};
use crate::outcome::{Outcome, becomes, lost, no_effect, refused, taken, translated};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::KohyaGui,
    name: "kohya_ss",
    title: "the kohya_ss GUI",
    about: "JSON of the tabs LoRA and Dreambooth, and presets. An empty field is as if not given. Epochs are `max_train_epochs`, \
            else `max_train_steps`, else `epoch`; `lr_warmup` is in percent of the run. Presets have no paths: what is missing is \
            said. Fields that are not listed here have names and meaning of sd-scripts' options.",
    groups: &sd_scripts::behind(OWN),
    own: &[OWN],
    is: |has| {
        has("LoRA_type")
            || [
                "max_resolution",
                "epoch",
                "train_batch_size",
                "num_cpu_threads_per_process",
                "xformers",
                "lr_warmup",
                "model_list",
            ]
            .iter()
            .filter(|key| has(key))
            .count()
                > 3
    },
    prepare: with_additional,
    finish: done,
};

/// Whether all weights are trained, as by the tabs beside LoRA's. Old files of that one have ranks and no kind.
fn is_full(root: &Scope<'_>) -> bool {
    root.given("LoRA_type").is_none() && root.given("network_dim").is_none()
}

/// A key of adapters.
fn of_lora(field: &Field<'_>, outcome: Outcome) -> Outcome {
    match is_full(&field.root) {
        true => no_effect("all weights are trained"),
        false => outcome,
    }
}

/// A key of LyCORIS' kinds, and of the GUI's with convolutions.
fn of_lycoris(field: &Field<'_>, decide: fn(&Field<'_>) -> Outcome) -> Outcome {
    match is_lycoris(&field.root) {
        true => decide(field),
        false => no_effect("a field of LyCORIS' kinds"),
    }
}

fn has_convolutions(root: &Scope<'_>) -> bool {
    let kind = root.text("LoRA_type").unwrap_or_default();
    is_lycoris(root) && kind != "LyCORIS/iA3" || ["LoCon", "Kohya LoCon", "Kohya DyLoRA"].contains(&kind.as_str())
}

static OWN: &[Row] = &[
    by(
        "LoRA_type",
        &["variant", "target_modules", "train"],
        "the kind of network; without it all weights are trained",
        kind,
    )
    .default("\"\""),
    by(
        "LyCORIS_preset",
        &["target_modules"],
        "the choice of layers of LyCORIS' kinds; full where none is given",
        |field| of_lycoris(field, |field| targets(field, &field.text())),
    )
    .default("\"full\""),
    by("max_train_epochs", &["epochs"], "wins over the others", |field| match field.count() {
        Some(0) => no_effect("0: the others count"),
        _ => field.count_as("epochs"),
    }),
    by("max_train_steps", &["max_train_steps"], "optimiser steps; wins over epoch", |field| {
        match (epochs(&field.root), field.count()) {
            (_, Some(0)) => no_effect("0: epochs count"),
            (true, _) => no_effect("max_train_epochs wins over it"),
            (false, Some(steps)) => taken("max_train_steps", steps),
            (false, None) => field.expected("a whole number"),
        }
    }),
    by("epoch", &["epochs"], "unless another length is given", |field| {
        let steps = field.root.count("max_train_steps").unwrap_or(0) > 0;
        match field.count() {
            _ if steps || epochs(&field.root) => no_effect("max_train_epochs or max_train_steps wins over it"),
            Some(epochs @ 1..) => taken("epochs", epochs),
            _ => field.expected("a whole number from 1 on"),
        }
    })
    .default("1"),
    by("lr_warmup", &["lr_warmup_steps"], "percent of the run", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if field.root.count("lr_warmup_steps").unwrap_or(0) > 0 => no_effect("lr_warmup_steps wins over it"),
        Some(_) if field.root.text("lr_scheduler").as_deref() == Some("constant") => {
            no_effect("lr_scheduler = constant has no warm-up in sd-scripts")
        }
        Some(_) if field.root.text("lr_scheduler").is_some_and(|name| name.starts_with("adafactor")) => {
            no_effect("Adafactor finds its step size itself")
        }
        Some(percent) if percent < 100.0 => {
            becomes("lr_warmup_steps", values::of_number(percent / 100.0), "percent of the run")
        }
        _ => field.expected("percent below 100"),
    }),
    by("lr_warmup_steps", &["lr_warmup_steps"], "wins over lr_warmup", |field| match field.count() {
        Some(0) => no_effect("0: lr_warmup counts"),
        Some(_) if field.root.text("lr_scheduler").as_deref() == Some("constant") => {
            no_effect("lr_scheduler = constant has no warm-up in sd-scripts")
        }
        _ => field.count_as("lr_warmup_steps"),
    }),
    by(
        "max_resolution",
        &["max_resolution"],
        "an area where there are buckets, there and here",
        sd_scripts::data::resolution,
    )
    .default("\"512,512\""),
    by("train_batch_size", &["batch_size"], "pictures at once", |field| field.count_as("batch_size")),
    by("output_name", &["output_name"], "the file's name", |field| taken("output_name", field.text()))
        .default("\"last\""),
    by("caption_extension", &["caption_extension"], "captions are looked for with this extension alone", |field| {
        taken("caption_extension", field.text())
    })
    .default("\".caption\""),
    by("save_precision", &["save_precision"], "`float` is fp32", sd_scripts::save::save_precision).default("\"fp16\""),
    by("mixed_precision", &["precision"], "`no` is fp32", sd_scripts::memory::mixed_precision).default("\"fp16\""),
    by("optimizer", &["optimizer"], "by its name", |field| {
        let old = field.root.given("use_8bit_adam").is_some_and(|on| values::switch(&on) == Some(false));
        match field.root.given("optimizer") {
            None if old => taken("optimizer", "adamw"),
            _ => optimisers::named(&field.text()),
        }
    })
    .default("\"AdamW8bit\""),
    by("use_8bit_adam", &["optimizer"], "`adamw8bit`", |field| {
        match field.on() && field.root.given("optimizer").is_none() {
            true => taken("optimizer", "adamw8bit"),
            false => no_effect("optimizer says which"),
        }
    }),
    by("learning_rate", &["learning_rate"], "of what has none of its own", |field| match field.number() {
        // The rates of the networks count where either is given.
        Some(0.0) => no_effect("0: unet_lr and text_encoder_lr count"),
        _ if is_flow(&field.root) && !is_full(&field.root) && field.root.number("unet_lr").unwrap_or(0.0) > 0.0 => {
            no_effect("unet_lr is the transformer's")
        }
        _ => field.number_as("learning_rate"),
    })
    .default("0.0001"),
    by(
        "unet_lr",
        &["unet_lr", "train_unet", "learning_rate"],
        "0 with a text_encoder_lr: the text encoders alone",
        |field| {
            let text = field.root.number("text_encoder_lr").unwrap_or(0.0);
            match field.number() {
                _ if is_full(&field.root) => no_effect("a field of the tab LoRA"),
                Some(0.0) if text > 0.0 => becomes("train_unet", false, "the text encoders alone"),
                Some(0.0) => no_effect("0: learning_rate counts"),
                Some(rate) if is_flow(&field.root) => {
                    becomes("learning_rate", values::of_number(rate), "the transformer's")
                }
                _ => field.number_as("unet_lr"),
            }
        },
    )
    .default("0"),
    by("text_encoder_lr", &["text_encoder_lr", "train_text_encoder"], "0 with a unet_lr: the U-Net alone", |field| {
        let unet = field.root.number("unet_lr").unwrap_or(0.0);
        match field.number() {
            _ if is_full(&field.root) => no_effect("a field of the tab LoRA"),
            _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
            _ if field.root.on("network_train_unet_only") => no_effect("text encoders are not trained"),
            Some(0.0) if unet > 0.0 => becomes("train_text_encoder", false, "the U-Net alone"),
            Some(0.0) => match field.root.number("learning_rate") {
                Some(rate) => becomes("text_encoder_lr", values::of_number(rate), "learning_rate, as for the U-Net"),
                None => no_effect("learning_rate counts"),
            },
            _ => field.number_as("text_encoder_lr"),
        }
    })
    .default("0"),
    by(
        "stop_text_encoder_training",
        &["train_text_encoder"],
        "below 0: the text encoders are not trained",
        stop_text_encoder,
    ),
    by("stop_text_encoder_training_pct", &["train_text_encoder"], "an old name of it", stop_text_encoder),
    by("network_dim", &["lora_rank"], "the rank", |field| {
        let rank = field.count().map_or_else(|| field.expected("a whole number"), |rank| taken("lora_rank", rank));
        of_lora(field, rank)
    })
    .default("8"),
    by("network_alpha", &["lora_alpha"], "0 is the rank", |field| of_lora(field, alpha(field, "network_dim")))
        .default("1"),
    by("lora_network_weights", &["init_from"], "a LoRA to go on from", |field| {
        of_lora(field, taken("init_from", field.text()))
    }),
    by("network_weights", &["init_from"], "a LoRA to go on from", |field| {
        of_lora(field, taken("init_from", field.text()))
    }),
    by("conv_dim", &["target_modules", "rank_pattern"], "of kinds with convolutions", |field| {
        match has_convolutions(&field.root) {
            true => convolutions(field, "conv_dim"),
            false => no_effect("a field of kinds with convolutions"),
        }
    }),
    by("conv_alpha", &["alpha_pattern"], "of kinds with convolutions", |field| match has_convolutions(&field.root) {
        true => conv_alpha(field),
        false => no_effect("a field of kinds with convolutions"),
    }),
    by("factor", &["variant_options"], "of LoKr", |field| of_kind(field, "LoKr", "factor")),
    by("decompose_both", &["variant_options"], "of LoKr", |field| of_kind(field, "LoKr", "decompose_both")),
    by("use_cp", &["variant_options"], "an old name of use_tucker", |field| {
        of_lycoris(field, |field| option(field, "tucker"))
    }),
    by("use_tucker", &["variant_options"], "`tucker`", |field| of_lycoris(field, |field| option(field, "tucker"))),
    by("train_on_input", &["variant_options"], "of IA3", |field| of_kind(field, "iA3", "on_input")),
    by("constrain", &["variant_options"], "of OFT", |field| of_kind(field, "OFT", "constraint")),
    by("rescaled", &["variant_options"], "of OFT", |field| of_kind(field, "OFT", "rescale")),
    by("dora_wd", &["variant"], "with magnitudes", |field| {
        field.when_on(of_lycoris(field, |_| translated(vec![], "the variant has magnitudes")))
    }),
    by("use_scalar", &[], "of LyCORIS' kinds", |field| {
        of_lycoris(field, |field| lost_if(field, "no factor that is trained beside the update"))
    }),
    by("rank_dropout_scale", &[], "of LyCORIS' kinds", |field| {
        of_lycoris(field, |field| lost_if(field, "what is left of the ranks is not scaled otherwise"))
    }),
    by("train_norm", &[], "of LyCORIS' kinds", |field| {
        of_lycoris(field, |field| lost_if(field, "norms are not trained"))
    }),
    nothing("bypass_mode", "how the update is computed"),
    by("unit", &[], "of DyLoRA", |field| {
        match field.root.text("LoRA_type").is_some_and(|kind| kind.contains("DyLoRA")) {
            true => lost("no DyLoRA; all ranks of a LoRA are trained together"),
            false => no_effect("a field of DyLoRA"),
        }
    }),
    by("rank_dropout", &["rank_dropout"], "dropout of ranks", |field| of_lora(field, between(field, "rank_dropout"))),
    by("module_dropout", &["module_dropout"], "dropout of modules", |field| {
        let outcome = match field.number() {
            Some(0.0) => no_effect("off, as without it"),
            _ => field.number_as("module_dropout"),
        };
        of_lora(field, outcome)
    }),
    by("network_dropout", &["lora_dropout"], "dropout between the factors", |field| {
        of_lora(field, between(field, "lora_dropout"))
    }),
    same("loraplus_lr_ratio", "loraplus_lr_ratio", Kind::Positive),
    gone("loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio", OFF, "loraplus_lr_ratio holds for all networks"),
    gone("block_dims", OFF, "ranks by block are given by rank_pattern"),
    gone("block_alphas", OFF, "alphas by block are given by alpha_pattern"),
    gone("conv_block_dims", OFF, "ranks by block are given by rank_pattern"),
    gone("conv_block_alphas", OFF, "alphas by block are given by alpha_pattern"),
    by("down_lr_weight", &["learning_rate_pattern"], "numbers, of Stable Diffusion 1, 2 and XL", |field| {
        weights(field, Side::Down)
    }),
    by("mid_lr_weight", &["learning_rate_pattern"], "a number, of Stable Diffusion XL three", |field| {
        weights(field, Side::Middle)
    }),
    by("up_lr_weight", &["learning_rate_pattern"], "numbers, of Stable Diffusion 1, 2 and XL", |field| {
        weights(field, Side::Up)
    }),
    nothing("block_lr_zero_threshold", "with weights of blocks"),
    by("noise_offset_type", &[], "which of the two kinds of noise counts", |_| {
        no_effect("which of the two kinds of noise counts")
    }),
    by("noise_offset", &["noise_offset"], "with noise_offset_type Original", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if is_multires(&field.root) => no_effect("noise_offset_type is Multires"),
        _ => field.number_as("noise_offset"),
    }),
    by("adaptive_noise_scale", &["adaptive_noise_scale"], "with noise_offset_type Original", |field| {
        match is_multires(&field.root) || field.root.number("noise_offset").unwrap_or(0.0) == 0.0 {
            true => no_effect("there is no noise offset"),
            false => sd_scripts::loss::adaptive_noise_scale(field),
        }
    }),
    by("multires_noise_iterations", &["multires_noise_iterations"], "with noise_offset_type Multires", |field| {
        multires(field, "multires_noise_iterations")
    }),
    by("multires_noise_discount", &["multires_noise_discount"], "with noise_offset_type Multires", |field| {
        multires(field, "multires_noise_discount")
    }),
    by("clip_skip", &["clip_skip"], "SDXL reads a layer of its own", |field| match field.count() {
        Some(0 | 1) => no_effect("the last layer, as without it"),
        Some(_) if field.root.on("sdxl") || field.root.on("sdxl_checkbox") || is_flow(&field.root) => {
            no_effect("the layer that is read is the base's own")
        }
        _ => field.count_as("clip_skip"),
    }),
    by("max_token_length", &["max_token_length"], "75, 150 or 225", sd_scripts::program::max_token_length),
    by(
        "v_parameterization",
        &["v_parameterization"],
        "off means that the noise is predicted, whatever the base says",
        |field| match field.on() {
            _ if is_flow(&field.root) => no_effect("this base is trained by flow matching"),
            true => taken("v_parameterization", true),
            false => becomes("v_parameterization", false, "the noise is predicted unless it is on"),
        },
    )
    .default("false"),
    by("sample_prompts", &["sample_prompts"], "a line each; # begins a comment", |field| {
        let lines = field.text();
        let lines: Vec<&str> =
            lines.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
        match lines.is_empty() {
            true => no_effect("no prompts"),
            false => becomes("sample_prompts", json!(lines), "a line each"),
        }
    }),
    nothing("v2 sdxl flux1_checkbox sd3_checkbox", "the base's files say it"),
    nothing("model_list", "pretrained_model_name_or_path says it"),
    nothing("xformers", "how attention is computed"),
    nothing("num_cpu_threads_per_process", "how steps are computed"),
    by("num_processes", &[], "ranks are started by torchrun", |field| match field.count() {
        Some(0 | 1) => no_effect("one rank is the usual"),
        _ => lost("start as many ranks by torchrun: docs/multiple-gpus.md"),
    }),
    nothing("num_machines", "the launcher says it"),
    gone("multi_gpu", OFF, "start as many ranks by torchrun: docs/multiple-gpus.md"),
    nothing("gpu_ids", "`device` says which"),
    nothing("main_process_port", "the launcher says it"),
    nothing("dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph", "how steps are computed"),
    gone("extra_accelerate_launch_args", OFF, "nothing is launched"),
    by("additional_parameters", &[], "options of sd-scripts, which win over the fields", |_| {
        translated(vec![], "its options are read with these")
    }),
    gone("conv_alphas", OFF, "alphas by block are given by alpha_pattern"),
    gone("conv_dims", OFF, "ranks by block are given by rank_pattern"),
    nothing("use_wandb", "nothing is sent anywhere"),
    nothing("no_token_padding", "captions are padded as the base expects"),
    nothing("save_as_bool training_preset", "a field of the GUI"),
    nothing(
        "sdxl_cache_text_encoder_outputs flux1_cache_text_encoder_outputs",
        "captions are encoded once wherever they may be",
    ),
    nothing("flux1_cache_text_encoder_outputs_to_disk", "with `cache_dir`"),
    nothing("sd3_text_encoder_batch_size", "how many captions are encoded at once"),
    nothing("sd3_cache_text_encoder_outputs", "captions are encoded once wherever they may be"),
    nothing("sd3_cache_text_encoder_outputs_to_disk", "with `cache_dir`"),
    nothing("sdxl_no_half_vae no_half_vae", "an autoencoder that overflows goes on in fp32"),
    nothing("lowvram", "what is kept on the device"),
    by("weighting_scheme_checkbox", &[], "a field of the GUI", |_| no_effect("a field of the GUI")),
    // The tabs Dreambooth and Finetuning.
    by("train_text_encoder", &["train_text_encoder"], "trained", |field| match field.on() {
        true => no_effect("trained, as without it"),
        false => taken("train_text_encoder", false),
    }),
    same("image_folder", "train_data_dir", Kind::Text),
    by("dataset_repeats", &["repeats"], "visits in an epoch", |field| match field.count() {
        Some(0 | 1) => no_effect("1, as without it"),
        _ => field.count_as("repeats"),
    }),
    by("create_buckets", &["enable_bucket"], "the tab Finetuning always has buckets", |_| {
        becomes("enable_bucket", true, "the tab Finetuning always has buckets")
    }),
    by("generate_image_buckets", &["enable_bucket"], "the tab Finetuning always has buckets", |_| {
        becomes("enable_bucket", true, "the tab Finetuning always has buckets")
    }),
    nothing(
        "generate_caption_database create_caption full_path caption_metadata_filename latent_metadata_filename \
         train_dir",
        "captions are read beside their pictures",
    ),
    nothing("use_latent_files", "`cache_dir` keeps latents for the next run"),
    nothing("batch_size", "how many pictures are encoded at once"),
    gone("block_lr", OFF, "no learning rates by block"),
    nothing("sdxl_checkbox", "the base's files say it"),
    by("learning_rate_te", &["text_encoder_lr"], "of the text encoder, where all weights are trained", |field| {
        rate_of_full(field, "text_encoder_lr", "0: learning_rate counts")
    }),
    by("learning_rate_te1", &["text_encoder_1_lr"], "of SDXL's first text encoder", |field| {
        rate_of_full(field, "text_encoder_1_lr", "0: not trained")
    }),
    by("learning_rate_te2", &["text_encoder_2_lr"], "of SDXL's second text encoder", |field| {
        rate_of_full(field, "text_encoder_2_lr", "0: not trained")
    }),
];

fn epochs(root: &Scope<'_>) -> bool {
    root.count("max_train_epochs").unwrap_or(0) > 0
}

/// Weights of blocks, where the fields are filled in.
fn weights(field: &Field<'_>, side: Side) -> Outcome {
    match field.text().trim().is_empty() {
        true => no_effect("off, as without it"),
        false => {
            let kind = field.root.text("LoRA_type").unwrap_or_default();
            block_rates(field, side, kind.contains("LoCon") || is_lycoris(&field.root))
        }
    }
}

fn is_multires(root: &Scope<'_>) -> bool {
    root.text("noise_offset_type").is_some_and(|kind| kind == "Multires")
}

fn multires(field: &Field<'_>, ours: &'static str) -> Outcome {
    let off = field.root.number("multires_noise_iterations").unwrap_or(0.0) == 0.0;
    match off || !is_multires(&field.root) {
        true => no_effect("off, as without it"),
        false => match field.number() {
            Some(number) => becomes(ours, values::of_number(number), "each picture's noise has unit variance"),
            None => field.expected("a number"),
        },
    }
}

fn lost_if(field: &Field<'_>, what: &str) -> Outcome {
    match field.on() || field.number().is_some_and(|number| number != 0.0) {
        true => lost(what),
        false => no_effect("off, as without it"),
    }
}

fn of_kind(field: &Field<'_>, kind: &str, ours: &str) -> Outcome {
    match field.root.text("LoRA_type").is_some_and(|own| own.contains(kind)) {
        true => option(field, ours),
        false => no_effect(format!("a field of {kind}")),
    }
}

fn stop_text_encoder(field: &Field<'_>) -> Outcome {
    match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(percent) if percent < 0.0 => becomes("train_text_encoder", false, "the text encoders are not trained"),
        Some(_) if !is_full(&field.root) => no_effect("the GUI does not do it for a LoRA"),
        Some(_) => lost("the text encoder is trained to the end"),
        None => field.expected("a number"),
    }
}

fn rate_of_full(field: &Field<'_>, ours: &'static str, at_zero: &str) -> Outcome {
    match field.number() {
        _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        Some(rate) if rate > 0.0 => taken(ours, values::of_number(rate)),
        Some(_) => no_effect(at_zero),
        None => field.expected("a number"),
    }
}

fn kind(field: &Field<'_>) -> Outcome {
    let kind = field.text();
    let dora = field.root.on("dora_wd");
    match kind.as_str() {
        "" if !is_full(&field.root) => no_effect("a LoRA, as without it"),
        "" => becomes("train", "full", "a file without LoRA_type is of a tab that trains all weights"),
        "Flux1" | "SD3" if field.root.given("train_blocks").is_none() => {
            becomes("target_modules", json!([BLOCKS]), "all linear layers of blocks, those of their modulation too")
        }
        "Standard" | "LoCon" | "Kohya LoCon" | "Flux1" | "SD3" | "LyCORIS/LoCon" | "LyCORIS/LoRA" if !dora => {
            no_effect("a LoRA, as without it")
        }
        "LoRA-FA" => lost("no LoRA-FA; both factors of a LoRA are trained"),
        "Kohya DyLoRA" | "LyCORIS/DyLoRA" => lost("no DyLoRA; all ranks of a LoRA are trained together"),
        "Flux1 OFT" => taken("variant", "oft"),
        "LyCORIS/Native Fine-Tuning" => becomes("variant", "full", "the difference itself"),
        lycoris => match lycoris.strip_prefix("LyCORIS/") {
            Some(name) => algorithm(name, dora),
            None => refused(format!("no kind `{lycoris}` is known")),
        },
    }
}

/// The options of `additional_parameters`, in the place of fields of their names.
fn with_additional(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries = root.entries().to_vec();
    let additional = entries.iter().find(|entry| entry.key == "additional_parameters");
    if let Some((line, text)) = additional.and_then(|entry| Some((entry.line, values::text(&entry.node.value())?))) {
        for entry in command::options_in(&place, line, &text)? {
            entries.retain(|other| other.key != entry.key);
            entries.push(entry);
        }
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}
