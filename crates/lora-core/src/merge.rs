//! Putting adapters into weights and taking them out: the arithmetic, one layer at a time. Streaming a checkpoint through
//! it is `lora-io`'s.

use crate::backend::Backend;
use crate::variant::{BaseLayer, Parameters, Variant};
use crate::{AdapterModule, LayerGeometry, Result};

/// An adapter on a layer with the strength that it is merged with.
#[derive(Debug)]
pub struct Applied<'a, B: Backend> {
    /// The formula.
    pub variant: &'a dyn Variant<B>,
    /// Its tensors.
    pub parameters: Parameters<B>,
    /// The factor on its update; 1 is the adapter as it was trained.
    pub strength: f64,
}

/// `W + Σ strength · ΔW`, every update computed against the untouched base, so that the order does not matter.
/// An adapter with strength 0 leaves no trace.
///
/// # Errors
/// [`crate::Error::MissingTensor`] or [`crate::Error::Shape`] where the parameters of an adapter are not those of its
/// variant on this layer; [`crate::Error::Backend`] where the backend fails.
pub fn merged_weight<B: Backend>(
    backend: &B,
    base: &dyn BaseLayer<B>,
    adapters: &[Applied<'_, B>],
) -> Result<B::Tensor> {
    let weight = base.weight()?;
    let mut sum: Option<B::Tensor> = None;
    for adapter in adapters.iter().filter(|adapter| adapter.strength != 0.0) {
        let delta = adapter.variant.delta_weight(backend, base, &adapter.parameters)?;
        let delta = if adapter.strength == 1.0 { delta } else { backend.scale(&delta, adapter.strength)? };
        sum = Some(match sum {
            Some(sum) => backend.add(sum, &delta)?,
            None => delta,
        });
    }
    match sum {
        Some(sum) => backend.add(backend.cast_like(&sum, &weight)?, &weight),
        None => Ok(weight),
    }
}

/// `b + Σ strength · Δb`; `None` if no adapter changes the bias. A layer without a bias gets one.
///
/// # Errors
/// As of [`merged_weight`].
pub fn merged_bias<B: Backend>(
    backend: &B,
    base: &dyn BaseLayer<B>,
    adapters: &[Applied<'_, B>],
) -> Result<Option<B::Tensor>> {
    let mut sum: Option<B::Tensor> = None;
    for adapter in adapters.iter().filter(|adapter| adapter.strength != 0.0) {
        if let Some(delta) = adapter.variant.delta_bias(backend, base, &adapter.parameters)? {
            let delta = backend.scale(&delta, adapter.strength)?;
            sum = Some(match sum {
                Some(sum) => backend.add(sum, &delta)?,
                None => delta,
            });
        }
    }
    match (sum, base.bias()) {
        (Some(sum), Some(bias)) => Ok(Some(backend.add(backend.cast_like(&sum, &bias)?, &bias)?)),
        (sum, _) => Ok(sum),
    }
}

/// The layer that a module adapts, from the shape of its base weight: an embedding if the module's tensors say so, else
/// what the shape shows.
pub fn geometry(module: &AdapterModule, weight: &[usize]) -> Option<LayerGeometry> {
    match *weight {
        [entries, width] if module.tensors.contains_key("embedding_down") => {
            Some(LayerGeometry::Embedding { entries, width })
        }
        _ => LayerGeometry::of_weight(weight),
    }
}
