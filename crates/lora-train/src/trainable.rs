//! The trained adapter: hung on the networks' layers, known to the optimiser, exported as a canonical adapter.

use std::collections::BTreeMap;

use lora_core::random::Stream;
use lora_core::target::{TargetLayer, Targets};
use lora_core::variant::{Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath};
use lora_models::layers::{Adaptable, AdaptableLayer, AttachedAdapter};
use lora_torch::TchBackend;
use lora_torch::gradients::{self, AdamW, AdamWEntry};
use lora_torch::tch::{Kind, Tensor};
use lora_torch::tensor::{from_host, to_host};

use crate::Result;

/// Shape of a new adapter.
#[derive(Debug, Clone)]
pub struct AdapterOptions {
    /// Name of the variant.
    pub variant: String,
    /// Rank.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Seed of its first values.
    pub seed: u64,
}

/// One trained tensor with its optimiser state.
#[derive(Debug)]
struct Trained {
    module: ModulePath,
    name: String,
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: Tensor,
}

/// All trained tensors of a run, in f32.
#[derive(Debug, Default)]
pub struct TrainableAdapter {
    tensors: Vec<Trained>,
    modules: BTreeMap<ModulePath, (String, usize, f64)>,
}

impl TrainableAdapter {
    /// Hangs an adapter on the targeted layers of a network, new or with the values of `from`.
    pub fn attach(
        &mut self,
        network: &mut dyn Adaptable,
        layers: &[TargetLayer],
        variants: &VariantRegistry<TchBackend>,
        options: &AdapterOptions,
        from: Option<&Adapter>,
    ) -> Result<()> {
        let component = network.component();
        let variant = variants.get(&options.variant)?;
        let mut result = Ok(());
        network.visit_layers(&mut |layer| {
            let module = ModulePath::new(component, layer.path());
            if result.is_err() || !layers.iter().any(|target| target.path == module) {
                return;
            }
            result = (|| {
                let (tensors, rank, alpha) = match from.and_then(|adapter| adapter.modules.get(&module)) {
                    Some(known) => (known.tensors.clone(), known.rank, known.alpha),
                    None => {
                        let stream = Stream::new(options.seed).at("adapter").at(&module.to_string());
                        (variant.initialise(layer, options.rank, &stream)?, options.rank, options.alpha)
                    }
                };
                let leaves = self.register(&module, &tensors, layer)?;
                let parameters = Parameters { tensors: leaves, scale: alpha / rank as f64 };
                layer.attach(AttachedAdapter { variant: variant.clone(), parameters });
                self.modules.insert(module, (options.variant.clone(), rank, alpha));
                Ok(())
            })();
        });
        result
    }

    fn register(
        &mut self,
        module: &ModulePath,
        tensors: &BTreeMap<String, HostTensor>,
        layer: &AdaptableLayer,
    ) -> Result<BTreeMap<String, Tensor>> {
        let device = layer.device();
        let mut leaves = BTreeMap::new();
        for (name, host) in tensors {
            let leaf = from_host(host, device)?.f_to_kind(Kind::Float)?.f_set_requires_grad(true)?;
            self.tensors.push(Trained {
                module: module.clone(),
                name: name.clone(),
                mean: leaf.detach().f_zeros_like()?,
                square: leaf.detach().f_zeros_like()?,
                steps: Tensor::f_zeros([0i64; 0], (Kind::Float, device))?,
                parameter: leaf.shallow_clone(),
            });
            leaves.insert(name.clone(), leaf);
        }
        Ok(leaves)
    }

    /// Number of adapted layers.
    pub fn modules(&self) -> usize {
        self.modules.len()
    }

    /// Number of trained numbers.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(|trained| trained.parameter.numel()).sum()
    }

    /// The gradients that the last backward passes left, of those tensors that got one.
    pub fn gradients(&self) -> Vec<Tensor> {
        self.tensors.iter().map(|trained| trained.parameter.grad()).filter(Tensor::defined).collect()
    }

    /// Takes one AdamW step with the gradients as they are, by each component's own numbers. A tensor without a gradient is
    /// left alone: no decay either.
    pub fn step(&mut self, numbers: impl Fn(Component) -> AdamW) -> Result<()> {
        for component in [Component::TextEncoder, Component::Unet] {
            let entries = self.tensors.iter().filter(|trained| trained.module.component == component);
            let entries = entries.filter_map(|trained| {
                let gradient = trained.parameter.grad();
                gradient.defined().then(|| AdamWEntry {
                    parameter: trained.parameter.detach(),
                    gradient,
                    mean: trained.mean.shallow_clone(),
                    square: trained.square.shallow_clone(),
                    steps: trained.steps.shallow_clone(),
                })
            });
            numbers(component).step(entries.collect())?;
        }
        Ok(())
    }

    /// Forgets all gradients.
    pub fn clear_gradients(&mut self) -> Result<()> {
        let mut parameters: Vec<Tensor> =
            self.tensors.iter().map(|trained| trained.parameter.shallow_clone()).collect();
        Ok(gradients::clear(&mut parameters)?)
    }

    /// Limits the gradients' common norm and returns it (see [`gradients::clip`]).
    pub fn clip(&mut self, limit: f64) -> Result<f64> {
        Ok(gradients::clip(&mut self.gradients(), limit)?)
    }

    /// Whether every trained number is finite.
    pub fn is_finite(&self) -> Result<bool> {
        for trained in &self.tensors {
            if f64::try_from(trained.parameter.detach().f_isfinite()?.f_all()?.f_to_kind(Kind::Double)?)? == 0.0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// L2 norm of each trained tensor, by module and name.
    pub fn norms(&self) -> Result<BTreeMap<(ModulePath, String), f64>> {
        let norm = |trained: &Trained| {
            Ok(((trained.module.clone(), trained.name.clone()), f64::try_from(trained.parameter.detach().f_norm()?)?))
        };
        self.tensors.iter().map(norm).collect()
    }

    /// A copy in host memory.
    pub fn export(&self) -> Result<Adapter> {
        let mut adapter = Adapter::default();
        for (path, (variant, rank, alpha)) in &self.modules {
            let module =
                AdapterModule { variant: variant.clone(), tensors: BTreeMap::new(), rank: *rank, alpha: *alpha };
            adapter.modules.insert(path.clone(), module);
        }
        for trained in &self.tensors {
            if let Some(module) = adapter.modules.get_mut(&trained.module) {
                module.tensors.insert(trained.name.clone(), to_host(&trained.parameter)?);
            }
        }
        Ok(adapter)
    }
}

/// The layers of some networks that a list of targets names.
pub fn select(networks: &mut [&mut dyn Adaptable], targets: &Targets) -> Result<Vec<TargetLayer>> {
    let layers: Vec<_> = networks.iter_mut().flat_map(|network| network.adaptable_layers()).collect();
    Ok(targets.select(&layers)?)
}
