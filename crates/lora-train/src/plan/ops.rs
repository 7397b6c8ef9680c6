//! What each of libtorch's operations makes, keeps for its backward pass and needs on the side: one place per operation.
//!
//! What is kept follows libtorch's derivatives (`derivatives.yaml` of 2.11): a convolution keeps its input and its weight even
//! where the weight is frozen; a linear layer keeps its input only where its weight is trained; normalisations keep their
//! input and two numbers a row or group; activations keep their input; attention by the fused kernels keeps query, key,
//! value, output and one number a row. What kernels need on the side was measured on the CPU by counting allocations; the
//! figures for CUDA are estimates from what cuDNN and the attention kernels are known to do.

use lora_core::LayerGeometry;
use lora_torch::frozen::{Storage, tile};
use lora_torch::tch::Kind;

use super::predict::CHUNK;
use super::tape::{Platform, Tape, Value};

/// oneDNN's convolutions work on blocks of so many channels.
const BLOCKED_CHANNELS: u64 = 16;

/// A single picture of no more numbers is too small for them on the CPU in fp32: libtorch has a convolution of its own for it.
const SMALL_CONVOLUTION: u64 = 20480;

/// A weight that an operation multiplies by.
#[derive(Debug, Clone)]
pub(super) enum Weight {
    /// Frozen, in the number type of arithmetic; its bytes are counted elsewhere.
    Frozen,
    /// Frozen in fewer bytes: made whole while the layer computes, in both passes, by a function that keeps nothing.
    Stored(Storage),
    /// Trained, or made of trained tensors.
    Trained(Value),
}

impl Tape {
    /// A linear layer `[…, inputs]` or a convolution `[batch, channels, height, width]`.
    pub(super) fn layer(&self, input: &Value, geometry: &LayerGeometry, weight: &Weight) -> Value {
        let product = Product::new(geometry, weight, input.kind());
        let mut output = product.compute(self, input, &output_shape(input.shape(), geometry), Direction::Forward);

        let frozen = input.detach();
        let trained = if let Weight::Trained(value) = weight { value } else { &frozen };
        let (wants_input, wants_weight) = (input.needs_gradient(), trained.needs_gradient());
        let is_convolution = matches!(geometry, LayerGeometry::Conv2d { .. });
        let mut saved = Vec::new();
        if wants_weight || is_convolution && matches!(weight, Weight::Trained(_)) {
            saved.push(&frozen);
        }
        if matches!(weight, Weight::Trained(_)) && (wants_input || is_convolution) {
            saved.push(trained);
        }
        let (shape, permuted, weight_shape) = (input.shape().to_vec(), input.is_permuted(), geometry.weight_shape());
        self.record(&[input, trained], &mut [&mut output], &saved, move |tape, mut given| {
            let Some(given) = given[0].take() else { return vec![None, None] };
            // Convolutions read both sides in the same order.
            let ordered =
                (is_convolution && given.must_be_ordered(permuted)).then(|| tape.like(&given).permuted(permuted));
            let given = ordered.as_ref().unwrap_or(&given);
            let to_input = wants_input.then(|| product.compute(tape, given, &shape, Direction::Backward));
            vec![to_input, wants_weight.then(|| tape.value(&weight_shape, given.kind()))]
        });
        output
    }

    /// A linear layer with a low-rank update in one. Keeps its input, the factors, and what lies between them.
    pub(super) fn adapted(
        &self,
        input: &Value,
        geometry: &LayerGeometry,
        weight: &Weight,
        down: &Value,
        up: &Value,
    ) -> Value {
        let product = Product::new(geometry, weight, input.kind());
        let mut output;
        let hidden;
        {
            let _rows = input.must_be_ordered(false).then(|| self.like(input));
            output = product
                .compute(self, input, &output_shape(input.shape(), geometry), Direction::Forward)
                .permuted(false);
            let mut shape = input.shape().to_vec();
            if let Some(last) = shape.last_mut() {
                *last = down.shape()[0];
            }
            hidden = self.value(&shape, input.kind());
        }
        let wants = [input, down, up].map(Value::needs_gradient);
        let (shapes, kept) = ([input, down, up].map(|value| value.shape().to_vec()), input.detach());
        let (hidden_shape, permuted) = (hidden.shape().to_vec(), input.is_permuted());
        let factors = [down.detach(), up.detach()];
        self.record(
            &[input, down, up],
            &mut [&mut output],
            &[&kept, &factors[0], &factors[1], &hidden],
            move |tape, mut given| {
                let Some(given) = given[0].take() else { return vec![None, None, None] };
                let ordered = given.must_be_ordered(false).then(|| tape.like(&given));
                let given = ordered.as_ref().unwrap_or(&given);
                let _inner = tape.value(&hidden_shape, given.kind());
                let to_down = wants[1].then(|| {
                    let _rows = permuted.then(|| tape.value(&shapes[0], given.kind()));
                    tape.value(&shapes[1], given.kind())
                });
                let to_up = wants[2].then(|| tape.value(&shapes[2], given.kind()));
                let to_input =
                    wants[0].then(|| product.compute(tape, given, &shapes[0], Direction::Backward).permuted(false));
                vec![to_input, to_down, to_up]
            },
        );
        output
    }

