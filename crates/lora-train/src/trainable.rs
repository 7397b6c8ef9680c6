//! The trained adapter: hung on the networks' layers, known to the optimiser, exported as a canonical adapter.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::random::Stream;
use lora_core::target::{Patterns, TargetLayer, Targets};
use lora_core::variant::{Parameters, Request, Variant, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath};
use lora_models::layers::{Adaptable, AdaptableLayer, AttachedAdapter};
use lora_torch::TchBackend;
use lora_torch::gradients::{self, AdamW, AdamWEntry};
use lora_torch::tch::{Kind, Tensor};
use lora_torch::tensor::{from_host, to_host};

use crate::Result;

/// Shape of a new adapter.
#[derive(Debug, Clone, Default)]
pub struct AdapterOptions {
    /// Name of the variant.
    pub variant: String,
    /// Rank.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// The variant's own numbers.
    pub options: BTreeMap<String, f64>,
    /// Scale by alpha / √rank (rsLoRA); recorded as alpha · √rank.
    pub rank_stabilised: bool,
    /// Other ranks for some layers.
    pub ranks: Patterns,
    /// Other alphas for some layers.
    pub alphas: Patterns,
    /// Seed of its first values.
    pub seed: u64,
}

impl AdapterOptions {
    /// Plain LoRA.
    pub fn lora(rank: usize, alpha: f64, seed: u64) -> Self {
        Self { variant: "lora".into(), rank, alpha, seed, ..Self::default() }
    }

    /// What one layer gets: the request, and the alpha to record.
    fn for_layer(&self, layer: &TargetLayer) -> (Request, f64) {
        let rank = self.ranks.get(layer).map_or(self.rank, |rank| rank as usize);
        let alpha = self.alphas.get(layer).unwrap_or(self.alpha);
        let alpha = if self.rank_stabilised { alpha * (rank as f64).sqrt() } else { alpha };
        (Request { rank, scale: alpha / rank.max(1) as f64, options: self.options.clone() }, alpha)
    }
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

/// What a module is besides its trained tensors.
#[derive(Debug)]
struct Attached {
    variant: Arc<dyn Variant<TchBackend>>,
    rank: usize,
    alpha: f64,
    frozen: BTreeMap<String, HostTensor>,
}

/// All trained tensors of a run, in f32.
#[derive(Debug, Default)]
pub struct TrainableAdapter {
    tensors: Vec<Trained>,
    modules: BTreeMap<ModulePath, Attached>,
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
        if let Some(unknown) = options.options.keys().find(|name| !variant.options().contains(&name.as_str())) {
            return Err(lora_core::Error::Option {
                key: "variant_options",
                value: unknown.clone(),
                reason: match variant.options() {
                    [] => format!("variant `{}` has no options", options.variant),
                    known => format!("variant `{}` knows {}", options.variant, known.join(", ")),
                },
            }
            .into());
        }
        let mut result = Ok(());
        network.visit_layers(&mut |layer| {
            let module = ModulePath::new(component, layer.path());
            let Some(target) = layers.iter().find(|target| target.path == module) else { return };
            if result.is_err() {
                return;
            }
            result = (|| {
                let (variant, tensors, rank, alpha) = match from.and_then(|adapter| adapter.modules.get(&module)) {
                    Some(known) => (variants.get(&known.variant)?, known.tensors.clone(), known.rank, known.alpha),
                    None => {
                        let (request, alpha) = options.for_layer(target);
                        let (rank, alpha) = variant.rank_and_alpha(&target.geometry, &request, alpha);
                        let stream = Stream::new(options.seed).at("adapter").at(&module.to_string());
                        (variant.clone(), variant.initialise(&TchBackend, layer, &request, &stream)?, rank, alpha)
                    }
                };
                let leaves = self.register(&module, &tensors, layer, &*variant)?;
                let parameters = Parameters { tensors: leaves, scale: alpha / rank.max(1) as f64 };
                layer.attach(AttachedAdapter { variant: variant.clone(), parameters });
                let frozen = tensors.into_iter().filter(|(name, _)| !variant.is_trained(name)).collect();
                self.modules.insert(module, Attached { variant, rank, alpha, frozen });
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
        variant: &dyn Variant<TchBackend>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let device = layer.device();
        let mut leaves = BTreeMap::new();
        for (name, host) in tensors {
            let leaf = from_host(host, device)?.f_to_kind(Kind::Float)?;
            if !variant.is_trained(name) {
                leaves.insert(name.clone(), leaf);
                continue;
            }
            let leaf = leaf.f_set_requires_grad(true)?;
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

    /// Takes one AdamW step with the gradients as they are, by each component's own numbers and, where the flag is set,
    /// those of up-projections (LoRA+). A tensor without a gradient is left alone: no decay either.
    pub fn step(&mut self, numbers: impl Fn(Component, bool) -> AdamW) -> Result<()> {
        let mut groups: BTreeMap<(Component, bool), Vec<AdamWEntry>> = BTreeMap::new();
        for trained in &self.tensors {
            let gradient = trained.parameter.grad();
            if gradient.defined() {
                let is_up = matches!(trained.name.as_str(), "up" | "embedding_up");
                groups.entry((trained.module.component, is_up)).or_default().push(AdamWEntry {
                    parameter: trained.parameter.detach(),
                    gradient,
                    mean: trained.mean.shallow_clone(),
                    square: trained.square.shallow_clone(),
                    steps: trained.steps.shallow_clone(),
                });
            }
        }
        for ((component, is_up), entries) in groups {
            numbers(component, is_up).step(entries)?;
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

    /// A copy in host memory, as files hold it (see [`Variant::export`]).
    pub fn export(&self) -> Result<Adapter> {
        let mut tensors: BTreeMap<&ModulePath, BTreeMap<String, HostTensor>> = BTreeMap::new();
        for trained in &self.tensors {
            tensors.entry(&trained.module).or_default().insert(trained.name.clone(), to_host(&trained.parameter)?);
        }
        let mut adapter = Adapter::default();
        for (path, Attached { variant, rank, alpha, frozen }) in &self.modules {
            let mut tensors = tensors.remove(path).unwrap_or_default();
            tensors.extend(frozen.clone());
            let module = AdapterModule { variant: variant.name().to_owned(), tensors, rank: *rank, alpha: *alpha };
            adapter.modules.insert(path.clone(), variant.export(module)?);
        }
        Ok(adapter)
    }
}

/// The layers of some networks that a list of targets names.
pub fn select(networks: &mut [&mut dyn Adaptable], targets: &Targets) -> Result<Vec<TargetLayer>> {
    let layers: Vec<_> = networks.iter_mut().flat_map(|network| network.adaptable_layers()).collect();
    Ok(targets.select(&layers)?)
}
