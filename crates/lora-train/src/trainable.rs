//! The trained adapter: hung on the networks' layers, exported as a canonical adapter. What the optimiser does with its
//! tensors is `parameters`' business.

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_core::compose::Outcome;
use lora_core::random::Stream;
use lora_core::target::{Patterns, TargetLayer, Targets};
use lora_core::variant::{
    BIAS_VALUE, BaseLayer, Parameters, Request, TOKEN_ROWS, TOKENS, Variant, VariantRegistry, WEIGHT_VALUE,
};
use lora_core::{Adapter, AdapterModule, HostTensor, LayerGeometry, ModulePath};
use lora_io::hash::sha256;
use lora_models::layers::{Adaptable, AdaptableLayer, AttachedAdapter};
use lora_torch::tch::{Kind, Tensor, no_grad_guard};
use lora_torch::tensor::{from_host, to_host};
use lora_torch::{TchBackend, dry};

use crate::Result;
use crate::config::TrainConfig;
use crate::initial;
use crate::parameters::ParameterList;

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
    /// Biases of its layers are trained too, in the place of the base's.
    pub biases: bool,
    /// Factors are cast to half precision where a layer computes, instead of once a step for all layers together: no
    /// copies of all of them are held, nor gradients of copies, for more and smaller kernels.
    pub cast_where_used: bool,
    /// Seed of its first values.
    pub seed: u64,
}

impl AdapterOptions {
    /// Plain LoRA.
    pub fn lora(rank: usize, alpha: f64, seed: u64) -> Self {
        Self { variant: "lora".into(), rank, alpha, seed, ..Self::default() }
    }

    /// As a configuration asks for, on the layers that it targets.
    pub(crate) fn of(config: &TrainConfig, targets: &[TargetLayer]) -> Result<Self> {
        Ok(Self {
            variant: config.variant.clone(),
            rank: config.lora_rank,
            alpha: config.lora_alpha,
            options: config.variant_options.clone(),
            rank_stabilised: config.use_rslora,
            ranks: Patterns::parse(&config.rank_pattern, targets)?,
            alphas: Patterns::parse(&config.alpha_pattern, targets)?,
            biases: Biases::of(config) != Biases::None,
            cast_where_used: config.gradient_checkpointing,
            seed: config.seed,
        })
    }

    /// Layers that are trained whole: their weights themselves (PEFT's `modules_to_save`).
    pub fn whole(seed: u64) -> Self {
        Self {
            variant: "full".into(),
            rank: 1,
            alpha: 1.0,
            options: BTreeMap::from([("value".to_owned(), 1.0)]),
            biases: true,
            seed,
            ..Self::default()
        }
    }

    /// What one layer gets: the request, and the alpha to record.
    pub(crate) fn for_layer(&self, layer: &TargetLayer) -> (Request, f64) {
        let rank = self.ranks.get(layer).map_or(self.rank, |rank| rank as usize);
        let alpha = self.alphas.get(layer).unwrap_or(self.alpha);
        let alpha = if self.rank_stabilised { alpha * (rank as f64).sqrt() } else { alpha };
        (Request { rank, scale: alpha / rank.max(1) as f64, options: self.options.clone() }, alpha)
    }
}

/// Which biases are trained (PEFT's `bias`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Biases {
    None,
    /// Those of adapted layers.
    Adapted,
    /// Those of all layers.
    All,
}

impl Biases {
    pub(crate) fn of(config: &TrainConfig) -> Self {
        match config.extra.text("bias") {
            Some("lora_only") => Self::Adapted,
            Some("all") => Self::All,
            _ => Self::None,
        }
    }
}

/// One adapted layer.
#[derive(Debug)]
struct Attached {
    variant: Arc<dyn Variant<TchBackend>>,
    rank: usize,
    alpha: f64,
    trained: BTreeMap<String, Tensor>,
    frozen: BTreeMap<String, HostTensor>,
}

/// An adapter that is trained.
#[derive(Debug, Default)]
pub struct TrainableAdapter {
    modules: BTreeMap<ModulePath, Attached>,
    /// What was kept of updates that it did not begin with as they were.
    begun: Vec<Outcome>,
}

