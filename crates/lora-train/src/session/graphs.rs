//! The passes of a micro-batch as CUDA graphs (`lora_torch::graph`), one for each shape that micro-batches have. Everything that
//! differs between two of them is in their [`Inputs`], so that a graph recorded for one computes any other of its shape.
//!
//! A shape's first micro-batch runs as ever, then it is recorded, and the recording held against what it gave. Where that
//! fails or differs, training goes on without graphs. On the CPU the same passes run again on the same tensors: there is
//! nothing to gain, but what is copied where is the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_torch::graph::{Graph, Recorder};
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::{dry, foreach, memory};

use crate::config::TrainConfig;
use crate::inputs::{InputShapes, Inputs};
use crate::parameters::ParameterList;
use crate::{Error, Result};

/// Most graphs: recording one takes as long as two or three steps, which a shape that is seldom met does not give back.
const MOST: usize = 24;

/// How far a recording may be from the passes as they ran, relative to what they gave: kernels that add in no order
/// differ by about 1e-3 in half precision.
const TOLERANCE: f64 = 0.03;

/// Whether a configuration's steps can be recorded, and are to be: nothing is drawn at random or copied from host memory in
/// the middle of them.
pub(crate) fn can_record(config: &TrainConfig) -> bool {
    let random = config.lora_dropout + config.rank_dropout + config.module_dropout > 0.0;
    config.cuda_graphs && !(random || config.offload_base || config.cpu_offload_checkpointing)
}

/// What a run on a GPU is recorded by, where its steps can be. Everything that it does is on the recorder's stream from the
/// beginning, as each stream has workspaces of its own.
pub(super) fn recorder(config: &TrainConfig, device: Device) -> Option<Arc<Recorder>> {
    if dry::platform(device).is_cpu() || !can_record(config) {
        return None;
    }
    let recorder = Recorder::new(device).map_err(|error| tracing::warn!("training without CUDA graphs: {error}"));
    recorder.ok().map(Arc::new)
}

/// The recordings of a run.
#[derive(Debug)]
pub(super) struct StepGraphs {
    /// None on the CPU.
    recorder: Option<Arc<Recorder>>,
    recorded: BTreeMap<InputShapes, Recorded>,
}

/// The passes of one shape.
#[derive(Debug)]
struct Recorded {
    graph: Option<Graph>,
    inputs: Inputs,
    loss: Tensor,
}

/// What came of a micro-batch whose passes are recorded, or are to be.
pub(super) enum Recording {
    /// Its loss; the recordings go on.
    Goes(Tensor),
    /// Its loss, and why there is no use in recording any more.
    GivenUp(Tensor, Error),
}

/// The passes of a micro-batch: adds to the gradients and gives the loss, without its graph.
type Passes<'a> = &'a dyn Fn(&Inputs) -> Result<Tensor>;

impl StepGraphs {
    pub(super) fn new(recorder: Option<Arc<Recorder>>) -> Self {
        Self { recorder, recorded: BTreeMap::new() }
    }

    /// How many shapes are recorded.
    pub(super) fn len(&self) -> usize {
        self.recorded.len()
    }

    /// Whether gradients are written to where they are, and have to stay there.
    pub(super) fn hold_gradients(&self) -> bool {
        !self.recorded.is_empty()
    }

    /// The loss of a micro-batch, whose gradients are added. `first`: the gradients are zero or not there yet.
    pub(super) fn run(
        &mut self,
        inputs: Inputs,
        first: bool,
        parameters: &ParameterList,
        passes: Passes<'_>,
    ) -> Result<Recording> {
        let shape = inputs.shapes();
        if let Some(recorded) = self.recorded.get_mut(&shape) {
            recorded.inputs.assign(&inputs)?;
            drop(inputs);
            recorded.replay(passes)?;
            // The next replay writes over it.
            return Ok(Recording::Goes(recorded.loss.f_detach_copy()?));
        }
        let loss = passes(&inputs)?;
        if !first || self.recorded.len() == MOST {
            return Ok(Recording::Goes(loss));
        }
        let expected = Outcome::read(&loss, parameters)?;
        if !expected.is_finite() {
            return Ok(Recording::Goes(loss));
        }
        match lora_torch::caught(|| self.record(inputs, &loss, parameters, passes)) {
            Ok(mut recorded) => {
                foreach::zero(&parameters.gradients())?;
                recorded.replay(passes)?;
                let found = Outcome::read(&recorded.loss, parameters)?;
                if let Some(difference) = expected.difference(&found) {
                    foreach::zero(&parameters.gradients())?;
                    let loss = passes(&recorded.inputs)?;
                    return Ok(Recording::GivenUp(loss, Error::RecordingDiffers(difference)));
                }
                let loss = recorded.loss.f_detach_copy()?;
                self.recorded.insert(shape, recorded);
                Ok(Recording::Goes(loss))
            }
            Err(error) if error.is_device_lost() => Err(error),
            // The gradients are still those of the passes as they ran.
            Err(error) => Ok(Recording::GivenUp(loss, error)),
        }
    }

