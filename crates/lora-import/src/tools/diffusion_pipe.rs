//! tdrussell/diffusion-pipe: the TOML of a run, with the TOML of the dataset that it names.

use std::path::Path;

use serde_json::{Value, json};

use super::{Table, Tool, optimisers, shared};
use crate::engine::{Field, Scope};
use crate::input::tree::{Content, Entry, Node};
use crate::input::{self, Document, Problem, Source};
use crate::outcome::{Outcome, Settings, becomes, lost, no_effect, refused, taken, translated};
use crate::row::{Element, Kind, OFF, Row, by, datasets, gone, nothing, same, table};
use crate::values;

pub(crate) static TABLE: Table = Table {
    tool: Tool::DiffusionPipe,
    name: "diffusion-pipe",
    title: "diffusion-pipe",
    about: "TOML of a run. The file that `dataset` names is read with it, where it is there: each `[[directory]]` is a dataset, \
            each of several `resolutions` one of its own. Pictures go to buckets by sd-scripts' rule, not to so many aspects. \
            Without `[adapter]` all weights are trained.",
    groups: &[ROWS],
    own: &[ROWS],
    is: |has| has("micro_batch_size_per_gpu") || has("model") && has("optimizer") && has("dataset"),
    prepare: with_dataset,
    finish: shared::split,
};

static ROWS: &[Row] = &[
    same("output_dir", "output_dir", Kind::Text),
    by("dataset", &[], "its directories are datasets", |field| match field.root.given("directory") {
        Some(_) => translated(vec![], "its directories are datasets"),
        None => lost("the file is not there: give its directories as datasets"),
    }),
    datasets("directory", DIRECTORY, |_| Element::Dataset),
    gone("eval_datasets", OFF, "held-out pictures are those of validation_data_dir or validation_split"),
    by("epochs", &["epochs"], "unless max_steps is given", |field| match field.root.given("max_steps") {
        Some(_) => no_effect("max_steps is the length of the run"),
        None => field.count_as("epochs"),
    }),
    same("max_steps", "max_train_steps", Kind::AtLeastOne),
    by("micro_batch_size_per_gpu", &["batch_size"], "one number for all resolutions", |field| match &field.value {
        Value::Array(_) => lost("one batch size holds for all resolutions: give each dataset its batch_size"),
        _ => field.count_as("batch_size"),
    }),
    same("gradient_accumulation_steps", "gradient_accumulation_steps", Kind::Count),
    same("gradient_clipping", "max_grad_norm", Kind::Number),
    same("warmup_steps", "lr_warmup_steps", Kind::AtLeastOne),
    by("lr_scheduler", &["lr_scheduler"], "by its name", |field| optimisers::schedule(&field.text())),
    gone("force_constant_lr", OFF, "optimizer.lr says it"),
    gone("pipeline_stages", &["1"], "a network is not split over devices"),
    by("blocks_to_swap", &["offload_base"], "all frozen weights are streamed", |field| match field.count() {
        Some(1..) => becomes("offload_base", true, "all frozen weights are streamed, not so many blocks"),
        _ => no_effect("off, as without it"),
    }),
    gone("pseudo_huber_c", OFF, "no pseudo-Huber loss of this scale: loss_type = huber has another"),
    by(
        "activation_checkpointing",
        &["gradient_checkpointing", "cpu_offload_checkpointing"],
        "`true`; `unsloth` keeps what blocks began with in host memory",
        |field| match field.text().as_str() {
            "unsloth" => translated(
                vec![("gradient_checkpointing", true.into()), ("cpu_offload_checkpointing", true.into())],
                "with what blocks began with in host memory",
            ),
            _ => field.when_on(taken("gradient_checkpointing", true)),
        },
    ),
    by("save_dtype", &["save_precision"], "the model's where none is given", |field| {
        precision(field, "save_precision")
    }),
    same("save_every_n_epochs", "save_every_n_epochs", Kind::AtLeastOne),
    same("save_every_n_steps", "save_every_n_steps", Kind::AtLeastOne),
    gone("save_every_n_examples", OFF, "saves are made by steps, epochs and time"),
    nothing(
        "checkpoint_every_n_epochs checkpoint_every_n_minutes checkpoint_every_n_steps",
        "a state is written by steps: save_state_every_n_steps",
    ),
    nothing(
        "eval_every_n_epochs eval_every_n_steps eval_every_n_examples eval_before_first_step \
         eval_micro_batch_size_per_gpu image_eval_micro_batch_size_per_gpu eval_gradient_accumulation_steps \
         disable_block_swap_for_eval",
        "with eval_datasets",
    ),
    nothing("image_micro_batch_size_per_gpu video_clip_mode", "films are not trained on"),
    nothing(
        "reentrant_activation_checkpointing partition_method partition_split compile caching_batch_size map_num_proc",
        "how steps are computed",
    ),
    nothing("steps_per_print logging_steps x_axis_examples", "metrics.jsonl and loss.png are written"),
    nothing("upload_hf_from_epoch huggingface_repo", "nothing is sent anywhere"),
    table("model", &[MODEL]),
    table("adapter", &[ADAPTER]),
    table("optimizer", &[OPTIMIZER, NUMBERS]),
    table("monitoring", &[MONITORING]),
];

