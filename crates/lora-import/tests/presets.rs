//! The keys and values of presets that kohya_ss and OneTrainer ship for Stable Diffusion: the union of the keys, and each
//! value that is not the usual one, with what it means here.

use lora_import::{Format, Import, Options, Source, Verdict, import};
use serde_json::{Value, json};

fn config(imported: &Import) -> Value {
    let text = imported.config();
    toml::from_str(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

fn lost(imported: &Import) -> Vec<&str> {
    let keys = imported.keys().iter().filter(|key| matches!(key.verdict, Verdict::NoCounterpart(_)));
    keys.map(|key| key.key.as_str()).collect()
}

#[track_caller]
fn assert_has(own: &Value, wanted: &Value) {
    for (key, value) in wanted.as_object().unwrap() {
        // Null stands for a key that must not be there.
        assert_eq!(own.get(key).unwrap_or(&Value::Null), value, "{key} in {own:#}");
    }
}

fn with(usual: Value, further: &Value) -> String {
    let mut keys = usual;
    keys.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
    keys.to_string()
}

fn read(text: &str) -> Import {
    import(&Source::text("preset", Format::Json, text), &Options::default())
        .unwrap_or_else(|problems| panic!("{problems}"))
}

/// All keys of the LoRA presets of kohya_ss, at values that most of them have.
fn of_gui(further: Value) -> Import {
    let usual = r#"{
        "LoRA_type": "Standard", "LyCORIS_preset": "full", "adaptive_noise_scale": 0, "additional_parameters": "",
        "block_alphas": "", "block_dims": "", "block_lr_zero_threshold": "", "bucket_no_upscale": true,
        "bucket_reso_steps": 64, "cache_latents": true, "cache_latents_to_disk": true,
        "caption_dropout_every_n_epochs": 0.0, "caption_dropout_rate": 0, "caption_extension": ".txt", "clip_skip": "1",
        "color_aug": false, "constrain": 0.0, "conv_alpha": 1, "conv_alphas": "", "conv_block_alphas": "",
        "conv_block_dims": "", "conv_dim": 1, "conv_dims": "", "debiased_estimation_loss": false,
        "decompose_both": false, "dim_from_weights": false, "down_lr_weight": "", "enable_bucket": true, "epoch": 10,
        "factor": -1, "flip_aug": false, "fp8_base": false, "full_bf16": false, "full_fp16": false, "gpu_ids": "",
        "gradient_accumulation_steps": 1.0, "gradient_checkpointing": true, "keep_tokens": "0", "learning_rate": 0.0001,
        "log_with": "", "logging_dir": "", "lora_network_weights": "", "lr_scheduler": "constant",
        "lr_scheduler_args": "", "lr_scheduler_num_cycles": "", "lr_scheduler_power": "", "lr_warmup": 0,
        "max_bucket_reso": 2048, "max_data_loader_n_workers": "0", "max_grad_norm": 1, "max_resolution": "1024,1024",
        "max_timestep": 1000, "max_token_length": "75", "max_train_epochs": "", "max_train_steps": "",
        "mem_eff_attn": false, "mid_lr_weight": "", "min_bucket_reso": 256, "min_snr_gamma": 0, "min_timestep": 0,
        "mixed_precision": "bf16", "model_list": "custom", "module_dropout": 0, "multi_gpu": false,
        "multires_noise_discount": 0, "multires_noise_iterations": 0, "network_alpha": 16, "network_dim": 32,
        "network_dropout": 0, "no_token_padding": false, "noise_offset": 0, "noise_offset_type": "Original",
        "num_cpu_threads_per_process": 2, "num_machines": 1, "num_processes": 1, "optimizer": "AdamW",
        "optimizer_args": "", "output_dir": "", "output_name": "", "persistent_data_loader_workers": false,
        "pretrained_model_name_or_path": "base.safetensors", "prior_loss_weight": 1.0, "random_crop": false,
        "rank_dropout": 0, "rank_dropout_scale": false, "reg_data_dir": "", "rescaled": false, "resume": "",
        "sample_every_n_epochs": 0, "sample_every_n_steps": 0, "sample_prompts": "", "sample_sampler": "euler_a",
        "save_every_n_epochs": 1, "save_every_n_steps": 0, "save_last_n_steps": 0, "save_last_n_steps_state": 0,
        "save_model_as": "safetensors", "save_precision": "bf16", "save_state": false,
        "scale_v_pred_loss_like_noise_pred": false, "scale_weight_norms": 0, "sdxl": true,
        "sdxl_cache_text_encoder_outputs": false, "sdxl_no_half_vae": true, "seed": "12345", "shuffle_caption": false,
        "stop_text_encoder_training": 0, "stop_text_encoder_training_pct": 0, "text_encoder_lr": 0.0001,
        "train_batch_size": 4, "train_data_dir": "", "train_norm": false, "train_on_input": true,
        "training_comment": "", "unet_lr": 0.0001, "unit": 1, "up_lr_weight": "", "use_cp": false, "use_scalar": false,
        "use_tucker": false, "use_wandb": false, "v2": false, "v_parameterization": false, "v_pred_like_loss": 0,
        "vae": "", "vae_batch_size": 0, "wandb_api_key": "", "weighted_captions": false, "xformers": "xformers"
    }"#;
    read(&with(serde_json::from_str(usual).unwrap(), &further))
}

const SPATIAL: &str = r"re:.*\.(conv1|conv2|conv)";

#[test]
fn the_usual_preset_of_kohya_ss_means_the_same_here() {
    let imported = of_gui(json!({}));
    assert_eq!((imported.keys().len(), lost(&imported)), (129, vec![]));
    let wanted = json!({
        "lora_rank": 32, "lora_alpha": 16, "epochs": 10, "batch_size": 4, "optimizer": "adamw", "precision": "bf16", "max_grad_norm": 1,
        "v_parameterization": false, "variant": null, "target_modules": null, "rank_pattern": null, "noise_offset": null,
        "scale_weight_norms": null, "variant_options": null, "max_train_steps": null, "min_timestep": null,
    });
    assert_has(&config(&imported), &wanted);
}

/// Values of single presets, what they become, and the keys that have no counterpart.
fn unusual() -> Vec<(Value, Value, Vec<&'static str>)> {
    let (full, prodigy) =
        (json!(["all-conv"]), r#""d0=1e-5" "d_coef=1.0" "weight_decay=0.4" "decouple=True" "safeguard_warmup=True""#);
    vec![
        (
            json!({ "LoRA_type": "LyCORIS/LoHa", "conv_dim": 8, "conv_alpha": 4, "use_cp": true, "scale_weight_norms": 2.5 }),
            json!({
                "variant": "loha", "target_modules": full, "rank_pattern": { SPATIAL: 8 }, "alpha_pattern": { SPATIAL: 4 },
                "variant_options": { "tucker": true }, "scale_weight_norms": null,
            }),
            vec!["scale_weight_norms"],
        ),
        (
            json!({
                "LoRA_type": "LyCORIS/LoKr", "network_dim": 100000, "network_alpha": 1, "conv_dim": 100000, "factor": 6,
                "decompose_both": true, "use_cp": true, "train_norm": true, "rank_dropout_scale": true, "rank_dropout": 0.1,
                "module_dropout": 0.1, "scale_weight_norms": 1,
            }),
            json!({
                "variant": "lokr", "lora_rank": 100000, "lora_alpha": 1, "rank_pattern": null, "rank_dropout": null,
                "module_dropout": 0.1, "variant_options": { "factor": 6, "decompose_both": true, "tucker": true },
            }),
            vec!["rank_dropout", "rank_dropout_scale", "scale_weight_norms", "train_norm"],
        ),
        (
            json!({ "LoRA_type": "LyCORIS/iA3", "network_dim": 1024, "network_dropout": 0.3, "scale_weight_norms": 1, "sdxl": false }),
            json!({ "variant": "lycoris-ia3", "variant_options": { "on_input": true }, "lora_dropout": null, "rank_pattern": null }),
            vec!["network_dropout", "scale_weight_norms"],
        ),
        (
            json!({
                "LoRA_type": "LyCORIS/LoCon", "conv_dim": 32, "network_dim": 64, "network_alpha": 64, "sdxl": false, "clip_skip": 2,
                "noise_offset": "0.05", "max_resolution": "512,650", "enable_bucket": false, "mem_eff_attn": true,
                "learning_rate": "0.0001", "text_encoder_lr": "5e-05", "lr_warmup": "0", "bucket_reso_steps": 64.0,
            }),
            json!({
                "variant": null, "rank_pattern": { SPATIAL: 32 }, "alpha_pattern": { SPATIAL: 1 }, "clip_skip": 2, "noise_offset": 0.05,
                "max_resolution": "512,648", "text_encoder_lr": 5e-5,
                "target_modules": ["all-conv", "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"],
            }),
            vec![],
        ),
        // Noise is of the kind that is named.
        (
            json!({ "noise_offset": 0.0357, "noise_offset_type": "Multires", "multires_noise_iterations": 8, "multires_noise_discount": 0.2 }),
            json!({ "noise_offset": null, "multires_noise_iterations": 8, "multires_noise_discount": 0.2 }),
            vec![],
        ),
        (
            json!({
                "noise_offset": 0.0357, "adaptive_noise_scale": 0.00357, "multires_noise_iterations": 8, "multires_noise_discount": 0.2,
                "use_cp": true, "conv_dim": 64, "scale_weight_norms": 5, "network_dropout": 0.1,
            }),
            json!({
                "noise_offset": 0.0357, "adaptive_noise_scale": 0.00357, "multires_noise_iterations": null, "scale_weight_norms": 5,
                "lora_dropout": 0.1, "variant_options": null,
            }),
            vec![],
        ),
        (
            json!({ "optimizer": "Prodigy", "optimizer_args": prodigy, "learning_rate": 1.0, "text_encoder_lr": 1, "unet_lr": "1.0" }),
            json!({
                "optimizer": "prodigy", "unet_lr": 1, "text_encoder_lr": 1,
                "optimizer_args": { "d0": 1e-5, "d_coef": 1, "weight_decay": 0.4, "decouple": true, "safeguard_warmup": true },
            }),
            vec![],
        ),
        (
            json!({
                "optimizer": "DAdaptAdam", "optimizer_args": "\"decouple=True\" \"betas=0.9,0.99\" \"growth_rate=1.02\"",
                "lr_scheduler": "cosine", "lr_warmup": 5, "additional_parameters": "--network_train_unet_only", "use_wandb": true,
                "max_token_length": "225", "keep_tokens": 2, "seed": "1337",
            }),
            json!({
                "optimizer": "prodigy", "optimizer_args": { "decouple": true, "betas": [0.9, 0.99], "growth_rate": 1.02 }, "seed": 1337,
                "lr_warmup_steps": 0.05, "train_text_encoder": false, "text_encoder_lr": null, "max_token_length": 225, "keep_tokens": 2,
            }),
            vec!["optimizer"],
        ),
        (
            json!({ "optimizer": "Adafactor", "lr_scheduler": "adafactor", "caption_extension": ".txt2", "min_bucket_reso": 64 }),
            json!({ "optimizer": "adafactor", "lr_scheduler": "constant", "caption_extension": ".txt2", "min_bucket_reso": 64 }),
            vec![],
        ),
        (
            json!({
                "optimizer": "Adafactor", "optimizer_args": "scale_parameter=False relative_step=False warmup_init=False",
                "lr_scheduler": "constant_with_warmup", "lr_warmup": 8, "unet_lr": 4e-07, "text_encoder_lr": 0.0, "bucket_reso_steps": 1,
                "caption_extension": ".none-use-foldername",
            }),
            json!({
                "optimizer_args": { "scale_parameter": false, "relative_step": false, "warmup_init": false }, "lr_warmup_steps": 0.08,
                "unet_lr": 4e-7, "train_text_encoder": false, "bucket_reso_steps": 8, "caption_extension": ".none-use-foldername",
            }),
            vec![],
        ),
        (
            json!({
                "additional_parameters": "--lr_scheduler_type \"CosineAnnealingLR\" --lr_scheduler_args \"T_max=1000\" \"eta_min=0e-0\"",
                "lr_scheduler": "cosine_with_restarts", "max_train_steps": "160", "debiased_estimation_loss": true, "min_snr_gamma": 5,
            }),
            json!({ "lr_scheduler": "cosine_with_restarts", "max_train_steps": 160, "epochs": null, "debiased_estimation_loss": true }),
            vec!["lr_scheduler_args", "lr_scheduler_type"],
        ),
        (
            json!({ "additional_parameters": "--max_grad_norm=0 --min_bucket_reso=512 --log_prefix=a", "min_timestep": 100, "max_timestep": 900 }),
            json!({ "max_grad_norm": 0, "min_bucket_reso": 512, "min_timestep": 100, "max_timestep": 900 }),
            vec![],
        ),
        (
            json!({
                "dim_from_weights": true, "lora_network_weights": "D:/a\\b, c-1.0.safetensors", "max_train_epochs": "16", "epoch": "1",
                "save_every_n_epochs": 0, "save_every_n_steps": 29, "save_last_n_steps_state": 1, "gradient_accumulation_steps": "2",
            }),
            json!({
                "init_from": "D:/a\\b, c-1.0.safetensors", "epochs": 16, "save_every_n_steps": 29, "save_every_n_epochs": null,
                "gradient_accumulation_steps": 2,
            }),
            vec!["dim_from_weights"],
        ),
    ]
}

#[test]
fn unusual_values_of_kohya_sss_presets_mean_what_they_mean_there() {
    for (given, wanted, without) in unusual() {
        let imported = of_gui(given.clone());
        assert_has(&config(&imported), &wanted);
        let mut own = lost(&imported);
        own.sort_unstable();
        assert_eq!(own, without, "{given}");
    }
}

#[test]
fn what_old_presets_of_kohya_ss_leave_out_has_the_guis_own_values() {
    let old = json!({
        "LoRA_type": "LyCORIS/LoHa", "max_resolution": "576,576", "network_dim": 8, "network_alpha": 8, "optimizer": "DAdaptation",
        "multires_noise_iterations": 6, "noise_offset": "0.1", "unet_lr": "1.0", "text_encoder_lr": "1.0",
    });
    let own = config(&read(&old.to_string()));
    let wanted = json!({
        "precision": "fp16", "save_precision": "fp16", "epochs": 1, "noise_offset": 0.1, "multires_noise_iterations": null, "variant": "loha",
    });
    assert_has(&own, &wanted);
}

#[test]
fn presets_of_kohya_ss_that_train_all_weights_are_taken() {
    let usual = json!({
        "batch_size": "1", "block_lr": "", "bucket_reso_steps": 1.0, "caption_dropout_rate": 0.1, "caption_metadata_filename": "a.json",
        "create_buckets": false, "create_caption": true, "dataset_repeats": "10", "epoch": "2", "full_path": true, "keep_tokens": 1,
        "generate_caption_database": true, "generate_image_buckets": true, "image_folder": "pictures", "latent_metadata_filename": "b.json",
        "learning_rate": "1e-6", "lr_scheduler": "adafactor", "lr_warmup": "10", "max_bucket_reso": "1024", "max_resolution": "512,512",
        "max_train_epochs": "", "mixed_precision": "bf16", "noise_offset": "", "num_cpu_threads_per_process": 2, "optimizer": "Adafactor",
        "optimizer_args": "scale_parameter=True relative_step=True warmup_init=True weight_decay=2", "save_every_n_epochs": "1",
        "sdxl_checkbox": true, "train_batch_size": 4, "train_dir": "a", "train_text_encoder": false, "use_8bit_adam": false,
        "use_latent_files": "No", "xformers": true,
    });
    let imported = read(&usual.to_string());
    assert_eq!(lost(&imported), Vec::<&str>::new());
    let wanted = json!({
        "train": "full", "train_data_dir": "pictures", "repeats": 10, "epochs": 2, "batch_size": 4, "lr_scheduler": "constant",
        "train_text_encoder": false, "lr_warmup_steps": null, "bucket_reso_steps": 8, "enable_bucket": true,
        "optimizer_args": { "scale_parameter": true, "relative_step": true, "warmup_init": true, "weight_decay": 2 },
    });
    assert_has(&config(&imported), &wanted);
    let paged =
        json!({ "optimizer": "PagedAdamW8bit", "optimizer_args": "", "lr_scheduler": "constant", "full_bf16": true });
    let imported = read(&with(usual, &paged));
    assert_eq!((lost(&imported), config(&imported)["optimizer"].as_str()), (vec!["full_bf16"], Some("adamw8bit")));
}

#[test]
fn presets_for_stable_diffusion_3_are_taken() {
    let keys = json!({
        "sd3_checkbox": true, "sd3_cache_text_encoder_outputs": true, "sd3_cache_text_encoder_outputs_to_disk": true,
        "sd3_text_encoder_batch_size": 1, "save_clip": false, "save_t5xxl": false, "clip_g": "g", "clip_l": "l", "t5xxl": "t",
        "t5xxl_device": "", "t5xxl_dtype": "bf16", "disable_mmap_load_safetensors": false, "weighting_scheme": "logit_normal",
        "logit_mean": 0, "logit_std": 1, "mode_scale": 1.29, "fused_optimizer_groups": 0, "learning_rate": 5e-6, "learning_rate_te": 0,
        "learning_rate_te1": 1e-5, "optimizer": "PagedAdamW8bit", "optimizer_args": "weight_decay=0.1 betas=.9,.95",
        "max_train_epochs": 8, "max_train_steps": 1600, "epoch": 8, "lr_scheduler": "cosine", "lr_warmup": 10, "train_batch_size": 1,
        "max_resolution": "512,512",
    });
    let imported = read(&keys.to_string());
    assert_eq!(lost(&imported), Vec::<&str>::new());
    let wanted = json!({
        "train": "full", "optimizer_args": { "weight_decay": 0.1, "betas": [0.9, 0.95] }, "epochs": 8, "max_train_steps": null,
        "text_encoder_1_lr": null,
    });
    assert_has(&config(&imported), &wanted);

    // A rate of the transformer's own is the run's.
    let text =
        "--pretrained_model_name_or_path a --network_module networks.lora_sd3 --learning_rate 1e-4 --unet_lr 1e-5";
    let script = format!("accelerate launch sd3_train_network.py {text}");
    let imported = import(&Source::text("run", Format::Command, &script), &Options::default()).unwrap();
    assert_has(&config(&imported), &json!({ "learning_rate": 1e-5, "unet_lr": null }));
    let gui = json!({ "LoRA_type": "SD3", "sd3_checkbox": true, "learning_rate": 1e-4, "unet_lr": 1e-5, "text_encoder_lr": 0 });
    assert_has(&config(&read(&gui.to_string())), &json!({ "learning_rate": 1e-5, "unet_lr": null }));
    let keys = json!({ "model_type": "STABLE_DIFFUSION_3", "transformer": { "learning_rate": 1e-5 }, "unet_learning_rate": null });
    assert_has(&config(&read(&of_onetrainer(keys))), &json!({ "learning_rate": 1e-5 }));
}

/// The keys of OneTrainer's first presets, which had settings of its parts at the top.
fn of_onetrainer(further: Value) -> String {
    let usual = r#"{
        "training_method": "LORA", "debug_mode": false, "debug_dir": "debug", "workspace_dir": "workspace/run",
        "cache_dir": "workspace-cache/run", "tensorboard": true, "continue_last_backup": false, "model_type": "STABLE_DIFFUSION_15",
        "base_model_name": "owner/base", "extra_model_name": "", "weight_dtype": "FLOAT_16", "text_encoder_weight_dtype": "NONE",
        "unet_weight_dtype": "NONE", "vae_weight_dtype": "FLOAT_32", "output_dtype": "FLOAT_32", "output_model_format": "CKPT",
        "output_model_destination": "models/lora.safetensors", "gradient_checkpointing": true, "concept_file_name": "none.json",
        "circular_mask_generation": false, "random_rotate_and_crop": false, "aspect_ratio_bucketing": true, "latent_caching": true,
        "latent_caching_epochs": 1, "clear_cache_before_training": true, "optimizer": "ADAMW", "learning_rate_scheduler": "CONSTANT",
        "learning_rate": 0.0003, "learning_rate_warmup_steps": 200, "learning_rate_cycles": 1, "weight_decay": 0.01, "epochs": 100,
        "batch_size": 4, "gradient_accumulation_steps": 1, "ema": "OFF", "ema_decay": 0.999, "ema_update_step_interval": 5,
        "train_text_encoder": true, "train_text_encoder_epochs": 30, "text_encoder_learning_rate": 0.0003, "text_encoder_layer_skip": 0,
        "train_unet": true, "train_unet_epochs": 100000, "unet_learning_rate": 0.0003, "offset_noise_weight": 0.05,
        "rescale_noise_scheduler_to_zero_terminal_snr": false, "force_v_prediction": false, "force_epsilon_prediction": false,
        "train_device": "cuda", "temp_device": "cpu", "train_dtype": "FLOAT_16", "only_cache": false, "resolution": 512,
        "masked_training": false, "unmasked_probability": 0.1, "unmasked_weight": 0.1, "normalize_masked_area_loss": false,
        "max_noising_strength": 1.0, "token_count": 1, "initial_embedding_text": "*", "embedding_weight_dtype": "FLOAT_32",
        "lora_rank": 16, "lora_alpha": 1.0, "lora_weight_dtype": "FLOAT_32", "attention_mechanism": "XFORMERS",
        "sample_definition_file_name": "none.json", "sample_after": 10, "sample_after_unit": "MINUTE", "sample_image_format": "JPG",
        "backup_after": 30, "backup_after_unit": "MINUTE", "rolling_backup": false, "rolling_backup_count": 3,
        "backup_before_save": true, "save_after": 0, "save_after_unit": "NEVER"
    }"#;
    with(serde_json::from_str(usual).unwrap(), &further)
}

#[test]
fn the_keys_of_onetrainers_presets_for_stable_diffusion_are_taken() {
    let imported = read(&of_onetrainer(json!({})));
    assert_eq!(lost(&imported), ["text_encoder.stop_training_after"], "30 of 100 epochs");
    let wanted = json!({
        "lora_rank": 16, "lora_alpha": 1, "unet_lr": 0.0003, "text_encoder_lr": 0.0003, "noise_offset": 0.05, "lr_warmup_steps": 200,
        "optimizer_args": { "weight_decay": 0.01 }, "max_resolution": 512, "target_modules": ["all-linear", "all-conv"],
    });
    assert_has(&config(&imported), &wanted);

    let masked = json!({
        "training_method": "FINE_TUNE", "masked_training": true, "normalize_masked_area_loss": true, "max_noising_strength": 0.8,
        "train_text_encoder": false, "weight_dtype": "BFLOAT_16",
    });
    let imported = read(&of_onetrainer(masked));
    assert_eq!(lost(&imported), ["unmasked_probability", "normalize_masked_area_loss"]);
    let wanted = json!({ "train": "full", "masked_loss": true, "unmasked_weight": 0.1, "max_timestep": 800, "train_text_encoder": false });
    assert_has(&config(&imported), &wanted);

    let now = json!({
        "backup_after": 10, "base_model_name": "owner/base", "batch_size": 4, "layer_filter_preset": "attn-mlp", "learning_rate": 0.0003,
        "model_type": "STABLE_DIFFUSION_XL_10_BASE", "output_model_destination": "models/lora.safetensors",
        "output_model_format": "KOHYA_LORA", "resolution": "1024", "training_method": "LORA", "unet": { "weight_dtype": "FLOAT_16" },
        "text_encoder": { "train": false, "weight_dtype": "FLOAT_16" }, "text_encoder_2": { "train": false, "weight_dtype": "FLOAT_16" },
        "vae": { "weight_dtype": "FLOAT_32" },
    });
    let imported = read(&now.to_string());
    assert_eq!(lost(&imported), Vec::<&str>::new());
    let wanted = json!({
        "train_text_encoder_1": false, "train_text_encoder_2": false, "target_modules": ["attention-mlp"], "base_storage": null,
        "lora_rank": 16, "lora_alpha": 1, "epochs": 100, "max_resolution": 1024,
    });
    assert_has(&config(&imported), &wanted);
    let dropped = json!({ "peft_type": "LOKR", "dropout_probability": 0.1 });
    let dropped = read(&with(now, &dropped));
    assert!(lost(&dropped) == ["dropout_probability"] && config(&dropped).get("lora_dropout").is_none(), "{dropped}");
}

#[test]
fn what_is_not_trained_here_is_refused_by_its_name() {
    let refused = |further: Value| {
        let text = of_onetrainer(further);
        import(&Source::text("preset", Format::Json, &text), &Options::default()).expect_err("refused").to_string()
    };
    for kind in ["STABLE_DIFFUSION_15_INPAINTING", "STABLE_DIFFUSION_XL_10_BASE_INPAINTING", "FLUX_FILL_DEV_1"] {
        let told = refused(json!({ "model_type": kind }));
        assert!(told.contains("`model_type`") && told.contains(&format!("{kind} reads pictures")), "{told}");
    }
    assert!(refused(json!({ "model_type": "WUERSTCHEN_2" })).contains("no base of the kind WUERSTCHEN_2"));
    assert!(refused(json!({ "training_method": "EMBEDDING" })).contains("EMBEDDING is not trained here"));
}

#[test]
fn limits_of_norms_and_dropouts_of_ranks_are_sd_scripts_own_of_lora_alone() {
    let run = |further: &str| {
        let text = format!(
            "--pretrained_model_name_or_path a --network_dim 8 --scale_weight_norms 1 --network_dropout 0.1 {further}"
        );
        let script = format!("accelerate launch sdxl_train_network.py {text}");
        import(&Source::text("run", Format::Command, &script), &Options::default())
            .unwrap_or_else(|problems| panic!("{problems}"))
    };
    let plain = run("--network_module networks.lora --network_args rank_dropout=0.1");
    assert_eq!(lost(&plain), Vec::<&str>::new());
    assert_has(&config(&plain), &json!({ "scale_weight_norms": 1, "lora_dropout": 0.1, "rank_dropout": 0.1 }));
    let dora =
        run("--network_module lycoris.kohya --network_args algo=locon preset=full dora_wd=True rank_dropout=0.1");
    assert_eq!(lost(&dora), ["scale_weight_norms"]);
    let of_three = ["network_args.rank_dropout", "scale_weight_norms", "network_dropout"];
    for further in [
        "--network_module lycoris.kohya --network_args algo=loha rank_dropout=0.1",
        "--network_module networks.lokr --network_args rank_dropout=0.1",
    ] {
        let other = run(further);
        assert_eq!(lost(&other), of_three, "{further}");
        assert_has(&config(&other), &json!({ "scale_weight_norms": null, "lora_dropout": null, "rank_dropout": null }));
    }
}
