//! Configurations of each trainer, written for these tests with its keys: what they mean there is what comes out here.

use lora_import::{Format, Import, Options, Source, Tool, Verdict, import};
use serde_json::{Value, json};

fn of(format: Format, text: &str) -> Import {
    import(&Source::text("run", format, text), &Options::default()).unwrap_or_else(|problems| panic!("{problems}"))
}

fn refused(format: Format, text: &str) -> String {
    import(&Source::text("run", format, text), &Options::default()).expect_err(text).to_string()
}

/// Our keys as values.
fn config(imported: &Import) -> Value {
    let text = imported.config();
    toml::from_str(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

fn verdict<'i>(imported: &'i Import, key: &str) -> &'i Verdict {
    &imported
        .keys()
        .iter()
        .find(|accounted| accounted.key == key)
        .unwrap_or_else(|| panic!("{key}: {imported}"))
        .verdict
}

fn is_lost(imported: &Import, key: &str) -> bool {
    matches!(verdict(imported, key), Verdict::NoCounterpart(_))
}

/// Some keys of ours with the values that they must have.
#[track_caller]
fn assert_has(own: &Value, wanted: Value) {
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(own.get(key), Some(value), "{key} in {own:#}");
    }
}

const SD_SCRIPTS: &str = r#"
pretrained_model_name_or_path = "base.safetensors"
output_dir = "out"
[any_heading]
train_data_dir = "pictures"
resolution = "768,768"
enable_bucket = true
network_module = "networks.lora"
network_dim = 16
learning_rate = 1e-4
"#;

#[test]
fn sd_scripts_defaults_are_its_own() {
    let own = config(&of(Format::Toml, SD_SCRIPTS));
    // network_alpha is 1, saved numbers are as held, captions have the extension .caption, a run has 1600 steps, and
    // both networks one learning rate.
    let wanted = json!({
        "lora_rank": 16, "lora_alpha": 1, "save_precision": "fp32", "precision": "fp32", "caption_extension": ".caption",
        "max_train_steps": 1600, "text_encoder_lr": 1e-4, "output_name": "last", "max_resolution": 768,
        "v_parameterization": false,
    });
    assert_has(&own, wanted);
}

