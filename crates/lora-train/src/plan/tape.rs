//! Tensors without elements, and the graph that libtorch's autograd would build of them: what each operation keeps for the
//! backward pass, and what is alive at each moment of either pass. Operations stand in [`super::ops`].
//!
//! A value holds its block as a tensor holds its storage, so that code which mirrors a network line by line lets go of
//! everything where the network does.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use lora_torch::tch::Kind;

use super::meter::{Block, Meter, Part};

/// What arithmetic runs on: kernels differ in what they need on the side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Platform {
    /// libtorch's CPU kernels and oneDNN's, with so many threads.
    Cpu {
        /// Threads of one operation.
        threads: u64,
    },
    /// CUDA with cuDNN.
    Cuda,
}

/// Where memory is counted and whether a graph is built. Clones are the same tape.
#[derive(Debug, Clone)]
pub(super) struct Tape(Rc<State>);

#[derive(Debug)]
struct State {
    meter: Meter,
    platform: Platform,
    recording: Cell<bool>,
    nodes: Cell<u64>,
}

/// A tensor without elements.
#[derive(Debug, Clone)]
pub(super) struct Value {
    block: Rc<Block>,
    shape: Vec<usize>,
    kind: Kind,
    /// Elements in another order than the shape's: pixels with their channels last, tokens with their positions last.
    permuted: bool,
    /// A part of the memory that it lies in, with gaps.
    scattered: bool,
    edge: Option<Edge>,
}

/// Where a value's gradient goes.
#[derive(Debug, Clone)]
enum Edge {
    Node(Rc<Node>, usize),
    Leaf(Rc<Leaf>),
}

/// A tensor that collects its gradient.
#[derive(Debug)]
pub(super) struct Leaf {
    part: Part,
    gradient: RefCell<Option<Value>>,
}

/// Gradients of the outputs to gradients of the inputs.
type Backward = Box<dyn Fn(&Tape, Vec<Option<Value>>) -> Vec<Option<Value>>>;

/// An operation of the graph.
struct Node {
    number: u64,
    edges: Vec<Option<Edge>>,
    saved: RefCell<Vec<Rc<Block>>>,
    backward: Backward,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Node {
    fn release(&self) {
        self.saved.take().iter().for_each(|block| block.unsave());
    }
}

impl Drop for Node {
    /// Without recursion: a graph is a chain of thousands of nodes.
    fn drop(&mut self) {
        self.release();
        let mut edges: Vec<_> = self.edges.drain(..).flatten().collect();
        while let Some(edge) = edges.pop() {
            if let Edge::Node(node, _) = edge
                && let Some(mut node) = Rc::into_inner(node)
            {
                edges.extend(node.edges.drain(..).flatten());
            }
        }
    }
}

impl Leaf {
    /// Its gradient, taken away.
    pub(super) fn take(&self) -> Option<Value> {
        self.gradient.take()
    }

    /// Has a gradient from now on, if it had none.
    pub(super) fn give(&self, gradient: &Value) {
        self.gradient.borrow_mut().get_or_insert_with(|| gradient.detach().count_as(self.part));
    }
}

impl Value {
    /// Its shape.
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its number type.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether its elements lie in another order than its shape says.
    pub(super) fn is_permuted(&self) -> bool {
        self.permuted
    }

    /// Whether an operation that reads in an order has to copy it first.
    pub(super) fn must_be_ordered(&self, permuted: bool) -> bool {
        self.scattered || self.permuted != permuted
    }

    /// Number of elements.
    pub(super) fn elements(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    /// Bytes of its elements; those of the memory that it is a view of may be more.
    pub(super) fn bytes(&self) -> u64 {
        self.elements() * self.kind.elt_size_in_bytes() as u64
    }

    /// Whether a gradient is wanted.
    pub(super) fn needs_gradient(&self) -> bool {
        self.edge.is_some()
    }

    /// The same without its history.
    pub(super) fn detach(&self) -> Self {
        Self { edge: None, ..self.clone() }
    }

    /// The same memory in another shape, as its gradient is the output's gradient in another shape.
    pub(super) fn view(&self, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), ..self.clone() }
    }

    /// Some of the channels of the same memory.
    pub(super) fn channels(&self, shape: &[usize]) -> Self {
        let scattered = self.scattered || self.permuted || shape[0] > 1;
        Self { shape: shape.to_vec(), scattered, ..self.clone() }
    }

    /// With its elements in the order of its shape or in the other.
    pub(super) fn permuted(self, permuted: bool) -> Self {
        Self { permuted, ..self }
    }

