//! ostris/ai-toolkit: the YAML or JSON of a job with one process.

use serde_json::{Value, json};

use super::{Table, Tool, optimisers, sd_scripts, sd_scripts_network};
use crate::config::Draft;
use crate::engine::{Field, Scope};
use crate::input::tree::{Content, Entry, Node};
use crate::input::{Document, Problem};
use crate::outcome::{Outcome, Settings, becomes, lost, no_effect, refused, taken, translated};
use crate::report::Accounted;
use crate::row::{Element, Kind, OFF, Row, by, datasets, gone, nothing, same, table};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::AiToolkit,
    name: "ai-toolkit",
    title: "ai-toolkit",
    about: "YAML or JSON of a job; keys of its one process stand here without `config.process[0]`. The adapter's file lies in \
            `training_folder`/`name`. A list of resolutions makes a dataset of each. With `gradient_accumulation_steps` steps are \
            counted before accumulation, with `gradient_accumulation` after it.",
    groups: &[ROWS],
    own: &[ROWS],
    is: |has| has("job") && has("config"),
    prepare: one_process,
    finish: split_resolutions,
};

static ROWS: &[Row] = &[
    by("job", &[], "`extension` and `train`", |field| match field.text().as_str() {
        "extension" | "train" => no_effect("a run of training"),
        other => refused(format!("a job {other} trains nothing")),
    }),
    by("type", &[], "`sd_trainer` and its like", |field| match field.text().as_str() {
        "sd_trainer" | "diffusion_trainer" | "ui_trainer" => no_effect("a run of training"),
        other => refused(format!("a process {other} has no counterpart here; sd_trainer has")),
    }),
    by("name", &["output_name"], "the file's name, and that of its folder", |field| taken("output_name", field.text())),
    by("training_folder", &["output_dir"], "with `name` in it", |field| match field.root.text("name") {
        Some(name) => {
            becomes("output_dir", format!("{}/{name}", field.text().trim_end_matches('/')), "and the name in it")
        }
        None => taken("output_dir", field.text()),
    }),
    same("device", "device", Kind::Text),
    same("trigger_word", "trigger_word", Kind::Text),
    nothing("meta", "a note for the file's metadata"),
    nothing("performance_log_every", "what is printed"),
    nothing("sqlite_db_path", "how the program keeps its runs"),
    nothing("logging", "metrics.jsonl and loss.png are written"),
    gone("embedding", OFF, "no embeddings are trained"),
    gone("adapter", OFF, "no control adapters are trained"),
    gone("decorator", OFF, "no embeddings are trained"),
    gone("slider guidance", OFF, "no sliders are trained"),
    gone("first_sample", OFF, "samples are those of sample"),
    table("network", NETWORK),
    table("save", SAVE),
    datasets("datasets", DATASET, |_| Element::Dataset),
    table("train", TRAIN),
    table("model", MODEL),
    table("sample", SAMPLE),
];