impl TrainableAdapter {
    /// Hangs an adapter on the targeted layers of a network, new or with the updates of `from`, brought to the variant, rank
    /// and alpha that the options ask for ([`TrainableAdapter::begun`]), and takes its trained tensors into `list`.
    ///
    /// # Errors
    /// Where the variant is unknown, has no such option or no form on a layer, where a module of `from` cannot be brought to
    /// what is asked for, and where memory runs out.
    pub fn attach(
        &mut self,
        network: &mut dyn Adaptable,
        layers: &[TargetLayer],
        variants: &VariantRegistry<TchBackend>,
        options: &AdapterOptions,
        from: Option<&Adapter>,
        list: &mut ParameterList,
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
                let own = match from.and_then(|adapter| adapter.modules.get(&module)) {
                    Some(known) => {
                        let (own, outcome) = initial::module(known, layer, target, variants, options)?;
                        self.begun.extend(outcome);
                        own
                    }
                    None => fresh(&*variant, layer, target, options)?,
                };
                let AdapterModule { variant, mut tensors, rank, alpha } = own;
                let variant = variants.get(&variant)?;
                if options.biases && !tensors.contains_key(BIAS_VALUE) {
                    tensors.extend(bias_of(layer)?.map(|bias| (BIAS_VALUE.to_owned(), bias)));
                }
                let (mut leaves, mut trained, mut frozen) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
                let computes_in_half = variant.computes_in_input_dtype(&layer.geometry());
                for (name, host) in tensors {
                    // What takes a weight's place is computed with as the weight is.
                    let half = (computes_in_half || name == WEIGHT_VALUE) && layer.kind() != Kind::Float;
                    let values = from_host(&host, layer.device())?.f_to_kind(Kind::Float)?;
                    let leaf = if variant.is_trained(&name) {
                        let (full, is_up) = (format!("{module}.{name}"), variant.is_up(&name));
                        trained.insert(name.clone(), values.shallow_clone());
                        if half && (name == WEIGHT_VALUE || !options.cast_where_used) {
                            list.add_in(layer.kind(), component, full, is_up, &values)?
                        } else {
                            let leaf = values.f_set_requires_grad(true)?;
                            list.add(component, full, is_up, &leaf)?;
                            leaf
                        }
                    } else {
                        frozen.insert(name.clone(), host);
                        if half { values.f_to_kind(layer.kind())? } else { values }
                    };
                    leaves.insert(name, leaf);
                }
                let parameters = Parameters { tensors: leaves, scale: alpha / rank.max(1) as f64 };
                layer.attach(AttachedAdapter { variant: variant.clone(), parameters });
                self.modules.insert(module, Attached { variant, rank, alpha, trained, frozen });
                Ok(())
            })();
        })?;
        result
    }

    /// Trains the biases of a network's layers that carry nothing yet, new or with the values of `from`.
    pub(crate) fn attach_biases(
        &mut self,
        network: &mut dyn Adaptable,
        variants: &VariantRegistry<TchBackend>,
        from: Option<&Adapter>,
        list: &mut ParameterList,
    ) -> Result<()> {
        let component = network.component();
        let variant = variants.get("full")?;
        let mut result = Ok(());
        network.visit_layers(&mut |layer| {
            let module = ModulePath::new(component, layer.path());
            if result.is_err() || self.modules.contains_key(&module) {
                return;
            }
            result = (|| {
                let known = from.and_then(|adapter| adapter.modules.get(&module)?.tensors.get(BIAS_VALUE).cloned());
                let Some(host) = known.map_or_else(|| bias_of(layer), |known| Ok(Some(known)))? else { return Ok(()) };
                let leaf = from_host(&host, layer.device())?.f_to_kind(Kind::Float)?.f_set_requires_grad(true)?;
                list.add(component, format!("{module}.{BIAS_VALUE}"), false, &leaf)?;
                let tensors = |leaf: &Tensor| BTreeMap::from([(BIAS_VALUE.to_owned(), leaf.shallow_clone())]);
                let parameters = Parameters { tensors: tensors(&leaf), scale: 1.0 };
                layer.attach(AttachedAdapter { variant: variant.clone(), parameters });
                let (trained, frozen) = (tensors(&leaf), BTreeMap::new());
                self.modules
                    .insert(module, Attached { variant: variant.clone(), rank: 1, alpha: 1.0, trained, frozen });
                Ok(())
            })();
        })?;
        result
    }

    /// Trains the rows of single tokens of an embedding, new or with the values of `from`, and in the head that reads the same
    /// table.
    pub(crate) fn attach_tokens(
        &mut self,
        network: &mut dyn Adaptable,
        tokens: &TrainedTokens,
        variants: &VariantRegistry<TchBackend>,
        from: Option<&Adapter>,
        list: &mut ParameterList,
    ) -> Result<()> {
        let component = network.component();
        let variant = variants.get("full")?;
        let mut result = Ok(());
        let mut leaves: Option<BTreeMap<String, Tensor>> = None;
        network.visit_layers(&mut |layer| {
            let module = ModulePath::new(component, layer.path());
            if result.is_err() || module != tokens.embedding && layer.tied() != Some(&tokens.embedding.path) {
                return;
            }
            result = (|| {
                if layer.adapter().is_some() {
                    return Err(lora_core::Error::Option {
                        key: "trainable_token_indices",
                        value: tokens.embedding.path.clone(),
                        reason: format!(
                            "`{}` reads the same table and is trained itself; name it in one place",
                            layer.path()
                        ),
                    }
                    .into());
                }
                if leaves.is_none() {
                    let known = from.and_then(|adapter| adapter.modules.get(&module)?.tensors.get(TOKEN_ROWS).cloned());
                    let host = known.map_or_else(|| tokens.rows_of(layer), Ok)?;
                    let rows = from_host(&host, layer.device())?.f_to_kind(Kind::Float)?.f_set_requires_grad(true)?;
                    list.add(component, format!("{module}.{TOKEN_ROWS}"), false, &rows)?;
                    let numbers = tokens.numbers()?;
                    let there = from_host(&numbers, layer.device())?;
                    let trained = BTreeMap::from([(TOKEN_ROWS.to_owned(), rows.shallow_clone())]);
                    let frozen = BTreeMap::from([(TOKENS.to_owned(), numbers)]);
                    let own = Attached { variant: variant.clone(), rank: 1, alpha: 1.0, trained, frozen };
                    self.modules.insert(module, own);
                    leaves = Some(BTreeMap::from([(TOKEN_ROWS.to_owned(), rows), (TOKENS.to_owned(), there)]));
                }
                let own = leaves.iter().flatten().map(|(name, leaf)| (name.clone(), leaf.shallow_clone()));
                let parameters = Parameters { tensors: own.collect(), scale: 1.0 };
                layer.attach(AttachedAdapter { variant: variant.clone(), parameters });
                Ok(())
            })();
        })?;
        result
    }

    /// Learning rates of trained tensors, by their names in a [`ParameterList`], where layers have their own.
    pub(crate) fn rates(&self, layers: &[TargetLayer], of: &Patterns) -> BTreeMap<String, f64> {
        let mut rates = BTreeMap::new();
        for layer in layers {
            let (Some(rate), Some(own)) = (of.get(layer), self.modules.get(&layer.path)) else { continue };
            rates.extend(own.trained.keys().map(|name| (format!("{}.{name}", layer.path), rate)));
        }
        rates
    }

    /// Scales both factors of a plain LoRA where the Frobenius norm of its scaled update is above `limit`, each by the root of
    /// what brings the norm there (sd-scripts' `scale_weight_norms`). Returns how many layers were scaled, a scalar on the
    /// device.
    ///
    /// # Errors
    /// Where memory runs out.
    pub(crate) fn limit_norms(&self, limit: f64) -> Result<Option<Tensor>> {
        let _guard = no_grad_guard();
        let mut scaled: Option<Tensor> = None;
        for Attached { rank, alpha, trained, .. } in self.modules.values() {
            let (Some(down), Some(up)) = (trained.get("down"), trained.get("up")) else { continue };
            let norm = product_norm(&up.detach(), &down.detach())?.f_mul_scalar(alpha / (*rank).max(1) as f64)?;
            // One that is zero stays so.
            let ratio = norm.f_reciprocal()?.f_mul_scalar(limit)?.f_clamp_max(1.0)?;
            let root = ratio.f_sqrt()?;
            for factor in [up, down] {
                let _ = factor.detach().f_mul_(&root)?;
            }
            let one = ratio.f_lt(1.0)?.f_to_kind(Kind::Float)?;
            scaled = Some(match scaled {
                Some(sum) => sum.f_add(&one)?,
                None => one,
            });
        }
        Ok(scaled)
    }

    /// What was kept of the updates of layers that did not begin with the values of an adapter as they were: with its update
    /// at another rank or alpha, or of another variant.
    pub fn begun(&self) -> &[Outcome] {
        &self.begun
    }

    /// Number of adapted layers.
    pub fn modules(&self) -> usize {
        self.modules.len()
    }

    /// A digest of the tensors that are not trained, where the variant has any.
    pub(crate) fn frozen_digest(&self) -> Option<String> {
        let mut text = String::new();
        for (path, Attached { frozen, .. }) in &self.modules {
            for (name, tensor) in frozen {
                text.push_str(&format!("{path}.{name} {}\n", sha256(tensor.bytes())));
            }
        }
        (!text.is_empty()).then(|| sha256(text.as_bytes()))
    }

    /// A copy in host memory, as files hold it (see [`Variant::export`]).
    ///
    /// # Errors
    /// Where the device is lost or host memory runs out.
    pub fn export(&self) -> Result<Adapter> {
        let mut adapter = Adapter::default();
        for (path, Attached { variant, rank, alpha, trained, frozen }) in &self.modules {
            let mut tensors = frozen.clone();
            for (name, leaf) in trained {
                tensors.insert(name.clone(), to_host(leaf)?);
            }
            let module = AdapterModule { variant: variant.name().to_owned(), tensors, rank: *rank, alpha: *alpha };
            adapter.modules.insert(path.clone(), variant.export(module)?);
        }
        Ok(adapter)
    }
}

