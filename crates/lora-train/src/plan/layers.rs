//! Layers that can carry an adapter, as the tape sees them: `lora_models::layers` and the forward passes of `lora-core`'s
//! variants, line by line, so that values live as long as the tensors do.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use lora_core::LayerGeometry;
use lora_torch::checkpoint::LARGE;
use lora_torch::frozen::Storage;
use lora_torch::tch::Kind;

use super::meter::Part;
use super::ops::Weight;
use super::tape::{Leaf, Tape, Value};

/// Dropout between an adapter's factors, as far as it needs memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DropoutMasks {
    pub(super) activations: bool,
    pub(super) ranks: bool,
    pub(super) modules: bool,
}

/// An adapter on one layer.
#[derive(Debug)]
pub(super) enum LayerAdapter {
    /// Its update is computed through thin products: one for LoRA, two for variants that subtract their first values.
    Thin(Vec<Factors>),
    /// A whole weight is formed of these trained tensors.
    Whole(Vec<Value>),
}

/// Factors of a thin product.
#[derive(Debug)]
pub(super) struct Factors {
    pub(super) rank: usize,
    pub(super) down: Value,
    /// The core between two pointwise projections.
    pub(super) mid: Option<Value>,
    pub(super) up: Value,
    /// Whether the rank's activations are multiplied by a number other than 1.
    pub(super) scaled: bool,
}

/// A trained tensor, in fp32.
#[derive(Debug)]
pub(super) struct Trained {
    pub(super) value: Value,
    pub(super) leaf: Rc<Leaf>,
    /// What networks compute with in its place.
    pub(super) copy: Option<(Value, Rc<Leaf>)>,
}

impl Trained {
    /// One that networks compute with in `kind`: in a copy, where that is another.
    pub(super) fn new(tape: &Tape, shape: &[usize], kind: Kind) -> Self {
        let own = |kind| tape.leaf(&tape.value(shape, kind).count_as(Part::Adapter), Part::Gradients);
        let (value, leaf) = own(Kind::Float);
        Self { value, leaf, copy: (kind != Kind::Float).then(|| own(kind)) }
    }

    /// What networks compute with.
    pub(super) fn computed_with(&self) -> &Value {
        self.copy.as_ref().map_or(&self.value, |(copy, _)| copy)
    }

    /// Adds the gradients of copies to those of the tensors that they are copies of: all first in fp32, then all added.
    pub(super) fn collect(all: &[Self], tape: &Tape) {
        let given: Vec<_> = all
            .iter()
            .filter_map(|own| Some((own, own.copy.as_ref()?.1.take()?)))
            .map(|(own, gradient)| (own, gradient, tape.value(own.value.shape(), Kind::Float)))
            .collect();
        for (own, _, sum) in &given {
            own.leaf.give(sum);
        }
    }
}

/// What a network's layers need to know.
#[derive(Debug)]
pub(super) struct Layers {
    pub(super) tape: Tape,
    /// The number type of arithmetic.
    pub(super) kind: Kind,
    /// Layers whose weights are stored in fewer bytes.
    pub(super) stored: BTreeMap<String, Storage>,
    /// Weights come from host memory.
    pub(super) staged: bool,
    pub(super) adapters: BTreeMap<String, LayerAdapter>,
    /// Layers whose own weights are trained, in fp32.
    pub(super) trained: BTreeMap<String, Value>,
    pub(super) dropout: DropoutMasks,
    /// Blocks are computed again in the backward pass.
    pub(super) recompute: bool,
    /// So is the inner part of feed-forwards.
    pub(super) recompute_feed_forward: bool,
    /// Large inputs of blocks wait for that elsewhere.
    pub(super) inputs_elsewhere: bool,
    /// Names of all layers that were passed.
    pub(super) passed: RefCell<BTreeSet<String>>,
}