#[test]
fn sd_scripts_options_are_translated_by_its_meaning() {
    let text = format!(
        "{SD_SCRIPTS}max_train_epochs = 3\nmax_train_steps = 50\nnetwork_alpha = 0\nunet_lr = 2e-4\nflip_aug = true\nrandom_crop = true\n\
         optimizer_type = \"PagedAdamW8bit\"\noptimizer_args = [\"weight_decay=0.1\", \"betas=0.9,0.99\"]\nsave_every_n_steps = 100\n\
         save_last_n_steps = 300\nnetwork_args = [\"conv_dim=4\", \"conv_alpha=2\", \"rank_dropout=0.1\"]\nmixed_precision = \"bf16\"\n\
         lr_scheduler = \"cosine\"\nlr_warmup_steps = 0.1\nloss_type = \"huber\"\nhuber_c = 0.2\nxformers = true\nalpha_mask = true\n"
    );
    let imported = of(Format::Toml, &text);
    let own = config(&imported);
    let wanted = json!({
        "epochs": 3, "lora_alpha": 16, "unet_lr": 2e-4, "text_encoder_lr": 1e-4, "processors": ["random_crop", "flip"],
        "optimizer": "adamw8bit", "optimizer_args": { "weight_decay": 0.1, "betas": [0.9, 0.99] }, "save_total_limit": 4,
        "target_modules": ["all-conv"], "rank_pattern": { r"re:.*\.(conv1|conv2|conv)": 4 }, "rank_dropout": 0.1,
        "alpha_pattern": { r"re:.*\.(conv1|conv2|conv)": 2 }, "precision": "bf16", "lr_warmup_steps": 0.1,
        "masked_loss": true, "alpha_mask": true,
    });
    assert_has(&own, wanted);
    let restarts = text.replace("\"cosine\"", "\"cosine_with_restarts\"")
        + "lr_scheduler_num_cycles = 3\nlr_scheduler_power = 2\n";
    let restarts = config(&of(Format::Toml, &restarts));
    assert_has(&restarts, json!({ "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3 }));
    assert!(restarts.get("lr_scheduler_power").is_none(), "a number of another schedule");
    let base =
        format!("{text}base_weights = [\"a.safetensors\", \"b.safetensors\"]\nbase_weights_multiplier = [0.5]\n");
    assert_has(&config(&of(Format::Toml, &base)), json!({ "fuse_adapters": ["a.safetensors:0.5", "b.safetensors"] }));
    assert!(own.get("max_train_steps").is_none(), "epochs win over steps");
    assert_has(&own, json!({ "loss_type": "huber", "huber_c": 0.2 }));
    assert!(matches!(verdict(&imported, "xformers"), Verdict::WithoutEffect(_)));
    assert!(matches!(verdict(&imported, "max_train_steps"), Verdict::WithoutEffect(_)));
}

#[test]
fn what_is_logged_for_tensorboard_is_here_too() {
    let of_sd_scripts = |keys: &str| config(&of(Format::Toml, &format!("{SD_SCRIPTS}{keys}")));
    assert_has(
        &of_sd_scripts("logging_dir = \"logs\"\nlog_with = \"all\""),
        json!({ "logging_dir": "logs", "log_with": "tensorboard" }),
    );
    assert_has(&of_sd_scripts("logging_dir = \"logs\"\nlog_with = \"wandb\""), json!({ "log_with": "none" }));
    assert!(of_sd_scripts("logging_dir = \"\"").get("logging_dir").is_none());
    let of_axolotl = |keys: &str| config(&of(Format::Yaml, &format!("{AXOLOTL}{keys}")));
    let wanted = json!({ "log_with": "tensorboard", "logging_dir": "tb" });
    assert_has(&of_axolotl("report_to: [tensorboard, wandb]\nlogging_dir: tb\n"), wanted.clone());
    assert_has(&of_axolotl("use_tensorboard: true\nlogging_dir: tb\n"), wanted);
    assert!(of_axolotl("logging_dir: tb\n").get("logging_dir").is_none(), "nothing is logged there");
}

#[test]
fn noise_timesteps_and_losses_of_sd_scripts_are_taken_where_its_base_reads_them() {
    let keys = "min_timestep = 100\nmax_timestep = 900\nnoise_offset = 0.1\nnoise_offset_random_strength = true\nadaptive_noise_scale = 0.01\n\
                multires_noise_iterations = 6\nmultires_noise_discount = 0.2\nip_noise_gamma = 0.1\nloss_type = \"smooth_l1\"\n\
                huber_schedule = \"exponential\"\n";
    let own = config(&of(Format::Toml, &format!("{SD_SCRIPTS}{keys}")));
    let wanted = json!({
        "min_timestep": 100, "max_timestep": 900, "noise_offset": 0.1, "noise_offset_random_strength": true,
        "adaptive_noise_scale": 0.01, "multires_noise_iterations": 6, "multires_noise_discount": 0.2, "ip_noise_gamma": 0.1,
        "loss_type": "smooth_l1", "huber_schedule": "exponential",
    });
    assert_has(&own, wanted);
    let flux = format!("{SD_SCRIPTS}{keys}t5xxl = \"t5.safetensors\"\n");
    let own = config(&of(Format::Toml, &flux));
    assert_has(&own, json!({ "ip_noise_gamma": 0.1, "loss_type": "smooth_l1", "min_timestep": 100 }));
    assert!(
        own.get("noise_offset").is_none() && own.get("multires_noise_iterations").is_none(),
        "FLUX.1 has none there"
    );
    let message = refused(Format::Toml, &flux.replace("exponential", "snr"));
    assert!(message.contains("huber_schedule"), "{message}");
    let message = refused(Format::Toml, &format!("{SD_SCRIPTS}adaptive_noise_scale = 0.01\n"));
    assert!(message.contains("noise_offset"), "{message}");
}

#[test]
fn parts_of_chroma_and_anima_go_where_their_bases_read_them() {
    let chroma = "network_module = \"networks.lora_flux\"\nmodel_type = \"chroma\"\nt5xxl = \"t5.safetensors\"\nae = \"ae.safetensors\"\n\
                  apply_t5_attn_mask = true\ntimestep_sampling = \"sigmoid\"\n";
    let base = SD_SCRIPTS.lines().filter(|line| !line.starts_with("network_module")).collect::<Vec<_>>().join("\n");
    let imported = of(Format::Toml, &format!("{base}\n{chroma}"));
    let wanted = json!({ "text_encoder": "t5.safetensors", "vae": "ae.safetensors", "timestep_sampling": "sigmoid" });
    assert_has(&config(&imported), wanted);
    assert!(config(&imported).get("guidance_scale").is_none(), "Chroma is told none");

    let anima = "network_module = \"networks.lora_anima\"\nqwen3 = \"qwen\"\nvae = \"vae.safetensors\"\nt5_tokenizer_path = \"t5\"\n";
    let own = config(&of(Format::Toml, &format!("{base}\n{anima}")));
    assert_has(&own, json!({ "text_encoder": "qwen", "t5_tokenizer": "t5", "vae": "vae.safetensors" }));
    assert_has(&own, json!({ "timestep_sampling": "sigmoid" }));
}

/// Block 1 + 3i + j of 25 is `down_blocks.i`'s j-th, 12 the middle, 13 + 3i + j `up_blocks.i`'s.
#[test]
fn weights_of_blocks_become_learning_rates_of_the_layers_that_they_are_of() {
    let run =
        |arguments: &str| of(Format::Toml, &format!("{SD_SCRIPTS}unet_lr = 2e-4\nnetwork_args = [{arguments}]\n"));
    let down = "\"down_lr_weight=9,1,0.5,9,1,0,1,1,1,9,9,9\"";
    let up = "\"up_lr_weight=1,1,1,1,1,2\"";
    let imported = run(&format!("{down}, \"mid_lr_weight=0.5\", {up}"));
    let attentions = json!({
        r"re:down_blocks\.0\.(attentions\.1)\..*": 1e-4, r"re:down_blocks\.1\.(attentions\.1)\..*": 0.0,
        r"re:mid_block\..*": 1e-4, r"re:up_blocks\.1\.(attentions\.2)\..*": 4e-4,
    });
    let found = &config(&imported)["learning_rate_pattern"];
    for (pattern, rate) in attentions.as_object().unwrap() {
        assert_eq!(found[pattern].as_f64(), rate.as_f64(), "{pattern} in {found:#}");
    }
    assert_eq!(found.as_object().unwrap().len(), 4, "what carries no LoRA has no pattern: {found:#}");
    let found = &config(&run(&format!("{down}, {up}, \"conv_dim=4\"")))["learning_rate_pattern"];
    for pattern in [
        r"re:down_blocks\.0\.(attentions\.1|resnets\.1)\..*",
        r"re:down_blocks\.0\.(downsamplers\.0)\..*",
        r"re:down_blocks\.2\.(downsamplers\.0)\..*",
        r"re:down_blocks\.3\.(resnets\.0)\..*",
        r"re:up_blocks\.1\.(attentions\.2|resnets\.2|upsamplers\.0)\..*",
    ] {
        assert!(found.get(pattern).is_some(), "{pattern} in {found:#}");
    }
    assert!(is_lost(&run("\"down_lr_weight=sine+.25\""), "network_args.down_lr_weight"), "shapes go by name");
    // Stable Diffusion XL's: 9 of input blocks, 3 of the middle, 9 of output blocks.
    let run = |further: &str| {
        let arguments = "down_lr_weight=9,9,9,0.5,1,2,3,4,5 mid_lr_weight=2,0.5,3 up_lr_weight=2,1,3,1,1,4,5,1,1";
        let text = format!(
            "accelerate launch sdxl_train_network.py --pretrained_model_name_or_path b --train_data_dir d --output_dir o \
             --network_module networks.lora --learning_rate 1e-4 --network_args {arguments} {further}\n"
        );
        config(&of(Format::Command, &text))["learning_rate_pattern"].clone()
    };
    let attentions = json!({
        r"re:down_blocks\.1\.(attentions\.1)\..*": 2e-4, r"re:down_blocks\.2\.(attentions\.0)\..*": 4e-4,
        r"re:down_blocks\.2\.(attentions\.1)\..*": 5e-4, r"re:mid_block\.attentions\.0\..*": 5e-5,
        r"re:up_blocks\.0\.(attentions\.0)\..*": 2e-4, r"re:up_blocks\.0\.(attentions\.2)\..*": 3e-4,
        r"re:up_blocks\.1\.(attentions\.2)\..*": 4e-4,
    });
    let found = run("");
    for (pattern, rate) in attentions.as_object().unwrap() {
        let (rate, found) = (rate.as_f64().unwrap(), found[pattern].as_f64().unwrap_or_default());
        assert!((found - rate).abs() < 1e-12, "{pattern}: {found}");
    }
    assert_eq!(found.as_object().unwrap().len(), 7, "{found:#}");
    let found = run("conv_dim=4");
    for pattern in [
        r"re:down_blocks\.0\.(resnets\.0)\..*",
        r"re:down_blocks\.0\.(downsamplers\.0)\..*",
        r"re:mid_block\.resnets\.1\..*",
        r"re:up_blocks\.0\.(attentions\.2|resnets\.2|upsamplers\.0)\..*",
        r"re:up_blocks\.2\.(resnets\.0)\..*",
    ] {
        assert!(found.get(pattern).is_some(), "{pattern} in {found:#}");
    }
    assert_has(
        &config(&of(Format::Toml, &format!("{SD_SCRIPTS}scale_weight_norms = 1.0\n"))),
        json!({ "scale_weight_norms": 1 }),
    );
}

/// There the first expression that is all of a name counts, here the longest pattern.
#[test]
fn learning_rates_by_expressions_keep_their_order() {
    let run = |module: &str, rates: &str| {
        let text = SD_SCRIPTS.replace("networks.lora", module);
        of(Format::Toml, &format!("{text}network_args = ['network_reg_lrs={rates}']\n"))
    };
    let rates = r".*attn1.*=1e-3, .*\.to_[kv]=2e-4,.*attentions.*=5e-5";
    let found = config(&run("networks.lokr", rates))["learning_rate_pattern"].clone();
    let longest_first = {
        let mut all: Vec<_> = found.as_object().unwrap().iter().collect();
        all.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.len()));
        all.iter().map(|(pattern, rate)| (pattern.replace("(?:)", ""), rate.as_f64().unwrap())).collect::<Vec<_>>()
    };
    let expected = [("re:.*attn1.*", 1e-3), (r"re:.*\.to_[kv]", 2e-4), ("re:.*attentions.*", 5e-5)];
    assert_eq!(longest_first, expected.map(|(pattern, rate)| (pattern.to_owned(), rate)));
    for (module, rates) in [("networks.lora_flux", rates), ("networks.lokr", "(?!.*attn1).*=1e-3")] {
        assert!(is_lost(&run(module, rates), "network_args.network_reg_lrs"), "{module} {rates}");
    }
}

#[test]
fn losses_and_timesteps_of_onetrainer_are_taken_where_they_are_one_of_ours() {
    let run = |further: Value| {
        let mut keys = json!({
            "__version": 9, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "base.safetensors",
            "concepts": [{ "path": "pictures", "image": {}, "text": {} }], "output_model_destination": "out/lora.safetensors",
        });
        keys.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        of(Format::Json, &keys.to_string())
    };
    let imported = run(json!({
        "mse_strength": 0.0, "mae_strength": 1.0, "timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5,
        "noising_weight": 0.25, "min_noising_strength": 0.1, "timestep_shift": 2.0,
    }));
    let wanted = json!({
        "loss_type": "l1", "timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 1.25, "min_timestep": 100,
        "discrete_flow_shift": 2,
    });
    assert_has(&config(&imported), wanted);
    assert!(is_lost(&run(json!({ "mae_strength": 1.0 })), "mae_strength"), "a mixture is none of ours");
}

#[test]
fn a_command_line_is_read_from_a_script_and_from_words() {
    let script = "#!/bin/bash\naccelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py \\\n\
                  --pretrained_model_name_or_path base.safetensors --network_train_unet_only --clip_skip 2 \\\n\
                  --text_encoder_lr 1e-5 2e-5 --optimizer_args relative_step=False scale_parameter=False --optimizer_type adafactor\n";
    let imported = of(Format::Command, script);
    let own = config(&imported);
    assert_eq!(imported.tool(), Tool::SdScripts);
    assert_has(
        &own,
        json!({ "train_text_encoder": false, "optimizer_args": { "relative_step": false, "scale_parameter": false } }),
    );
    assert!(own.get("clip_skip").is_none(), "SDXL reads a layer of its own");
    let words = script.replace('\\', "").split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>();
    let of_words = import(&Source::command_line(words), &Options::default()).unwrap();
    assert_eq!(config(&of_words), own);
    assert!(imported.keys().iter().any(|key| key.key == "accelerate.num_cpu_threads_per_process"));

    let pair = script.replace("--network_train_unet_only ", "");
    assert_has(&config(&of(Format::Command, &pair)), json!({ "text_encoder_1_lr": 1e-5, "text_encoder_2_lr": 2e-5 }));
}

#[test]
fn a_dataset_file_becomes_datasets_with_each_key_accounted_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.toml");
    let text = "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = 'a'\n\
                num_repeats = 3\nalpha_mask = true\nface_crop_aug_range = [1.0, 2.0]\n[[datasets.subsets]]\nimage_dir = 'b'\nis_reg = true\n";
    std::fs::write(&path, text).unwrap();
    let run = format!("{SD_SCRIPTS}dataset_config = {:?}\n", path.to_str().unwrap());
    let imported = of(Format::Toml, &run);
    let own = config(&imported);
    assert_has(
        &own["datasets"][0],
        json!({ "train_data_dir": "a", "repeats": 3, "batch_size": 2, "max_resolution": 512, "shuffle_caption": true }),
    );
    assert_has(&own["datasets"][0], json!({ "alpha_mask": true, "masked_loss": true }));
    assert_has(&own["datasets"][1], json!({ "train_data_dir": "b", "is_reg": true }));
    assert!(own["datasets"][1].get("masked_loss").is_none());
    assert!(own.get("train_data_dir").is_none(), "it is ignored beside dataset_config");
    let of_file = imported.keys().iter().filter(|key| key.key.contains("d.toml")).count();
    assert_eq!(of_file, 9);
    assert!(
        imported.keys().iter().any(|key| key.key.ends_with("subsets[0].face_crop_aug_range")
            && matches!(key.verdict, Verdict::NoCounterpart(_)))
    );
}

