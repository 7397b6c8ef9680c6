//! Number types, the device, and what trades time for memory.

use std::path::PathBuf;

use lora_core::DType;
use lora_torch::frozen::Storage;

use super::{Given, Group, Key, Reads, Resumed, shown};

/// Number types by the names that trainers have for them.
pub(super) const PRECISIONS: &[(&str, DType)] =
    &[("fp32", DType::F32), ("fp16", DType::F16), ("bf16", DType::BF16), ("no", DType::F32), ("float", DType::F32)];

/// How frozen weights are stored; `None` as they compute.
const STORAGES: &[(&str, Option<Storage>)] = &[
    ("precision", None),
    ("fp16", Some(Storage::Half)),
    ("bf16", Some(Storage::BFloat16)),
    ("fp8", Some(Storage::Float8)),
    ("int8", Some(Storage::Int8)),
    ("nf4", Some(Storage::Nf4)),
];

/// The keys, in the order of the reference.
pub(super) static KEYS: Group = Group {
    section: "Precision and memory",
    behind: None,
    keys: &[
        Key {
            name: "precision",
            values: "fp32, bf16, fp16",
            default: "\"fp16\"",
            meaning: "Number type of the base and of activations; fp16 with dynamic loss scaling. On the CPU fp16 falls back to fp32.",
            memory: "fp16 and bf16 halve weights and activations.",
            resumed: Resumed::Fixed(|config| config.precision.to_string()),
            reads: Reads::Run(|given, config| config.precision = given.choice(PRECISIONS).unwrap_or(DType::F16)),
        },
        Key {
            name: "device",
            values: "auto, cpu, cuda, cuda:N",
            default: "\"auto\"",
            meaning: "Where to train.",
            memory: "",
            resumed: Resumed::Free(|config| config.device.clone()),
            reads: Reads::Run(|given, config| config.device = device(given)),
        },
        Key {
            name: "ddp_timeout",
            values: "1 … 86400",
            default: "1800",
            meaning: "Seconds that processes which train together wait for each other before they end: to begin, and while one of them makes samples or validates. One that ends is noticed at once.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.ddp_timeout = given.count_to(1, 86_400).unwrap_or(1800)),
        },
        Key {
            name: "base_storage",
            values: "precision, fp16, bf16, fp8, int8, nf4",
            default: "\"precision\"",
            meaning: "How the frozen weights of layers are stored; each is made whole for its layer alone. fp8 and int8 have one factor for each output, nf4 one for each 64 weights (QLoRA's, double quantisation). A language model's embedding and head are in int8 where layers are in fp8, int8 or nf4. What a GGUF file holds quantised stays as it is without this key.",
            memory: "fp8 and int8 take a byte a weight: half of fp16, a quarter of fp32. nf4 takes half of that.",
            resumed: Resumed::Fixed(|config| shown(&config.base_storage)),
            reads: Reads::Adapter(|given, config| config.base_storage = given.choice(STORAGES).unwrap_or_default()),
        },
        Key {
            name: "offload_base",
            values: "true/false",
            default: "false",
            meaning: "Keep the frozen weights of layers in host memory (pinned), in the form of `base_storage`, and copy each to the device while the layers before it compute; the result is the same. For bases larger than the device; on the CPU it saves nothing.",
            memory: "Of those weights only an eighth is on the device at a time (room for two of the largest at least, and for eight at most). Each crosses the bus in the forward and in the backward pass: where that takes longer than computing, steps take longer.",
            resumed: Resumed::Free(|config| shown(&config.offload_base)),
            reads: Reads::Adapter(|given, config| config.offload_base = given.boolean(false)),
        },
        Key {
            name: "gradient_checkpointing",
            values: "true/false",
            default: "false",
            meaning: "Compute the activations within blocks again in the backward pass instead of keeping them; the result is the same.",
            memory: "Large: only what lies between blocks is kept. Costs about a third more time.",
            resumed: Resumed::Free(|config| shown(&config.gradient_checkpointing)),
            reads: Reads::Run(|given, config| config.gradient_checkpointing = given.boolean(false)),
        },
        Key {
            name: "recompute_feed_forward",
            values: "true/false",
            default: "false",
            meaning: "Compute the wide inner part of the U-Net's feed-forwards again in the backward pass instead of keeping it; the result is the same. Alone it is the mild form of `gradient_checkpointing`; with it, it saves within the block that is at work.",
            memory: "About a third of the activations. Costs about a twentieth more time.",
            resumed: Resumed::Free(|config| shown(&config.recompute_feed_forward)),
            reads: Reads::Run(|given, config| config.recompute_feed_forward = given.boolean(false)),
        },
        Key {
            name: "cpu_offload_checkpointing",
            values: "true/false",
            default: "false",
            meaning: "With `gradient_checkpointing`: what blocks need to be computed again waits in host memory; the result is the same.",
            memory: "Saves what checkpointing leaves, more at high resolutions and large batches. Costs two copies over the bus a block.",
            resumed: Resumed::Free(|config| shown(&config.cpu_offload_checkpointing)),
            reads: Reads::Run(|given, config| {
                config.cpu_offload_checkpointing = given.boolean(false);
                if config.cpu_offload_checkpointing && !config.gradient_checkpointing {
                    given.problem("means nothing without gradient_checkpointing = true");
                }
            }),
        },
        Key {
            name: "cuda_graphs",
            values: "true/false",
            default: "true",
            meaning: "On a GPU: the kernels of a step are recorded once for each shape of micro-batch and launched together, so that the device does not wait for the host; the result is the same. Where a step cannot be recorded (dropout within the adapter, `offload_base`, `cpu_offload_checkpointing`) it runs without.",
            memory: "The memory of the recordings, as much as a step takes, stays theirs: with pictures of several shapes, or samples, what runs beside them comes on top, and where that does not fit the recordings make room. Off saves that, and the gradients of the adapter before the first backward pass.",
            resumed: Resumed::Free(|config| shown(&config.cuda_graphs)),
            reads: Reads::Run(|given, config| config.cuda_graphs = given.boolean(true)),
        },
        Key {
            name: "vram_budget",
            values: "\"8GiB\", \"7.5GiB\", \"8192MiB\"",
            default: "none",
            meaning: "Memory that the run may use. Before training it is planned (`lora plan`), and what makes it fit is applied at an equal effective batch: smaller micro-batches, `recompute_feed_forward`, `gradient_checkpointing`, `cache_latents`, half precision, `vae_tiling`, `base_storage`, 8-bit AdamW, `cpu_offload_checkpointing`, `offload_base`. On the CPU it is host memory.",
            memory: "The run keeps to it, or ends at once with the least that it needs. On a GPU libtorch's allocator is bound by it, less 0.4 GiB for the driver: what was not foreseen is met as on a card of that size.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.vram_budget = given.bytes()),
        },
        Key {
            name: "auto",
            values: "true/false",
            default: "false",
            meaning: "The budget is what is free on the device when the run begins, less 5%; `vram_budget` wins over it.",
            memory: "As `vram_budget`.",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.auto = given.boolean(false)),
        },
        Key {
            name: "cache_dir",
            values: "path",
            default: "none",
            meaning: "Keep encoded pictures and captions here for the next run. A changed picture, setting or base is encoded anew; runs may share it.",
            memory: "",
            resumed: Resumed::Unrecorded,
            reads: Reads::Run(|given, config| config.cache_dir = given.text().map(PathBuf::from)),
        },
    ],
};

/// What a plan may do to pictures.
pub(super) static PICTURES: Group = Group {
    section: "Precision and memory",
    behind: Some("auto"),
    keys: &[Key {
        name: "allow_lower_resolution",
        values: "true/false",
        default: "false",
        meaning: "A plan may lower `max_resolution` by one or two eighths (512 to 448 or 384).",
        memory: "Activations shrink with the area.",
        resumed: Resumed::Unrecorded,
        reads: Reads::Run(|given, config| config.allow_lower_resolution = given.boolean(false)),
    }],
};

fn device(given: &mut Given<'_>) -> String {
    let device = given.text().unwrap_or_else(|| "auto".into());
    let number = device.strip_prefix("cuda:").map(|number| number.parse::<usize>().is_ok());
    if !matches!(device.as_str(), "auto" | "cpu" | "cuda") && number != Some(true) {
        given.problem(format!("expected auto, cpu, cuda or cuda:N, found `{device}`"));
    }
    device
}