impl Layers {
    /// A layer `y = W x + b` with its adapter.
    pub(super) fn linear(&self, path: &str, input: &Value, outputs: usize, bias: bool) -> Value {
        let inputs = input.shape().last().copied().unwrap_or(1);
        self.layer(path, input, &LayerGeometry::linear(inputs, outputs), bias)
    }

    /// A convolution with bias, padded so that a stride of 1 keeps the size.
    pub(super) fn conv2d(&self, path: &str, input: &Value, outputs: usize, kernel: usize, stride: usize) -> Value {
        let geometry = LayerGeometry::conv2d(input.shape()[1], outputs, kernel, stride, kernel / 2);
        self.layer(path, input, &geometry, true)
    }

    /// A layer of any geometry.
    pub(super) fn layer(&self, path: &str, input: &Value, geometry: &LayerGeometry, bias: bool) -> Value {
        self.passed.borrow_mut().insert(path.to_owned());
        let stored = self.stored.get(path).copied();
        let weight = match self.trained.get(path) {
            Some(trained) => Weight::Trained(self.tape.cast(trained, self.kind)),
            None => stored.map_or(Weight::Frozen, Weight::Stored),
        };
        let base = || self.tape.layer(input, geometry, &weight);
        let products = match self.adapters.get(path) {
            None => return base(),
            Some(LayerAdapter::Whole(trained)) => return self.whole_update(input, geometry, trained, stored.is_some()),
            Some(LayerAdapter::Thin(products)) => products,
        };
        let is_linear = matches!(geometry, LayerGeometry::Linear { .. }) && !matches!(weight, Weight::Trained(_));
        let in_one = is_linear && self.dropout == DropoutMasks::default();
        // With a bias, three axes and a plain weight, a linear layer ends in a view.
        let view =
            bias && stored.is_none() && !self.staged && input.shape().len() == 3 && !input.is_permuted() && !in_one;
        let mut products = products.iter();
        let first = match products.next() {
            Some(Factors { down, up, .. }) if in_one => {
                let [down, up] = [down, up].map(|factor| self.tape.cast(factor, input.kind()));
                self.tape.adapted(input, geometry, &weight, &down, &up)
            }
            Some(factors) => {
                let update = self.low_rank(input, geometry, factors);
                self.tape.add_in_place(&base(), &update, view)
            }
            None => base(),
        };
        products
            .fold(first, |sum, factors| self.tape.add_in_place(&sum, &self.low_rank(input, geometry, factors), view))
    }

    /// `scale · up([mid](down(x)))`. Factors in another number type are cast, which the products keep.
    fn low_rank(&self, input: &Value, geometry: &LayerGeometry, factors: &Factors) -> Value {
        let tape = &self.tape;
        let cast = |factor: &Value| match factor.needs_gradient() {
            true => Weight::Trained(tape.cast(factor, input.kind())),
            false => Weight::Frozen,
        };
        let (down, up) = (cast(&factors.down), cast(&factors.up));
        let mut hidden = match (&factors.mid, *geometry) {
            (Some(mid), LayerGeometry::Conv2d { kernel, stride, padding, .. }) => {
                let inner = factors.down.shape()[0];
                let pointwise = LayerGeometry::conv2d(geometry.inputs(), inner, 1, 1, 0);
                let hidden = tape.layer(input, &pointwise, &down);
                let core = LayerGeometry::conv2d(inner, factors.rank, kernel, stride, padding);
                tape.layer(&hidden, &core, &cast(mid))
            }
            _ => tape.layer(input, &geometry.with_outputs(factors.rank), &down),
        };
        let DropoutMasks { activations, ranks, modules } = self.dropout;
        let batch = hidden.shape()[0];
        let masks = [
            activations.then(|| tape.value(hidden.shape(), input.kind())),
            ranks.then(|| tape.value(&[batch, factors.rank], input.kind())),
            modules.then(|| tape.value(&[batch], input.kind())),
        ];
        for mask in masks.into_iter().flatten() {
            hidden = tape.multiply(&hidden, &mask.view(hidden.shape()));
        }
        if factors.scaled {
            hidden = tape.scale(&hidden);
        }
        tape.layer(&hidden, &geometry.pointwise_from(factors.rank), &up)
    }

