//! Kernels of the device without memory against the CPU's, on random shapes: outputs of the same shape, order and type,
//! and the same peak of memory, to the 64 bytes of numbers that libtorch wraps into tensors. A kernel that
//! `cpp/dry/kernels.cpp` has and nothing here runs fails a test.

#![cfg(not(target_os = "macos"))]

use std::sync::{Mutex, PoisonError};

use lora_core::LayerGeometry;
use lora_core::blocks::BlockKind;
use lora_core::random::Stream;
use lora_torch::activation::{Gate, gated, geglu, swiglu};
use lora_torch::cross_entropy::CrossEntropy;
use lora_torch::dry::{DryRun, Platform};
use lora_torch::frozen::{FrozenWeight, Storage};
use lora_torch::gradients::{AdamW, settle};
use lora_torch::memory::{count_host_allocations, host_allocations, reset_host_peak};
use lora_torch::norm::{RmsWeight, group_norm_silu, rms_norm};
use lora_torch::rotary::{RotaryLayout, rotary};
use lora_torch::tch::{self, Device, Kind, Reduction, Tensor};

/// Counting is the process's: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Bytes that a peak may be off by: numbers that libtorch wraps into tensors for the time of an operation.
const WRAPPED: u64 = 64;
/// The same with attention on the CPU, whose threads take a buffer of a row each, not all at one time.
const THREADS: u64 = 8 << 10;
/// The same with convolutions, whose workspaces are known to the byte at the sizes of networks only.
const CONVOLUTION: u64 = 256 << 10;
/// The same with products in bf16, for which oneDNN takes buffers by the CPU's instructions.
const HALF_PRODUCT: u64 = 512 << 10;
/// The same with those of a head of 50,000 words, where the buffers of AMX take 0.6 % of all with several threads.
const HALF_HEAD: u64 = 2 << 20;

/// What work came to.
#[derive(Debug)]
struct Measured {
    /// Shape, strides and type of each output.
    outputs: Vec<(Vec<i64>, Vec<i64>, Kind)>,
    /// The most that was held beside the inputs.
    peak: u64,
}

type Work<'a> = &'a dyn Fn(&[Tensor]) -> Vec<Tensor>;

/// Shapes and types; whole numbers are zeros, others random where there are numbers.
type Inputs = Vec<(Vec<i64>, Kind)>;

fn inputs_on(inputs: &Inputs, device: Device) -> Vec<Tensor> {
    let make = |(shape, kind): &(Vec<i64>, Kind)| match kind {
        Kind::Int64 | Kind::Bool | Kind::Uint8 => Tensor::zeros(&**shape, (*kind, device)),
        _ if device == Device::Cpu => Tensor::randn(&**shape, (Kind::Float, device)).to_kind(*kind),
        _ => Tensor::zeros(&**shape, (*kind, device)),
    };
    inputs.iter().map(make).collect()
}

fn measured(inputs: &[Tensor], work: Work<'_>, before: impl Fn() -> u64, peak: impl Fn() -> u64) -> Measured {
    let held = before();
    let outputs = work(inputs);
    let peak = peak() - held;
    let of = |output: &Tensor| (output.size(), output.stride(), output.kind());
    Measured { outputs: outputs.iter().map(of).collect(), peak }
}

fn on_cpu(inputs: &Inputs, work: Work<'_>) -> Measured {
    let inputs = inputs_on(inputs, Device::Cpu);
    let before = || {
        reset_host_peak();
        host_allocations().unwrap().live
    };
    measured(&inputs, work, before, || host_allocations().unwrap().peak)
}

fn dry(inputs: &Inputs, work: Work<'_>) -> Measured {
    let run = DryRun::begin(Platform::cpu()).unwrap();
    let inputs = inputs_on(inputs, run.device());
    let before = || {
        run.reset_peak();
        run.live()
    };
    measured(&inputs, work, before, || run.peak().total())
}

