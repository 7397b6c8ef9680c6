//! Nerogar/OneTrainer: the JSON of a run and its presets, with the concepts and samples that it names.

use serde_json::{Value, json};

use super::onetrainer_optimizer::OPTIMIZER;
use super::{Table, Tool, done, optimisers, sd_scripts, sd_scripts_network, tracking};
use crate::engine::{Field, Scope};
use crate::input::tree::{Content, Entry, Node};
use crate::input::{self, Document, Problem, Source};
use crate::outcome::{Outcome, becomes, instead, lost, no_effect, refused, taken, translated};
use crate::row::{Element, Kind, OFF, Row, by, datasets, gone, nothing, same, table};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::OneTrainer,
    name: "onetrainer",
    title: "OneTrainer",
    about: "JSON of a run or a preset. Concepts are read from `concepts`, or from the file that `concept_file_name` names; those \
            that are not enabled are left out, those of validation become `validation_data_dir`. `resolution` is an area: \
            pictures go to buckets by sd-scripts' rule, whose sides differ a little from OneTrainer's.",
    groups: &[ROWS],
    own: &[ROWS],
    is: |has| has("training_method") && has("model_type") || has("base_model_name") && has("concept_file_name"),
    prepare: with_files,
    finish: split_resolutions,
};

static ROWS: &[Row] = &[
    by("training_method", &["train"], "`LORA`; `FINE_TUNE` trains all weights", |field| match field.text().as_str() {
        "LORA" => no_effect("an adapter, as without it"),
        "FINE_TUNE" => becomes("train", "full", "all weights"),
        other => refused(format!("{other} is not trained here; LORA and FINE_TUNE are")),
    })
    .default("\"FINE_TUNE\""),
    by("model_type", &[], "the base's files say it", |field| {
        let kind = field.text();
        let known = [
            "STABLE_DIFFUSION_15",
            "STABLE_DIFFUSION_2",
            "STABLE_DIFFUSION_XL",
            "STABLE_DIFFUSION_3",
            "FLUX",
            "Z_IMAGE",
            "CHROMA",
            "QWEN",
        ];
        match known.iter().any(|known| kind.starts_with(known))
            && !kind.contains("INPAINTING")
            && !kind.contains("DEPTH")
        {
            true => no_effect("the base's files say it"),
            false => lost(format!("no base of the kind {kind} is trained here")),
        }
    }),
    by("base_model_name", &["base_model"], "a file or a folder", sd_scripts::base_model),
    by("output_model_destination", &["output_dir", "output_name"], "its folder and its name", |field| {
        let path = field.text().replace('\\', "/");
        let (folder, name) = path.rsplit_once('/').unwrap_or((".", &path));
        let name = name.strip_suffix(".safetensors").unwrap_or(name);
        translated(vec![("output_dir", folder.into()), ("output_name", name.into())], "folder and name")
    })
    .default("\"models/model.safetensors\""),
    by("output_dtype", &["save_precision"], "fp32 where none is given", |field| match precision(&field.text()) {
        Some(precision) => taken("save_precision", precision),
        None => lost("written as fp32, fp16 or bf16"),
    })
    .default("\"FLOAT_32\""),
    by("output_model_format", &[], "files are safetensors that most programs load", |_| {
        no_effect("files are safetensors in the layout that most programs load")
    }),
    by("train_dtype", &["precision"], "fp16 where none is given", |field| match precision(&field.text()) {
        Some(precision) => taken("precision", precision),
        None => lost("computed in fp32, fp16 or bf16"),
    })
    .default("\"FLOAT_16\""),
    same("train_device", "device", Kind::Text),
    // Data.
    datasets("concepts", CONCEPT, concept),
    nothing("concept_file_name", "its concepts are read with these keys"),
    by(
        "aspect_ratio_bucketing",
        &["enable_bucket", "max_bucket_reso"],
        "on where it is not given; up to 4 : 1",
        |field| {
            field.when_on({
                let largest = field.root.text("resolution").unwrap_or_default();
                let largest =
                    largest.split([',', 'x']).filter_map(|side| side.trim().parse::<u64>().ok()).max().unwrap_or(512);
                let settings = vec![
                    ("enable_bucket", true.into()),
                    ("max_bucket_reso", largest.saturating_mul(2).min(4096).into()),
                ];
                translated(settings, "sd-scripts' buckets, whose sides differ a little")
            })
        },
    )
    .default("true"),
    by("resolution", &["max_resolution"], "an area; several are datasets of their own", |field| {
        resolutions(&field.text())
    })
    .default("\"512\""),
    // Optimisation.
    same("learning_rate", "learning_rate", Kind::Number).default("0.000003"),
    by("learning_rate_scheduler", &["lr_scheduler"], "by its name", |field| match field.text().as_str() {
        "COSINE_WITH_HARD_RESTARTS" => taken("lr_scheduler", "cosine_with_restarts"),
        // There the cosine goes up again as it went down.
        "COSINE_WITH_RESTARTS" => instead(
            vec![("lr_scheduler", "cosine".into())],
            "no schedule that rises again; a cosine stands in its place",
        ),
        "REX" => instead(
            vec![("lr_scheduler", "rex".into())],
            "REX by its paper; the curve of that name has other constants there",
        ),
        name => optimisers::schedule(&name.to_ascii_lowercase()),
    })
    .default("\"CONSTANT\""),
    by(
        "learning_rate_warmup_steps",
        &["lr_warmup_steps"],
        "200 steps where none are given; a share up to 1",
        |field| match field.number() {
            Some(0.0) => no_effect("off, as without it"),
            Some(steps) => taken("lr_warmup_steps", values::of_number(steps)),
            None => field.expected("steps, or a share"),
        },
    )
    .default("200"),
    by("learning_rate_cycles", &["lr_scheduler_num_cycles"], "of `COSINE_WITH_HARD_RESTARTS`", |field| {
        match (field.root.text("learning_rate_scheduler").as_deref(), field.count()) {
            (Some("COSINE_WITH_HARD_RESTARTS"), Some(cycles @ 1..)) => taken("lr_scheduler_num_cycles", cycles),
            (_, Some(1)) => no_effect("1, as without it"),
            (Some("CONSTANT" | "LINEAR" | "ADAFACTOR" | "REX"), _) => no_effect("a number of cosines"),
            _ => lost("a cosine goes through once"),
        }
    }),
    same("learning_rate_min_factor", "lr_min_ratio", Kind::Positive),
    gone("custom_learning_rate_scheduler scheduler_params", OFF, "no schedules of one's own code"),
    gone("learning_rate_scaler", &["\"NONE\""], "learning_rate counts as it is; multiply it yourself"),
    gone("loss_scaler", &["\"NONE\""], "the loss is a mean; multiply learning_rate instead"),
    same("epochs", "epochs", Kind::Count).default("100"),
    same("batch_size", "batch_size", Kind::Count).default("1"),
    same("gradient_accumulation_steps", "gradient_accumulation_steps", Kind::Count),
    same("clip_grad_norm", "max_grad_norm", Kind::Number),
    by("ema", &["ema_decay"], "`OFF`, or with ema_decay", |field| match field.text().as_str() {
        "OFF" => no_effect("off, as without it"),
        _ => {
            let decay = field.root.number("ema_decay").unwrap_or(0.999);
            let interval = field.root.number("ema_update_step_interval").unwrap_or(5.0).max(1.0);
            becomes("ema_decay", decay.powf(1.0 / interval), "averaged at each step, by as much in all")
        }
    }),
    nothing("ema_decay ema_update_step_interval", "with ema"),
    table("optimizer", OPTIMIZER),
    // The adapter.
    by("peft_type", &["variant"], "by its name", |field| match field.text().as_str() {
        _ if is_full(&field.root) => no_effect("all weights are trained"),
        "LORA" => no_effect("a LoRA, as without it"),
        "LOHA" => taken("variant", "loha"),
        "LOKR" => taken("variant", "lokr"),
        "OFT_2" | "OFT" => becomes("variant", "peft-oft", "rotations of the inputs"),
        other => refused(format!("no adapter {other} is known")),
    }),
    by("lora_rank", &["lora_rank"], "16 where none is given", |field| {
        of_lora(field, field.count().map(|rank| taken("lora_rank", rank)))
    })
    .default("16"),
    by("lora_alpha", &["lora_alpha"], "1 where none is given; here the rank", |field| {
        of_lora(
            field,
            field.number().filter(|&alpha| alpha > 0.0).map(|alpha| taken("lora_alpha", values::of_number(alpha))),
        )
    })
    .default("1"),
    by("lora_decompose", &["variant"], "with magnitudes", |field| match field.on() {
        true if !is_full(&field.root) => {
            becomes("variant", "lycoris-dora", "with magnitudes, and an epsilon beside their norms")
        }
        _ => no_effect("off, as without it"),
    }),
    nothing("lora_decompose_norm_epsilon", "with lora_decompose"),
    by("lora_decompose_output_axis", &[], "with lora_decompose", |field| {
        match field.on() && field.root.on("lora_decompose") {
            true => lost("magnitudes are of the inputs"),
            false => no_effect("off, as without it"),
        }
    }),
    gone("lora_weight_dtype", &["\"FLOAT_32\""], "trained numbers are fp32"),
    by("lora_model_name", &["init_from"], "a LoRA to go on from", |field| {
        of_lora(field, Some(taken("init_from", field.text())))
    }),
    by("dropout_probability", &["lora_dropout"], "dropout of the adapter", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        number => of_lora(field, number.map(|rate| taken("lora_dropout", values::of_number(rate)))),
    }),
    by("layer_filter_preset", &["target_modules"], "`full`: all layers; `attn-mlp`, `attn-only`, `custom`", layers)
        .default("\"full\""),
    by("layer_filter", &["target_modules"], "with the preset `custom`: what names of layers contain", |field| {
        match field.root.text("layer_filter_preset").as_deref() {
            Some("custom") if !is_full(&field.root) => custom_layers(field),
            _ => no_effect("only with the preset custom"),
        }
    }),
    nothing("layer_filter_regex", "with layer_filter"),
    nothing("lora_layers", "an old name of layer_filter"),
    nothing("lora_layer_preset", "an old name of layer_filter_preset"),
    nothing("lora_layers_regex", "an old name of layer_filter_regex"),
    gone("quantization", OFF, "all layers of the base are stored alike: base_storage"),
    by("oft_block_size", &["variant_options"], "of OFT", |field| of_peft(field, "OFT", "block_size")),
    by("oft_block_share", &["variant_options"], "of OFT", |field| of_peft(field, "OFT", "block_share")),
    gone("dora_oft", OFF, "no magnitudes with rotations"),
    gone("oft_scaled", OFF, "no scales with rotations"),
    nothing("oft_clipped_norm", "of OFT"),
    gone("oft_cans", OFF, "rotations are exact"),
    by("lokr_dim", &["lora_rank"], "of LoKr", |field| match is_peft(field, "LOKR") {
        true => no_effect("lora_rank says it"),
        false => no_effect("a field of LoKr"),
    }),
    by("lokr_decompose_both", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "decompose_both")),
    by("lokr_decompose_factor", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "factor")),
    by("lokr_use_tucker", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "tucker")),
    by("lokr_full_matrix", &["variant_options"], "of LoKr", |field| of_peft(field, "LOKR", "full_matrix")),
    gone("lokr_weight_decompose", OFF, "see lora_decompose"),
    nothing("lokr_dora_on_output", "with lokr_weight_decompose"),
    nothing("lokr_vec_trick", "how steps are computed"),
    gone("additional_embeddings", OFF, "no embeddings are trained"),
    // Loss and noise.
    by("mse_strength", &[], "1, or 0 beside `mae_strength` of 1", |field| match field.number() {
        Some(1.0) => no_effect("as without it"),
        Some(0.0) if is_absolute(&field.root) => no_effect("mae_strength says the loss"),
        _ => lost("the loss is the squared difference"),
    }),
    by("mae_strength", &["loss_type"], "alone: `l1`", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(_) if is_absolute(&field.root) => becomes("loss_type", "l1", "the absolute difference alone"),
        _ => lost("the loss is one of the squared and the absolute difference, not a mixture"),
    }),
    gone("log_cosh_strength huber_strength", OFF, "the loss is the squared difference"),
    by("huber_delta", &[], "with huber_strength", |_| no_effect("with huber_strength")),
    by("loss_weight_fn", &["min_snr_gamma", "debiased_estimation_loss"], "with loss_weight_strength", |field| {
        match field.text().as_str() {
            "CONSTANT" => no_effect("off, as without it"),
            "MIN_SNR_GAMMA" => becomes(
                "min_snr_gamma",
                field.root.number("loss_weight_strength").map_or(json!(5), values::of_number),
                "loss_weight_strength",
            ),
            "DEBIASED_ESTIMATION" => taken("debiased_estimation_loss", true),
            other => lost(format!("no weight {other} of the loss")),
        }
    }),
    nothing("loss_weight_strength", "with loss_weight_fn"),
    same("offset_noise_weight", "noise_offset", Kind::Positive),
    gone("generalized_offset_noise", OFF, "the offset has the same strength at all timesteps"),
    gone("perturbation_noise_weight", OFF, "the inputs' noise is that of the target"),
    same("rescale_noise_scheduler_to_zero_terminal_snr", "zero_terminal_snr", Kind::Flag),
    by("force_v_prediction", &["v_parameterization"], "on", |field| match field.on() {
        true if field.root.on("force_epsilon_prediction") => {
            refused("contradicts force_epsilon_prediction; keep one of them")
        }
        true => taken("v_parameterization", true),
        false => no_effect("the base says it"),
    }),
    by("force_epsilon_prediction", &["v_parameterization"], "off", |field| match field.on() {
        true => taken("v_parameterization", false),
        false => no_effect("the base says it"),
    }),
    by("min_noising_strength", &["min_timestep"], "in thousandths", |field| noising(field, "min_timestep", 0.0)),
    by("max_noising_strength", &["max_timestep"], "in thousandths", |field| noising(field, "max_timestep", 1.0)),
    by("timestep_distribution", &["timestep_sampling"], "`UNIFORM` and `LOGIT_NORMAL`", distribution)
        .default("\"UNIFORM\""),
    by("noising_weight", &["logit_std"], "of `LOGIT_NORMAL`: one less than the standard deviation", |field| {
        of_distribution(field, "logit_std", 1.0)
    }),
    by("noising_bias", &["logit_mean"], "of `LOGIT_NORMAL`: the mean", |field| {
        of_distribution(field, "logit_mean", 0.0)
    }),
    by("timestep_shift", &["discrete_flow_shift"], "1 is none", |field| match field.number() {
        Some(1.0) => no_effect("off, as without it"),
        _ => field.number_as("discrete_flow_shift"),
    }),
    by("dynamic_timestep_shifting", &["timestep_sampling"], "`flux_shift`", |field| {
        match field.on() && is_flow(&field.root) {
            true => becomes("timestep_sampling", "flux_shift", "by the picture's size"),
            false => no_effect("off, as without it"),
        }
    }),
    gone("cep_gamma", OFF, "captions' states are taken as they are"),
    gone("force_circular_padding", OFF, "convolutions pad with zeros"),
    // Parts.
    table("unet", UNET),
    table("transformer", UNET),
    table("text_encoder", TEXT_ENCODER),
    table("text_encoder_2", TEXT_ENCODER_2),
    table("text_encoder_3", OTHER_PART),
    table("vae", VAE),
    by("text_encoder_layer_skip", &["clip_skip"], "layers that are left out: one less than clip_skip", |field| {
        match field.count() {
            Some(0) => no_effect("none, as without it"),
            Some(skipped) if !is_sdxl(&field.root) => becomes("clip_skip", skipped + 1, "counted from 1"),
            Some(_) => no_effect("the layer that is read is the base's own"),
            None => field.expected("a whole number"),
        }
    }),
    by("gradient_checkpointing", &["gradient_checkpointing"], "an old form", |field| match field.text().as_str() {
        "OFF" => no_effect("off, as without it"),
        _ if values::switch(&field.value) == Some(false) => no_effect("off, as without it"),
        _ => taken("gradient_checkpointing", true),
    }),
    nothing("enable_activation_offloading layer_offload_fraction weight_dtype", "an old form"),
    gone("extra_model_name", OFF, "the base alone is read"),
    gone("circular_mask_generation", OFF, "masks are as they are"),
    gone("random_rotate_and_crop", OFF, "no rotations"),
    nothing("latent_caching_epochs", "crops and flips are drawn anew at each visit"),
    nothing("token_count initial_embedding_text", "a field of embeddings"),
    same("min_snr_gamma", "min_snr_gamma", Kind::Positive),
    // Masks.
    same("masked_training", "masked_loss", Kind::Flag),
    by("unmasked_weight", &["unmasked_weight"], "with masked_training; 0.1 where none is given", |field| {
        match field.root.on("masked_training") {
            true => taken("unmasked_weight", field.number().map_or(Value::Null, values::of_number)),
            false => no_effect("only with masked_training"),
        }
    })
    .default("0.1"),
    by("unmasked_probability", &[], "with masked_training", |field| {
        match field.root.on("masked_training") && field.number() != Some(0.0) {
            true => lost("masks count at every step"),
            false => no_effect("only with masked_training"),
        }
    })
    .default("0.1"),
    gone("normalize_masked_area_loss", OFF, "the loss is a mean over the whole picture"),
    same("masked_prior_preservation_weight", "prior_mask_weight", Kind::Positive),
    gone("custom_conditioning_image", OFF, "no pictures beside the captions"),
    // Looking and saving.
    by("validation", &[], "with concepts of validation", |_| no_effect("with concepts of validation")),
    by("validate_after", &["validate_every_n_steps"], "by steps", |field| {
        match field.root.text("validate_after_unit").as_deref() {
            _ if !field.root.on("validation") => no_effect("validation is off"),
            Some("STEP") => taken("validate_every_n_steps", field.count().unwrap_or(1)),
            _ => lost("held-out loss is told by steps, and before and after training"),
        }
    }),
    nothing("validate_after_unit", "with validate_after"),
    by("samples", &["sample_prompts"], "each with its own size, seed, steps and guidance", samples),
    nothing("sample_definition_file_name", "its samples are read with these keys"),
    by("sample_after", &["sample_every_n_steps", "sample_every_minutes"], "by steps or by time", |field| {
        match field.root.text("sample_after_unit").as_deref() {
            _ if prompts(&field.root).is_empty() => no_effect("there are no prompts"),
            Some("NEVER") => no_effect("off, as without it"),
            Some("STEP") => taken("sample_every_n_steps", field.count().unwrap_or(1)),
            unit => match unit.and_then(|unit| minutes(field, unit)) {
                Some(minutes) => taken("sample_every_minutes", minutes),
                None => lost("samples are drawn before and after training, by steps and by time"),
            },
        }
    })
    .default("10"),
    nothing("sample_after_unit", "with sample_after").default("\"MINUTE\""),
    by("save_every", &["save_every_n_steps", "save_every_n_epochs", "save_every_minutes"], "by its unit", save_every),
    by(
        "save_after",
        &["save_every_n_steps", "save_every_n_epochs", "save_every_minutes"],
        "an old name of save_every",
        save_every,
    ),
    nothing("save_every_unit", "with save_every"),
    nothing("save_after_unit", "with save_after"),
    by("continue_last_backup", &["resume"], "from a state of this program, where there is one", |field| {
        field.when_on(becomes("resume", "auto", "from a state of this program, where there is one"))
    }),
    gone("multi_gpu", OFF, "one device trains; raise gradient_accumulation_steps by their number"),
    nothing(
        "workspace_dir cache_dir debug_mode debug_dir prevent_overwrites include_train_config \
         clear_cache_before_training save_filename_prefix secrets __version",
        "how files and runs are kept",
    ),
    by("tensorboard", &["log_with"], "files for TensorBoard", tracking::tensorboard),
    nothing(
        "tensorboard_expose tensorboard_always_on tensorboard_port samples_to_tensorboard",
        "metrics.jsonl and loss.png are written",
    ),
    nothing(
        "device_indexes gradient_reduce_precision gradient_reduce_prevision fused_gradient_reduce \
         async_gradient_reduce async_gradient_reduce_buffer",
        "one device trains",
    ),
    nothing(
        "async_offloading enable_async_offloading compile temp_device attention_mechanism enable_autocast_cache \
         fallback_train_dtype prefetch_next_batch dataloader_threads caching_threads",
        "how steps are computed",
    ),
    nothing("cloud", "nothing is sent anywhere"),
    nothing("text_caching latent_caching image_caching", "captions are encoded once wherever they may be"),
    nothing("frames sample_video_format sample_audio_format", "films are not trained on"),
    nothing(
        "backup_after backup_after_unit rolling_backup rolling_backup_count backup_before_save",
        "a state is written by steps: save_state_every_n_steps",
    ),
    nothing(
        "embedding_learning_rate preserve_embedding_norm embedding embeddings embedding_weight_dtype \
         bundle_additional_embeddings",
        "a field of embeddings",
    ),
    nothing(
        "prior effnet_encoder decoder decoder_text_encoder decoder_vqgan text_encoder_3_layer_skip text_encoder_4 \
         text_encoder_4_layer_skip unconditional_transformer text_encoder_2_layer_skip text_encoder_2_sequence_length \
         text_encoder_sequence_length vb_loss_strength",
        "a part of other bases",
    ),
    nothing("optimizer_defaults", "of optimisers that are not chosen"),
    nothing(
        "sample_image_format sample_skip_first non_ema_sampling save_skip_first only_cache",
        "a field of the program",
    ),
];