    /// `W + ΔW`, formed in fp32 of two factors of its size: an estimate for the variants that form it, each in its own way.
    fn whole_update(&self, input: &Value, geometry: &LayerGeometry, trained: &[Value], stored: bool) -> Value {
        let tape = &self.tape;
        let shape = geometry.weight_shape();
        let whole = stored.then(|| tape.value(&shape, input.kind()));
        let mut factors = [tape.value(&shape, Kind::Float), tape.value(&shape, Kind::Float)];
        let inputs: Vec<&Value> = trained.iter().collect();
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|input| input.shape().to_vec()).collect();
        let [first, second] = &mut factors;
        tape.record(&inputs, &mut [first, second], &[], move |tape, _given| {
            shapes.iter().map(|shape| Some(tape.value(shape, Kind::Float))).collect()
        });
        let delta = tape.multiply(&factors[0], &factors[1]);
        let effective = tape.cast(&delta, input.kind());
        drop((delta, factors));
        let output = tape.layer(input, geometry, &Weight::Trained(effective));
        drop(whole);
        output
    }

    /// A block's output. Where blocks are computed again, only its inputs are kept, and the block runs once more in the
    /// backward pass.
    pub(super) fn block(
        self: &Rc<Self>,
        inputs: &[&Value],
        run: impl Fn(&Rc<Self>, &[Value]) -> Value + 'static,
    ) -> Value {
        self.part(self.recompute, self.inputs_elsewhere, inputs, run)
    }

    /// The output of the inner part of a feed-forward, likewise.
    pub(super) fn feed_forward(
        self: &Rc<Self>,
        input: &Value,
        run: impl Fn(&Rc<Self>, &Value) -> Value + 'static,
    ) -> Value {
        self.part(self.recompute_feed_forward, false, &[input], move |layers, inputs| run(layers, &inputs[0]))
    }

    fn part(
        self: &Rc<Self>,
        recompute: bool,
        inputs_elsewhere: bool,
        inputs: &[&Value],
        run: impl Fn(&Rc<Self>, &[Value]) -> Value + 'static,
    ) -> Value {
        let own: Vec<Value> = inputs.iter().map(|&input| input.clone()).collect();
        if !recompute {
            return run(self, &own);
        }
        let tape = &self.tape;
        let mut output = tape.recording(false, || run(self, &own)).detach();
        if !tape.is_recording() {
            return output;
        }
        let layers = Rc::clone(self);
        let kept: Vec<Value> = own
            .iter()
            .map(|value| match inputs_elsewhere && value.bytes() >= LARGE as u64 {
                true => tape.elsewhere(value),
                false => value.detach(),
            })
            .collect();
        let wanted: Vec<bool> = own.iter().map(Value::needs_gradient).collect();
        // What the closure knows of its inputs is what the graph saved: it must not keep them alive longer.
        let saved: Vec<&Value> = kept.iter().collect();
        let held = RefCell::new(Some(kept.clone()));
        tape.insert(
            inputs,
            &mut [&mut output],
            &saved,
            Box::new(move |tape, given| {
                let kept: Vec<Value> = held.take().unwrap_or_default().iter().map(|value| tape.back(value)).collect();
                let leaves: Vec<_> = kept.iter().map(|value| tape.leaf(value, Part::Working)).collect();
                let again: Vec<Value> = leaves
                    .iter()
                    .zip(&wanted)
                    .map(|((value, _), &wanted)| if wanted { value.clone() } else { value.detach() })
                    .collect();
                let output = tape.recording(true, || run(&layers, &again));
                if let Some(Some(gradient)) = given.first() {
                    tape.backward(&output, gradient.clone());
                }
                leaves.iter().map(|(_, leaf)| leaf.take()).collect()
            }),
        );
        output
    }
}