/// Holds one piece of work on both devices against each other.
fn hold(name: &str, inputs: Inputs, allowed: u64, work: Work<'_>) {
    // What the process keeps from the first use on is no part of it.
    on_cpu(&inputs, work);
    let (own, expected) = (dry(&inputs, work), on_cpu(&inputs, work));
    assert_eq!(own.outputs, expected.outputs, "{name} of {inputs:?}");
    assert!(
        own.peak.abs_diff(expected.peak) <= allowed,
        "{name} of {inputs:?}: {} foreseen, {} counted",
        own.peak,
        expected.peak
    );
}

/// Output and gradients of those inputs that are of floats, of `work` on them.
fn with_gradients(inputs: &[Tensor], work: impl Fn(&[Tensor]) -> Tensor) -> Vec<Tensor> {
    let floats = |tensor: &Tensor| matches!(tensor.kind(), Kind::Float | Kind::BFloat16);
    let leaves: Vec<Tensor> = inputs.iter().map(|own| own.detach().set_requires_grad(floats(own))).collect();
    let output = work(&leaves);
    let wanted: Vec<&Tensor> = leaves.iter().filter(|leaf| leaf.requires_grad()).collect();
    // A gradient with numbers of its own, as a network's is: that of the sum is one number, expanded.
    let loss = (&output * output.ones_like()).sum(Kind::Float);
    let mut all = Tensor::run_backward(&[&loss], &wanted, false, false);
    all.push(output.detach());
    all
}

struct Shapes(Stream);

impl Shapes {
    /// A number of a range.
    fn from(&mut self, least: i64, most: i64) -> i64 {
        least + self.0.below((most - least + 1) as u64) as i64
    }

    /// One of several.
    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.from(0, all.len() as i64 - 1) as usize]
    }
}

fn begin(key: u64) -> (impl Drop, Shapes) {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    count_host_allocations().unwrap();
    (turn, Shapes(Stream::new(key)))
}

fn of_products(kind: Kind) -> u64 {
    if kind == Kind::Float { WRAPPED } else { HALF_PRODUCT }
}

fn of_heads(kind: Kind) -> u64 {
    if kind == Kind::Float { WRAPPED } else { HALF_HEAD }
}

