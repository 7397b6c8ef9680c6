//! Every configuration key as data: the reference in `docs/config.md`, the advice on unknown keys and the check that
//! nothing is left out are all made from this table.

/// One key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What values it takes.
    pub values: &'static str,
    /// Its default, `required` where there is none.
    pub default: &'static str,
    /// What it does.
    pub meaning: &'static str,
    /// What it does to video memory; empty where nothing.
    pub memory: &'static str,
}

const fn key(
    name: &'static str,
    values: &'static str,
    default: &'static str,
    meaning: &'static str,
    memory: &'static str,
) -> Key {
    Key { name, values, default, meaning, memory }
}

/// What changing captions cost.
const KEPT_ENCODER: &str = "Keeps the text encoder on the device (0.25 GB in fp16) even where it does not train.";

/// All keys, grouped as in the reference.
pub const KEYS: &[(&str, &[Key])] = &[
    (
        "What to train on",
        &[
            key(
                "base_model",
                "path",
                "required",
                "Stable Diffusion 1.x checkpoint: one `.safetensors` file in the original layout, or a diffusers folder.",
                "",
            ),
            key(
                "train_data_dir",
                "path",
                "required",
                "Folder of pictures with captions (`.txt`, `.caption`, `metadata.csv` or `metadata.jsonl`), of `N_name` folders or of any folders; a `.tar` in WebDataset's form; a `.parquet`. Not needed with `datasets` or `dataset_config`.",
                "",
            ),
            key(
                "datasets",
                "list of tables",
                "none",
                "Several datasets, each with its own `train_data_dir` and whatever else differs from the keys outside: repeats, resolution, buckets, batch size, captions, processors, masks, `is_reg`.",
                "",
            ),
            key(
                "dataset_config",
                "path",
                "none",
                "A dataset file of sd-scripts (`[general]`, `[[datasets]]`, `[[datasets.subsets]]`), as it is.",
                "",
            ),
            key(
                "reg_data_dir",
                "path",
                "none",
                "Folder of regularisation pictures, which keep what the model knows of the class; as many visits as the others have.",
                "",
            ),
            key("is_reg", "true/false", "false", "In `datasets`: these are regularisation pictures.", ""),
            key("prior_loss_weight", "0 …", "1", "How much regularisation pictures count in the loss.", ""),
            key("loss_weight", "0 …", "1", "How much a dataset's pictures count in the loss.", ""),
            key("recursive", "true/false", "false", "Read folders below one that has pictures of its own too.", ""),
            key(
                "caption_extension",
                "extension",
                ".txt, then .caption",
                "Extension of caption files, where it is another.",
                "",
            ),
            key("class_tokens", "text", "the `name` of an `N_name` folder", "Caption of pictures that have none.", ""),
            key(
                "metadata_file",
                "path",
                "none",
                "Metadata of sd-scripts (JSON by path, or JSON lines); its pictures are trained on, relative ones in `train_data_dir`.",
                "",
            ),
            key(
                "output_dir",
                "path",
                "required",
                "Folder for the LoRA, samples, loss curve and metrics; made if it is not there.",
                "",
            ),
            key(
                "output_name",
                "text",
                "\"lora\"",
                "File name of the LoRA without its extension; the WebUI shows it.",
                "",
            ),
            key(
                "init_from",
                "path",
                "none",
                "A LoRA of this layout to go on from, with the same rank and targets.",
                "",
            ),
            key(
                "strict",
                "true/false",
                "false",
                "Unreadable pictures end the run instead of being skipped with a count.",
                "",
            ),
        ],
    ),
    (
        "Adapter",
        &[
            key(
                "train",
                "lora, full",
                "\"lora\"",
                "`lora` trains an adapter; `full` trains all weights of the networks and writes a whole checkpoint (one file in the original layout), where the other keys of this group mean nothing but `train_unet`, `train_text_encoder` and `save_precision`.",
                "`full` holds 16 bytes for each weight: value, gradient and two averages in fp32.",
            ),
            key(
                "lora_rank",
                "1 …",
                "16",
                "Rank of the update.",
                "Small: SD 1.5 with all default targets holds 9.4 MB of weights, gradients and optimiser state per unit of rank.",
            ),
            key("lora_alpha", "above 0", "lora_rank", "The update is scaled by alpha / rank.", ""),
            key(
                "use_rslora",
                "true/false",
                "false",
                "Scale by alpha / √rank instead (rsLoRA); the file holds alpha · √rank, so that every tool applies the same.",
                "",
            ),
            key(
                "rank_pattern",
                "table",
                "{}",
                "Other ranks for some layers, by layer name, glob or `re:` expression; of several that match, the longest counts.",
                "As lora_rank.",
            ),
            key("alpha_pattern", "table", "{}", "Other alphas for some layers, in the same way.", ""),
            key("lora_dropout", "0 … below 1", "0", "Dropout between the two factors.", "A mask per module."),
            key("rank_dropout", "0 … below 1", "0", "Dropout of whole ranks.", ""),
            key("module_dropout", "0 … below 1", "0", "Dropout of whole modules.", ""),
            key(
                "variant",
                "name",
                "\"lora\"",
                "Adapter variant: `lora`, `dora`, `pissa`, `pissa-fast`, `olora`, `loha`, `lokr`, `oft`, `boft`, `ia3`, `vera`, `glora`, `full`, the other tools' conventions of them (`lycoris-dora`, `lycoris-dora-loha`, `lycoris-dora-lokr`, `peft-oft`, `peft-oft-neumann`, `peft-boft`, `lycoris-ia3`, `peft-glora`), or one that your program registers.",
                "All but `lora`, `dora`, `pissa`, `olora`, `vera`, `ia3` and `lokr` on linear layers form the whole update of a layer.",
            ),
            key(
                "variant_options",
                "table",
                "{}",
                "The variant's own numbers and switches, such as `factor` of `lokr` or `tucker` of `loha`.",
                "",
            ),
            key(
                "target_modules",
                "preset, name or list",
                "\"attention-mlp\"",
                "Layers to adapt: `attention`, `attention-mlp` (what sd-scripts adapts), `all-conv`, layer names (`q_proj` means the U-Net's `to_q` too), globs, or `re:` expressions.",
                "More layers, more of the above, and more activations kept.",
            ),
            key("train_unet", "true/false", "true", "Adapt the U-Net.", ""),
            key(
                "train_text_encoder",
                "true/false",
                "true",
                "Adapt the text encoder.",
                "Off saves its activations, and its weights once captions are encoded.",
            ),
            key(
                "save_precision",
                "fp32, fp16, bf16",
                "\"fp16\"",
                "Number type of the written LoRA. Trained weights are always kept in fp32.",
                "",
            ),
        ],
    ),
    (
        "Optimisation",
        &[
            key("learning_rate", "above 0", "1e-4; lion 3e-5, prodigy 1", "Learning rate.", ""),
            key("unet_lr", "0 …", "learning_rate", "Learning rate of the U-Net's adapter.", ""),
            key(
                "text_encoder_lr",
                "0 …",
                "half of learning_rate",
                "Learning rate of the text encoder's adapter, which overfits sooner.",
                "",
            ),
            key(
                "optimizer",
                "adamw, adamw8bit, adafactor, lion, prodigy, adamw_schedulefree, or one that your program registers",
                "\"adamw\"",
                "Optimiser; what each is for and what it takes: docs/optimisers.md.",
                "Bytes per trained number: adamw and adamw_schedulefree 8, adamw8bit 2, lion 4, adafactor near 0, prodigy 12 to 16.",
            ),
            key(
                "optimizer_args",
                "table of numbers by name, or list of texts \"name=value\"",
                "the optimiser's own",
                "Numbers of the optimiser, named as elsewhere: `{ d_coef = 2.0, weight_decay = 0.01 }`.",
                "",
            ),
            key(
                "adam_betas",
                "two numbers",
                "the optimiser's own; adamw: [0.9, 0.999]",
                "Short for `betas` of `optimizer_args`: averaging of gradients and their squares.",
                "",
            ),
            key("adam_eps", "above 0", "the optimiser's own; adamw: 1e-8", "Short for `eps` of `optimizer_args`.", ""),
            key(
                "loraplus_lr_ratio",
                "above 0",
                "1",
                "Learning rate of the up-projections relative to the rest (LoRA+; 16 is usual).",
                "",
            ),
            key(
                "weight_decay",
                "0 …",
                "the optimiser's own; adamw: 0.01",
                "Short for `weight_decay` of `optimizer_args`: decoupled weight decay.",
                "",
            ),
            key(
                "lr_scheduler",
                "constant, constant_with_warmup, linear, cosine",
                "\"constant\"",
                "How the learning rate goes over the run; every one begins with the warm-up, if there is one.",
                "",
            ),
            key(
                "lr_warmup_steps",
                "steps, or a share below 1",
                "0",
                "Steps over which the learning rate rises from 0.",
                "",
            ),
            key(
                "ema_decay",
                "0 … below 1",
                "0",
                "Decay of a running average of the trained numbers, which is then what is saved and drawn; 0 for none. 0.999 is usual.",
                "4 bytes per trained number.",
            ),
            key("max_grad_norm", "0 …", "1.0", "Limit of the gradient's norm; 0 for none.", ""),
            key("batch_size", "1 …", "1", "Pictures at once.", "The largest lever: activations grow with it."),
            key(
                "gradient_accumulation_steps",
                "1 …",
                "1",
                "Micro-batches for one step; with batch_size 1 and 8 of these the update is that of batch_size 8.",
                "None: this is how to have a large batch on a small card.",
            ),
            key("epochs", "1 …", "10", "Times through all pictures; not together with max_train_steps.", ""),
            key("max_train_steps", "1 …", "by epochs", "Optimiser steps.", ""),
            key("repeats", "1 …", "1", "Visits of each picture in an epoch.", ""),
            key("seed", "0 …", "42", "All randomness follows from it.", ""),
        ],
    ),
    (
        "Pictures and captions",
        &[
            key(
                "max_resolution",
                "\"W,H\" or a side",
                "\"512,512\"",
                "Size that pictures are scaled and cut to; multiples of 8 (64 is best).",
                "Activations grow with the area, attention's work with its square.",
            ),
            key(
                "enable_bucket",
                "true/false",
                "false",
                "Pictures keep their aspect: each goes to the bucket nearest to it, none larger in area than `max_resolution`; by sd-scripts' rule.",
                "",
            ),
            key("min_bucket_reso", "pixels", "256", "Shortest side of a bucket.", ""),
            key("max_bucket_reso", "pixels", "1024", "Longest side of a bucket.", ""),
            key("bucket_reso_steps", "multiple of 8", "64", "Sides of buckets are multiples of this.", ""),
            key(
                "bucket_no_upscale",
                "true/false",
                "false",
                "Small pictures are not enlarged; their bucket is their own size.",
                "",
            ),
            key(
                "masked_loss",
                "true/false",
                "false",
                "Weight the loss by masks: `name-mask.png` or `name-masklabel.png` beside the picture, white counts, black does not.",
                "",
            ),
            key("mask_dir", "path", "none", "Folder of masks, each of its picture's name.", ""),
            key(
                "alpha_mask",
                "true/false",
                "false",
                "The picture's transparency is its mask where it has no other.",
                "",
            ),
            key("invert_mask", "true/false", "false", "Black counts, white does not.", ""),
            key("unmasked_weight", "0 … 1", "0", "The least that any part of a picture counts.", ""),
            key("background", "white, black, \"#rrggbb\"", "\"white\"", "What lies behind transparent pictures.", ""),
            key(
                "processors",
                "list of names",
                "[\"center_crop\"]",
                "What pictures go through before training, in order: one of `center_crop`, `top_left_crop`, `random_crop`, `focus_crop` (the most salient part), `no_crop` (squashed to size), and `flip`, `color_jitter`, or what your program registers.",
                "",
            ),
            key("clip_skip", "1 …", "1", "2 leaves out the text encoder's last layer, as bases trained so expect.", ""),
            key(
                "max_token_length",
                "75, 150, 225",
                "75",
                "Tokens of a caption; what is longer is cut.",
                "Longer captions, longer cross-attention.",
            ),
            key(
                "text_cleaning",
                "ftfy, none",
                "\"ftfy\"",
                "How captions are cleaned before they are split into tokens: as CLIP and sd-scripts do, or as transformers 5 does. They differ on full-width punctuation, curly quotes and entities.",
                "",
            ),
            key(
                "trigger_word",
                "text",
                "none",
                "Put in front of captions that do not have it, as a tag that stays there.",
                "",
            ),
            key("caption_prefix", "text", "none", "Put before each caption, with a blank.", ""),
            key("caption_suffix", "text", "none", "Put after each caption, with a blank.", ""),
            key("caption_dropout_rate", "0 … 1", "0", "Share of visits without their caption.", ""),
            key("caption_dropout_every_n_epochs", "0 …", "0", "All captions are left out every so many epochs.", ""),
            key("shuffle_caption", "true/false", "false", "Tags come in another order at each visit.", KEPT_ENCODER),
            key(
                "caption_tag_dropout_rate",
                "0 … 1",
                "0",
                "Probability that a tag is left out at a visit.",
                KEPT_ENCODER,
            ),
            key("keep_tokens", "0 …", "0", "Tags at the front that are neither shuffled nor left out.", ""),
            key(
                "keep_tokens_separator",
                "text",
                "none",
                "Divides kept tags from the others in a caption (`\\|\\|\\|`); a second one begins a kept end.",
                "",
            ),
            key("caption_separator", "text", "\",\"", "Divides tags.", ""),
            key("secondary_separator", "text", "none", "Divides tags that move and drop together (`;;;`).", ""),
            key(
                "enable_wildcard",
                "true/false",
                "false",
                "Of a caption's lines one is chosen, of `{a\\|b}` one part; otherwise the first line counts.",
                KEPT_ENCODER,
            ),
            key(
                "weighted_captions",
                "true/false",
                "false",
                "`(word:1.2)`, `(word)` and `[word]` in captions and sample prompts weigh words as in the WebUI.",
                "",
            ),
            key(
                "noise_offset",
                "0 …",
                "0",
                "Adds a constant per channel to the noise, for darker darks and lighter lights (0.05 to 0.1).",
                "",
            ),
            key("min_snr_gamma", "above 0", "none", "Weights the loss by min(SNR, γ)/SNR; 5 in the paper.", ""),
        ],
    ),
    (
        "Precision and memory",
        &[
            key(
                "precision",
                "fp32, bf16, fp16",
                "\"fp16\"",
                "Number type of the base and of activations; fp16 with dynamic loss scaling. On the CPU fp16 falls back to fp32.",
                "fp16 and bf16 halve weights and activations.",
            ),
            key("device", "auto, cpu, cuda, cuda:N", "\"auto\"", "Where to train.", ""),
            key(
                "base_storage",
                "precision, fp16, bf16, fp8, int8, nf4",
                "\"precision\"",
                "How the frozen weights of the U-Net and the text encoder are stored; each is made whole for its layer alone. fp8 and int8 have one factor for each output, nf4 one for each 64 weights (QLoRA's, double quantisation).",
                "fp8 and int8 take a byte a weight: half of fp16, a quarter of fp32. nf4 takes half of that.",
            ),
            key(
                "offload_base",
                "true/false",
                "false",
                "Keep the frozen weights of layers in host memory (pinned), in the form of `base_storage`, and copy each to the device while the layers before it compute; the result is the same. For bases larger than the device; on the CPU it saves nothing.",
                "Of those weights only an eighth is on the device at a time (and room for the two largest). Each crosses the bus in the forward and in the backward pass: where that takes longer than computing, steps take longer.",
            ),
            key(
                "gradient_checkpointing",
                "true/false",
                "false",
                "Compute the activations within blocks again in the backward pass instead of keeping them; the result is the same.",
                "Large: only what lies between blocks is kept. Costs about a third more time.",
            ),
            key(
                "recompute_feed_forward",
                "true/false",
                "false",
                "Compute the wide inner part of the U-Net's feed-forwards again in the backward pass instead of keeping it; the result is the same. Alone it is the mild form of `gradient_checkpointing`; with it, it saves within the block that is at work.",
                "About a third of the activations. Costs about a twentieth more time.",
            ),
            key(
                "cpu_offload_checkpointing",
                "true/false",
                "false",
                "With `gradient_checkpointing`: what blocks need to be computed again waits in host memory; the result is the same.",
                "Saves what checkpointing leaves, more at high resolutions and large batches. Costs two copies over the bus a block.",
            ),
            key(
                "cuda_graphs",
                "true/false",
                "true",
                "On a GPU: the kernels of a step are recorded once for each shape of micro-batch and launched together, so that the device does not wait for the host; the result is the same. Where a step cannot be recorded (dropout within the adapter, `offload_base`, `cpu_offload_checkpointing`) it runs without.",
                "The memory of the recordings, as much as a step takes, stays theirs: with pictures of several shapes, or samples, what runs beside them comes on top, and where that does not fit the recordings make room. Off saves that, and the gradients of the adapter before the first backward pass.",
            ),
            key(
                "cache_latents",
                "true/false",
                "true",
                "Encode all pictures once, before the first step; then the autoencoder leaves the device.",
                "On saves the autoencoder's weights and its encoding of each step.",
            ),
            key(
                "vae_tiling",
                "true/false",
                "false",
                "Take pictures of more than 256 pixels a side (of SD 1.x) through the autoencoder in overlapping tiles that fade into each other, when they are encoded and when samples are drawn. The autoencoder's norms see a tile instead of the picture, so that latents and samples differ a little.",
                "What drawing samples and encoding need beside weights falls to a fifth at 512 pixels, less at larger sizes. Costs two thirds more time in the autoencoder.",
            ),
            key(
                "vram_budget",
                "\"8GiB\", \"7.5GiB\", \"8192MiB\"",
                "none",
                "Memory that the run may use. Before training it is planned (`lora plan`), and what makes it fit is applied at an equal effective batch: smaller micro-batches, `recompute_feed_forward`, `gradient_checkpointing`, `cache_latents`, half precision, `vae_tiling`, `base_storage`, 8-bit AdamW, `cpu_offload_checkpointing`, `offload_base`. On the CPU it is host memory.",
                "The run keeps to it, or ends at once with the least that it needs. On a GPU libtorch's allocator is bound by it, less 0.4 GiB for the driver: what was not foreseen is met as on a card of that size.",
            ),
            key(
                "auto",
                "true/false",
                "false",
                "The budget is what is free on the device when the run begins, less 5%; `vram_budget` wins over it.",
                "As `vram_budget`.",
            ),
            key(
                "allow_lower_resolution",
                "true/false",
                "false",
                "A plan may lower `max_resolution` by one or two eighths (512 to 448 or 384).",
                "Activations shrink with the area.",
            ),
            key(
                "cache_dir",
                "path",
                "none",
                "Keep encoded pictures and captions here for the next run. A changed picture, setting or base is encoded anew; runs may share it.",
                "",
            ),
        ],
    ),
    (
        "Saving and looking",
        &[
            key("save_every_n_steps", "1 …", "none", "Also save the LoRA every so many steps.", ""),
            key("save_every_n_epochs", "1 …", "none", "Also save the LoRA every so many epochs.", ""),
            key(
                "validation_data_dir",
                "path",
                "none",
                "Pictures that are not trained on: their loss, with the same noise at each look, is told before and after training and written to `validation.jsonl`.",
                "The autoencoder again, for a moment.",
            ),
            key("validate_every_n_steps", "1 …", "none", "Also tell it every so many steps.", ""),
            key(
                "save_state_every_n_steps",
                "1 …",
                "none",
                "Write the whole state of the run every so many steps, in the place of the one before: `<output_name>-state.safetensors`. Whatever happens, no more than the steps since then are lost.",
                "",
            ),
            key(
                "save_state",
                "true/false",
                "true with save_state_every_n_steps",
                "Write the state when the run ends, is interrupted or fails. It holds 12 bytes for each trained number.",
                "",
            ),
            key(
                "resume",
                "true, false, auto, path",
                "false",
                "Go on from a state, exactly as if the run had never stopped: `true` from this `output_dir`'s, `auto` where there is one, or from a file or folder. The run may be made longer; what would make it another run is refused.",
                "",
            ),
            key(
                "sample_prompts",
                "list of texts",
                "[]",
                "Prompts drawn before, during and after training, into one grid.",
                "Drawing needs the autoencoder again, for a moment.",
            ),
            key("sample_negative_prompt", "text", "\"\"", "Negative prompt of the samples.", ""),
            key("sample_every_n_steps", "1 …", "none", "Also draw samples every so many steps.", ""),
            key("sample_steps", "1 … 1000", "20", "Steps of the sampler.", ""),
            key("sample_guidance_scale", "1 …", "7.5", "Classifier-free guidance.", ""),
            key("sample_sampler", "euler, ddim", "\"euler\"", "Sampler.", ""),
            key("sample_seed", "0 …", "seed", "Seed of the samples' noise: the same in every row of the grid.", ""),
            key("sample_resolution", "\"W,H\" or a side", "max_resolution", "Size of the samples.", ""),
            key("callbacks", "list of names", "[]", "Callbacks that your program registers.", ""),
        ],
    ),
];