    fn record(
        &self,
        inputs: Inputs,
        loss: &Tensor,
        parameters: &ParameterList,
        passes: Passes<'_>,
    ) -> Result<Recorded> {
        let loss = loss.f_zeros_like()?;
        let Some(recorder) = &self.recorder else { return Ok(Recorded { graph: None, inputs, loss }) };
        // What the passes left in the cache is of no use to the recording, which has memory of its own.
        if let Some(parameter) = parameters.gradients().first() {
            memory::empty_cache(parameter.device())?;
        }
        let graph = recorder.record(|| -> Result<()> {
            loss.shallow_clone().f_copy_(&passes(&inputs)?)?;
            Ok(())
        })?;
        Ok(Recorded { graph: Some(graph), inputs, loss })
    }
}

impl Recorded {
    fn replay(&mut self, passes: Passes<'_>) -> Result<()> {
        match &mut self.graph {
            Some(graph) => graph.replay()?,
            None => self.loss.f_copy_(&passes(&self.inputs)?).map(drop)?,
        }
        Ok(())
    }
}

/// The result of passes: the loss and the norm of each gradient.
struct Outcome(Vec<f64>);

impl Outcome {
    /// Waits for the device.
    fn read(loss: &Tensor, parameters: &ParameterList) -> Result<Self> {
        let gradients = parameters.gradients();
        // What is told beside the loss may jump where a sum is rounded otherwise.
        let loss = super::step::loss_of(loss)?.f_to_kind(Kind::Float)?.f_reshape([1i64])?;
        let all = if gradients.is_empty() { loss } else { Tensor::f_cat(&[loss, foreach::norms(&gradients)?], 0)? };
        Ok(Self(Vec::try_from(all.f_to_kind(Kind::Double)?)?))
    }

    fn is_finite(&self) -> bool {
        self.0.iter().all(|value| value.is_finite())
    }

    /// Why another is not the same.
    fn difference(&self, other: &Self) -> Option<String> {
        let largest = self.0.iter().skip(1).copied().fold(0.0, f64::max);
        let close = |index: usize, (own, other): (f64, f64)| {
            // Small gradients are noise beside the large ones.
            let slack = if index == 0 { 0.0 } else { largest * 1e-3 };
            (own - other).abs() <= TOLERANCE * own.abs() + slack
        };
        let pairs = self.0.iter().copied().zip(other.0.iter().copied());
        let (index, (own, other)) = pairs.enumerate().find(|&(index, pair)| !close(index, pair))?;
        let what = if index == 0 { "the loss".to_owned() } else { format!("the norm of gradient {index}") };
        Some(format!("a recorded step gives {other} instead of {own} for {what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let one = Outcome(vec![0.5, 2.0, 1e-6]);
        assert_eq!(one.difference(&Outcome(vec![0.501, 1.97, 3e-4])), None);
        assert!(one.difference(&Outcome(vec![0.6, 2.0, 1e-6])).unwrap().contains("the loss"));
        assert!(one.difference(&Outcome(vec![0.5, 1.5, 1e-6])).unwrap().contains("gradient 1"));
        assert!(one.difference(&Outcome(vec![0.5, 2.0, 0.1])).unwrap().contains("gradient 2"));
        assert!(one.difference(&Outcome(vec![f64::NAN, 2.0, 1e-6])).is_some());
        assert!(!Outcome(vec![1.0, f64::INFINITY]).is_finite());
    }
}