#[test]
fn the_gui_counts_in_percent_and_epochs_and_takes_further_options() {
    let text = r#"{
        "LoRA_type": "LyCORIS/LoHa", "max_resolution": "512,650", "epoch": 10, "max_train_epochs": "", "train_batch_size": 2,
        "lr_scheduler": "cosine", "lr_warmup": 10, "network_dim": 32, "network_alpha": 16, "conv_dim": 8, "conv_alpha": 4, "use_cp": true,
        "unet_lr": "0.0002", "text_encoder_lr": "0", "optimizer": "AdamW", "optimizer_args": "\"weight_decay=0.1\" \"betas=0.9,0.99\"",
        "noise_offset_type": "Original", "noise_offset": 0.05, "multires_noise_iterations": 6, "seed": "", "xformers": true,
        "additional_parameters": "--min_bucket_reso=512 --log_prefix=x", "min_bucket_reso": 256, "sample_prompts": "a cat --w 512\n# no\n\nb"
    }"#;
    let imported = of(Format::Json, text);
    let own = config(&imported);
    assert_eq!(imported.tool(), Tool::KohyaGui);
    let wanted = json!({
        "variant": "loha", "epochs": 10, "lr_warmup_steps": 0.1, "lora_rank": 32, "lora_alpha": 16, "train_text_encoder": false,
        "unet_lr": 2e-4, "variant_options": { "tucker": true }, "noise_offset": 0.05, "min_bucket_reso": 512,
        "max_resolution": "512,648", "optimizer_args": { "weight_decay": 0.1, "betas": [0.9, 0.99] },
        "sample_prompts": ["a cat --w 512", "b"], "rank_pattern": { r"re:.*\.(conv1|conv2|conv)": 8 },
    });
    assert_has(&own, wanted);
    // Noise is of one kind or the other.
    assert!(matches!(verdict(&imported, "multires_noise_iterations"), Verdict::WithoutEffect(_)));
    assert_eq!(imported.missing(), ["base_model", "train_data_dir", "output_dir"]);

    // An old file of the tab LoRA has ranks and no kind; without either all weights are trained.
    let old = text
        .replace("\"LoRA_type\": \"LyCORIS/LoHa\",", "")
        .replace("\"optimizer\": \"AdamW\",", "\"use_8bit_adam\": false,");
    let own = config(&of(Format::Json, &old));
    assert!(own.get("train").is_none() && own["optimizer"] == "adamw", "{own:#}");
    let full = config(&of(Format::Json, &old.replace("\"network_dim\": 32, \"network_alpha\": 16,", "")));
    assert!(full["train"] == "full" && full.get("lora_alpha").is_none(), "{full:#}");

    // Of a plain LoRA the fields of convolutions mean nothing; D-Adaptation has something else in its place.
    let plain = text.replace("LyCORIS/LoHa", "Standard").replace("\"AdamW\"", "\"DAdaptAdam\"");
    let imported = of(Format::Json, &plain);
    assert!(config(&imported).get("rank_pattern").is_none() && is_lost(&imported, "optimizer"));
}

