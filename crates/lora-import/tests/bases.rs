//! Runs of FLUX.1, Chroma, Qwen-Image, Z-Image, Stable Diffusion 3 and Anima as the examples of other trainers set them up:
//! configurations of our own with all keys that occur in those examples, and what each of them means here.

use std::path::Path;

use lora_import::{Format, Import, Options, Source, Tool, Verdict, import};
use serde_json::{Value, json};

fn of(format: Format, text: &str) -> Import {
    import(&Source::text("run", format, text), &Options::default()).unwrap_or_else(|problems| panic!("{problems}"))
}

fn config(imported: &Import) -> Value {
    let text = imported.config();
    toml::from_str(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

/// The keys that have no counterpart.
fn lost(imported: &Import) -> Vec<&str> {
    let lost = imported.keys().iter().filter(|key| matches!(key.verdict, Verdict::NoCounterpart(_)));
    lost.map(|key| key.key.as_str()).collect()
}

#[track_caller]
fn assert_has(own: &Value, wanted: Value) {
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(own.get(key), Some(value), "{key} in {own:#}");
    }
}

/// A command of sd-scripts for FLUX.1 as fluxgym writes it.
const FLUX: &str = "accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 sd-scripts/flux_train_network.py \\
  --pretrained_model_name_or_path \"unet/dev.sft\" --clip_l \"clip_l.safetensors\" --t5xxl \"t5.safetensors\" --ae \"ae.sft\" \\
  --cache_latents_to_disk --save_model_as safetensors --sdpa --persistent_data_loader_workers \\
  --max_data_loader_n_workers 2 --seed 42 --gradient_checkpointing --mixed_precision bf16 --save_precision bf16 \\
  --network_module networks.lora_flux --network_dim 4 --optimizer_type adafactor \\
  --optimizer_args \"relative_step=False\" \"scale_parameter=False\" \"warmup_init=False\" --split_mode \\
  --lr_scheduler constant_with_warmup --max_grad_norm 0.0 --learning_rate 8e-4 --cache_text_encoder_outputs \\
  --cache_text_encoder_outputs_to_disk --fp8_base --highvram --max_train_epochs 16 --save_every_n_epochs 4 \\
  --output_dir \"out\" --output_name mine --model_prediction_type raw --guidance_scale 1 --loss_type l2 \\
  --sample_prompts=\"prompts.txt\" --sample_every_n_steps=\"100\"";

#[test]
fn noise_levels_of_sd_scripts_are_those_of_its_scheduler() {
    let run = |options: &str| config(&of(Format::Command, &format!("{FLUX} {options}\n")));
    // Without the option the scheduler's timesteps are drawn evenly, and it moves them by 3.
    let own = run("");
    assert_has(&own, json!({ "timestep_sampling": "uniform", "discrete_flow_shift": 3 }));
    assert!(own.get("sample_sampler").is_none(), "samples follow the flow");
    let own = run("--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean 0.5 --logit_std 1.5");
    // Timesteps fall there as the number that is drawn rises.
    assert_has(&own, json!({ "timestep_sampling": "logit_normal", "logit_mean": -0.5, "logit_std": 1.5 }));
    let own = run("--weighting_scheme mode --mode_scale 1 --discrete_flow_shift 1");
    assert_has(&own, json!({ "timestep_sampling": "mode", "mode_scale": 1 }));
    assert!(own.get("discrete_flow_shift").is_none(), "1 moves nothing");
    let own =
        run("--timestep_sampling shift --discrete_flow_shift 3.1582 --weighting_scheme logit_normal --logit_mean 1");
    assert_has(&own, json!({ "timestep_sampling": "shift", "discrete_flow_shift": 3.1582 }));
    assert!(own.get("logit_mean").is_none(), "the scheme is read with sigma alone");
    let own = run("--timestep_sampling sigmoid");
    assert!(own.get("discrete_flow_shift").is_none(), "nothing is moved");
    let sd3 = FLUX.replace("flux_train", "sd3_train").replace("lora_flux", "lora_sd3");
    let own = config(&of(Format::Command, &format!("{sd3} --training_shift 2.5\n")));
    assert_has(&own, json!({ "timestep_sampling": "uniform", "discrete_flow_shift": 2.5 }));
}

#[test]
fn adapters_of_sd_scripts_are_on_the_linear_layers_of_flux_blocks() {
    let targets =
        |options: &str| config(&of(Format::Command, &format!("{FLUX} {options}\n")))["target_modules"].clone();
    assert_eq!(targets(""), json!([r"re:(single_)?transformer_blocks\..*"]));
    assert_eq!(targets("--network_args train_blocks=single"), json!([r"re:single_transformer_blocks\..*"]));
}

#[test]
fn ai_toolkits_jobs_for_transformers_are_taken() {
    let job = |model: &str, train: &str, resolution: &str| {
        let text = format!(
            r#"
job: extension
config:
  name: mine
  process:
    - type: diffusion_trainer
      training_folder: output
      performance_log_every: 1000
      device: cuda:0
      trigger_word: p3r5on
      network: {{ type: lora, linear: 16, linear_alpha: 32 }}
      save: {{ dtype: bf16, save_every: 250, max_step_saves_to_keep: 4, save_format: safetensors, push_to_hub: false }}
      datasets:
        - folder_path: pictures
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: {resolution}
      train:
        batch_size: 1
        steps: 2000
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        optimizer_params: {{ weight_decay: 0.0001 }}
        lr: 1e-4
        lr_scheduler: constant
        dtype: bf16
        loss_type: mse
        content_or_style: balanced
        cache_text_embeddings: true
        unload_text_encoder: false
        switch_boundary_every: 1
        skip_first_sample: true
        disable_sampling: false
        {train}
      logging: {{ log_every: 1, use_ui_logger: true }}
      model: {model}
      sample:
        sampler: flowmatch
        sample_every: 250
        sample_start_step: 0
        width: 1024
        height: 1024
        samples: [{{ prompt: "[trigger] in a garden" }}]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {{ name: "[name]", version: "1.0" }}
"#
        );
        of(Format::Yaml, &text)
    };
    let ema = "ema_config: { use_ema: true, ema_decay: 0.99 }";
    let flux = job("{ name_or_path: flux, is_flux: true, quantize: true, low_vram: true }", ema, "[512, 768, 1024]");
    let own = config(&flux);
    assert_eq!(lost(&flux), Vec::<&str>::new());
    let wanted = json!({
        "base_model": "flux", "base_storage": "fp8", "timestep_sampling": "sigmoid", "lora_alpha": 32, "ema_decay": 0.99,
        "max_train_steps": 2000, "sample_guidance_scale": 4, "sample_prompts": ["p3r5on in a garden"],
    });
    assert_has(&own, wanted);
    let sides: Vec<_> = own["datasets"].as_array().unwrap().iter().map(|dataset| &dataset["max_resolution"]).collect();
    assert_eq!(sides, [512, 768, 1024]);

    let quantised = "{ name_or_path: qwen, arch: qwen_image, quantize: true, qtype: \"uint3|adapters/v2.safetensors\", \
                     quantize_te: true, qtype_te: qfloat8, low_vram: true }";
    let qwen = job(quantised, "gradient_accumulation: 2", "[1024]");
    assert_eq!(lost(&qwen), ["model.qtype"], "its adapter");
    assert_has(
        &config(&qwen),
        json!({ "base_storage": "nf4", "max_train_steps": 2000, "gradient_accumulation_steps": 2 }),
    );
    let eight = quantised.replace("uint3", "uint6");
    assert_has(&config(&job(&eight, "", "[1024]")), json!({ "base_storage": "int8" }));

    let preserved = "timestep_type: weighted\n        diff_output_preservation: true\n        \
                     diff_output_preservation_multiplier: 1.0\n        diff_output_preservation_class: person";
    let z_image = job("{ name_or_path: z, arch: zimage, model_kwargs: {} }", preserved, "[1024, 1024]");
    assert_eq!(lost(&z_image), ["train.timestep_type"], "its weights by noise level");
    assert_has(
        &config(&z_image),
        json!({ "timestep_sampling": "uniform", "prior_prompt": "person", "prior_prompt_weight": 1 }),
    );
    let sd3 = job("{ name_or_path: sd35, is_v3: true }", "timestep_type: linear", "[1024]");
    assert_has(&config(&sd3), json!({ "timestep_sampling": "uniform", "max_resolution": 1024 }));
}

#[test]
fn onetrainers_presets_for_transformers_are_taken() {
    let run = |further: Value| {
        let mut keys = json!({
            "base_model_name": "base", "batch_size": 2, "learning_rate": 0.0003, "output_model_format": "DIFFUSERS_LORA",
            "output_model_destination": "models/lora.safetensors", "resolution": "512", "dataloader_threads": 1, "compile": true,
            "backup_after": 10, "transformer": { "train": true, "weight_dtype": "FLOAT_8" },
            "text_encoder": { "train": false, "weight_dtype": "FLOAT_8" }, "text_encoder_2": { "train": false, "weight_dtype": "NFLOAT_4" },
            "text_encoder_3": { "train": false }, "training_method": "LORA", "vae": { "weight_dtype": "FLOAT_32" },
            "train_dtype": "BFLOAT_16", "weight_dtype": "BFLOAT_16", "output_dtype": "BFLOAT_16",
            "layer_filter": "attn,ff", "layer_filter_preset": "attn-mlp", "timestep_distribution": "LOGIT_NORMAL",
        });
        keys.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        of(Format::Json, &keys.to_string())
    };
    for kind in ["FLUX_DEV_1", "CHROMA_1", "QWEN", "Z_IMAGE", "STABLE_DIFFUSION_3", "STABLE_DIFFUSION_35", "ANIMA"] {
        let imported = run(json!({ "model_type": kind }));
        assert_eq!(lost(&imported), Vec::<&str>::new(), "{kind}");
        let own = config(&imported);
        let wanted = json!({
            "target_modules": ["attention-mlp"], "timestep_sampling": "logit_normal", "base_storage": "fp8",
            "gradient_checkpointing": true, "precision": "bf16", "save_precision": "bf16",
        });
        assert_has(&own, wanted);
        assert!(own.get("train_text_encoder").is_none(), "they are never trained: {kind}");
    }
    let flux =
        config(&run(json!({ "model_type": "FLUX_DEV_1", "dynamic_timestep_shifting": true, "noising_weight": 0.5 })));
    assert_has(&flux, json!({ "timestep_sampling": "flux_shift", "sigmoid_scale": 1.5 }));
    let heavy = json!({ "model_type": "CHROMA_1", "timestep_distribution": "HEAVY_TAIL", "noising_weight": 1.2 });
    assert_has(&config(&run(heavy)), json!({ "timestep_sampling": "mode", "mode_scale": 1.2 }));
    let parabola =
        run(json!({ "model_type": "CHROMA_1", "timestep_distribution": "INVERTED_PARABOLA", "noising_weight": 7.7 }));
    assert_eq!(lost(&parabola), ["timestep_distribution", "noising_weight"]);
    assert_has(&config(&parabola), json!({ "timestep_sampling": "logit_normal" }));
    // Files of before settings by network.
    let old = json!({ "model_type": "QWEN", "gradient_checkpointing": "CPU_OFFLOADED", "layer_offload_fraction": 0.5 });
    assert_has(&config(&run(old)), json!({ "cpu_offload_checkpointing": true, "offload_base": true }));
    let off = config(&run(json!({ "model_type": "QWEN", "transformer": { "gradient_checkpointing": false } })));
    assert!(off.get("gradient_checkpointing").is_none(), "it is off where it is given: {off:#}");
}

fn written(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn musubi_tuners_command_and_dataset_file_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[general]\nresolution = [960, 544]\ncaption_extension = '.txt'\nbatch_size = 1\nenable_bucket = true\n\
                bucket_no_upscale = false\n[[datasets]]\nimage_directory = 'a'\ncache_directory = 'c'\nnum_repeats = 1\n\
                [[datasets]]\nimage_directory = 'b'\nnum_repeats = 3\nresolution = 512\nmultiple_target = true\n";
    let dataset = written(folder.path(), "d.toml", text);
    let command = format!(
        "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/zimage_train_network.py \\\n\
         --dit dit.safetensors --vae vae.safetensors --text_encoder te.safetensors --dataset_config {dataset:?} --sdpa \\\n\
         --mixed_precision bf16 --timestep_sampling shift --weighting_scheme none --discrete_flow_shift 2.0 --split_attn \\\n\
         --optimizer_type adamw8bit --learning_rate 1e-4 --gradient_checkpointing --gradient_checkpointing_cpu_offload \\\n\
         --max_data_loader_n_workers 2 --persistent_data_loader_workers --network_module networks.lora_zimage --network_dim 32 \\\n\
         --max_train_epochs 16 --save_every_n_epochs 1 --seed 42 --output_dir out --output_name mine --fp8_base --fp8_scaled \\\n\
         --fp8_llm --blocks_to_swap 20 --use_pinned_memory_for_block_swap --disable_numpy_memmap --num_timestep_buckets 4\n"
    );
    let imported = of(Format::Command, &command);
    assert_eq!(imported.tool(), Tool::Musubi);
    let own = config(&imported);
    let wanted = json!({
        "base_model": "dit.safetensors", "text_encoder": "te.safetensors", "vae": "vae.safetensors", "lora_rank": 32, "lora_alpha": 1,
        "timestep_sampling": "shift", "discrete_flow_shift": 2, "cpu_offload_checkpointing": true, "base_storage": "fp8",
        "offload_base": true, "epochs": 16, "save_precision": "bf16",
    });
    assert_has(&own, wanted);
    assert!(own.get("target_modules").is_none(), "attention and feed-forward, as here");
    assert_has(
        &own["datasets"][0],
        json!({ "train_data_dir": "a", "max_resolution": "960,544", "enable_bucket": true }),
    );
    assert_has(&own["datasets"][1], json!({ "train_data_dir": "b", "max_resolution": 512, "repeats": 3 }));
    assert_eq!(lost(&imported).len(), 2, "strata, and several targets: {:?}", lost(&imported));
    // Its scheduler moves nothing unless it is told to.
    let usual = command.replace("--timestep_sampling shift", "").replace("--discrete_flow_shift 2.0", "");
    let own = config(&of(Format::Command, &usual));
    assert_has(&own, json!({ "timestep_sampling": "uniform" }));
    assert!(own.get("discrete_flow_shift").is_none());
    let by_size = command.replace("sampling shift", "sampling qwen_shift").replace("zimage", "qwen_image");
    assert_has(&config(&of(Format::Command, &by_size)), json!({ "timestep_sampling": "flux_shift" }));
    let film = of(Format::Command, &command.replace("zimage", "wan"));
    assert!(lost(&film).contains(&"dit"), "no base of that kind");
}

#[test]
fn diffusion_pipes_run_and_dataset_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = "resolutions = [512, 768]\nenable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 7\n\
                   frame_buckets = [1]\ncache_shuffle_num = 4\ncache_shuffle_delimiter = ', '\nskip_empty_caption = true\n\
                   [[directory]]\npath = 'a'\nmask_path = 'm'\nnum_repeats = 1\n[[directory]]\npath = 'b'\nnum_repeats = 5\n\
                   resolutions = [[1280, 720]]\nar_buckets = [1.0]\n";
    written(folder.path(), "dataset.toml", dataset);
    let run = |model: &str, adapter: &str| {
        let text = format!(
            "output_dir = 'runs'\ndataset = 'dataset.toml'\nepochs = 1000\nmicro_batch_size_per_gpu = 1\npipeline_stages = 1\n\
             gradient_accumulation_steps = 1\ngradient_clipping = 1.0\nwarmup_steps = 100\nblocks_to_swap = 20\n\
             eval_every_n_epochs = 1\neval_before_first_step = true\neval_micro_batch_size_per_gpu = 1\n\
             eval_gradient_accumulation_steps = 1\nsave_every_n_epochs = 2\ncheckpoint_every_n_minutes = 120\n\
             activation_checkpointing = 'unsloth'\npartition_method = 'parameters'\nsave_dtype = 'bfloat16'\ncompile = true\n\
             caching_batch_size = 1\nsteps_per_print = 1\nvideo_clip_mode = 'single_beginning'\n[model]\n{model}\n\
             dtype = 'bfloat16'\n{adapter}\n[optimizer]\ntype = 'adamw_optimi'\nlr = 2e-5\nbetas = [0.9, 0.99]\n\
             weight_decay = 0.01\neps = 1e-8\n[monitoring]\nenable_wandb = false\nwandb_api_key = ''\n"
        );
        let path = written(folder.path(), "run.toml", &text);
        import(&Source::file(path), &Options::default()).unwrap_or_else(|problems| panic!("{problems}"))
    };
    let adapter = "[adapter]\ntype = 'lora'\nrank = 32\ndtype = 'bfloat16'";
    let flux = "type = 'flux'\ndiffusers_path = 'FLUX.1-dev'\ntransformer_path = 'dev.safetensors'\n\
                transformer_dtype = 'float8'\nflux_shift = true";
    let imported = run(flux, adapter);
    assert_eq!((imported.tool(), lost(&imported)), (Tool::DiffusionPipe, vec![]));
    let own = config(&imported);
    let wanted = json!({
        "base_model": "dev.safetensors", "text_encoder_2": "FLUX.1-dev/text_encoder_2", "vae": "FLUX.1-dev/vae", "lora_rank": 32,
        "lora_alpha": 32, "base_storage": "fp8", "timestep_sampling": "flux_shift", "optimizer": "adamw", "learning_rate": 2e-5,
        "cpu_offload_checkpointing": true, "offload_base": true, "lr_warmup_steps": 100, "masked_loss": true,
        "target_modules": [r"re:.*(layers|refiner|transformer_blocks)\.\d+\..*"],
    });
    assert_has(&own, wanted);
    let datasets = own["datasets"].as_array().unwrap();
    let sides: Vec<_> = datasets.iter().map(|dataset| &dataset["max_resolution"]).collect();
    assert_eq!(sides, [512, 768, 960], "an area of 1280 × 720 is that of a square of 960");
    assert_has(
        &datasets[2],
        json!({ "train_data_dir": "b", "repeats": 5, "shuffle_caption": true, "enable_bucket": true }),
    );

    let qwen = "type = 'qwen_image'\ntransformer_path = 'q'\ntext_encoder_path = 't'\nvae_path = 'v'\n\
                timestep_sample_method = 'logit_normal'\nshift = 2.2\nmin_t = 0.1";
    let own = config(&run(qwen, adapter));
    let wanted =
        json!({ "text_encoder": "t", "timestep_sampling": "shift", "discrete_flow_shift": 2.2, "min_timestep": 100 });
    assert_has(&own, wanted);
    let sdxl = "type = 'sdxl'\ncheckpoint_path = 'xl'\nunet_lr = 4e-5\ntext_encoder_1_lr = 1e-5\nmin_snr_gamma = 5\nv_pred = true";
    let own = config(&run(sdxl, adapter));
    assert_has(
        &own,
        json!({ "unet_lr": 4e-5, "text_encoder_1_lr": 1e-5, "text_encoder_2_lr": 2e-5, "v_parameterization": true }),
    );
    assert!(own.get("timestep_sampling").is_none());
    assert_has(&config(&run(qwen, "")), json!({ "train": "full" }));
}

#[test]
fn llama_factorys_oft_is_pefts() {
    let text = "model_name_or_path: base\nstage: sft\ndo_train: true\nfinetuning_type: oft\noft_block_size: 64\noft_target: all\n\
                dataset: texts\ntemplate: llama3\ncutoff_len: 2048\noutput_dir: out\n";
    let own = config(&of(Format::Yaml, text));
    let wanted =
        json!({ "variant": "peft-oft", "variant_options": { "block_size": 64 }, "target_modules": ["all-linear"] });
    assert_has(&own, wanted);
}