/// Keys of other trainers, and what they are called here.
pub(super) const FOREIGN: &[(&str, &str)] = &[
    ("network_dim", "lora_rank"),
    ("network_alpha", "lora_alpha"),
    ("network_dropout", "lora_dropout"),
    ("algo", "variant"),
    ("network_algo", "variant"),
    ("network_weights", "init_from"),
    ("r", "lora_rank"),
    ("rank", "lora_rank"),
    ("alpha", "lora_alpha"),
    ("pretrained_model_name_or_path", "base_model"),
    ("model_name_or_path", "base_model"),
    ("instance_data_dir", "train_data_dir"),
    ("image_dir", "train_data_dir"),
    ("class_data_dir", "reg_data_dir"),
    ("in_json", "metadata_file"),
    ("flip_aug", "processors"),
    ("color_aug", "processors"),
    ("random_crop", "processors"),
    ("mask_path", "mask_dir"),
    ("conditioning_data_dir", "mask_dir"),
    ("data_dir", "train_data_dir"),
    ("train_batch_size", "batch_size"),
    ("per_device_train_batch_size", "batch_size"),
    ("resolution", "max_resolution"),
    ("mixed_precision", "precision"),
    ("max_train_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("num_epochs", "epochs"),
    ("num_repeats", "repeats"),
    ("lr", "learning_rate"),
    ("optimizer_type", "optimizer"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("warmup_steps", "lr_warmup_steps"),
    ("adam_beta1", "adam_betas"),
    ("adam_beta2", "adam_betas"),
    ("adam_epsilon", "adam_eps"),
    ("adam_weight_decay", "weight_decay"),
    ("max_steps", "max_train_steps"),
    ("snr_gamma", "min_snr_gamma"),
    ("network_train_unet_only", "train_text_encoder"),
    ("network_train_text_encoder_only", "train_unet"),
    ("validation_prompt", "sample_prompts"),
    ("checkpointing_steps", "save_every_n_steps"),
    ("resume_from_checkpoint", "resume"),
    ("save_state_on_train_end", "save_state"),
    ("save_n_steps", "save_every_n_steps"),
];

/// Names of all keys.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    KEYS.iter().flat_map(|(_, keys)| keys.iter().map(|key| key.name))
}

/// The reference as Markdown.
pub fn reference() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         One file in TOML or YAML, with the same flat keys. Paths are relative to the current directory. Any key can be\n\
         set from the command line: `lora train config.toml --set lora_rank=8`. An unknown key is an error that names the\n\
         nearest one, and every value is checked before a model is loaded.\n\n\
         This page is made from the program's own table of keys.\n",
    );
    for (group, keys) in KEYS {
        text.push_str(&format!(
            "\n## {group}\n\n| key | values | default | what it does | video memory |\n|---|---|---|---|---|\n"
        ));
        for Key { name, values, default, meaning, memory } in *keys {
            text.push_str(&format!(
                "| `{name}` | {values} | {} | {meaning} | {memory} |\n",
                default.replace('|', "\\|")
            ));
        }
    }
    text
}
