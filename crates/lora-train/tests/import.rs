//! Configurations of other trainers, translated, are configurations here, with the values that the other trainer means.

use lora_core::DType;
use lora_import::{Format as Theirs, Options, Source, Tool, import};
use lora_train::config::keys::Keys;
use lora_train::config::{Format, LrScheduler, RunLength, TrainConfig, Warmup};

macro_rules! input {
    ($name:literal) => {
        include_str!(concat!("../../lora-import/tests/inputs/", $name))
    };
}

fn read(format: Theirs, text: &str, tool: Tool) -> TrainConfig {
    let imported =
        import(&Source::text("run", format, text), &Options::default()).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(imported.tool(), tool);
    // What the input does not name, a user fills in.
    let set: Vec<String> = imported.missing().iter().map(|key| format!("{key}=filled-in")).collect();
    TrainConfig::from_text(&imported.config(), Format::Toml, &set)
        .unwrap_or_else(|error| panic!("{error} in\n{}", imported.config()))
}

#[test]
fn every_key_that_the_tables_can_write_is_one_of_ours() {
    let keys = Keys::default();
    let unknown: Vec<_> = lora_import::keys_written().into_iter().filter(|key| keys.get(key).is_none()).collect();
    assert_eq!(unknown, [""; 0]);
}

#[test]
fn a_run_of_sd_scripts_has_the_values_that_it_has_there() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "a cat --w 512\na dog\n").unwrap();
    let text = input!("sd_scripts.toml").replace("prompts.txt", prompts.to_str().unwrap());
    let config = read(Theirs::Toml, &text, Tool::SdScripts);
    // The scale is alpha / rank = 1/32: there alpha is 1 where none is given.
    assert_eq!((config.lora_rank, config.lora_alpha), (32, 1.0));
    assert_eq!((config.unet_lr, config.text_encoder_lr, config.learning_rate), (2e-4, 1e-4, 1e-4));
    assert_eq!((config.batch_size, config.gradient_accumulation_steps, config.length), (2, 2, RunLength::Epochs(4)));
    assert_eq!((config.lr_scheduler, config.lr_warmup), (LrScheduler::Cosine, Warmup::Steps(100)));
    assert_eq!((config.precision, config.save_precision, config.seed), (DType::BF16, DType::F16, 7));
    assert_eq!((config.clip_skip, config.min_snr_gamma, config.noise_offset), (2, Some(5.0), 0.05));
    assert_eq!((config.max_token_length, config.prior_loss_weight, config.rank_dropout), (150, 0.5, 0.1));
    assert_eq!(config.optimizer_args["betas"], [0.9, 0.99]);
    assert_eq!(config.target_modules, ["all-conv"]);
    let convolutions = r"re:.*\.(conv1|conv2|conv)";
    assert_eq!((config.rank_pattern[convolutions], config.alpha_pattern[convolutions]), (8.0, 4.0));
    assert_eq!((config.save_total_limit, config.save_every_n_epochs, config.save_state), (Some(2), Some(1), true));
    assert_eq!((config.samples.prompts.len(), config.samples.every_n_steps), (2, Some(50)));
    assert_eq!(config.output_name, "last");
    let [dataset] = config.datasets.as_slice() else { panic!("{:?}", config.datasets) };
    assert_eq!(dataset.scan.caption_extension.as_deref(), Some(".caption"));
    assert_eq!(dataset.processors, ["center_crop", "flip"]);
    assert!(dataset.captions.shuffle && dataset.captions.keep_tokens == 1);
}

#[test]
fn a_command_line_of_sd_scripts_has_the_values_that_it_has_there() {
    let config = read(Theirs::Command, input!("sd_scripts.sh"), Tool::SdScripts);
    assert_eq!((config.variant.as_str(), config.variant_options["factor"]), ("lokr", 8.0));
    assert_eq!((config.optimizer.as_str(), config.learning_rate, config.train_text_encoder), ("prodigy", 1.0, false));
    assert_eq!(config.optimizer_args["d_coef"], [2.0]);
    assert_eq!((config.length, config.lr_scheduler), (RunLength::Steps(500), LrScheduler::Constant));
    assert_eq!((config.save_precision, config.lora_alpha), (DType::F32, 8.0));
    assert!(config.base_storage.is_some(), "fp8_base");
}

#[test]
fn a_run_of_the_kohya_gui_has_the_values_that_it_has_there() {
    let config = read(Theirs::Json, input!("kohya_gui.json"), Tool::KohyaGui);
    assert_eq!((config.length, config.lr_warmup), (RunLength::Epochs(8), Warmup::Share(0.1)));
    assert_eq!((config.lora_rank, config.lora_alpha, config.clip_skip, config.seed), (16, 8.0, 2, 3));
    assert_eq!((config.optimizer.as_str(), config.unet_lr, config.text_encoder_lr), ("lion", 2e-4, 5e-5));
}