    /// The same memory with two axes exchanged: tokens that lie in order are pixels with their channels last.
    pub(super) fn permute(&self, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), permuted: !self.permuted, ..self.clone() }
    }

    /// Counts as a part of its own.
    pub(super) fn count_as(self, part: Part) -> Self {
        self.block.count_as(part);
        self
    }
}

impl Tape {
    /// A tape that records.
    pub(super) fn new(platform: Platform) -> Self {
        // CUDA's caching allocator hands out multiples of 512 bytes.
        let unit = if platform == Platform::Cuda { 512 } else { 1 };
        Self(Rc::new(State { meter: Meter::new(unit), platform, recording: Cell::new(true), nodes: Cell::new(0) }))
    }

    /// What it counts.
    pub(super) fn meter(&self) -> &Meter {
        &self.0.meter
    }

    /// What arithmetic runs on.
    pub(super) fn platform(&self) -> Platform {
        self.0.platform
    }

    /// Runs something without building a graph, or with.
    pub(super) fn recording<T>(&self, on: bool, run: impl FnOnce() -> T) -> T {
        let before = self.0.recording.replace(on);
        let result = run();
        self.0.recording.set(before);
        result
    }

    /// A new tensor.
    pub(super) fn value(&self, shape: &[usize], kind: Kind) -> Value {
        let bytes = shape.iter().product::<usize>() * kind.elt_size_in_bytes();
        self.of_block(self.0.meter.block(bytes as u64, Part::Working), shape, kind)
    }

    fn of_block(&self, block: Rc<Block>, shape: &[usize], kind: Kind) -> Value {
        Value { block, shape: shape.to_vec(), kind, permuted: false, scattered: false, edge: None }
    }

    /// A new tensor of a value's shape, kind and order.
    pub(super) fn like(&self, value: &Value) -> Value {
        self.value(&value.shape, value.kind).permuted(value.permuted)
    }

    /// A copy in host memory: on a device it takes nothing.
    pub(super) fn elsewhere(&self, value: &Value) -> Value {
        let bytes = if self.0.platform == Platform::Cuda { 0 } else { value.bytes() };
        let block = self.0.meter.block(bytes, Part::Working);
        self.of_block(block, &value.shape, value.kind).permuted(value.permuted)
    }

    /// The value itself, or what was [`Tape::elsewhere`] as it comes back.
    pub(super) fn back(&self, value: &Value) -> Value {
        if value.block.bytes() == 0 { self.like(value) } else { value.clone() }
    }

    /// Memory that an operation needs while it runs.
    pub(super) fn scratch(&self, bytes: u64) -> Rc<Block> {
        self.0.meter.block(bytes, Part::Working)
    }

    /// The value as one that collects its gradient, which counts as `part`.
    pub(super) fn leaf(&self, value: &Value, part: Part) -> (Value, Rc<Leaf>) {
        let leaf = Rc::new(Leaf { part, gradient: RefCell::new(None) });
        (Value { edge: Some(Edge::Leaf(leaf.clone())), ..value.clone() }, leaf)
    }

    /// Whether an operation on these inputs goes into the graph.
    pub(super) fn records(&self, inputs: &[&Value]) -> bool {
        self.0.recording.get() && inputs.iter().any(|input| input.needs_gradient())
    }

    /// Puts an operation into the graph, if one of its inputs wants a gradient: what is saved, and how gradients of its
    /// outputs become those of its inputs, in the order given. The outputs know it from then on.
    pub(super) fn record(
        &self,
        inputs: &[&Value],
        outputs: &mut [&mut Value],
        saved: &[&Value],
        backward: impl Fn(&Tape, Vec<Option<Value>>) -> Vec<Option<Value>> + 'static,
    ) {
        if self.records(inputs) {
            self.insert(inputs, outputs, saved, Box::new(backward));
        }
    }

    /// The same whether or not an input wants a gradient, as custom functions with parameters of their own do.
    pub(super) fn insert(&self, inputs: &[&Value], outputs: &mut [&mut Value], saved: &[&Value], backward: Backward) {
        let number = self.0.nodes.get();
        self.0.nodes.set(number + 1);
        let saved: Vec<_> = saved.iter().map(|value| value.block.clone()).collect();
        saved.iter().for_each(|block| block.save());
        let edges = inputs.iter().map(|input| input.edge.clone()).collect();
        let node = Rc::new(Node { number, edges, saved: RefCell::new(saved), backward });
        for (index, output) in outputs.iter_mut().enumerate() {
            output.edge = Some(Edge::Node(node.clone(), index));
        }
    }

    /// Whether a graph is being built.
    pub(super) fn is_recording(&self) -> bool {
        self.0.recording.get()
    }