static NETWORK: &[Row] = &[
    by("type", &["variant", "target_modules"], "`lora`, `locon`, `lokr`", |field| {
        match field.text().to_ascii_lowercase().as_str() {
            "lora" => no_effect("a LoRA, as without it"),
            "locon" => becomes("target_modules", json!(["all-conv"]), "convolutions too"),
            "lokr" => taken("variant", "lokr"),
            "dora" => taken("variant", "dora"),
            other => refused(format!("no network {other} is trained here")),
        }
    }),
    by("linear", &["lora_rank"], "the rank", rank),
    by("rank", &["lora_rank"], "an old name of linear", rank),
    by("linear_alpha", &["lora_alpha"], "alpha where none is given, and 1 without that", |field| {
        alpha(field, field.number().or_else(|| field.here.number("alpha")))
    })
    .default("\"alpha\""),
    by("alpha", &[], "with linear_alpha", |field| match field.here.given("linear_alpha") {
        Some(_) => no_effect("linear_alpha says it"),
        None => translated(Settings::new(), "the alpha of linear layers"),
    })
    .default("1"),
    by("conv", &["target_modules", "rank_pattern"], "convolutions too, with this rank", |field| match field.count() {
        Some(0) => no_effect("off, as without it"),
        Some(rank) => translated(
            vec![
                ("target_modules", json!(["all-conv"])),
                ("rank_pattern", json!({ sd_scripts_network::SPATIAL: rank })),
            ],
            "convolutions too, with this rank",
        ),
        None => field.expected("a whole number"),
    }),
    by("conv_alpha", &["alpha_pattern"], "of convolutions", |field| match (field.here.count("conv"), field.number()) {
        (None | Some(0), _) => no_effect("only with conv"),
        (_, Some(alpha)) => becomes(
            "alpha_pattern",
            json!({ sd_scripts_network::SPATIAL: values::of_number(alpha) }),
            "of convolutions",
        ),
        _ => field.expected("a number"),
    }),
    same("dropout", "lora_dropout", Kind::Positive),
    by("lokr_full_rank", &["variant_options"], "of LoKr", |field| of_lokr(field, "full_matrix")),
    by("lokr_factor", &["variant_options"], "of LoKr", |field| of_lokr(field, "factor")),
    nothing("old_lokr_format", "how files are written"),
    nothing("transformer_only", "only blocks of a transformer are adapted, as by attention-mlp"),
    nothing("split_multistage_loras", "for bases of several stages"),
    same("pretrained_lora_path", "init_from", Kind::Text),
    gone("all_layers", OFF, "layers that are neither linear nor convolutions are not trained"),
    gone("layer_offloading", OFF, "the adapter stays on the device"),
    gone("lorm", OFF, "no LoRM"),
    gone("normalize", OFF, "the update is not normalised"),
    table("network_kwargs", KWARGS),
];

static KWARGS: &[Row] = &[
    by("only_if_contains", &["target_modules"], "layers whose name has one of these", |field| {
        match values::texts(&field.value) {
            Some(parts) => {
                let parts: Vec<String> = parts.iter().map(|part| format!("*{part}*")).collect();
                becomes("target_modules", json!(parts), "layers whose name has one of these")
            }
            None => field.expected("a list of texts"),
        }
    }),
    gone("ignore_if_contains", OFF, "layers are named, not left out: target_modules"),
    gone("full_train_in_out", OFF, "the first and the last layer are not trained whole"),
    gone("full_if_contains", OFF, "no layer is trained whole"),
];

static SAVE: &[Row] = &[
    by("dtype", &["save_precision"], "fp16 where none is given", |field| precision(field, "save_precision"))
        .default("\"float16\""),
    by("save_dtype", &["save_precision"], "an old name of dtype", |field| precision(field, "save_precision")),
    same("save_every", "save_every_n_steps", Kind::AtLeastOne).default("1000"),
    same("max_step_saves_to_keep", "save_total_limit", Kind::AtLeastOne).default("5"),
    gone("save_format", &["\"safetensors\""], "an adapter is one file of safetensors"),
    nothing("push_to_hub hf_repo_id hf_private", "nothing is sent anywhere"),
];

