//! Diffusion around a network that denoises: noise schedules with what the network is to predict, and samplers; in
//! [`flow`] the same for networks that answer with velocities.
//! Networks are in [`crate::networks`]; these take their answers as tensors.

pub mod flow;
mod sampler;
mod schedule;

pub use sampler::{Sampler, SamplerKind};
pub use schedule::{NoiseSchedule, Prediction, noise_schedule};