fn of_attention(kind: Kind) -> u64 {
    of_products(kind).max(THREADS)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Kernels of `cpp/dry/kernels.cpp` that stand for CUDA's alone: there is nothing on the CPU to hold them against.
const CUDA_ALONE: [&str; 6] = [
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward",
    "native_dropout",
    "native_dropout_backward",
];

/// Kernels that tests below run, by the test.
const RUN: [(&str, &[&str]); 6] = [
    ("convolutions", &["convolution", "convolution_backward"]),
    (
        "normalisations",
        &[
            "native_group_norm",
            "native_group_norm_backward",
            "native_layer_norm",
            "native_layer_norm_backward",
            "group_norm",
        ],
    ),
    ("look_ups", &["index_select", "triu_indices", "embedding_dense_backward", "bucketize.Tensor"]),
    (
        "attention",
        &[
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "scaled_dot_product_attention",
            "dropout",
        ],
    ),
    (
        "reductions_losses_and_steps",
        &[
            "sum.dim_IntList",
            "mean.dim",
            "mse_loss_backward",
            "_fused_adamw_",
            "_amp_foreach_non_finite_check_and_unscale_",
            "_local_scalar_dense",
            "max",
            "min",
        ],
    ),
    (
        "elements",
        &[
            "copy_",
            "resize_",
            "where.self",
            "abs.out",
            "logical_not.out",
            "isnan",
            "relu",
            // Reached by solving; it makes nothing.
            "_linalg_check_errors",
        ],
    ),
];

#[test]
fn no_kernel_is_left_out() {
    let text = include_str!("../cpp/dry/kernels.cpp");
    let names: Vec<&str> = text.split("m.impl(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(names.len() > 30, "{names:?}");
    let run = |name: &str| RUN.iter().any(|(_, kernels)| kernels.contains(&name)) || CUDA_ALONE.contains(&name);
    let left_out: Vec<&&str> = names.iter().filter(|name| !run(name)).collect();
    assert!(left_out.is_empty(), "{left_out:?} are run by no test");
}

#[test]
fn convolutions() {
    let (_turn, mut shapes) = begin(1);
    // One thread has kernels of its own.
    let threads = tch::get_num_threads();
    for turn in 0..24 {
        tch::set_num_threads(if turn < 12 { threads } else { 1 });
        let (kernel, stride) = shapes.one_of(&[(1, 1), (3, 1), (3, 2)]);
        let (channels, outputs) = (shapes.from(1, 5) * 16, shapes.from(1, 5) * 16);
        let side = shapes.from(2, 8) * 4;
        let shape = vec![shapes.from(1, 3), channels, side, shapes.from(2, 8) * 4];
        let inputs = vec![(shape, Kind::Float), (vec![outputs, channels, kernel, kernel], Kind::Float)];
        hold("convolution", inputs, CONVOLUTION, &|inputs| {
            let padding = [(kernel == 3) as i64; 2];
            with_gradients(inputs, |own| own[0].conv2d(&own[1], None::<&Tensor>, [stride; 2], padding, [1; 2], 1))
        });
    }
    tch::set_num_threads(threads);
}

#[test]
fn normalisations() {
    let (_turn, mut shapes) = begin(2);
    for kind in KINDS {
        for _ in 0..4 {
            let channels = 8 * shapes.from(1, 6);
            let image = vec![shapes.from(1, 3), channels, shapes.from(2, 9), shapes.from(2, 9)];
            let inputs = vec![(image, kind), (vec![channels], kind), (vec![channels], kind)];
            hold("group norm", inputs.clone(), WRAPPED, &|inputs| {
                with_gradients(inputs, |own| own[0].group_norm(4, Some(&own[1]), Some(&own[2]), 1e-5, true))
            });
            hold("group norm and SiLU", inputs, WRAPPED, &|inputs| {
                with_gradients(inputs, |own| group_norm_silu(&own[0], 4, &own[1], &own[2], 1e-5).unwrap())
            });
            let width = shapes.from(1, 200);
            let rows = vec![shapes.from(1, 4), shapes.from(1, 30), width];
            let inputs = vec![(rows, kind), (vec![width], kind), (vec![width], kind)];
            hold("layer norm", inputs.clone(), WRAPPED, &|inputs| {
                with_gradients(inputs, |own| own[0].layer_norm([width], Some(&own[1]), Some(&own[2]), 1e-5, true))
            });
            for way in [RmsWeight::Rounded, RmsWeight::Single, RmsWeight::OnePlus] {
                hold("RMS norm", inputs[..2].to_vec(), WRAPPED, &|inputs| {
                    with_gradients(inputs, |own| rms_norm(&own[0], Some(&own[1]), 1e-5, way).unwrap())
                });
                hold("RMS norm without a weight", inputs[..1].to_vec(), WRAPPED, &|inputs| {
                    with_gradients(inputs, |own| rms_norm(&own[0], None, 1e-5, way).unwrap())
                });
            }
        }
    }
}

#[test]
fn look_ups() {
    let (_turn, mut shapes) = begin(3);
    for kind in KINDS {
        for _ in 0..4 {
            let (words, width) = (shapes.from(2, 300), shapes.from(1, 90));
            let table = (vec![words, width], kind);
            let count = shapes.from(1, 40);
            hold("index_select", vec![table.clone(), (vec![count], Kind::Int64)], WRAPPED, &|inputs| {
                vec![inputs[0].index_select(0, &inputs[1])]
            });
            let places = (vec![shapes.from(1, 3), count], Kind::Int64);
            hold("embedding", vec![table, places], WRAPPED, &|inputs| {
                with_gradients(inputs, |own| Tensor::embedding(&own[0], &own[1], -1, false, false))
            });
        }
    }
    let numbers = vec![(vec![shapes.from(1, 9), 40], Kind::Float), (vec![15], Kind::Float)];
    for offset in [-2, 0, 1, 50] {
        let like = vec![(vec![1], Kind::Float)];
        let options = |inputs: &[Tensor]| (Kind::Int64, inputs[0].device());
        hold("triu_indices", like, WRAPPED, &|inputs| vec![Tensor::triu_indices(5, 7, offset, options(inputs))]);
    }
    for narrow in [true, false] {
        hold("bucketize", numbers.clone(), WRAPPED, &|inputs| vec![inputs[0].bucketize(&inputs[1], narrow, false)]);
    }
}

#[test]
fn attention() {
    let (_turn, mut shapes) = begin(4);
    for kind in KINDS {
        for round in 0..8 {
            let (batch, heads, width) = (shapes.from(1, 2), 2 * shapes.from(1, 3), 8 * shapes.from(1, 8));
            let queries = shapes.one_of(&[7, 64, 200, 800]);
            let causal = round % 2 == 0;
            let keys = if causal { queries } else { shapes.from(4, 600) };
            let of = |tokens| (vec![batch, heads, tokens, width], kind);
            hold(
                "attention of projections",
                vec![(vec![batch, queries, heads, width], kind); 3],
                of_attention(kind),
                &|inputs| {
                    with_gradients(inputs, |own| {
                        let [q, k, v] = [0, 1, 2].map(|part: usize| own[part].transpose(1, 2));
                        Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, causal, None, false)
                    })
                },
            );
            hold("attention", vec![of(queries), of(keys), of(keys)], of_attention(kind), &|inputs| {
                with_gradients(inputs, |own| {
                    let none = None::<&Tensor>;
                    Tensor::scaled_dot_product_attention(&own[0], &own[1], &own[2], none, 0.0, causal, None, false)
                })
            });
            let fewer = (vec![batch, heads / 2, keys, width], kind);
            hold("attention of fewer keys", vec![of(queries), fewer.clone(), fewer], of_attention(kind), &|inputs| {
                with_gradients(inputs, |own| {
                    let none = None::<&Tensor>;
                    Tensor::scaled_dot_product_attention(&own[0], &own[1], &own[2], none, 0.0, causal, None, true)
                })
            });
            let mask = (vec![1, 1, queries, keys], Kind::Bool);
            hold("masked attention", vec![of(queries), of(keys), of(keys), mask], of_attention(kind), &|inputs| {
                with_gradients(inputs, |own| {
                    let mask = own[3].logical_not();
                    Tensor::scaled_dot_product_attention(&own[0], &own[1], &own[2], Some(mask), 0.0, false, None, false)
                })
            });
        }
        let shape = vec![shapes.from(1, 40), shapes.from(1, 40)];
        hold("dropout", vec![(shape, kind)], of_attention(kind), &|inputs| {
            with_gradients(inputs, |own| own[0].dropout(0.3, true))
        });
    }
}

#[test]
fn reductions_losses_and_steps() {
    let (_turn, mut shapes) = begin(5);
    for kind in KINDS {
        for _ in 0..3 {
            let inputs = vec![(vec![shapes.from(1, 5), shapes.from(1, 20), shapes.from(1, 20)], kind)];
            for axes in [&[-1i64][..], &[0, 2], &[1]] {
                for keep in [true, false] {
                    hold("sums and means", inputs.clone(), WRAPPED, &|inputs| {
                        let (own, axes) = (&inputs[0], Some(axes));
                        vec![
                            own.sum_dim_intlist(axes, keep, kind),
                            own.sum_dim_intlist(axes, keep, Kind::Float),
                            own.mean_dim(axes, keep, Kind::Float),
                        ]
                    });
                }
            }
            hold("largest and smallest", inputs, WRAPPED, &|inputs| vec![inputs[0].max(), inputs[0].min()]);
        }
    }
    for _ in 0..3 {
        let shape = vec![shapes.from(1, 30), shapes.from(1, 30)];
        let two = vec![(shape.clone(), Kind::Float), (shape.clone(), Kind::Float)];
        hold("mean square", two, WRAPPED, &|inputs| {
            with_gradients(inputs, |own| own[0].mse_loss(&own[1], Reduction::None))
        });
        let four = vec![(shape, Kind::Float); 4];
        hold("steps", four, WRAPPED, &|inputs| {
            let own: Vec<Tensor> = inputs.iter().map(|own| own.abs()).collect();
            let step = AdamW { learning_rate: 1e-3, betas: (0.9, 0.99), weight_decay: 0.0, epsilon: 1e-8 };
            step.step(&own[..1], &own[1..2], &own[2..3], &own[3..], 1).unwrap();
            own
        });
        hold("settling", vec![(vec![40, 3], Kind::Float), (vec![1], Kind::Float)], WRAPPED, &|inputs| {
            let mut gradients = [inputs[0].copy()];
            settle(&mut gradients, &inputs[1], 2.0, 1.0).unwrap();
            gradients.into()
        });
    }
}

#[test]
fn elements() {
    let (_turn, mut shapes) = begin(6);
    for kind in KINDS {
        for _ in 0..3 {
            let shape = vec![shapes.from(1, 30), shapes.from(1, 30)];
            let two = vec![(shape.clone(), kind), (shape, kind)];
            hold("elements", two, WRAPPED, &|inputs| {
                let [a, b] = inputs else { panic!("two inputs") };
                let condition = a.isnan();
                let chosen = b.where_self(&condition, a);
                let mut kept = a.copy();
                kept.copy_(&b.tr().tr());
                let absolute = a.abs_out(&Tensor::empty_like(a));
                let not = condition.logical_not_out(&Tensor::empty_like(&condition));
                let grown = Tensor::empty([2], (a.kind(), a.device())).resize_([50]);
                vec![condition, chosen, kept, absolute, not, grown, b.relu()]
            });
        }
    }
}

#[test]
fn gates_and_rotary_embedding() {
    let (_turn, mut shapes) = begin(7);
    for kind in KINDS {
        for _ in 0..3 {
            let (tokens, width) = (shapes.from(1, 40), 2 * shapes.from(1, 50));
            let two = vec![(vec![2, tokens, width], kind); 2];
            hold("SwiGLU", two.clone(), WRAPPED, &|inputs| {
                with_gradients(inputs, |own| swiglu(&own[0], &own[1]).unwrap())
            });
            for act in [Gate::Gelu, Gate::GeluTanh] {
                hold("a gate", two.clone(), WRAPPED, &|inputs| {
                    with_gradients(inputs, |own| gated(&own[0], &own[1], act).unwrap())
                });
            }
            hold("GEGLU", two[..1].to_vec(), WRAPPED, &|inputs| with_gradients(inputs, |own| geglu(&own[0]).unwrap()));
            let half = width / 2 - shapes.from(0, 1).min(width / 2 - 1);
            for layout in [RotaryLayout::Halves, RotaryLayout::Interleaved] {
                let table = (vec![1, tokens, half], Kind::Float);
                let inputs = vec![(vec![2, tokens, 3, width], kind), table.clone(), table];
                hold("rotary embedding", inputs, WRAPPED, &|inputs| {
                    let (cos, sin) = (&inputs[1], &inputs[2]);
                    with_gradients(&inputs[..1], |own| rotary(&own[0].transpose(1, 2), cos, sin, layout).unwrap())
                });
            }
        }
    }
}

#[test]
fn weights_in_blocks() {
    let (_turn, mut shapes) = begin(8);
    for kind in KINDS {
        for blocks in BlockKind::ALL {
            // One tile, or two.
            let shape = [shapes.one_of(&[48, 1100]), 2048];
            let bytes = vec![0; blocks.bytes(shape).unwrap()];
            hold("a layer in blocks", vec![(vec![3, 2048], kind)], of_products(kind), &|inputs| {
                let weight = FrozenWeight::packed(&bytes, blocks, shape, kind, inputs[0].device()).unwrap();
                let geometry = LayerGeometry::linear(shape[1], shape[0]);
                with_gradients(inputs, |own| weight.apply(&geometry, &own[0], None).unwrap())
            });
        }
    }
}

#[test]
fn cross_entropy() {
    let (_turn, _) = begin(9);
    let ways = [
        CrossEntropy::default(),
        CrossEntropy { label_smoothing: 0.1, soft_cap: Some(30.0), logit_scale: 0.5 },
        CrossEntropy { label_smoothing: 0.1, ..CrossEntropy::default() },
    ];
    for kind in KINDS {
        // The second in chunks, the third in parts of the head.
        for (tokens, words, width, storage) in
            [(70, 896, 64, None), (700, 50_048, 8, None), (5, 16_400, 2_048, Some(Storage::Int8))]
        {
            let inputs = vec![(vec![tokens, width], kind), (vec![words, width], kind), (vec![tokens], Kind::Int64)];
            for way in ways {
                hold("cross entropy", inputs.clone(), of_heads(kind), &|inputs| {
                    let head = match storage {
                        Some(storage) => FrozenWeight::stored(&inputs[1], storage).unwrap(),
                        None => FrozenWeight::plain(inputs[1].shallow_clone()),
                    };
                    with_gradients(&inputs[..1], |own| way.sum(&own[0], &head, &inputs[2], None).unwrap())
                });
            }
            hold("losses of tokens", inputs, of_heads(kind), &|inputs| {
                let head = FrozenWeight::plain(inputs[1].shallow_clone());
                with_gradients(&inputs[..1], |own| ways[0].of_tokens(&own[0], &head, &inputs[2]).unwrap())
            });
        }
    }
}

/// What a decoder consists of, where there is no GPU to count on: all of it has kernels, and nothing but what is said
/// is kept.
#[test]
fn a_decoder_runs_on_a_dry_gpu() {
    let (_turn, _) = begin(11);
    let run = DryRun::begin(Platform::Cuda).unwrap();
    let of = |shape: &[i64]| Tensor::zeros(shape, (Kind::BFloat16, run.device()));
    let (tokens, width) = (64, 1024);
    let blocks = BlockKind::Q4_K;
    let weight = |outputs: usize, kind| {
        let bytes = vec![0; blocks.bytes([outputs, width as usize]).unwrap()];
        FrozenWeight::packed(&bytes, blocks, [outputs, width as usize], kind, run.device()).unwrap()
    };
    let (norm, table) = (of(&[width]), Tensor::zeros([1, tokens, 32], (Kind::Float, run.device())));
    let words = Tensor::zeros([1, tokens], (Kind::Int64, run.device()));
    let head = weight(2048, Kind::BFloat16);
    let leaf = head.embed(&words).unwrap().set_requires_grad(true);
    for way in [RmsWeight::Rounded, RmsWeight::Single, RmsWeight::OnePlus] {
        let held = run.live();
        let normed = rms_norm(&leaf, Some(&norm), 1e-6, way).unwrap();
        // The output in bf16, and a number a row in f32.
        assert_eq!(run.live() - held, (2 * tokens * width + 512.max(4 * tokens)) as u64, "{way:?}");
        drop(normed);
    }
    let normed = rms_norm(&leaf, Some(&norm), 1e-6, RmsWeight::Rounded).unwrap();
    let query = normed.view([1, tokens, 16, 64]).transpose(1, 2);
    let turned = rotary(&query, &table, &table, RotaryLayout::Halves).unwrap();
    let hidden = turned.transpose(1, 2).reshape([1, tokens, width]);
    let gate = weight(width as usize, Kind::BFloat16);
    let geometry = LayerGeometry::linear(width as usize, width as usize);
    let hidden = swiglu(&gate.apply(&geometry, &hidden, None).unwrap(), &hidden).unwrap();
    let ways = CrossEntropy { label_smoothing: 0.1, soft_cap: Some(30.0), logit_scale: 1.0 };
    let loss = ways.sum(&hidden, &head, &words, None).unwrap();
    loss.backward();
    assert_eq!((leaf.grad().size(), leaf.grad().kind()), (vec![1, tokens, width], Kind::BFloat16));
}

#[test]
fn logits_are_never_there_as_a_whole() {
    let (_turn, _) = begin(10);
    let (tokens, words, width) = (4_096, 32_768, 16);
    let head = FrozenWeight::plain(Tensor::randn([words, width], (Kind::Float, Device::Cpu)));
    let hidden = Tensor::randn([tokens, width], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let labels = Tensor::zeros([tokens], (Kind::Int64, Device::Cpu));
    reset_host_peak();
    let before = host_allocations().unwrap().live;
    CrossEntropy::default().sum(&hidden, &head, &labels, None).unwrap().backward();
    let held = host_allocations().unwrap();
    let logits = 4 * (tokens * words) as u64;
    assert!(held.peak - before < logits / 3, "{} bytes, and logits of {logits}", held.peak - before);
    // The gradient of the hidden states alone is left.
    assert_eq!(held.live - before, 4 * (tokens * width) as u64);
}