static MODEL: &[Row] = &[
    by("type", &[], "the base's files say it", |field| match kind(&field.root).as_str() {
        "sdxl" | "flux" | "flux2" | "chroma" | "sd3" | "qwen_image" | "z_image" | "anima" => {
            no_effect("the base's files say it")
        }
        other => lost(format!("no base of the kind {other} is trained here")),
    }),
    same("checkpoint_path", "base_model", Kind::Text),
    same("transformer_path diffusion_model", "base_model", Kind::Text),
    by(
        "diffusers_path",
        &["base_model", "text_encoder", "text_encoder_2", "vae"],
        "beside a transformer's file: where text encoders and autoencoder are",
        diffusers,
    ),
    same("vae_path vae", "vae", Kind::Text),
    same("text_encoder_path llm_path t5_path", "text_encoder", Kind::Text),
    by("text_encoders", &["text_encoder"], "the first", |field| {
        let first = field.value.get(0).and_then(|one| one.get("path").unwrap_or(one).as_str());
        match first {
            Some(path) => taken("text_encoder", path),
            None => field.expected("a list of tables with a path"),
        }
    }),
    by("dtype", &["precision"], "bf16, fp16 or fp32", |field| precision(field, "precision")),
    by("transformer_dtype diffusion_model_dtype", &["base_storage"], "`float8`: fp8", |field| {
        match field.text().as_str() {
            "nf4" => taken("base_storage", "nf4"),
            float8 if float8.starts_with("float8") => becomes("base_storage", "fp8", "with a factor for each output"),
            _ => no_effect("weights are in the precision of the run"),
        }
    }),
    by("timestep_sample_method", &["timestep_sampling"], "`logit_normal` and `uniform`", |field| {
        let (shift, by_size) = (field.here.number("shift").is_some(), field.here.on("flux_shift"));
        match field.text().as_str() {
            _ if kind(&field.root) == "sdxl" => no_effect("timesteps of this base are drawn evenly"),
            "uniform" => taken("timestep_sampling", "uniform"),
            "logit_normal" if shift => becomes("timestep_sampling", "shift", "moved by shift"),
            "logit_normal" if by_size => becomes("timestep_sampling", "flux_shift", "by the picture's size"),
            "logit_normal" => becomes("timestep_sampling", "sigmoid", "the sigmoid of normal numbers"),
            _ => field.expected("logit_normal or uniform"),
        }
    })
    .default("\"logit_normal\""),
    same("sigmoid_scale", "sigmoid_scale", Kind::Positive),
    same("shift", "discrete_flow_shift", Kind::Positive),
    by("flux_shift", &[], "with timestep_sample_method; shift wins over it", |field| {
        match field.on() && field.here.text("timestep_sample_method").as_deref() == Some("uniform") {
            true => lost("only noise levels of logit_normal are moved by the picture's size"),
            false => no_effect("with timestep_sample_method"),
        }
    }),
    by("guidance", &["guidance_scale"], "of FLUX.1; 1 where none is given", |field| match kind(&field.root).as_str() {
        "flux" => field.number_as("guidance_scale"),
        _ => no_effect("only FLUX.1 is told it"),
    }),
    by("min_t", &["min_timestep"], "in thousandths", |field| thousandths(field, "min_timestep")),
    by("max_t", &["max_timestep"], "in thousandths", |field| thousandths(field, "max_timestep")),
    same("max_sequence_length", "max_sequence_length", Kind::AtLeastOne),
    by("v_pred", &["v_parameterization"], "on", |field| field.when_on(taken("v_parameterization", true))),
    same("min_snr_gamma", "min_snr_gamma", Kind::Positive),
    same("debiased_estimation_loss", "debiased_estimation_loss", Kind::Flag),
    same("unet_lr", "unet_lr", Kind::Number),
    by("text_encoder_1_lr", &["text_encoder_1_lr"], "optimizer.lr where none is given (here half of it)", |field| {
        encoder_rate(field, "text_encoder_1_lr")
    })
    .default("\"lr\""),
    by("text_encoder_2_lr", &["text_encoder_2_lr"], "optimizer.lr where none is given (here half of it)", |field| {
        encoder_rate(field, "text_encoder_2_lr")
    })
    .default("\"lr\""),
    gone("bypass_guidance_embedding", OFF, "FLUX.1 is told guidance_scale"),
    nothing("cache_text_embeddings", "captions are encoded once wherever they may be"),
    nothing(
        "ckpt_path single_file_path clip_path llama3_path llama3_4bit byt5_path lumina_shift",
        "a key of other bases",
    ),
    nothing("max_llama3_sequence_length first_frame_conditioning_p image_shift", "a key of other bases"),
];