#[test]
fn onetrainer_reads_concepts_and_has_its_own_defaults() {
    let text = r#"{
        "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "base.safetensors",
        "output_model_destination": "models/mine.safetensors", "resolution": "512,768", "learning_rate": 0.0003,
        "layer_filter_preset": "attn-mlp", "ema": "GPU", "ema_decay": 0.9, "ema_update_step_interval": 2,
        "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 4.0, "huber_strength": 1.0, "validation": true,
        "unet": { "weight_dtype": "NFLOAT_4" }, "text_encoder": { "learning_rate": 1e-5, "train": true },
        "optimizer": { "optimizer": "ADAFACTOR", "beta1": null },
        "concepts": [
            { "path": "a", "balancing": 2.0, "image": { "enable_crop_jitter": false, "enable_random_flip": false } },
            { "path": "b", "enabled": false, "text": { "enable_tag_shuffling": true } },
            { "path": "c", "type": "VALIDATION" }
        ]
    }"#;
    let imported = of(Format::Json, text);
    let own = config(&imported);
    let wanted = json!({
        "output_dir": "models", "output_name": "mine", "lora_rank": 16, "lora_alpha": 1, "lr_warmup_steps": 200, "epochs": 100,
        "precision": "fp16", "save_precision": "fp32", "target_modules": ["attention-mlp"], "text_encoder_lr": 1e-5,
        "min_snr_gamma": 4, "base_storage": "nf4", "gradient_checkpointing": true, "validation_data_dir": "c",
        "optimizer_args": { "relative_step": false, "scale_parameter": false }, "enable_bucket": true, "max_bucket_reso": 1536,
    });
    assert_has(&own, wanted);
    assert!((own["ema_decay"].as_f64().unwrap() - 0.9f64.sqrt()).abs() < 1e-12);
    for (asked, kept) in [(3, 3), (150, 100)] {
        let drawn = format!("\"path\": \"a\", \"image_variations\": {asked}");
        let imported = of(
            Format::Json,
            &text
                .replace("\"path\": \"a\"", &drawn)
                .replace("\"enable_random_flip\": false", "\"enable_random_flip\": true"),
        );
        assert_has(&config(&imported)["datasets"][0], json!({ "image_variations": kept }));
    }
    let datasets = own["datasets"].as_array().unwrap();
    assert_eq!(datasets.len(), 2, "each resolution is a dataset; what is not enabled is none");
    for (dataset, side) in datasets.iter().zip([512, 768]) {
        assert_has(
            dataset,
            json!({ "train_data_dir": "a", "repeats": 2, "max_resolution": side, "enable_wildcard": true }),
        );
    }
    let by_time = text.replace("\"validation\": true,", "\"validation\": true, \"save_every\": 2, \"save_every_unit\": \"HOUR\", \"masked_prior_preservation_weight\": 0.5,");
    assert_has(&config(&of(Format::Json, &by_time)), json!({ "save_every_minutes": 120, "prior_mask_weight": 0.5 }));
    assert!(is_lost(&imported, "huber_strength"));
    assert!(matches!(verdict(&imported, "concepts[1].text"), Verdict::WithoutEffect(_)));
    // The text encoder would stop after 30 of 100 epochs, without a key that says so.
    assert!(imported.defaults().iter().any(|key| key.key == "text_encoder.stop_training_after"));
}

