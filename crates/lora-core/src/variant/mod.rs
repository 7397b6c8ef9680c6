//! Adapter variants: the trait that every formula implements, and the registry that finds one by its name.
//! One variant, one file. A variant of a user's own crate registers in the same way as ours.

mod dropout;
mod lora;

pub use dropout::Dropout;
pub use lora::Lora;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::backend::Backend;
use crate::random::Stream;
use crate::{Error, HostTensor, LayerGeometry, Result};

/// The frozen layer under an adapter, whatever its weights are stored as.
pub trait BaseLayer<B: Backend> {
    /// Its shape.
    fn geometry(&self) -> LayerGeometry;
    /// Its output without any adapter.
    fn forward(&self, input: &B::Tensor) -> Result<B::Tensor>;
    /// Its weight, in the dtype it computes in.
    fn weight(&self) -> Result<B::Tensor>;
    /// Its bias.
    fn bias(&self) -> Option<B::Tensor>;
}

/// The tensors of one adapted layer in a backend, by the variant's own names.
#[derive(Debug)]
pub struct Parameters<B: Backend> {
    /// The trained tensors.
    pub tensors: BTreeMap<String, B::Tensor>,
    /// The factor on the update, `alpha / rank` for plain LoRA.
    pub scale: f64,
}

impl<B: Backend> Parameters<B> {
    /// One tensor by name.
    pub fn get(&self, variant: &str, name: &str) -> Result<&B::Tensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::MissingTensor { variant: variant.to_owned(), tensor: name.to_owned() })
    }
}

/// The formula of one kind of adapter.
pub trait Variant<B: Backend>: Debug + Send + Sync {
    /// The name it is registered and configured under.
    fn name(&self) -> &str;

    /// The tensors that training starts from, such that the update is zero. `stream` is the layer's own.
    fn initialise(&self, base: &dyn BaseLayer<B>, rank: usize, stream: &Stream)
    -> Result<BTreeMap<String, HostTensor>>;

    /// The update ΔW in the shape of the base's weight, its scale included.
    fn delta_weight(&self, backend: &B, geometry: &LayerGeometry, parameters: &Parameters<B>) -> Result<B::Tensor>;

    /// The adapted layer's output. The default computes with `W + ΔW`; override where something cheaper is equal.
    /// A variant that overrides nothing has no dropout.
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        if dropout.is_some() {
            return Err(Error::Option {
                key: "lora_dropout",
                value: "above 0".into(),
                reason: format!("variant `{}` has no dropout", self.name()),
            });
        }
        let weight = base.weight()?;
        let delta = backend.cast_like(&self.delta_weight(backend, &base.geometry(), parameters)?, &weight)?;
        let effective = backend.add(delta, &weight)?;
        backend.apply(&base.geometry(), input, &effective, base.bias().as_ref())
    }
}

/// Variants by name.
#[derive(Debug, Clone)]
pub struct VariantRegistry<B: Backend>(BTreeMap<String, Arc<dyn Variant<B>>>);

impl<B: Backend> Default for VariantRegistry<B> {
    /// The variants of this crate.
    fn default() -> Self {
        let lora: Arc<dyn Variant<B>> = Arc::new(Lora);
        Self(BTreeMap::from([(lora.name().to_owned(), lora)]))
    }
}

impl<B: Backend> VariantRegistry<B> {
    /// Adds a variant under its own name, which must be free.
    pub fn register(&mut self, variant: impl Variant<B> + 'static) -> Result<()> {
        let name = variant.name().to_owned();
        if self.0.contains_key(&name) {
            return Err(Error::DuplicateVariant { name });
        }
        self.0.insert(name, Arc::new(variant));
        Ok(())
    }

    /// The variant of a name.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Variant<B>>> {
        self.0.get(name).cloned().ok_or_else(|| Error::UnknownVariant {
            name: name.to_owned(),
            known: self.0.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }
}