/// The Frobenius norm of `up · down`, `[outputs, rank, …] · [rank, …]`, from products of rank by rank numbers: the trace of
/// (upᵀ up)(down downᵀ).
fn product_norm(up: &Tensor, down: &Tensor) -> Result<Tensor> {
    let (up, down) = (up.f_flatten(1, -1)?, down.f_flatten(1, -1)?);
    let products = up.f_tr()?.f_matmul(&up)?.f_mul(&down.f_matmul(&down.f_tr()?)?)?;
    Ok(products.f_sum(Kind::Double)?.f_clamp_min(0.0)?.f_sqrt()?.f_to_kind(Kind::Float)?)
}

/// A layer's bias, where it has one. In a dry run only its shape matters.
fn bias_of(layer: &AdaptableLayer) -> Result<Option<HostTensor>> {
    let Some(bias) = BaseLayer::bias(layer) else { return Ok(None) };
    if dry::is_dry(layer.device()) {
        return Ok(Some(HostTensor::zeros(vec![layer.geometry().outputs()])));
    }
    Ok(Some(to_host(&bias.f_to_kind(Kind::Float)?)?))
}

/// A new adapter's module on a layer.
pub(crate) fn fresh(
    variant: &dyn Variant<TchBackend>,
    layer: &AdaptableLayer,
    target: &TargetLayer,
    options: &AdapterOptions,
) -> Result<AdapterModule> {
    let (request, alpha) = options.for_layer(target);
    let (rank, alpha) = variant.rank_and_alpha(&target.geometry, &request, alpha);
    let stream = Stream::new(options.seed).at("adapter").at(&target.path.to_string());
    let tensors = first_values(variant, layer, &request, &stream)?;
    Ok(AdapterModule { variant: variant.name().to_owned(), tensors, rank, alpha })
}