#[test]
fn ai_toolkit_counts_steps_before_accumulation() {
    let text = r#"
job: extension
config:
  name: mine
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: sks
      network: { type: lora, linear: 16, linear_alpha: 8 }
      save: { dtype: bf16, save_every: 250, max_step_saves_to_keep: 4 }
      datasets:
        - folder_path: pictures
          caption_dropout_rate: 0.05
          resolution: [512, 768]
          mask_path: masks
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 4
        noise_scheduler: ddpm
        optimizer: adamw8bit
        optimizer_params: { weight_decay: 0.1 }
        lr: 1e-4
        dtype: bf16
        ema_config: { use_ema: true, ema_decay: 0.99 }
        diff_output_preservation: true
      model: { name_or_path: base.safetensors, is_xl: true, quantize: true }
      sample: { sampler: ddpm, sample_every: 250, width: 1024, height: 768, prompts: ["[trigger] in a hat"], neg: "" }
"#;
    let imported = of(Format::Yaml, text);
    let own = config(&imported);
    let wanted = json!({
        "output_dir": "output/mine", "output_name": "mine", "lora_rank": 16, "lora_alpha": 8, "max_train_steps": 500,
        "gradient_accumulation_steps": 4, "train_text_encoder": false, "precision": "bf16", "save_precision": "bf16",
        "save_total_limit": 4, "ema_decay": 0.99, "base_storage": "fp8", "sample_prompts": ["sks in a hat"],
        "sample_resolution": "1024,768", "masked_loss": true, "optimizer_args": { "weight_decay": 0.1 },
    });
    assert_has(&own, wanted);
    for (dataset, side) in own["datasets"].as_array().unwrap().iter().zip([512, 768]) {
        assert_has(
            dataset,
            json!({ "max_resolution": side, "enable_bucket": true, "caption_extension": ".txt", "mask_dir": "masks" }),
        );
    }
    assert_has(&own, json!({ "prior_prompt": "", "prior_prompt_weight": 1 }));
    let two = text.replace("    - type: sd_trainer", "    - type: sd_trainer\n    - type: sd_trainer");
    assert!(refused(Format::Yaml, &two).contains("2 processes"));
    let class = "diff_output_preservation: true\n        diff_output_preservation_class: person\n        diff_output_preservation_multiplier: 0.5\n        blank_prompt_preservation: true";
    let own = config(&of(Format::Yaml, &text.replace("diff_output_preservation: true", class)));
    assert_has(&own, json!({ "prior_prompt": "person", "prior_prompt_weight": 0.5, "prior_blank_weight": 1 }));
    // A mirror image is a picture of its own there.
    for (repeats, visits) in [("", 2), ("\n          num_repeats: 3", 6)] {
        let flipped = text.replace("mask_path: masks", &format!("flip_x: true{repeats}"));
        for dataset in config(&of(Format::Yaml, &flipped))["datasets"].as_array().unwrap() {
            let wanted = json!({ "processors": ["center_crop", "flip"], "repeats": visits, "caption_lines": "all" });
            assert_has(dataset, wanted);
        }
    }
    let lokr = of(Format::Yaml, &text.replace("type: lora, linear: 16", "type: lokr, dropout: 0.1, linear: 16"));
    assert!(config(&lokr).get("lora_dropout").is_none(), "it has no ranks in between: {lokr}");
}