static UNET: &[Row] = &[
    by("train", &["train_unet"], "adapted", |field| match field.on() {
        true => no_effect("adapted, as without it"),
        false => taken("train_unet", false),
    }),
    by("learning_rate", &["unet_lr"], "learning_rate where none is given", |field| match field.number() {
        Some(_) if is_flow(&field.root) => {
            becomes("learning_rate", values::of_number(field.number().unwrap_or(0.0)), "the transformer's")
        }
        _ => field.number_as("unet_lr"),
    }),
    by("weight_dtype", &["base_storage"], "in fewer bits: base_storage", storage),
    by("gradient_checkpointing", &["gradient_checkpointing"], "on where it is not given", |field| {
        field.when_on(taken("gradient_checkpointing", true))
    })
    .default("true"),
    by("activation_offloading", &["cpu_offload_checkpointing"], "its name here", |field| {
        field.when_on(taken("cpu_offload_checkpointing", true))
    }),
    by("offload_fraction", &["offload_base"], "all frozen weights are streamed", |field| match field.number() {
        Some(fraction) if fraction > 0.0 => {
            becomes("offload_base", true, "all frozen weights are streamed, not a share")
        }
        _ => no_effect("off, as without it"),
    }),
    by("stop_training_after", &[], "trained to the end", stop),
    nothing("stop_training_after_unit", "with stop_training_after"),
    gone("model_name", OFF, "the base's own network is trained"),
    nothing("include", "which networks there are"),
    nothing("dropout_probability", "a field of text encoders"),
    nothing("train_embedding", "a field of embeddings"),
    nothing("attention_mask", "how captions' padding is treated, the base says"),
    by("guidance_scale", &["guidance_scale"], "of FLUX.1", |field| {
        match field.root.text("model_type").is_some_and(|kind| kind.starts_with("FLUX")) {
            true => taken("guidance_scale", field.number().map_or(Value::Null, values::of_number)),
            false => no_effect("only FLUX.1 is told it"),
        }
    }),
];