static ADAPTER: &[Row] = &[
    by("type", &["variant", "target_modules", "train"], "`lora` and `lokr`, on all linear layers of blocks", |field| {
        let targets: Settings = match kind(&field.root).as_str() {
            "sdxl" => vec![],
            _ => vec![("target_modules", json!([BLOCKS]))],
        };
        match field.text().as_str() {
            _ if field.root.given("adapter").is_none() => becomes("train", "full", "all weights, without [adapter]"),
            "lora" => translated(targets, "on all linear layers of blocks, those of their modulation too"),
            "lokr" => {
                translated([targets, vec![("variant", "lokr".into())]].concat(), "on all linear layers of blocks")
            }
            other => refused(format!("no adapter {other} is known; lora and lokr are")),
        }
    })
    .default("\"lora\""),
    by("rank", &["lora_rank", "lora_alpha", "variant_options"], "and as alpha, which is the rank there", |field| {
        match field.count() {
            Some(rank @ 1..=4096) => {
                translated(vec![("lora_rank", rank.into()), ("lora_alpha", rank.into())], "alpha is the rank there")
            }
            Some(_) if field.here.text("type").as_deref() == Some("lokr") => {
                becomes("variant_options", json!({ "full_matrix": true }), "as a whole matrix")
            }
            _ => field.expected("a whole number from 1 on"),
        }
    }),
    gone("alpha", &["null"], "alpha is the rank there"),
    nothing("dtype", "trained numbers are fp32"),
    same("dropout", "lora_dropout", Kind::Positive),
    same("rank_dropout", "rank_dropout", Kind::Positive),
    same("init_from_existing", "init_from", Kind::Text),
    by("decompose_factor", &["variant_options"], "of LoKr", |field| match field.number() {
        Some(factor) if factor > 0.0 => {
            becomes("variant_options", json!({ "factor": values::of_number(factor) }), "the variant's own number")
        }
        _ => no_effect("the largest factor, as without it"),
    }),
    by("fuse_adapters", &["fuse_adapters"], "each with its weight", |field| {
        let one = |adapter: &Value| {
            let path = adapter.get("path")?.as_str()?;
            Some(match adapter.get("weight").and_then(values::number) {
                Some(weight) => format!("{path}:{weight}"),
                None => path.to_owned(),
            })
        };
        let all: Option<Vec<String>> = field.value.as_array().and_then(|all| all.iter().map(one).collect());
        all.map_or_else(|| field.expected("tables with path and weight"), |all| taken("fuse_adapters", all))
    }),
];