const AXOLOTL: &str = r#"
base_model: ./Llama-3.2-1B
load_in_4bit: true
adapter: qlora
datasets:
  - path: ./data.jsonl
    type: chat_template
sequence_len: 4096
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 0.0002
bf16: auto
warmup_ratio: 0.1
val_set_size: 0.05
eval_steps: 20
wandb_project:
"#;

#[test]
fn axolotl_has_its_own_defaults() {
    let imported = of(Format::Yaml, AXOLOTL);
    let wanted = json!({
        "base_model": "./Llama-3.2-1B", "train_data_dir": "./data.jsonl", "output_dir": "./model-out", "base_storage": "nf4",
        "max_seq_length": 4096, "packing": true, "lora_rank": 16, "lora_alpha": 32, "target_modules": ["all-linear"], "batch_size": 2,
        "gradient_accumulation_steps": 4, "epochs": 3, "precision": "bf16", "lr_warmup_steps": 0.1, "validation_split": 0.05,
        "validate_every_n_steps": 20, "lr_scheduler": "cosine", "weight_decay": 0, "optimizer": "adamw", "long_documents": "skip",
    });
    assert_has(&config(&imported), wanted);
    let dpo = config(&of(Format::Yaml, &format!("{AXOLOTL}rl: dpo\nrl_beta: 0.2\n")));
    assert_has(&dpo, json!({ "objective": "dpo", "dpo_beta": 0.2, "max_seq_length": 8192 }));
    assert!(refused(Format::Yaml, &format!("{AXOLOTL}rl: kto\n")).contains("run:22: `rl`: kto is not trained here"));
    // A template holds for the whole run.
    let two =
        AXOLOTL.replace("    type: chat_template\n", "    type: alpaca\n  - path: ./more.jsonl\n    type: alpaca\n");
    let own = config(&of(Format::Yaml, &two));
    assert!(own["chat_template"] == "alpaca" && own["datasets"][1].get("chat_template").is_none(), "{own:#}");
    // batch_size is that of a step.
    let total = AXOLOTL.replace("gradient_accumulation_steps: 4", "batch_size: 16");
    assert_has(&config(&of(Format::Yaml, &total)), json!({ "batch_size": 2, "gradient_accumulation_steps": 8 }));
}