static TEXT_ENCODER: &[Row] = &[
    by("train", &["train_text_encoder", "train_text_encoder_1"], "adapted", |field| {
        match (field.on(), is_sdxl(&field.root)) {
            _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
            (true, _) => no_effect("adapted, as without it"),
            (false, false) => taken("train_text_encoder", false),
            (false, true) => becomes("train_text_encoder_1", false, "SDXL's first"),
        }
    }),
    by(
        "learning_rate",
        &["text_encoder_lr", "text_encoder_1_lr"],
        "learning_rate where none is given (here half of it)",
        |field| {
            encoder_rate(
                field,
                if is_sdxl(&field.root) { "text_encoder_1_lr" } else { "text_encoder_lr" },
                "text_encoder.train",
            )
        },
    )
    .default("\"learning_rate\""),
    by("stop_training_after", &[], "trained to the end; 30 epochs where none are given", stop).default("30"),
    nothing("stop_training_after_unit", "with stop_training_after").default("\"EPOCH\""),
    by("dropout_probability", &["caption_dropout_rate"], "captions that are left out", |field| match field.number() {
        Some(0.0) => no_effect("off, as without it"),
        Some(rate) => becomes("caption_dropout_rate", values::of_number(rate), "for all text encoders together"),
        None => field.expected("a number"),
    }),
    by("weight_dtype", &["base_storage"], "in fewer bits: base_storage", |field| match precision(&field.text()) {
        Some(_) => no_effect("weights are in the precision of the run"),
        None => no_effect("stored as the base is"),
    }),
    nothing("train_embedding", "a field of embeddings"),
    nothing("include", "which networks there are"),
    gone("model_name", OFF, "the base's own network is used"),
    nothing("attention_mask", "how captions' padding is treated, the base says"),
    nothing("guidance_scale", "a field of other parts"),
    nothing("gradient_checkpointing activation_offloading offload_fraction", "as for the U-Net"),
];