/// What a layer's adapter begins with. In a dry run only its shapes matter, and some variants take the base's weight apart.
fn first_values(
    variant: &dyn Variant<TchBackend>,
    layer: &AdaptableLayer,
    request: &Request,
    stream: &Stream,
) -> Result<BTreeMap<String, HostTensor>> {
    if !dry::is_dry(layer.device()) {
        return Ok(variant.initialise(&TchBackend, layer, request, stream)?);
    }
    let zeros = |(name, shape): (String, Vec<usize>)| {
        let count = shape.iter().product();
        Ok((name, HostTensor::from_f32(shape, vec![0.0; count])?))
    };
    variant.shapes(&layer.geometry(), request)?.into_iter().map(zeros).collect()
}

/// Tokens whose rows of an embedding are trained (PEFT's `trainable_token_indices`).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TrainedTokens {
    pub(crate) embedding: ModulePath,
    tokens: Vec<i64>,
}

impl TrainedTokens {
    /// Those that a configuration names, of a network with these layers.
    ///
    /// # Errors
    /// What is wrong: there is no embedding of that name, a token is not of its table, or a layer that reads the table is trained
    /// in another way too.
    pub(crate) fn of(
        config: &TrainConfig,
        layers: &[TargetLayer],
        others: &[TargetLayer],
    ) -> std::result::Result<Option<Self>, String> {
        let Some(names) = config.extra.texts("trainable_token_indices").filter(|names| !names.is_empty()) else {
            return Ok(None);
        };
        let tokens: Vec<i64> = names.iter().filter_map(|name| name.parse().ok()).collect();
        let is_table = |layer: &&TargetLayer| {
            matches!(layer.geometry, LayerGeometry::Embedding { .. }) && layer.path.path.ends_with("embed_tokens")
        };
        let table = layers.iter().find(is_table).ok_or("the base has no `embed_tokens`")?;
        let entries = table.geometry.inputs() as i64;
        if let Some(token) = tokens.iter().find(|token| **token >= entries) {
            return Err(format!("there is no token {token}: `{}` has {entries} rows", table.path));
        }
        if others.iter().any(|other| other.path == table.path) {
            return Err(format!("`{}` is in target_modules or modules_to_save too; name it in one place", table.path));
        }
        Ok(Some(Self { embedding: table.path.clone(), tokens }))
    }