    /// Group normalisation. Keeps its input, and mean and deviation of each group.
    pub(super) fn group_norm(&self, input: &Value, groups: usize) -> Value {
        let statistics = self.value(&[2, input.shape()[0], groups], input.kind());
        let mut output = self.like(input);
        let kept = input.detach();
        let (shape, kind, permuted) = (input.shape().to_vec(), input.kind(), input.is_permuted());
        self.record(&[input], &mut [&mut output], &[&kept, &statistics], move |tape, given| {
            let given = given[0].as_ref();
            let _ordered = given.filter(|given| given.must_be_ordered(permuted)).map(|given| tape.like(given));
            vec![Some(tape.value(&shape, kind).permuted(permuted))]
        });
        output
    }

    /// Group normalisation and SiLU in one. Keeps its input, in order, and mean and deviation of each group.
    pub(super) fn norm_silu(&self, input: &Value, groups: usize) -> Value {
        let (shape, kind) = (input.shape().to_vec(), input.kind());
        let kept = if input.is_permuted() { self.value(&shape, kind) } else { input.detach() };
        let statistics = self.value(&[2, shape[0], groups], kind);
        let mut output = self.value(&shape, kind);
        self.record(&[input], &mut [&mut output], &[&kept, &statistics], move |tape, given| {
            let given = given[0].as_ref();
            let gradient = {
                let _normed = tape.value(&shape, kind);
                let _ordered = given.filter(|given| given.must_be_ordered(false)).map(|given| tape.like(given));
                tape.value(&shape, kind)
            };
            let result = tape.value(&shape, kind);
            drop(gradient);
            vec![Some(result)]
        });
        output
    }

    /// Normalisation over the last axis. Keeps its input, and mean and deviation of each row in fp32. It reads in order, and
    /// copies what is not.
    pub(super) fn layer_norm(&self, input: &Value) -> Value {
        let rows = &input.shape()[..input.shape().len() - 1];
        let _ordered = input.is_permuted().then(|| self.like(input));
        let mut output = self.value(input.shape(), input.kind());
        let statistics = self.value(&[rows, &[2]].concat(), input.kind());
        let kept = input.detach();
        let (shape, kind, permuted) = (input.shape().to_vec(), input.kind(), input.is_permuted());
        self.record(&[input], &mut [&mut output], &[&kept, &statistics], move |tape, _given| {
            let _ordered = permuted.then(|| tape.value(&shape, kind));
            vec![Some(tape.value(&shape, kind))]
        });
        output
    }

    /// SiLU or the exact GELU. Keeps its input.
    pub(super) fn activation(&self, input: &Value) -> Value {
        let kept = input.detach();
        self.elementwise(input, &[&kept])
    }

    /// The logistic function. Keeps its output.
    pub(super) fn sigmoid(&self, input: &Value) -> Value {
        let mut output = self.like(input);
        let kept = output.clone();
        self.record(&[input], &mut [&mut output], &[&kept], |tape, given| {
            vec![given[0].as_ref().map(|given| tape.like(given))]
        });
        output
    }

    /// Times a number. Keeps nothing.
    pub(super) fn scale(&self, input: &Value) -> Value {
        self.elementwise(input, &[])
    }

    fn elementwise(&self, input: &Value, saved: &[&Value]) -> Value {
        let mut output = self.like(input);
        self.record(&[input], &mut [&mut output], saved, |tape, given| {
            vec![given[0].as_ref().map(|given| tape.like(given))]
        });
        output
    }

    /// Times another of the same shape. Each keeps what the other's gradient needs.
    pub(super) fn multiply(&self, a: &Value, b: &Value) -> Value {
        let mut output = self.value(a.shape(), a.kind());
        let (first, second) = (a.detach(), b.detach());
        let mut saved = Vec::new();
        if b.needs_gradient() {
            saved.push(&first);
        }
        if a.needs_gradient() {
            saved.push(&second);
        }
        let (wants, shape, kind) = ([a.needs_gradient(), b.needs_gradient()], a.shape().to_vec(), a.kind());
        self.record(&[a, b], &mut [&mut output], &saved, move |tape, _given| {
            wants.iter().map(|wanted| wanted.then(|| tape.value(&shape, kind))).collect()
        });
        output
    }