static TEXT_ENCODER_2: &[Row] = &[
    by("train", &["train_text_encoder_2"], "adapted", |field| match field.on() || !is_sdxl(&field.root) {
        true => no_effect("adapted, as without it"),
        false => becomes("train_text_encoder_2", false, "SDXL's second"),
    }),
    by("learning_rate", &["text_encoder_2_lr"], "learning_rate where none is given (here half of it)", |field| {
        match is_sdxl(&field.root) {
            true => encoder_rate(field, "text_encoder_2_lr", "text_encoder_2.train"),
            false => no_effect("a text encoder of other bases"),
        }
    })
    .default("\"learning_rate\""),
    by("stop_training_after", &[], "trained to the end; 30 epochs where none are given", |field| {
        match is_sdxl(&field.root) {
            true => stop(field),
            false => no_effect("a text encoder of other bases"),
        }
    })
    .default("30"),
    nothing("stop_training_after_unit", "with stop_training_after").default("\"EPOCH\""),
    nothing("dropout_probability", "that of the first text encoder counts for all"),
    nothing("weight_dtype", "stored as the base is"),
    nothing("train_embedding", "a field of embeddings"),
    nothing("include", "which networks there are"),
    gone("model_name", OFF, "the base's own network is used"),
    nothing("attention_mask", "how captions' padding is treated, the base says"),
    nothing("guidance_scale", "a field of other parts"),
    nothing("gradient_checkpointing activation_offloading offload_fraction", "as for the U-Net"),
];