    fn numbers(&self) -> Result<HostTensor> {
        Ok(HostTensor::from_f32([self.tokens.len()], self.tokens.iter().map(|&token| token as f32).collect())?)
    }

    /// The base's rows. In a dry run only their shape matters.
    fn rows_of(&self, layer: &AdaptableLayer) -> Result<HostTensor> {
        if dry::is_dry(layer.device()) {
            return Ok(HostTensor::zeros(vec![self.tokens.len(), layer.geometry().outputs()]));
        }
        Ok(to_host(&layer.rows(&self.tokens)?)?)
    }

    /// Whether an adapter's module holds rows of these tokens.
    pub(crate) fn are_of(&self, module: &AdapterModule) -> bool {
        let found = module.tensors.get(TOKENS).map(|numbers| numbers.to_f32());
        found.is_some_and(|found| found.iter().map(|&number| number as i64).eq(self.tokens.iter().copied()))
    }
}

/// The layers that `target_modules` may name: neither norms, which are trained whole or not at all, nor the parameters of
/// experts.
pub(crate) fn adaptable(layers: &[TargetLayer]) -> Vec<TargetLayer> {
    let other =
        |layer: &&TargetLayer| !matches!(layer.geometry, LayerGeometry::Norm { .. } | LayerGeometry::Experts { .. });
    layers.iter().filter(other).cloned().collect()
}

/// The layers that `modules_to_save` may name.
pub(crate) fn savable(layers: &[TargetLayer]) -> Vec<TargetLayer> {
    layers.iter().filter(|layer| !matches!(layer.geometry, LayerGeometry::Experts { .. })).cloned().collect()
}

/// The parameters of experts that `target_parameters` may name.
pub(crate) fn parameters_of_experts(layers: &[TargetLayer]) -> Vec<TargetLayer> {
    layers.iter().filter(|layer| matches!(layer.geometry, LayerGeometry::Experts { .. })).cloned().collect()
}