    /// Plus another of the same shape, in new memory. Both get the output's gradient itself.
    pub(super) fn add(&self, a: &Value, b: &Value) -> Value {
        let mut output = self.like(a);
        self.record(&[a, b], &mut [&mut output], &[], |_, mut given| {
            let given = given[0].take();
            vec![given.clone(), given]
        });
        output
    }

    /// Plus one number a channel, which gets the sum of the gradient.
    pub(super) fn add_to_channels(&self, a: &Value, b: &Value) -> Value {
        let mut output = self.like(a);
        let (shape, kind, wanted) = (b.shape().to_vec(), b.kind(), b.needs_gradient());
        self.record(&[a, b], &mut [&mut output], &[], move |tape, mut given| {
            vec![given[0].take(), wanted.then(|| tape.value(&shape, kind))]
        });
        output
    }

    /// Plus another, in the memory of the first. Where the first is a view of another tensor (linear layers with a bias end in
    /// one), libtorch copies the gradient twice on the way back.
    pub(super) fn add_in_place(&self, a: &Value, b: &Value, view: bool) -> Value {
        let mut output = a.detach();
        self.record(&[a, b], &mut [&mut output], &[], move |tape, mut given| {
            let Some(given) = given[0].take() else { return vec![None, None] };
            match view {
                true => vec![Some(tape.like(&given)), Some(tape.like(&given))],
                false => vec![Some(given.clone()), Some(given)],
            }
        });
        output
    }

    /// In another number type; the same value where it has it already.
    pub(super) fn cast(&self, input: &Value, kind: Kind) -> Value {
        if input.kind() == kind {
            return input.clone();
        }
        let mut output = self.value(input.shape(), kind);
        let (shape, before) = (input.shape().to_vec(), input.kind());
        self.record(&[input], &mut [&mut output], &[], move |tape, _given| vec![Some(tape.value(&shape, before))]);
        output
    }

    /// One after the other along the channels. Gradients are views of the whole's.
    pub(super) fn concatenate(&self, a: &Value, b: &Value) -> Value {
        let mut shape = a.shape().to_vec();
        shape[1] += b.shape()[1];
        let mut output = self.value(&shape, a.kind()).permuted(a.is_permuted() && b.is_permuted());
        let (first, second) = (a.shape().to_vec(), b.shape().to_vec());
        self.record(&[a, b], &mut [&mut output], &[], move |_, mut given| {
            let Some(given) = given[0].take() else { return vec![None, None] };
            vec![Some(given.channels(&first)), Some(given.channels(&second))]
        });
        output
    }

    /// The first half of the last axis times the GELU of the second. Keeps its input.
    pub(super) fn geglu(&self, input: &Value) -> Value {
        let (shape, kind) = (input.shape().to_vec(), input.kind());
        let half = [&shape[..shape.len() - 1], &[shape[shape.len() - 1] / 2]].concat();
        let mut output = self.value(&half, kind);
        let kept = input.detach();
        self.record(&[input], &mut [&mut output], &[&kept], move |tape, _given| vec![Some(tape.value(&shape, kind))]);
        output
    }

    /// Pixels repeated up to a size. Keeps nothing.
    pub(super) fn upsample(&self, input: &Value, size: [usize; 2]) -> Value {
        let shape = [input.shape()[0], input.shape()[1], size[0], size[1]];
        let mut output = self.value(&shape, input.kind()).permuted(input.is_permuted());
        if matches!(self.platform(), Platform::Cpu { .. }) && !input.is_permuted() {
            // The kernel works with the channels last.
            drop(self.scratch(input.bytes() + output.bytes()));
        }
        let (before, kind, permuted) = (input.shape().to_vec(), input.kind(), input.is_permuted());
        self.record(&[input], &mut [&mut output], &[], move |tape, _given| {
            vec![Some(tape.value(&before, kind).permuted(permuted))]
        });
        output
    }