static OTHER_PART: &[Row] = &[
    nothing(
        "train learning_rate stop_training_after stop_training_after_unit",
        "text encoders of this base are never trained here",
    ),
    nothing("dropout_probability", "that of the first text encoder counts for all"),
    nothing("weight_dtype", "stored as the base is"),
    nothing("train_embedding", "a field of embeddings"),
    nothing("include", "which networks there are"),
    gone("model_name", OFF, "the base's own network is used"),
    nothing("attention_mask", "how captions' padding is treated, the base says"),
    nothing("guidance_scale", "a field of other parts"),
    nothing("gradient_checkpointing activation_offloading offload_fraction", "as for the transformer"),
];

static VAE: &[Row] = &[
    same("model_name", "vae", Kind::Text),
    nothing("weight_dtype", "an autoencoder that overflows goes on in fp32"),
    nothing("train", "the autoencoder is not trained"),
    nothing("include", "which networks there are"),
    nothing("learning_rate stop_training_after stop_training_after_unit", "the autoencoder is not trained"),
    nothing("dropout_probability", "a field of text encoders"),
    nothing("train_embedding", "a field of embeddings"),
    nothing("attention_mask", "a field of text encoders"),
    nothing("guidance_scale", "a field of other parts"),
    nothing("gradient_checkpointing activation_offloading offload_fraction", "the autoencoder is not trained"),
];

static CONCEPT: &[Row] = &[
    by("path", &["train_data_dir", "validation_data_dir"], "its pictures", |field| {
        match field.here.text("type").as_deref() {
            Some("VALIDATION") => becomes("validation_data_dir", field.text(), "a concept of validation"),
            _ => taken("train_data_dir", field.text()),
        }
    }),
    nothing("name", "a note"),
    nothing("seed", "draws belong to the pictures"),
    nothing("enabled", "those that are not enabled are left out"),
    nothing("type validation_concept", "of validation: validation_data_dir"),
    nothing("__version", "how files are kept"),
    nothing("concept_stats", "counts of the program"),
    same("include_subdirectories", "recursive", Kind::Flag),
    gone("image_variations", &["1"], "crops and flips are drawn anew at each visit"),
    gone("text_variations", &["1"], "captions are drawn anew at each visit"),
    by("balancing", &["repeats"], "with balancing_strategy REPEATS", balancing),
    by("repeats", &["repeats"], "an old name of balancing", balancing),
    gone("balancing_strategy", &["\"REPEATS\""], "pictures are visited by repeats, not by a number of samples"),
    by("loss_weight", &["loss_weight"], "how much it counts", |field| match field.number() {
        Some(1.0) => no_effect("1, as without it"),
        _ => field.number_as("loss_weight"),
    }),
    table("image", IMAGE),
    table("text", TEXT),
];