static OPTIMIZER: &[Row] = &[
    by("type", &["optimizer"], "by its name", |field| optimisers::named(&field.text())),
    same("lr", "learning_rate", Kind::Number),
    nothing("gradient_release stabilize", "how steps are computed"),
];

static NUMBERS: &[Row] = optimisers::argument_rows!(|field: &Field<'_>| optimiser(&field.root));

static MONITORING: &[Row] =
    &[nothing("enable_wandb wandb_api_key wandb_tracker_name wandb_run_name wandb_group", "nothing is sent anywhere")];

static DIRECTORY: &[Row] = &[
    by(
        "path",
        &["train_data_dir", "caption_extension", "caption_lines"],
        "its pictures, and captions in .txt files with all their lines",
        |field| {
            translated(
                vec![
                    ("train_data_dir", field.text().into()),
                    ("caption_extension", ".txt".into()),
                    ("caption_lines", "all".into()),
                ],
                "with captions in .txt files, all their lines",
            )
        },
    ),
    same("num_repeats", "repeats", Kind::Count),
    by("mask_path", &["mask_dir", "masked_loss"], "masks of the same names", |field| {
        becomes("mask_dir", field.text(), "with masked_loss")
    }),
    by("resolutions", &["max_resolution"], "areas; several are datasets of their own", |field| {
        let side = |value: &Value| match value {
            // Width and height of an area.
            Value::Array(pair) => {
                Some(pair.iter().map(values::number).collect::<Option<Vec<_>>>()?.iter().product::<f64>().sqrt() as u64)
            }
            one => values::count(one),
        };
        let sides: Option<Vec<u64>> = field.value.as_array().and_then(|all| all.iter().map(side).collect());
        let eights = |side: u64| side / 8 * 8;
        match sides.as_deref() {
            Some(&[one]) => becomes("max_resolution", eights(one), "an area, in buckets"),
            Some(several) if !several.is_empty() => {
                let several: Vec<u64> = several.iter().copied().map(eights).collect();
                becomes("max_resolution", json!(several), "each is a dataset of its own")
            }
            _ => field.expected("a list of sides"),
        }
    }),
    by("enable_ar_bucket", &["enable_bucket", "max_bucket_reso"], "buckets by aspect", |field| {
        let sides = values::texts(&field.here.get("resolutions").unwrap_or_default()).unwrap_or_default();
        field.when_on(shared::buckets(sides.iter().filter_map(|side| side.parse().ok())))
    }),
    nothing("min_ar max_ar num_ar_buckets ar_buckets", "buckets follow sd-scripts' rule"),
    gone("size_buckets", OFF, "buckets follow sd-scripts' rule"),
    nothing("frame_buckets", "films are not trained on"),
    same("shuffle_tags", "shuffle_caption", Kind::Flag),
    by("cache_shuffle_num", &["shuffle_caption"], "tags are shuffled at each visit", |field| match field.count() {
        Some(0) => no_effect("off, as without it"),
        Some(_) => becomes("shuffle_caption", true, "drawn at each visit, not so many times"),
        None => field.expected("a whole number"),
    }),
    same("cache_shuffle_delimiter", "caption_separator", Kind::Text),
    same("caption_prefix", "caption_prefix", Kind::Text),
    nothing("skip_empty_caption", "pictures without captions are told of"),
    gone("control_path default_mask_file", OFF, "no pictures beside the captions"),
];

/// The linear layers of blocks of transformers.
const BLOCKS: &str = r"re:.*(layers|refiner|transformer_blocks)\.\d+\..*";

fn kind(root: &Scope<'_>) -> String {
    root.text("model.type").unwrap_or_default()
}

fn optimiser(root: &Scope<'_>) -> &'static str {
    optimisers::ours(&root.text("optimizer.type").unwrap_or_else(|| "adamw".to_owned()))
}

fn precision(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.text().as_str() {
        "bfloat16" => taken(ours, "bf16"),
        "float16" => taken(ours, "fp16"),
        "float32" => taken(ours, "fp32"),
        other => lost(format!("bfloat16, float16 or float32, not {other}")),
    }
}

fn thousandths(field: &Field<'_>, ours: &'static str) -> Outcome {
    match field.number() {
        Some(level) if (0.0..=1.0).contains(&level) => {
            becomes(ours, values::of_number(level * 1000.0), "in thousandths")
        }
        _ => field.expected("a number from 0 to 1"),
    }
}

/// SDXL's text encoders are trained with the optimiser's rate.
fn encoder_rate(field: &Field<'_>, ours: &'static str) -> Outcome {
    match (kind(&field.root).as_str(), &field.value, field.root.number("optimizer.lr")) {
        ("sdxl", Value::String(text), Some(rate)) if text == "lr" => {
            becomes(ours, values::of_number(rate), "optimizer.lr")
        }
        ("sdxl", ..) => field.number_as(ours),
        _ => no_effect("text encoders of this base are never trained here"),
    }
}

/// A folder of diffusers: the base, or what a transformer's file lacks.
fn diffusers(field: &Field<'_>) -> Outcome {
    let within = |name: &str| Value::from(format!("{}/{name}", field.text().trim_end_matches('/')));
    match (field.here.given("transformer_path"), kind(&field.root).as_str()) {
        (None, _) => taken("base_model", field.text()),
        (Some(_), "flux") => translated(
            vec![
                ("text_encoder", within("text_encoder")),
                ("text_encoder_2", within("text_encoder_2")),
                ("vae", within("vae")),
            ],
            "its text encoders and autoencoder",
        ),
        // Chroma's text encoder is FLUX.1's second.
        (Some(_), "chroma") => translated(
            vec![("text_encoder", within("text_encoder_2")), ("vae", within("vae"))],
            "FLUX.1's second text encoder and its autoencoder",
        ),
        (Some(_), _) => translated(
            vec![("text_encoder", within("text_encoder")), ("vae", within("vae"))],
            "its text encoder and autoencoder",
        ),
    }
}

/// The directories of the file that `dataset` names, each with what holds for all of them.
fn with_dataset(document: Document) -> Result<Document, Problem> {
    let Document { place, root, script } = document;
    let mut entries = root.entries().to_vec();
    let named = root.get("dataset").and_then(|node| values::text(&node.value()));
    let beside = |name: &str| Path::new(&place).parent().map(|folder| folder.join(name));
    let file = named
        .and_then(|name| [Some(name.clone().into()), beside(&name)].into_iter().flatten().find(|path| path.is_file()));
    if let Some(file) = file {
        let dataset = input::read(&Source::file(&file))?.root;
        let (directories, common): (Vec<&Entry>, Vec<&Entry>) =
            dataset.entries().iter().partition(|entry| entry.key == "directory");
        let mut all = Vec::new();
        for entry in directories {
            let Content::List(items) = &entry.node.content else { continue };
            for item in items {
                let own = item.entries();
                let outer = common.iter().filter(|outer| own.iter().all(|entry| entry.key != outer.key));
                all.push(Node::table(item.line, outer.copied().chain(own).cloned().collect()));
            }
        }
        entries.push(Entry {
            key: "directory".to_owned(),
            line: 0,
            node: Node { line: 0, content: Content::List(all) },
        });
    }
    Ok(Document { place, root: Node::table(1, entries), script })
}