static DATASET: &[Row] = &[
    by("folder_path", &["train_data_dir", "recursive"], "its pictures, of folders below it too", |field| {
        translated(
            vec![("train_data_dir", field.text().into()), ("recursive", true.into())],
            "and what lies in folders below it",
        )
    }),
    same("dataset_path", "train_data_dir", Kind::Text),
    gone("type", &["\"image\""], "pictures are trained on"),
    same("default_caption", "class_tokens", Kind::Text),
    gone("trigger_word", OFF, "one trigger_word holds for all datasets"),
    gone("random_triggers", OFF, "no words drawn from a list"),
    nothing("random_triggers_max", "with random_triggers"),
    by("caption_ext", &["caption_extension"], "`txt` where none is given", |field| {
        taken("caption_extension", format!(".{}", field.text().trim_start_matches('.')))
    })
    .default("\"txt\""),
    same("caption_type", "caption_extension", Kind::Text),
    by("resolution", &["max_resolution"], "an area; several are datasets of their own", resolution).default("512"),
    by("buckets", &["enable_bucket", "max_bucket_reso"], "on where it is not given, without limits", |field| {
        field.when_on({
            let largest = values::texts(&field.here.get("resolution").unwrap_or_default()).unwrap_or_default();
            let largest = largest.iter().filter_map(|side| side.parse::<u64>().ok()).max().unwrap_or(512);
            let settings: Settings =
                vec![("enable_bucket", true.into()), ("max_bucket_reso", largest.saturating_mul(2).min(4096).into())];
            translated(settings, "sd-scripts' buckets, whose sides differ a little")
        })
    })
    .default("true"),
    by("bucket_tolerance", &["bucket_reso_steps"], "sides are multiples of it", |field| match field.count() {
        Some(64) => no_effect("64, as without it"),
        Some(steps) if steps % 8 == 0 && steps > 0 => taken("bucket_reso_steps", steps),
        _ => lost("sides are multiples of 8"),
    }),
    same("is_reg", "is_reg", Kind::Flag),
    gone("prior_reg", OFF, "the base's own prediction is no target"),
    gone("network_weight", &["1"], "the adapter counts fully for each dataset"),
    by("token_dropout_rate", &["caption_tag_dropout_rate"], "tags that are left out", |field| {
        rate(field, "caption_tag_dropout_rate")
    }),
    same("shuffle_tokens", "shuffle_caption", Kind::Flag),
    same("keep_tokens", "keep_tokens", Kind::AtLeastOne),
    by("caption_dropout_rate", &["caption_dropout_rate"], "captions that are left out", |field| {
        rate(field, "caption_dropout_rate")
    }),
    by("flip_x", &["processors"], "`flip`", processors),
    gone("flip_y", OFF, "pictures are not turned upside down"),
    by("random_crop", &["processors"], "`random_crop`", processors),
    gone("random_scale", OFF, "pictures have one scale"),
    gone("scale", &["1"], "pictures have one scale"),
    gone("square_crop", OFF, "buckets keep aspects; without buckets all are squares"),
    gone("augments augmentations", OFF, "no augmentations by name"),
    nothing("shuffle_augmentations", "with augmentations"),
    gone(
        "control_path control_path_1 control_path_2 control_path_3 controls inpaint_path clip_image_path \
             unconditional_path",
        OFF,
        "no pictures beside the captions",
    ),
    nothing("full_size_control_images control_transparent_color", "with control_path"),
    by("alpha_mask", &["alpha_mask", "masked_loss"], "transparency weights the loss", |field| {
        field.when_on(translated(vec![("alpha_mask", true.into())], "with masked_loss"))
    }),
    by("mask_path", &["mask_dir"], "masks of the same names", |field| {
        becomes("mask_dir", field.text(), "with masked_loss")
    }),
    same("invert_mask", "invert_mask", Kind::Flag),
    same("mask_min_value", "unmasked_weight", Kind::Positive),
    gone("use_short_captions", OFF, "captions are those of the files"),
    by("num_repeats", &["repeats"], "visits of each picture in an epoch", |field| match field.count() {
        Some(1) => no_effect("1, as without it"),
        Some(count @ 2..) => taken("repeats", count),
        _ => field.expected("a whole number from 1 on"),
    }),
    by("loss_multiplier", &["loss_weight"], "how much it counts", |field| match field.number() {
        Some(1.0) => no_effect("1, as without it"),
        _ => field.number_as("loss_weight"),
    }),
    gone("replacements", OFF, "words of captions are not replaced"),
    gone("standardize_images", OFF, "pictures are as they are"),
    nothing("resize_method", "pictures are resized with Lanczos filters"),
    nothing("cache_latents", "latents are cached"),
    nothing("cache_latents_to_disk", "`cache_dir` keeps them for the next run"),
    nothing("cache_text_embeddings", "captions are encoded once wherever they may be"),
    nothing("cache_clip_vision_to_disk", "with control adapters"),
    nothing("load_image_when_caching_latents num_workers prefetch_factor fast_image_size", "how pictures are read"),
    nothing("debug", "what is printed"),
    nothing("extra_values", "for bases that read them"),
    nothing("replay_transforms", "with control_path"),
    nothing("guidance_type", "with sliders"),
    gone("num_frames", &["1"], "films are not trained on"),
    nothing("shrink_video_to_frames fps auto_frame_count do_i2v do_audio", "films are not trained on"),
];