static IMAGE: &[Row] = &[
    by("enable_crop_jitter", &["processors"], "`random_crop`; on where it is not given", processors).default("true"),
    by("enable_random_flip", &["processors"], "`flip`; on where it is not given", processors).default("true"),
    gone("enable_fixed_flip", OFF, "flips are drawn"),
    gone("enable_random_rotate enable_fixed_rotate", OFF, "no rotations"),
    nothing("random_rotate_max_angle", "with rotations"),
    gone("enable_random_brightness", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_brightness", OFF, "colours are as they are"),
    nothing("random_brightness_max_strength", "with brightness"),
    gone("enable_random_contrast", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_contrast", OFF, "colours are as they are"),
    nothing("random_contrast_max_strength", "with contrast"),
    gone("enable_random_saturation", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_saturation", OFF, "colours are as they are"),
    nothing("random_saturation_max_strength", "with saturation"),
    gone("enable_random_hue", OFF, "colours vary by color_jitter alone"),
    gone("enable_fixed_hue", OFF, "colours are as they are"),
    nothing("random_hue_max_strength", "with hue"),
    by("enable_resolution_override", &["max_resolution"], "with resolution_override", |field| {
        field.when_on(resolutions(&field.here.text("resolution_override").unwrap_or_default()))
    }),
    nothing("resolution_override", "with enable_resolution_override"),
    gone("enable_random_circular_mask_shrink enable_random_mask_rotate_crop", OFF, "masks are as they are"),
];

static TEXT: &[Row] = &[
    by(
        "prompt_source",
        &["caption_extension", "enable_wildcard"],
        "`sample`: a line of the picture's .txt file, drawn at each visit",
        |field| match field.text().as_str() {
            "sample" => translated(
                vec![("caption_extension", ".txt".into()), ("enable_wildcard", true.into())],
                "a line of it is drawn",
            ),
            "filename" => lost("names of files are no captions"),
            _ => lost("one file of captions for a concept is not read; class_tokens is one caption for all"),
        },
    )
    .default("\"sample\""),
    nothing("prompt_path", "with prompt_source"),
    same("enable_tag_shuffling", "shuffle_caption", Kind::Flag),
    same("tag_delimiter", "caption_separator", Kind::Text),
    by("keep_tags_count", &["keep_tokens"], "with enable_tag_shuffling; 1 where none is given", |field| {
        match field.here.on("enable_tag_shuffling") || field.here.on("tag_dropout_enable") {
            true => taken("keep_tokens", field.count().unwrap_or(1)),
            false => no_effect("tags stay where they are"),
        }
    })
    .default("1"),
    by(
        "tag_dropout_enable",
        &["caption_tag_dropout_rate", "caption_dropout_rate"],
        "with tag_dropout_probability",
        |field| match (field.on(), field.here.text("tag_dropout_mode").as_deref()) {
            (false, _) => no_effect("off, as without it"),
            (true, Some("RANDOM")) => becomes(
                "caption_tag_dropout_rate",
                field.here.number("tag_dropout_probability").map_or(json!(0), values::of_number),
                "each tag by itself",
            ),
            (true, Some("FULL")) => becomes(
                "caption_dropout_rate",
                field.here.number("tag_dropout_probability").map_or(json!(0), values::of_number),
                "all tags together",
            ),
            (true, _) => lost("tags are dropped with one probability for all"),
        },
    ),
    nothing("tag_dropout_mode tag_dropout_probability", "with tag_dropout_enable"),
    gone("tag_dropout_special_tags_mode", &["\"NONE\""], "all tags are alike"),
    nothing("tag_dropout_special_tags tag_dropout_special_tags_regex", "with its mode"),
    gone("caps_randomize_enable", OFF, "letters stay as they are"),
    nothing("caps_randomize_mode caps_randomize_probability caps_randomize_lowercase", "with caps_randomize_enable"),
];

fn is_full(root: &Scope<'_>) -> bool {
    root.text("training_method").is_some_and(|method| method != "LORA")
}

fn kind_is(root: &Scope<'_>, starts: &[&str]) -> bool {
    root.text("model_type").is_some_and(|kind| starts.iter().any(|start| kind.starts_with(start)))
}

fn is_sdxl(root: &Scope<'_>) -> bool {
    kind_is(root, &["STABLE_DIFFUSION_XL"])
}

fn is_flow(root: &Scope<'_>) -> bool {
    kind_is(root, &["FLUX", "Z_IMAGE", "STABLE_DIFFUSION_3", "CHROMA", "QWEN"])
}

fn of_lora(field: &Field<'_>, outcome: Option<Outcome>) -> Outcome {
    match is_full(&field.root) {
        true => no_effect("all weights are trained"),
        false => outcome.unwrap_or_else(|| field.expected("a number above 0")),
    }
}

fn is_peft(field: &Field<'_>, kind: &str) -> bool {
    !is_full(&field.root) && field.root.text("peft_type").is_some_and(|own| own.starts_with(kind))
}

fn of_peft(field: &Field<'_>, kind: &str, ours: &str) -> Outcome {
    match is_peft(field, kind) {
        true => sd_scripts_network::option(field, ours),
        false => no_effect(format!("a field of {kind}")),
    }
}

fn precision(name: &str) -> Option<&'static str> {
    match name {
        "FLOAT_32" | "TFLOAT_32" => Some("fp32"),
        "FLOAT_16" => Some("fp16"),
        "BFLOAT_16" => Some("bf16"),
        _ => None,
    }
}

fn storage(field: &Field<'_>) -> Outcome {
    match field.text().as_str() {
        "FLOAT_32" | "TFLOAT_32" | "FLOAT_16" | "BFLOAT_16" | "NONE" => {
            no_effect("weights are in the precision of the run")
        }
        "FLOAT_8" | "FLOAT_W8A8" => becomes("base_storage", "fp8", "with a factor for each output"),
        "INT_8" | "INT_W8A8" => becomes("base_storage", "int8", "with a factor for each output"),
        "NFLOAT_4" => taken("base_storage", "nf4"),
        "GGUF" => no_effect("a GGUF file's weights stay as they are"),
        other => lost(format!("weights are not stored as {other}")),
    }
}

fn layers(field: &Field<'_>) -> Outcome {
    let all = json!(["all-linear", "all-conv"]);
    match field.text().as_str() {
        _ if is_full(&field.root) => no_effect("all weights are trained"),
        "full" if is_flow(&field.root) => becomes("target_modules", json!(["all-linear"]), "all layers"),
        "full" => becomes("target_modules", all, "all layers"),
        "attn-mlp" => taken("target_modules", json!(["attention-mlp"])),
        "attn-only" => taken("target_modules", json!(["attention"])),
        "custom" => no_effect("layer_filter says which"),
        other => lost(format!("no preset {other} of layers; set target_modules")),
    }
}

fn custom_layers(field: &Field<'_>) -> Outcome {
    let text = field.text();
    let parts: Vec<String> = match field.root.on("layer_filter_regex") {
        true => text.split(',').map(|part| format!("re:.*{}.*", part.trim())).collect(),
        false => text.split(',').map(|part| format!("*{}*", part.trim())).collect(),
    };
    becomes("target_modules", json!(parts), "layers whose name has it; text encoders' too")
}

fn resolutions(text: &str) -> Outcome {
    let sides: Option<Vec<u64>> = text.split(',').map(|side| side.trim().parse::<u64>().ok()).collect();
    match sides.as_deref() {
        // Width and height are written with an x.
        None => match text
            .split_once('x')
            .map(|(width, height)| (width.trim().parse::<u64>(), height.trim().parse::<u64>()))
        {
            Some((Ok(width), Ok(height))) => {
                becomes("max_resolution", format!("{},{}", width / 8 * 8, height / 8 * 8), "width and height")
            }
            _ => refused(format!("expected a side in pixels, several, or WxH, found {text}")),
        },
        Some([side]) if side % 8 == 0 => taken("max_resolution", *side),
        Some([side]) => becomes("max_resolution", side / 8 * 8, "sides are multiples of 8"),
        Some(several) => {
            let several: Vec<u64> = several.iter().map(|side| side / 8 * 8).collect();
            becomes("max_resolution", json!(several), "each is a dataset of its own")
        }
    }
}

fn encoder_rate(field: &Field<'_>, ours: &'static str, train: &str) -> Outcome {
    let trained = field.root.get(train).is_none_or(|train| values::switch(&train) != Some(false));
    match (&field.value, field.root.number("learning_rate")) {
        _ if is_flow(&field.root) => no_effect("text encoders of this base are never trained here"),
        _ if !trained => no_effect("it is not trained"),
        (Value::String(text), Some(rate)) if text == "learning_rate" => {
            becomes(ours, values::of_number(rate), "learning_rate")
        }
        _ => field.number_as(ours),
    }
}

fn stop(field: &Field<'_>) -> Outcome {
    let after = field.number().unwrap_or(0.0);
    let trained = field.here.get("train").is_none_or(|train| values::switch(&train) != Some(false));
    match field.here.text("stop_training_after_unit").as_deref() {
        None | Some("NEVER") => no_effect("trained to the end, as without it"),
        _ if !trained || after == 0.0 || is_flow(&field.root) => no_effect("trained to the end, as without it"),
        Some("EPOCH") if field.root.number("epochs").is_some_and(|epochs| epochs <= after) => {
            no_effect("the run ends before")
        }
        Some(unit) => lost(format!("trained to the end, not for {after} {}s", unit.to_ascii_lowercase())),
    }
}

fn noising(field: &Field<'_>, ours: &'static str, neutral: f64) -> Outcome {
    match field.number() {
        Some(strength) if strength == neutral => no_effect("off, as without it"),
        Some(strength) => becomes(ours, values::of_number(strength * 1000.0), "in thousandths"),
        None => field.expected("a number"),
    }
}

/// Whether the loss is the absolute difference alone.
fn is_absolute(root: &Scope<'_>) -> bool {
    let strength = |key, usual| root.number(key).unwrap_or(usual);
    strength("mae_strength", 0.0) == 1.0
        && strength("mse_strength", 1.0) == 0.0
        && strength("log_cosh_strength", 0.0) == 0.0
        && strength("huber_strength", 0.0) == 0.0
}

/// A number of the distribution of timesteps, so much less than ours.
fn of_distribution(field: &Field<'_>, ours: &'static str, less: f64) -> Outcome {
    match (field.number(), field.root.text("timestep_distribution").as_deref()) {
        (Some(0.0), _) => no_effect("off, as without it"),
        (Some(number), Some("LOGIT_NORMAL")) if ours == "logit_mean" || number + less > 0.0 => {
            becomes(ours, values::of_number(number + less), "of the normal numbers")
        }
        (Some(_), None | Some("UNIFORM")) => no_effect("a number of other distributions"),
        (Some(_), _) => lost("the shape of timestep_distribution is its usual one"),
        (None, _) => field.expected("a number"),
    }
}

fn distribution(field: &Field<'_>) -> Outcome {
    match (field.text().as_str(), is_flow(&field.root)) {
        ("UNIFORM", _) => taken("timestep_sampling", "uniform"),
        ("LOGIT_NORMAL", _) => taken("timestep_sampling", "logit_normal"),
        (other, _) => lost(format!("timesteps are not drawn by {other}")),
    }
}

fn save_every(field: &Field<'_>) -> Outcome {
    let unit = field.root.text("save_every_unit").or_else(|| field.root.text("save_after_unit")).unwrap_or_default();
    match (field.count(), unit.as_str()) {
        (Some(0), _) | (_, "NEVER" | "") => no_effect("off, as without it"),
        (Some(count), "EPOCH") => becomes("save_every_n_epochs", count, "epochs"),
        (Some(count), "STEP") => becomes("save_every_n_steps", count, "steps"),
        (Some(_), unit) => match minutes(field, unit) {
            Some(minutes) => taken("save_every_minutes", minutes),
            None => lost("saves are made by steps, epochs and time"),
        },
        (None, _) => field.expected("a whole number"),
    }
}

/// A time in minutes; `None` where its unit is none of time, or it is 0.
fn minutes(field: &Field<'_>, unit: &str) -> Option<Value> {
    let each = match unit {
        "SECOND" => 1.0 / 60.0,
        "MINUTE" => 1.0,
        "HOUR" => 60.0,
        _ => return None,
    };
    field.number().filter(|count| *count > 0.0).map(|count| values::of_number(each * count))
}

fn concept(field: &Field<'_>) -> Element {
    let kind = field.here.text("type").unwrap_or_default();
    let validation = kind == "VALIDATION" || field.here.on("validation_concept");
    match () {
        () if field.here.given("enabled").is_some_and(|on| values::switch(&on) == Some(false)) => {
            Element::Apart(&[], "its concept is not enabled")
        }
        () if validation && !field.root.on("validation") => Element::Apart(&[], "validation is off"),
        () if validation => Element::Apart(&["path"], "nothing of a concept of validation is trained on"),
        () => Element::Dataset,
    }
}

fn balancing(field: &Field<'_>) -> Outcome {
    match field.number() {
        _ if field.here.text("balancing_strategy").as_deref() == Some("SAMPLES") => {
            lost("pictures are visited by repeats, not by a number of samples")
        }
        Some(1.0) => no_effect("1, as without it"),
        Some(repeats) if repeats.fract() == 0.0 && repeats >= 1.0 => taken("repeats", values::of_number(repeats)),
        Some(repeats) => lost(format!("repeats are whole numbers, not {repeats}")),
        None => field.expected("a number"),
    }
}

fn processors(field: &Field<'_>) -> Outcome {
    let on = |name: &str| field.here.on(name);
    let mut all = vec![if on("enable_crop_jitter") { "random_crop" } else { "center_crop" }];
    all.extend(on("enable_random_flip").then_some("flip"));
    becomes("processors", json!(all), "drawn anew at each visit")
}

/// Prompts as lines with what they say of their own.
fn prompts(root: &Scope<'_>) -> Vec<String> {
    let Some(Value::Array(samples)) = root.given("samples") else { return Vec::new() };
    samples
        .iter()
        .filter(|sample| sample.get("enabled").is_none_or(|on| values::switch(on) != Some(false)))
        .filter_map(line)
        .collect()
}

fn line(sample: &Value) -> Option<String> {
    let mut line = values::text(sample.get("prompt")?).filter(|prompt| !prompt.is_empty())?;
    let random = sample.get("random_seed").is_some_and(|on| values::switch(on) == Some(true));
    for (flag, key) in [
        ("--n", "negative_prompt"),
        ("--w", "width"),
        ("--h", "height"),
        ("--d", "seed"),
        ("--s", "diffusion_steps"),
        ("--l", "cfg_scale"),
    ] {
        let value = sample.get(key).and_then(values::text).filter(|value| !value.is_empty());
        let wanted = value.filter(|_| flag != "--d" || !random);
        line.extend(wanted.map(|value| format!(" {flag} {value}")));
    }
    Some(line)
}

fn samples(field: &Field<'_>) -> Outcome {
    match prompts(&field.root) {
        lines if lines.is_empty() => no_effect("no prompts"),
        lines => becomes("sample_prompts", json!(lines), "a line each"),
    }
}

/// Old forms, and the concepts and samples of other files.
fn with_files(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries = root.entries().to_vec();
    if let Some(entry) = entries.iter_mut().find(|entry| entry.key == "optimizer")
        && matches!(entry.node.content, Content::Scalar(Value::String(_)))
    {
        let named = Entry { key: "optimizer".to_owned(), line: entry.line, node: entry.node.clone() };
        entry.node = Node::table(entry.line, vec![named]);
    }
    let mut entries = nested(entries);
    for (list, file) in [("concepts", "concept_file_name"), ("samples", "sample_definition_file_name")] {
        let given = entries.iter().any(|entry| entry.key == list && !entry.node.is_empty());
        let named = entries.iter().find(|entry| entry.key == file).and_then(|entry| values::text(&entry.node.value()));
        let Some(name) = named.filter(|name| !given && std::path::Path::new(name).is_file()) else { continue };
        let node = input::read(&Source::file(name))?.root;
        entries.retain(|entry| entry.key != list);
        entries.push(Entry { key: list.to_owned(), line: 0, node });
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}

/// Keys of parts that stood at the top in old files, in the tables of their parts.
fn nested(entries: Vec<Entry>) -> Vec<Entry> {
    let place = |key: &str| -> Option<(String, String)> {
        if key == "weight_decay" {
            return Some(("optimizer".to_owned(), key.to_owned()));
        }
        if let Some(own) = key.strip_prefix("optimizer_").filter(|own| *own != "defaults") {
            return Some(("optimizer".to_owned(), own.to_owned()));
        }
        for part in ["text_encoder_2", "text_encoder", "unet", "vae"] {
            let own = match key.strip_prefix("train_").and_then(|rest| rest.strip_prefix(part)) {
                Some("") => Some("train"),
                Some("_epochs") => Some("stop_training_after"),
                _ => key.strip_prefix(part).and_then(|rest| rest.strip_prefix('_')),
            };
            if let Some(own @ ("train" | "stop_training_after" | "learning_rate" | "weight_dtype" | "model_name")) = own
            {
                return Some((part.to_owned(), own.to_owned()));
            }
        }
        None
    };
    let mut all: Vec<Entry> = Vec::new();
    let mut moved: Vec<(String, Entry)> = Vec::new();
    for entry in entries {
        match place(&entry.key) {
            Some((part, key)) => moved.push((part, Entry { key, ..entry })),
            None => all.push(entry),
        }
    }
    for (part, entry) in moved {
        match all.iter_mut().find(|other| other.key == part) {
            Some(Entry { node: Node { content: Content::Table(within), .. }, .. }) => within.push(entry),
            _ => {
                let line = entry.line;
                all.push(Entry { key: part, line, node: Node::table(line, vec![entry]) });
            }
        }
    }
    all
}

/// Each of several resolutions is a dataset of its own.
fn split_resolutions(
    root: &Scope<'_>,
    draft: &mut crate::config::Draft,
    keys: &mut Vec<crate::report::Accounted>,
) -> Result<(), Problem> {
    if let Some(Value::Array(sides)) = draft.get("max_resolution").cloned() {
        if draft.datasets.is_empty() {
            draft.add_dataset();
        }
        draft.spread("max_resolution", &sides.into());
    }
    draft.split("max_resolution");
    done(root, draft, keys)
}