    /// Attention by a fused kernel, `[batch, tokens, width]` each. Keeps all three inputs, the output and one number a row.
    pub(super) fn attention(&self, query: &Value, key: &Value, value: &Value, heads: usize) -> Value {
        let (batch, tokens, width) = (query.shape()[0], query.shape()[1], query.shape()[2]);
        let mut output = self.value(query.shape(), query.kind());
        let rows = self.value(&[batch, heads, tokens], Kind::Float);
        let sizes = AttentionSizes {
            batch,
            heads,
            queries: tokens,
            keys: key.shape()[1],
            width: width / heads,
            kind: query.kind(),
        };
        drop(self.scratch(sizes.forward_workspace(self.platform())));
        let kept = [query.detach(), key.detach(), value.detach(), output.clone(), rows];
        let inputs = [query, key, value];
        let shapes = inputs.map(|input| input.shape().to_vec());
        self.record(&inputs, &mut [&mut output], &kept.each_ref(), move |tape, _given| {
            let results = shapes.iter().map(|shape| Some(tape.value(shape, sizes.kind))).collect();
            drop(tape.scratch(sizes.backward_workspace(tape.platform())));
            results
        });
        output
    }
}

/// Whether a convolution takes its input as one with the channels last. A single picture made of tokens has them last, too, but
/// not the strides that libtorch looks for.
fn channels_last(input: &Value) -> bool {
    input.is_permuted() && input.shape()[0] > 1
}

/// Which way a layer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// A product with a layer's weight, or with its transpose.
#[derive(Debug, Clone, Copy)]
struct Product {
    geometry: LayerGeometry,
    /// Bytes of the whole weight in the number type of arithmetic.
    weight: u64,
    /// What it has to be made whole of first.
    stored: Option<Storage>,
    /// Whether a large one is worked on in tiles on the CPU.
    tiled: bool,
}

impl Product {
    fn new(geometry: &LayerGeometry, weight: &Weight, kind: Kind) -> Self {
        let bytes = geometry.weight_shape().iter().product::<usize>() * kind.elt_size_in_bytes();
        let stored = if let Weight::Stored(storage) = weight { Some(*storage) } else { None };
        let convolution = matches!(geometry, LayerGeometry::Conv2d { .. });
        let tiled = stored.is_some() || convolution && matches!(weight, Weight::Frozen);
        Self { geometry: *geometry, weight: bytes as u64, stored, tiled }
    }

    /// Outputs that are computed at once, and all there are.
    fn tile(&self, tape: &Tape) -> (u64, u64) {
        let shape = self.geometry.weight_shape();
        let (outputs, row) = (shape[0], shape[1..].iter().product());
        let is_tiled = self.tiled && matches!(tape.platform(), Platform::Cpu { .. });
        ((if is_tiled { tile(outputs, row) } else { outputs }) as u64, outputs as u64)
    }

    /// The result in new memory, with what is needed meanwhile.
    fn compute(&self, tape: &Tape, from: &Value, shape: &[usize], direction: Direction) -> Value {
        let is_cpu = matches!(tape.platform(), Platform::Cpu { .. });
        let (tile, outputs) = self.tile(tape);
        let share = |bytes: u64| bytes * tile / outputs;
        let numbers = self.geometry.weight_shape().iter().product::<usize>() as u64;
        let _magnitudes = (is_cpu && self.stored == Some(Storage::Nf4)).then(|| tape.scratch(4 * numbers.div_ceil(64)));
        let whole = self.stored.map(|_| tape.scratch(share(self.weight)));
        if from.kind() != Kind::Float && is_cpu && self.stored == Some(Storage::Nf4) {
            // It is rounded from f32, a chunk at a time; CUDA's kernel has that in registers.
            drop(tape.scratch(4 * CHUNK.min(share(numbers))));
        }
        if tile == outputs {
            return self.multiply(tape, from, from.bytes(), shape, self.weight, direction);
        }
        let bytes = (shape.iter().product::<usize>() * from.kind().elt_size_in_bytes()) as u64;
        let is_convolution = matches!(self.geometry, LayerGeometry::Conv2d { .. });
        let permuted = is_convolution && channels_last(from);
        match direction {
            // Tiles of the output, joined in the end.
            Direction::Forward => {
                let _before = tape.scratch(bytes - share(bytes));
                let mut part = shape.to_vec();
                part[if is_convolution { 1 } else { shape.len() - 1 }] = tile as usize;
                let _last = self.multiply(tape, from, from.bytes(), &part, share(self.weight), direction);
                drop(whole);
                tape.value(shape, from.kind()).permuted(permuted)
            }
            // Whole results of a part of the gradient each, added up.
            Direction::Backward => {
                let sum = tape.value(shape, from.kind()).permuted(permuted);
                drop(self.multiply(tape, from, share(from.bytes()), shape, share(self.weight), direction));
                sum
            }
        }
    }