#[test]
fn plain_texts_of_axolotl_are_split_whatever_becomes_of_long_conversations() {
    let plain = AXOLOTL.replace("type: chat_template", "type: completion");
    assert_has(&config(&of(Format::Yaml, &plain)), json!({ "long_documents": "split" }));
    let given = of(Format::Yaml, &format!("{plain}excess_length_strategy: truncate\n"));
    assert_has(&config(&given), json!({ "long_documents": "split" }));
    let both =
        plain.replace("type: completion\n", "type: completion\n  - path: ./chats.jsonl\n    type: chat_template\n");
    let both = of(Format::Yaml, &format!("{both}excess_length_strategy: drop\n"));
    assert_has(&config(&both), json!({ "long_documents": "skip" }));
    let Verdict::NoCounterpart(what) = verdict(&both, "excess_length_strategy") else { panic!("{both}") };
    assert!(what.contains("plain texts"), "{what}");
    let headings = of(Format::Yaml, &AXOLOTL.replace("type: chat_template", "type: alpaca"));
    let Verdict::NoCounterpart(what) = verdict(&headings, "datasets[0].type") else { panic!("{headings}") };
    assert!(what.contains("### Input:"), "{what}");
}

#[test]
fn llama_factory_has_its_own_defaults_and_names_of_datasets() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("dataset_info.json"),
        r#"{"mine": {"file_name": "mine.json"}, "far": {"hf_hub_url": "a/b"}}"#,
    )
    .unwrap();
    let text = format!(
        "model_name_or_path: ./Qwen3-4B\nstage: sft\ndo_train: true\nfinetuning_type: lora\ndataset: mine,far\ndataset_dir: {}\ntemplate: qwen3\n\
         output_dir: out\nnum_train_epochs: 3.0\n",
        folder.path().display()
    );
    let imported = of(Format::Yaml, &text);
    let wanted = json!({
        "lora_rank": 8, "lora_alpha": 16, "target_modules": ["all-linear"], "max_seq_length": 2048, "long_documents": "truncate",
        "batch_size": 8, "learning_rate": 5e-5, "lr_scheduler": "linear", "weight_decay": 0, "epochs": 3, "precision": "fp32",
        "gradient_checkpointing": true, "save_every_n_steps": 500,
        "train_data_dir": folder.path().join("mine.json").to_str().unwrap(),
    });
    assert_has(&config(&imported), wanted);
    let Verdict::NoCounterpart(what) = verdict(&imported, "dataset") else { panic!("{imported}") };
    assert!(what.contains("far is on a hub"), "{what}");
    let orpo = text.replace("stage: sft", "stage: dpo\npref_loss: orpo\npref_beta: 0.2");
    let of_pairs = json!({ "objective": "orpo", "orpo_lambda": 0.2, "max_seq_length": 4096 });
    assert_has(&config(&of(Format::Yaml, &orpo)), of_pairs);
    let adapters = format!("{text}adapter_name_or_path: one, two\n");
    assert_has(&config(&of(Format::Yaml, &adapters)), json!({ "init_from": "two", "fuse_adapters": ["one"] }));
    let own = config(&of(Format::Yaml, &format!("{adapters}create_new_adapter: true\n")));
    assert!(own.get("init_from").is_none() && own["fuse_adapters"] == json!(["one", "two"]), "{own:#}");
}

#[test]
fn plain_texts_of_llama_factory_fill_rows_and_are_split() {
    let text = "model_name_or_path: b\nstage: pt\ndo_train: true\ndataset: mine\noutput_dir: out\ncutoff_len: 512\n";
    let wanted = json!({ "max_seq_length": 512, "long_documents": "split", "packing": true });
    assert_has(&config(&of(Format::Yaml, text)), wanted);
    let alone = config(&of(Format::Yaml, &format!("{text}packing: false\n")));
    assert!(alone["long_documents"] == "truncate" && alone.get("packing").is_none(), "{alone:#}");
}