    /// Sends a gradient back through the graph of a value: last operation first, each letting go of what it saved.
    pub(super) fn backward(&self, value: &Value, gradient: Value) {
        self.recording(false, || {
            let mut ready = BTreeMap::new();
            self.send(&mut ready, value.edge.as_ref(), gradient);
            while let Some((_, (node, gradients))) = ready.pop_last() {
                let results = (node.backward)(self, gradients);
                node.release();
                for (edge, result) in node.edges.iter().zip(results) {
                    if let Some(result) = result {
                        self.send(&mut ready, edge.as_ref(), result);
                    }
                }
            }
        });
    }

    /// Adds a gradient to those that wait: in place where nobody else holds the first, as libtorch's engine does.
    fn send(&self, ready: &mut BTreeMap<u64, (Rc<Node>, Vec<Option<Value>>)>, edge: Option<&Edge>, gradient: Value) {
        match edge {
            None => {}
            Some(Edge::Leaf(leaf)) => {
                let mut held = leaf.gradient.borrow_mut();
                if held.is_none() {
                    // Taken over where nobody else holds it, copied otherwise.
                    let own = Rc::strong_count(&gradient.block) == 1 && !gradient.scattered;
                    let own = if own { gradient } else { self.like(&gradient) };
                    *held = Some(Value { edge: None, ..own.count_as(leaf.part) });
                }
            }
            Some(Edge::Node(node, index)) => {
                let (_, waiting) = ready.entry(node.number).or_insert_with(|| (node.clone(), Vec::new()));
                waiting.resize(waiting.len().max(index + 1), None);
                let own = &mut waiting[*index];
                *own = Some(match own.take() {
                    None => gradient,
                    Some(first) if Rc::strong_count(&first.block) == 1 && !first.scattered => first,
                    Some(first) => self.like(&first),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tape() -> Tape {
        Tape::new(Platform::Cpu { threads: 1 })
    }

    /// An operation that keeps its input and makes a new gradient.
    fn operation(tape: &Tape, input: &Value) -> Value {
        let mut output = tape.like(input);
        let shape = input.shape.clone();
        tape.record(&[input], &mut [&mut output], &[input], move |tape, _| vec![Some(tape.value(&shape, Kind::Float))]);
        output
    }

    #[test]
    fn a_graph_keeps_what_it_saved_and_lets_go_in_the_backward_pass() {
        let tape = tape();
        let (input, leaf) = tape.leaf(&tape.value(&[25], Kind::Float), Part::Gradients);
        let output = (0..3).fold(input.clone(), |value, _| operation(&tape, &value));
        let live = tape.meter().live();
        assert_eq!((live.of(Part::Saved), live.of(Part::Working)), (300, 100));
        tape.meter().reset_peak();
        tape.backward(&output, tape.like(&output));
        // The last operation's input, its gradient and that of its output beside everything else.
        assert_eq!(tape.meter().peak().total(), 600);
        let live = tape.meter().live();
        assert_eq!((live.of(Part::Saved), live.of(Part::Gradients)), (0, 100));
        drop((input, output));
        assert_eq!(tape.meter().live().total(), 100);
        assert!(leaf.take().is_some());
        assert_eq!(tape.meter().live().total(), 0);
    }

    #[test]
    fn without_recording_nothing_is_saved_and_long_graphs_are_dropped() {
        let tape = tape();
        let (input, _leaf) = tape.leaf(&tape.value(&[1], Kind::Float), Part::Gradients);
        let output = tape.recording(false, || operation(&tape, &operation(&tape, &input)));
        assert!(!output.needs_gradient());
        assert_eq!(tape.meter().live().of(Part::Saved), 0);
        drop(output);
        let long = (0..100_000).fold(input, |value, _| operation(&tape, &value));
        assert_eq!(tape.meter().live().total(), 400_004);
        drop(long);
        assert_eq!(tape.meter().live().total(), 0);
    }

    #[test]
    fn gradients_that_meet_are_added_in_place_where_they_may_be() {
        let tape = tape();
        let (input, leaf) = tape.leaf(&tape.value(&[25], Kind::Float), Part::Gradients);
        // Both uses give the same gradient on, as an addition does: the first to come is shared.
        let once = operation(&tape, &input);
        let mut sum = tape.like(&once);
        tape.record(&[&once, &once], &mut [&mut sum], &[], |_, mut given| {
            let given = given.remove(0);
            vec![given.clone(), given]
        });
        drop(once);
        tape.backward(&sum, tape.like(&sum));
        assert_eq!(leaf.take().unwrap().bytes(), 100);
    }
}