    /// The product with a weight of so many bytes, of which `read` bytes of the input are for.
    fn multiply(
        &self,
        tape: &Tape,
        from: &Value,
        read: u64,
        shape: &[usize],
        weight: u64,
        direction: Direction,
    ) -> Value {
        let half = from.kind() != Kind::Float;
        let is_cpu = matches!(tape.platform(), Platform::Cpu { .. });
        let LayerGeometry::Conv2d { kernel, stride, .. } = self.geometry else {
            let result = tape.value(shape, from.kind());
            if half && is_cpu {
                // oneDNN reads the weight in an order of its own.
                drop(tape.scratch(weight));
            }
            return result;
        };
        let permuted = channels_last(from);
        let _ordered = (from.is_permuted() && !permuted).then(|| tape.scratch(read));
        let result = || tape.value(shape, from.kind()).permuted(permuted);
        if is_cpu && kernel == 1 && !half {
            return result();
        }
        if is_cpu && !half && from.shape()[0] == 1 && read <= 4 * SMALL_CONVOLUTION {
            // A matrix product with what lies around each pixel.
            let (channels, pixels) = match direction {
                Direction::Forward => (from.shape()[1], &shape[2..]),
                Direction::Backward => (shape[1], &from.shape()[2..]),
            };
            let around = (channels * kernel * kernel * pixels.iter().product::<usize>()) as u64;
            let _around = tape.scratch(4 * around);
            return result();
        }
        if permuted {
            // Channels last, as these kernels like them: only the weight is brought into that order.
            let _ordered = (kernel > 1 || !is_cpu).then(|| tape.scratch(weight));
            let result = result();
            if is_cpu {
                drop(tape.scratch(weight));
            }
            return result;
        }
        // Otherwise all three are brought into the kernel's order, and the result back.
        let bytes = (shape.iter().product::<usize>() * from.kind().elt_size_in_bytes()) as u64;
        let read = if (from.shape()[1] as u64) < BLOCKED_CHANNELS { 0 } else { read };
        let channels = shape[1] as u64;
        let written = bytes / channels * if half { channels } else { channels.next_multiple_of(BLOCKED_CHANNELS) };
        drop(tape.scratch(read + weight + written));
        let _written = tape.scratch(written);
        let result = result();
        if is_cpu && (half || direction == Direction::Backward && stride > 1) {
            drop(tape.scratch(bytes));
        }
        result
    }
}

/// Sizes of one attention.
#[derive(Debug, Clone, Copy)]
struct AttentionSizes {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
    kind: Kind,
}

impl AttentionSizes {
    /// Scores of one block of queries and keys, for each thread.
    fn tile(&self) -> (u64, u64) {
        let rows = match self.queries {
            768.. => 256,
            192.. => 64,
            _ => 32,
        };
        (rows.min(self.queries) as u64, self.keys.min(512) as u64)
    }

    fn forward_workspace(&self, platform: Platform) -> u64 {
        let Platform::Cpu { threads } = platform else { return 0 };
        let (rows, columns) = self.tile();
        let tile = 4 * (rows * columns + 2 * rows + rows * self.width as u64);
        let half = u64::from(self.kind != Kind::Float);
        // In half precision: scores in that precision too, and keys and values in another order.
        let reordered = 2 * 2 * (self.batch * self.heads * self.keys * self.width) as u64;
        threads * (tile + half * 2 * rows * columns) + half * reordered
    }

    fn backward_workspace(&self, platform: Platform) -> u64 {
        let (rows, columns) = self.tile();
        match platform {
            Platform::Cpu { threads } => {
                let half = u64::from(self.kind != Kind::Float);
                threads * rows * columns * 2 * (4 + 2 * half)
            }
            // The query's gradient is summed in fp32, over whole tiles.
            Platform::Cuda => {
                let rows = (self.batch * self.heads * self.queries.next_multiple_of(128)) as u64;
                4 * rows * (self.width.next_multiple_of(32) as u64 + 1)
            }
        }
    }
}

/// The shape of a layer's output.
fn output_shape(input: &[usize], geometry: &LayerGeometry) -> Vec<usize> {
    let mut shape = input.to_vec();
    match *geometry {
        LayerGeometry::Conv2d { out_channels, kernel, stride, padding, .. } => {
            shape[1] = out_channels;
            for side in &mut shape[2..] {
                *side = (*side + 2 * padding).saturating_sub(kernel) / stride + 1;
            }
        }
        _ => {
            if let Some(last) = shape.last_mut() {
                *last = geometry.outputs();
            }
        }
    }
    shape
}