#[test]
fn what_dataset_info_says_of_records_is_told_where_it_is_not_so_here() {
    let folder = tempfile::tempdir().unwrap();
    let info = json!({
        "known": {"file_name": "a.json", "formatting": "sharegpt", "ranking": true, "split": "train",
            "columns": {"messages": "messages", "system": null, "chosen": "chosen", "rejected": "rejected"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        "own": {"file_name": "b.json", "num_samples": 500, "split": "test",
            "columns": {"prompt": "aufgabe", "response": "output", "images": "bilder"}, "tags": {"user_tag": "ich"}},
    });
    std::fs::write(folder.path().join("dataset_info.json"), info.to_string()).unwrap();
    let of_set = |name: &str| {
        let folder = folder.path().display();
        of(
            Format::Yaml,
            &format!("model_name_or_path: b\nstage: sft\ndataset: {name}\ndataset_dir: {folder}\noutput_dir: o\n"),
        )
    };
    assert!(matches!(verdict(&of_set("known"), "dataset"), Verdict::Translated(_)));
    let own = of_set("own");
    let Verdict::NoCounterpart(what) = verdict(&own, "dataset") else { panic!("{own}") };
    for part in [
        "own: `aufgabe`, its column prompt, is not read; call it `instruction`",
        "`bilder`, its column images, is not read",
        "`ich`, its tag user_tag, is not read; call it `user`",
        "not 500 records",
        "not the split test",
    ] {
        assert!(what.contains(part), "{part}: {what}");
    }
    assert!(!what.contains("`output`"), "{what}");
    assert!(own.config().contains("train_data_dir"), "{}", own.config());
}

#[test]
fn templates_of_llama_factory_that_no_model_has_are_not_called_the_bases_own() {
    let of_template = |name: &str, more: &str| {
        of(
            Format::Yaml,
            &format!("model_name_or_path: b\nstage: sft\ndataset: d\noutput_dir: o\ntemplate: {name}\n{more}"),
        )
    };
    let sentence =
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.";
    let alpaca = config(&of_template("alpaca", ""));
    assert_has(&alpaca, json!({ "chat_template": "alpaca", "system_prompt": sentence }));
    assert_has(&config(&of_template("alpaca", "default_system: Be kind.\n")), json!({ "system_prompt": "Be kind." }));
    assert!(matches!(verdict(&of_template("default", ""), "template"), Verdict::NoCounterpart(_)));
    assert!(config(&of_template("qwen3", "")).get("chat_template").is_none());
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_what_would_be_right() {
    let cases: &[(Format, &str, &[&str])] = &[
        (
            Format::Toml,
            "pretrained_model_name_or_path = 'b'\nnetwork_dimm = 4",
            &["run:2: `network_dimm`", "did you mean `network_dim`"],
        ),
        (
            Format::Toml,
            "pretrained_model_name_or_path = 'b'\nnetwork_dim = 'four'",
            &["run:2", "expected a whole number", "four"],
        ),
        (
            Format::Toml,
            "pretrained_model_name_or_path = 'b'\n[a]\nseed = 1\n[b]\nseed = 2",
            &["run:5: `seed`", "line 3"],
        ),
        (
            Format::Toml,
            "pretrained_model_name_or_path = 'b'\nnetwork_train_unet_only = true\nnetwork_train_text_encoder_only = true",
            &["run:2", "contradicts network_train_text_encoder_only"],
        ),
        (
            Format::Toml,
            "pretrained_model_name_or_path = 'b'\nlr_warmup_steps = 10\nlr_scheduler = 'constant'",
            &["run:2", "constant_with_warmup"],
        ),
        (
            Format::Toml,
            "pretrained_model_name_or_path = 'b'\nuse_8bit_adam = true\noptimizer_type = 'Lion'",
            &["contradicts use_8bit_adam"],
        ),
        (Format::Toml, "pretrained_model_name_or_path = 'b'\nseed = ", &["run:2: not valid TOML"]),
        (
            Format::Yaml,
            "base_model: b\nadapter: lora\nbatch_size: 3\nmicro_batch_size: 2\ngradient_accumulation_steps: 2",
            &["run:3: `batch_size`", "contradicts"],
        ),
        (
            Format::Yaml,
            "base_model: b\nadapter: lora\nload_in_4bit: true\nload_in_8bit: true",
            &["contradicts load_in_8bit"],
        ),
        (
            Format::Yaml,
            "model_name_or_path: b\nstage: sft\nbf16: true\nfp16: true",
            &["run:3: `bf16`", "contradicts fp16"],
        ),
        (Format::Json, "{\"training_method\": \"LORA\", \"model_type\":", &["not valid JSON", "run:1"]),
        (
            Format::Json,
            "{\"training_method\": \"EMBEDDING\", \"model_type\": \"STABLE_DIFFUSION_15\"}",
            &["EMBEDDING is not trained here"],
        ),
        (Format::Yaml, "a: 1\nb: 2", &["no configuration of a known trainer", "sd-scripts"]),
        (Format::Yaml, "base_model: b\nlora_rank: 4\ntrain_data_dir: d", &["a configuration of this program"]),
        (
            Format::Yaml,
            "lora_r: 4\nlora_alpha: 8\nmicro_batch_size: 1",
            &["3 of its 3 keys are of axolotl (--from axolotl)"],
        ),
    ];
    for (format, text, fragments) in cases {
        let said = refused(*format, text);
        for fragment in *fragments {
            assert!(said.contains(fragment), "`{text}` gives `{said}`, which lacks `{fragment}`");
        }
    }
}

#[test]
fn every_key_ends_in_exactly_one_list_and_unknown_ones_only_where_that_is_asked_for() {
    let text = format!("{AXOLOTL}a_key_to_come: 1\n");
    assert!(refused(Format::Yaml, &text).contains("run:22: `a_key_to_come`"));
    let options = Options { allow_unknown: true, ..Options::default() };
    let imported = import(&Source::text("run", Format::Yaml, &text), &options).unwrap();
    assert!(is_lost(&imported, "a_key_to_come"));
    // 19 lines, of which datasets has two keys in its place.
    assert_eq!(imported.keys().len(), 20);
    let json = serde_json::to_value(&imported).unwrap();
    let listed =
        ["taken", "translated", "without_effect", "no_counterpart"].map(|list| json[list].as_array().unwrap().len());
    assert_eq!(listed.iter().sum::<usize>(), 20);
    assert_eq!(json["trainer"], "axolotl");
}
