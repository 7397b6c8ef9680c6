//! Out of memory in the middle of a step: what was computed is dropped, the next remedy applied and the same step run again
//! with the same draws, as those belong to the items. All remedies here leave the update what it is; others are named
//! when nothing is left. Samples and validation are here too: where there is no room for them beside the recordings of
//! steps, the recordings are dropped and made again.

use lora_data::sampler::Visit;
use lora_torch::{dry, memory};

use super::graphs::StepGraphs;
use super::step::StepGradients;
use super::{Session, title};
use crate::event::Event;
use crate::{Error, Result};

/// What helps and cannot be done in the middle of a run, beside what of the base's own keys does.
pub(super) fn remedies(of_base: &str) -> String {
    format!(
        "what helps beyond that takes a new start: offload_base = true, to the same result; or, to another, base_storage = \"int8\" or \"nf4\", precision = \"bf16\" (\"fp16\" on older GPUs), {of_base}, target_modules = \"attention\", a lower lora_rank; or other programs that give the device free"
    )
}

impl Session {
    /// The gradients of a step, whatever it takes.
    pub(super) fn survive(&mut self, batches: &[Vec<Visit>]) -> Result<StepGradients> {
        let scaler = self.scaler;
        loop {
            let recorded = self.graphs.as_ref().map(StepGraphs::hold_gradients);
            match lora_torch::caught(|| self.gradients(batches)) {
                Err(error) if error.is_out_of_memory() => {
                    self.scaler = scaler;
                    self.graphs = None;
                    self.parameters.clear_gradients()?;
                    // Before the cache is emptied: this is what it looked like when it ran out.
                    let in_use = self.memory_in_use();
                    memory::empty_cache(self.device)?;
                    if recorded == Some(true) {
                        let remedy = "steps are not recorded any more, which kept memory of their own";
                        self.note_remedy(&error, &in_use, remedy, "cuda_graphs = false");
                    } else {
                        self.relieve(batches, &error, &in_use)?;
                        self.graphs = recorded.map(|_| StepGraphs::new(self.recorder.clone()));
                    }
                }
                result => return result,
            }
        }
    }

    /// Does what is beside training. Where there is no room for it beside the recordings, they make room, and come again with
    /// their shapes.
    pub(super) fn beside_recordings<T>(&mut self, run: impl Fn(&mut Self) -> Result<T>) -> Result<T> {
        match lora_torch::caught(|| run(self)) {
            Err(error) if error.is_out_of_memory() && self.recorded_shapes() > 0 => {
                tracing::debug!("recorded steps make room: {error}");
                self.graphs = None;
                self.empty_cache()?;
                self.graphs = Some(StepGraphs::new(self.recorder.clone()));
                lora_torch::caught(|| run(self))
            }
            result => result,
        }
    }

    /// Most items at once.
    pub(super) fn micro_batch(&self, batches: &[Vec<Visit>]) -> usize {
        let largest = batches.iter().map(Vec::len).max().unwrap_or(0);
        self.progress.economy.micro_batch.map_or(largest, |most| most.min(largest))
    }

    /// Whether activations within blocks are computed again.
    pub(super) fn recomputes(&self) -> bool {
        self.config.gradient_checkpointing || self.progress.economy.recompute
    }

    /// Whether the inner part of feed-forwards is.
    pub(super) fn recomputes_feed_forward(&self) -> bool {
        self.config.recompute_feed_forward || self.progress.economy.recompute_feed_forward
    }

    /// How often something was done because memory ran out.
    #[cfg(test)]
    pub(crate) fn remedies_tried(&self) -> usize {
        self.tried.len()
    }

    /// Applies the next remedy.
    fn relieve(&mut self, batches: &[Vec<Visit>], error: &Error, in_use: &str) -> Result<()> {
        let (most, noun) = (self.micro_batch(batches), self.feed.data.noun);
        let (remedy, permanent) = if most > 1 {
            let fewer = most.div_ceil(2);
            self.progress.economy.micro_batch = Some(fewer);
            let all: usize = batches.iter().map(Vec::len).sum();
            (
                format!("{fewer} {noun}(s) at once instead of {most}, accumulated to the same {all} a step"),
                format!("batch_size = {fewer} with gradient_accumulation_steps = {}", all.div_ceil(fewer)),
            )
        } else if !self.recomputes() && !self.recomputes_feed_forward() {
            self.progress.economy.recompute_feed_forward = true;
            ("the inner part of feed-forwards is computed again".into(), "recompute_feed_forward = true".to_owned())
        } else if !self.recomputes() {
            self.progress.economy.recompute = true;
            ("activations within blocks are computed again".into(), "gradient_checkpointing = true".to_owned())
        } else if !self.progress.economy.inputs_in_host
            && !self.config.cpu_offload_checkpointing
            && !dry::platform(self.device).is_cpu()
        {
            self.progress.economy.inputs_in_host = true;
            ("the inputs of blocks wait in host memory".into(), "cpu_offload_checkpointing = true".to_owned())
        } else if let Some(encoder) = self.feed.examples.encoder().filter(|_| !self.progress.economy.encoder_leaves) {
            self.progress.economy.encoder_leaves = true;
            self.base.unload(encoder);
            let title = title(&*self.base, encoder);
            (format!("the {title} leaves the device between {noun}s"), "cache_latents = true".to_owned())
        } else {
            return Err(self.exhausted(format!("at step {}{in_use}", self.progress.step + 1), error));
        };
        self.note_remedy(error, in_use, &remedy, &permanent);
        Ok(())
    }

    /// Tells of a remedy, now and in the end.
    fn note_remedy(&mut self, error: &Error, in_use: &str, remedy: &str, permanent: &str) {
        let step = self.progress.step + 1;
        let message = format!(
            "step {step}: {error}{in_use}. Step {step} is run again with the same draws and from now on: {remedy}. The update stays the same; {permanent} does so from the start"
        );
        tracing::warn!("{message}");
        self.tell(Event::OutOfMemory { step, remedy: remedy.to_owned(), permanent: permanent.to_owned(), message });
        self.tried.push(format!("step {step}{in_use}: {remedy}"));
    }

    /// Nothing is left: what was tried, and what would help.
    pub(super) fn exhausted(&mut self, place: String, error: &Error) -> Error {
        Error::OutOfMemory {
            place,
            reason: error.to_string(),
            tried: std::mem::take(&mut self.tried),
            remedies: remedies(self.remedies),
        }
    }

    /// How much is in use, for people; empty where it cannot be told.
    fn memory_in_use(&self) -> String {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        match self.device_memory() {
            Ok(Some(own)) => format!(
                " ({:.2} GiB in tensors, {:.2} GiB reserved, {:.2} GiB free of {:.2})",
                gib(own.allocated),
                gib(own.reserved),
                gib(own.free),
                gib(own.total)
            ),
            _ => memory::host_memory()
                .map_or_else(String::new, |own| format!(" ({:.2} GiB resident)", gib(own.resident))),
        }
    }
}