/// What the configuration calls `target_parameters`, where it names any.
pub(crate) fn target_parameters(config: &TrainConfig) -> Option<&[String]> {
    config.extra.texts("target_parameters").filter(|names| !names.is_empty())
}

/// The layers that a configuration adapts, and those that it trains whole, which are not adapted.
///
/// # Errors
/// Where a name names no layer, or names are malformed.
pub(crate) fn chosen(config: &TrainConfig, layers: &[TargetLayer]) -> Result<(Vec<TargetLayer>, Vec<TargetLayer>)> {
    let saved = match config.extra.texts("modules_to_save") {
        Some(names) if !names.is_empty() => Targets::parse(names)?.select(&savable(layers))?,
        _ => Vec::new(),
    };
    let mut targets = Targets::parse(&config.target_modules)?.select(&adaptable(layers))?;
    if let Some(names) = target_parameters(config) {
        targets.extend(Targets::parse(names)?.select(&parameters_of_experts(layers))?);
    }
    targets.retain(|target| saved.iter().all(|saved| saved.path != target.path));
    Ok((targets, saved))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_models::weights::synthetic_uniform;

    /// A layer's factors, of a linear layer or of a convolution of 3 × 3.
    fn module(name: &str, kernel: bool, size: f32) -> (ModulePath, Attached) {
        let make = |part: &str, shape: &[i64]| {
            let count = shape.iter().product::<i64>() as usize;
            let values: Vec<f32> = synthetic_uniform(&format!("{name}.{part}"), count).map(|u| size * u).collect();
            Tensor::from_slice(&values).view(shape)
        };
        let (up, down) = match kernel {
            true => (make("up", &[6, 2, 1, 1]), make("down", &[2, 5, 3, 3])),
            false => (make("up", &[6, 2]), make("down", &[2, 5])),
        };
        let trained = BTreeMap::from([("up".to_owned(), up), ("down".to_owned(), down)]);
        let variant = VariantRegistry::default().get("lora").unwrap();
        let own = Attached { variant, rank: 2, alpha: 3.0, trained, frozen: BTreeMap::new() };
        (ModulePath::new(lora_core::Component::UNET, name), own)
    }

    /// The update as it is defined: (alpha / rank) · up · down, as one matrix.
    fn update(own: &Attached) -> Tensor {
        let part = |name: &str| own.trained[name].flatten(1, -1).to_kind(Kind::Double);
        part("up").matmul(&part("down")) * 1.5
    }

    #[test]
    fn updates_beyond_the_limit_are_scaled_to_it_and_others_are_left_alone() {
        let modules = [("a", false, 2.0), ("b", true, 2.0), ("c", false, 0.01), ("d", true, 0.0)];
        let adapter = TrainableAdapter {
            modules: modules.iter().map(|&(name, kernel, size)| module(name, kernel, size)).collect(),
            ..TrainableAdapter::default()
        };
        let before: Vec<(Tensor, BTreeMap<String, Tensor>)> = adapter
            .modules
            .values()
            .map(|own| (update(own), own.trained.iter().map(|(name, own)| (name.clone(), own.copy())).collect()))
            .collect();
        let scaled = adapter.limit_norms(1.0).unwrap().unwrap();
        assert_eq!((f64::try_from(scaled).unwrap(), before.len()), (2.0, 4));
        for (own, (update_before, factors)) in adapter.modules.values().zip(&before) {
            let norm = f64::try_from(update_before.norm()).unwrap();
            let ratio = if norm > 1.0 { 1.0 / norm } else { 1.0 };
            let apart = (update(own) - update_before * ratio).norm();
            assert!(f64::try_from(apart).unwrap() < 1e-6 * norm.max(1e-9));
            for (name, factor) in factors {
                let expected = factor * ratio.sqrt();
                assert!(f64::try_from((&own.trained[name] - expected).norm()).unwrap() < 1e-5, "{name}");
                assert!(ratio < 1.0 || own.trained[name] == *factor, "{name} is as it was to the last bit");
            }
        }
        assert!(TrainableAdapter::default().limit_norms(1.0).unwrap().is_none());
    }
}