#[test]
fn a_run_of_onetrainer_has_the_values_that_it_has_there() {
    let config = read(Theirs::Json, input!("onetrainer.json"), Tool::OneTrainer);
    assert_eq!((config.output_dir.to_str(), config.output_name.as_str()), (Some("models"), "mine"));
    assert_eq!((config.length, config.lr_warmup), (RunLength::Epochs(20), Warmup::Steps(50)));
    assert_eq!((config.lora_rank, config.lora_alpha, config.text_encoder_lr), (8, 4.0, 3e-4));
    // There relative_step and scale_parameter are off where they are not given.
    assert_eq!(
        (&config.optimizer_args["relative_step"], &config.optimizer_args["scale_parameter"]),
        (&vec![0.0], &vec![0.0])
    );
    assert_eq!((config.precision, config.save_precision, config.masked_loss), (DType::F16, DType::F32, true));
    let sides: Vec<_> = config.datasets.iter().map(|dataset| dataset.framing.resolution()).collect();
    assert_eq!(sides, [(512, 512), (768, 768)]);
    assert!(config.datasets.iter().all(|dataset| dataset.scan.repeats == 3 && dataset.captions.shuffle));
}

#[test]
fn a_job_of_ai_toolkit_has_the_values_that_it_has_there() {
    let config = read(Theirs::Yaml, input!("ai_toolkit.yaml"), Tool::AiToolkit);
    assert_eq!((config.length, config.gradient_accumulation_steps), (RunLength::Steps(500), 4));
    assert_eq!((config.ema_decay, config.train_text_encoder, config.precision), (0.99, false, DType::BF16));
    assert_eq!(
        (config.samples.prompts.as_slice(), config.samples.resolution),
        (&["sks in a hat".to_owned()][..], (1024, 768))
    );
    assert_eq!(config.datasets.len(), 2);
}

#[test]
fn runs_of_language_models_have_the_values_that_they_have_there() {
    let config = read(Theirs::Yaml, input!("axolotl.yaml"), Tool::Axolotl);
    assert_eq!((config.batch_size, config.gradient_accumulation_steps, config.length), (2, 4, RunLength::Epochs(3)));
    assert_eq!((config.lora_rank, config.lora_alpha, config.lora_dropout), (16, 32.0, 0.05));
    assert_eq!((config.extra.whole("max_seq_length"), config.extra.switch("packing")), (Some(4096), Some(true)));
    assert_eq!(config.extra.text("long_documents"), Some("skip"), "what is too long is left out there");
    assert_eq!((config.lr_scheduler, config.lr_warmup), (LrScheduler::Cosine, Warmup::Share(0.1)));
    assert!(config.base_storage.is_some() && config.optimizer == "adamw8bit");

    let config = read(Theirs::Yaml, input!("llama_factory.yaml"), Tool::LlamaFactory);
    assert_eq!((config.lora_rank, config.lora_alpha), (8, 16.0), "alpha is twice the rank there");
    assert_eq!((config.extra.text("objective"), config.extra.number("dpo_beta")), (Some("dpo"), Some(0.2)));
    assert_eq!(
        (config.extra.whole("max_seq_length"), config.extra.text("long_documents")),
        (Some(2048), Some("truncate")),
        "1024 of each answer of a pair there"
    );
    assert_eq!(config.optimizer_args["weight_decay"], [0.0], "transformers decays nothing unless it is told to");
    assert!(config.gradient_checkpointing && config.save_every_n_steps == Some(500));
}

#[test]
fn a_run_of_musubi_tuner_has_the_values_that_it_has_there() {
    let config = read(Theirs::Command, input!("musubi.sh"), Tool::Musubi);
    assert_eq!((config.lora_rank, config.lora_alpha, config.learning_rate), (16, 8.0, 5e-5));
    assert_eq!((config.length, config.save_every_n_steps, config.seed), (RunLength::Steps(800), Some(200), 42));
    assert_eq!((config.precision, config.save_precision), (DType::BF16, DType::BF16));
    assert_eq!(config.extra.text("timestep_sampling"), Some("flux_shift"));
    assert_eq!(config.optimizer_args["betas"], [0.9, 0.99]);
}

#[test]
fn a_run_of_diffusion_pipe_has_the_values_that_it_has_there() {
    let config = read(Theirs::Toml, input!("diffusion_pipe.toml"), Tool::DiffusionPipe);
    assert_eq!((config.lora_rank, config.lora_alpha, config.learning_rate), (16, 16.0, 2e-5));
    assert_eq!((config.length, config.gradient_accumulation_steps), (RunLength::Steps(2000), 4));
    assert_eq!((config.lr_warmup, config.save_precision), (Warmup::Steps(100), DType::BF16));
    assert_eq!(config.extra.text("timestep_sampling"), Some("shift"));
    assert_eq!(config.extra.number("discrete_flow_shift"), Some(3.0));
}