static TRAIN: &[Row] = &[
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
            (true, "shift" | "flux_shift") => becomes("timestep_sampling", "flux_shift", "by the picture's size"),
            (true, other) => lost(format!("noise levels are not drawn by {other}")),
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
    table("optimizer_params", OPTIMIZER),
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

static MODEL: &[Row] = &[
    by("name_or_path", &["base_model"], "a file or a folder", sd_scripts::base_model),
    by("arch", &[], "the base's files say it", |_| no_effect("the base's files say it")),
    nothing("is_v2 is_v3 is_xl is_flux is_pixart is_lumina2 is_auraflow", "the base's files say it"),
    by("is_v_pred", &["v_parameterization"], "on", |field| match field.on() {
        true => taken("v_parameterization", true),
        false => no_effect("the base says it"),
    }),
    nothing("dtype", "weights are in the precision of the run"),
    nothing("vae_dtype", "an autoencoder that overflows goes on in fp32"),
    nothing("te_dtype", "weights are in the precision of the run"),
    same("vae_path", "vae", Kind::Text),
    same("te_name_or_path", "text_encoder", Kind::Text),
    by("extras_name_or_path", &["text_encoder"], "where the other networks are", |field| {
        taken("text_encoder", field.text())
    }),
    by("quantize", &["base_storage"], "by qtype; fp8 where none is given", |field| {
        match (field.on(), field.here.text("qtype").unwrap_or_default()) {
            (false, _) => no_effect("off, as without it"),
            (true, qtype) if qtype.contains('4') || qtype.contains('3') || qtype.contains('2') => {
                becomes("base_storage", "nf4", format!("{qtype} is nearest to nf4"))
            }
            (true, qtype) if qtype.contains("int") => becomes("base_storage", "int8", "with a factor for each output"),
            (true, _) => becomes("base_storage", "fp8", "with a factor for each output"),
        }
    }),
    nothing("qtype", "with quantize"),
    nothing("quantize_te qtype_te text_encoder_bits", "text encoders are gone once captions are encoded"),
    nothing("quantize_kwargs", "with quantize"),
    gone("accuracy_recovery_adapter", OFF, "no adapter makes up for fewer bits"),
    nothing("low_vram", "vram_budget says what there is"),
    by("layer_offloading", &["offload_base"], "all frozen weights are streamed", |field| {
        field.when_on(becomes("offload_base", true, "all frozen weights are streamed"))
    }),
    nothing("layer_offloading_transformer_percent layer_offloading_text_encoder_percent", "with layer_offloading"),
    gone("auto_memory", OFF, "vram_budget says what there is"),
    by("assistant_lora_path", &["fuse_adapters"], "merged into the base; there it is off in samples", |field| {
        becomes("fuse_adapters", vec![field.text()], "samples are drawn with it too")
    }),
    gone("inference_lora_path", OFF, "samples are drawn with the adapter alone"),
    by("lora_path", &["fuse_adapters"], "a LoRA in the base", |field| taken("fuse_adapters", vec![field.text()])),
    gone("refiner_name_or_path", OFF, "no refiner is used"),
    nothing("refiner_start_at", "no refiner is used"),
    gone("unet_path", OFF, "the base's own network is trained"),
    gone("attn_masking", OFF, "padding of captions is treated as the base says"),
    gone("split_model_over_gpus", OFF, "one device trains"),
    nothing("split_model_other_module_param_count_scale", "one device trains"),
    nothing("use_text_encoder_1 use_text_encoder_2", "the base says which"),
    nothing("experimental_xl", "the base's files say it"),
    nothing("use_flux_cfg", "guidance is not part of training"),
    nothing("compile", "how steps are computed"),
    nothing("vae_device te_device", "where networks are"),
    nothing("latent_space_version", "the base says it"),
    gone("only_if_contains ignore_if_contains", OFF, "layers are named by target_modules"),
    gone("model_kwargs model_paths", OFF, "nothing reads them"),
];

static SAMPLE: &[Row] = &[
    by("sampler", &["sample_sampler"], "of those that there are", |field| match field.text().as_str() {
        _ if prompts(&field.root).is_empty() => no_effect("there are no prompts"),
        sampler @ ("euler" | "euler_a" | "ddim") => taken("sample_sampler", sampler),
        _ => no_effect("samples alone look otherwise"),
    }),
    by("sample_every", &["sample_every_n_steps"], "with prompts", |field| {
        match (prompts(&field.root).is_empty(), field.count()) {
            (true, _) => no_effect("there are no prompts"),
            (false, Some(steps @ 1..)) => taken("sample_every_n_steps", steps),
            _ => no_effect("off, as without it"),
        }
    })
    .default("100"),
    nothing("sample_start_step", "samples are drawn from the first step on"),
    by("width", &["sample_resolution"], "with height", size),
    by("height", &["sample_resolution"], "with width", size),
    by("prompts", &["sample_prompts"], "[trigger] is the trigger word", samples),
    by("samples", &["sample_prompts"], "each with its own size, seed, steps and guidance", samples),
    by("neg", &["sample_negative_prompt"], "the negative prompt", |field| match field.value.as_str() {
        Some(text) if !text.is_empty() => taken("sample_negative_prompt", text),
        _ => no_effect("none"),
    }),
    by("seed", &["sample_seed"], "of the samples' noise", |field| match field.count() {
        Some(seed) => taken("sample_seed", seed),
        None => no_effect("drawn anew there"),
    }),
    nothing("walk_seed", "all samples have one seed"),
    by("guidance_scale", &["sample_guidance_scale"], "its name here", |field| match field.number() {
        Some(scale) if scale >= 1.0 => taken("sample_guidance_scale", values::of_number(scale)),
        _ => no_effect("no guidance"),
    }),
    by("sample_steps", &["sample_steps"], "steps of the sampler", |field| match field.count() {
        Some(steps @ 1..) => taken("sample_steps", steps),
        _ => field.expected("a whole number from 1 on"),
    }),
    nothing("network_multiplier", "samples are drawn with the adapter fully"),
    nothing("guidance_rescale", "where the base asks for it"),
    nothing("format", "samples are one grid of PNG"),
    nothing("adapter_conditioning_scale", "no control adapters"),
    nothing("refiner_start_at", "no refiner is used"),
    nothing("extra_values", "for bases that read them"),
    nothing("num_frames fps", "films are not drawn"),
    nothing("do_cfg_norm", "where the base asks for it"),
];

fn is_flow(root: &Scope<'_>) -> bool {
    root.text("train.noise_scheduler").is_some_and(|name| name == "flowmatch")
        || root.on("model.is_flux")
        || root.on("model.is_v3")
        || root.text("model.arch").is_some_and(|arch| !["sd1", "sd2", "sdxl", "ssd", "vega"].contains(&arch.as_str()))
}

fn optimiser(root: &Scope<'_>) -> &'static str {
    optimisers::ours(&root.text("train.optimizer").unwrap_or_else(|| "adamw".to_owned()))
}

fn rank(field: &Field<'_>) -> Outcome {
    match field.count() {
        Some(rank @ 1..) => taken("lora_rank", rank),
        _ => field.expected("a whole number from 1 on"),
    }
}

fn alpha(field: &Field<'_>, alpha: Option<f64>) -> Outcome {
    match alpha {
        Some(alpha) if alpha > 0.0 => taken("lora_alpha", values::of_number(alpha)),
        _ => field.expected("a number above 0"),
    }
}

fn of_lokr(field: &Field<'_>, ours: &str) -> Outcome {
    match field.here.text("type").is_some_and(|kind| kind.eq_ignore_ascii_case("lokr")) {
        true => sd_scripts_network::option(field, ours),
        false => no_effect("a field of LoKr"),
    }
}

fn precision(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.text().as_str() {
        "fp32" | "float32" | "float" => taken(ours, "fp32"),
        "fp16" | "float16" => taken(ours, "fp16"),
        "bf16" | "bfloat16" => taken(ours, "bf16"),
        other => lost(format!("fp32, fp16 or bf16, not {other}")),
    }
}

fn rate(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        _ => field.number_as(ours),
    }
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

fn resolution(field: &Field<'_>) -> Outcome {
    let eights = |side: u64| side / 8 * 8;
    let sides = match &field.value {
        Value::Array(items) => items.iter().map(values::count).collect::<Option<Vec<_>>>(),
        value => values::count(value).map(|side| vec![side]),
    };
    match sides.as_deref() {
        Some(&[side]) => becomes("max_resolution", eights(side), "an area, in buckets"),
        Some(several) if !several.is_empty() => {
            let several: Vec<u64> = several.iter().map(|&side| eights(side)).collect();
            becomes("max_resolution", json!(several), "each is a dataset of its own")
        }
        _ => field.expected("a side in pixels, or several"),
    }
}

fn processors(field: &Field<'_>) -> Outcome {
    if !field.on() {
        return no_effect("off, as without it");
    }
    let mut all = vec![if field.here.on("random_crop") { "random_crop" } else { "center_crop" }];
    all.extend(field.here.on("flip_x").then_some("flip"));
    becomes("processors", json!(all), "a step of what pictures go through")
}

fn size(field: &Field<'_>) -> Outcome {
    let side = |key: &str| field.here.count(key).unwrap_or(512) / 8 * 8;
    becomes("sample_resolution", format!("{},{}", side("width"), side("height")), "width and height")
}

/// Prompts as lines with what they say of their own.
fn prompts(root: &Scope<'_>) -> Vec<String> {
    if root.on("train.disable_sampling") {
        return Vec::new();
    }
    let trigger = root.text("trigger_word").unwrap_or_default();
    let line = |sample: &Value| {
        let mut line =
            values::text(sample).or_else(|| values::text(sample.get("prompt")?))?.replace("[trigger]", &trigger);
        for (flag, key) in [
            ("--n", "neg"),
            ("--w", "width"),
            ("--h", "height"),
            ("--d", "seed"),
            ("--s", "sample_steps"),
            ("--l", "guidance_scale"),
        ] {
            let value = sample.get(key).and_then(values::text).filter(|value| !value.is_empty());
            line.extend(value.map(|value| format!(" {flag} {value}")));
        }
        Some(line)
    };
    let list = root.get("sample.samples").or_else(|| root.get("sample.prompts"));
    list.as_ref().and_then(Value::as_array).into_iter().flatten().filter_map(line).collect()
}

fn samples(field: &Field<'_>) -> Outcome {
    match prompts(&field.root) {
        lines if lines.is_empty() => no_effect("no prompts"),
        lines => becomes("sample_prompts", json!(lines), "a line each"),
    }
}

/// The keys of the one process, without the tables around it.
fn one_process(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries: Vec<Entry> = Vec::new();
    for entry in root.entries() {
        if entry.key != "config" {
            entries.push(entry.clone());
            continue;
        }
        for entry in entry.node.entries() {
            let Content::List(processes) = &entry.node.content else {
                entries.push(entry.clone());
                continue;
            };
            match processes.as_slice() {
                [process] => entries.extend(process.entries().iter().cloned()),
                several => {
                    let message =
                        format!("{} processes; a configuration here is of one: leave one of them", several.len());
                    return Err(Problem::new(&place, entry.line, "config.process", message));
                }
            }
        }
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}

/// Each of several resolutions is a dataset of its own, and masks count where there are any.
fn split_resolutions(_: &Scope<'_>, draft: &mut Draft, _: &mut Vec<Accounted>) -> Result<(), Problem> {
    draft.split("max_resolution");
    if draft.has("mask_dir") || draft.has("alpha_mask") {
        let place = "datasets";
        let verdict = crate::Verdict::Translated("masks of datasets count".to_owned());
        draft
            .set(None, "masked_loss", &true.into(), place, &verdict, false)
            .map_err(|error| Problem::of(place, error))?;
    }
    Ok(())
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
