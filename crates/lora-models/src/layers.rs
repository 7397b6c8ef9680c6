//! The layers that networks are made of: linear layers and convolutions that can carry an adapter, norms, and
//! attention. Adapter formulas live in lora-core.
//!
//! Precision: inputs come in the compute dtype (fp32, bf16 or fp16); frozen weights are held in it, or in fewer bytes
//! and decoded while their layer computes; trained ones are f32 and cast to it. Norms and the softmax of
//! attention accumulate in fp32 inside libtorch's kernels, whatever the dtype of their input.

use std::sync::Arc;

use lora_core::variant::{
    BaseLayer, Dropout, EXPERTS_DOWN, EXPERTS_UP, LoraFactors, Parameters, Variant, WEIGHT_VALUE,
};
use lora_core::{LayerGeometry, ModulePath};
use lora_torch::checkpoint::{Inputs, Shared, checkpoint};
use lora_torch::frozen::FrozenWeight;
use lora_torch::norm::group_norm_silu;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::{TchBackend, apply_layer};

use crate::token_rows::TokenRows;
use crate::weights::Weights;
use crate::{Error, Result};

/// What one pass through a network carries besides its inputs.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// Dropout on adapters, with one stream per item of the batch for this step.
    pub dropout: Option<Dropout>,
    /// Activations within blocks are not kept for the backward pass but computed again in it.
    pub recompute: bool,
    /// Neither is the wide inner part of transformers' feed-forward: cheap to compute again for what it takes.
    pub recompute_feed_forward: bool,
    /// Where they are computed again, the blocks' inputs wait for that in host memory.
    pub inputs_in_host: bool,
    /// Layers compute as if they carried no adapters: the base as it was.
    pub without_adapters: bool,
    /// Adapters change outputs by as much the other way: a strength of −1.
    pub reversed: bool,
}

impl Pass {
    /// What strengths of adapters are multiplied with.
    fn sign(&self) -> f64 {
        if self.reversed { -1.0 } else { 1.0 }
    }

    /// The output of a block; where its activations are to be computed again, only its inputs are kept.
    ///
    /// # Errors
    /// What the block's own pass gives.
    pub fn block<B: Send + 'static>(
        &self,
        block: &Shared<B>,
        inputs: &[&Tensor],
        run: impl Fn(&B, &[Tensor], &Pass) -> Result<Tensor> + Send + 'static,
    ) -> Result<Tensor> {
        let wait = if self.inputs_in_host { Inputs::InHost } else { Inputs::Kept };
        self.part(self.recompute.then_some(wait), block, inputs, run)
    }

    /// The output of the inner part of a feed-forward, likewise.
    pub(crate) fn feed_forward<B: Send + 'static>(
        &self,
        part: &Shared<B>,
        inputs: &[&Tensor],
        run: impl Fn(&B, &[Tensor], &Pass) -> Result<Tensor> + Send + 'static,
    ) -> Result<Tensor> {
        self.part(self.recompute_feed_forward.then_some(Inputs::Kept), part, inputs, run)
    }

    /// The output of a part of a network. `wait`: it is computed again, and where its inputs are until then.
    fn part<B: Send + 'static>(
        &self,
        wait: Option<Inputs>,
        block: &Shared<B>,
        inputs: &[&Tensor],
        run: impl Fn(&B, &[Tensor], &Pass) -> Result<Tensor> + Send + 'static,
    ) -> Result<Tensor> {
        let Some(wait) = wait else {
            let inputs: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
            return run(block, &inputs, self);
        };
        let (block, pass) = (block.clone(), self.clone());
        let run = move |inputs: &[Tensor]| run(&block, inputs, &pass).map_err(torch);
        Ok(checkpoint(inputs, wait, run)?)
    }
}

/// An error as the crates below know it.
pub(crate) fn torch(error: Error) -> lora_torch::Error {
    match error {
        Error::Torch(error) => error,
        other => lora_torch::Error::Torch(other.to_string()),
    }
}

/// A block, to be changed.
///
/// # Errors
/// [`Error::InUse`] while a graph that was made with it is alive: adapters come and go between steps.
pub fn exclusive<B: Send>(block: &mut Shared<B>) -> Result<&mut B> {
    block.get_mut().ok_or(Error::InUse)
}

/// A variant with its parameters, hung on a layer.
#[derive(Debug)]
pub struct AttachedAdapter {
    /// The formula.
    pub variant: Arc<dyn Variant<TchBackend>>,
    /// Its tensors.
    pub parameters: Parameters<TchBackend>,
}

impl AttachedAdapter {
    /// Whether all that it does is to add `scale · up · down`.
    fn is_of_factors(&self) -> bool {
        let names = LoraFactors::names(false);
        let tensors = &self.parameters.tensors;
        self.variant.merges_by_factors() && tensors.len() == 2 && names.iter().all(|name| tensors.contains_key(*name))
    }

    /// Of factors, the same the other way; tensors are shared.
    fn reversed(&self) -> Self {
        let tensors = self.parameters.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let parameters = Parameters { tensors: tensors.collect(), scale: -self.parameters.scale };
        Self { variant: Arc::clone(&self.variant), parameters }
    }
}

/// An adapter's factors, one of each for each expert.
#[derive(Debug)]
pub(crate) struct ExpertFactors {
    pub(crate) down: Vec<Tensor>,
    pub(crate) up: Vec<Tensor>,
    pub(crate) scale: f64,
}

/// The weight of a layer.
#[derive(Debug)]
pub(crate) enum LayerWeight {
    /// It does not change.
    Frozen(FrozenWeight),
    /// An f32 leaf that is cast to what the layer computes in.
    Trained { leaf: Tensor, kind: Kind },
}

impl LayerWeight {
    fn kind(&self) -> Kind {
        match self {
            Self::Frozen(weight) => weight.kind(),
            Self::Trained { kind, .. } => *kind,
        }
    }

    fn device(&self) -> Device {
        match self {
            Self::Frozen(weight) => weight.device(),
            Self::Trained { leaf, .. } => leaf.device(),
        }
    }

    /// In the compute dtype.
    fn in_compute_dtype(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Frozen(weight) => weight.whole()?,
            Self::Trained { leaf, kind } => leaf.f_to_kind(*kind)?,
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.bytes(),
            Self::Trained { leaf, .. } => leaf.numel() * leaf.kind().elt_size_in_bytes(),
        }
    }

    fn apply(&self, geometry: &LayerGeometry, input: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Frozen(weight) => Ok(weight.apply(geometry, input, bias)?),
            Self::Trained { kind, .. } => {
                let bias = bias.map(|bias| bias.f_to_kind(*kind)).transpose()?;
                Ok(apply_layer(geometry, input, &self.in_compute_dtype()?, bias.as_ref())?)
            }
        }
    }
}

/// A linear layer or convolution that can carry an adapter.
#[derive(Debug)]
pub struct AdaptableLayer {
    path: String,
    weight: LayerWeight,
    bias: Option<Tensor>,
    geometry: LayerGeometry,
    /// The adapters that it carries, each with its strength. In training it is one, at full strength.
    adapters: Vec<(AttachedAdapter, f64)>,
    /// The path of the embedding whose table it reads the other way round.
    tied: Option<String>,
}

impl AdaptableLayer {
    /// `y = W x + b` with weight `[outputs, inputs]`.
    ///
    /// # Errors
    /// As of [`AdaptableLayer::new`].
    pub fn linear(weights: &Weights<'_>, inputs: usize, outputs: usize, bias: bool) -> Result<Self> {
        Self::new(weights, LayerGeometry::linear(inputs, outputs), bias)
    }

    /// A convolution with bias, padded so that a stride of 1 keeps the size.
    ///
    /// # Errors
    /// As of [`AdaptableLayer::new`].
    pub fn conv2d(weights: &Weights<'_>, inputs: usize, outputs: usize, kernel: usize, stride: usize) -> Result<Self> {
        Self::new(weights, LayerGeometry::conv2d(inputs, outputs, kernel, stride, kernel / 2), true)
    }

    /// A table that row numbers look up, `[entries, width]`, held as [`Weights::tables`] says: a look-up reads few of its
    /// rows and makes no others whole. `alone`: nothing else reads it, so that where memory is short (layers are in few
    /// bytes or live in host memory) it stays in host memory, and the rows alone come to the device. Then a look-up
    /// cannot be recorded in a CUDA graph: see [`look_up`](crate::networks::Decoder::look_up).
    ///
    /// # Errors
    /// As of [`AdaptableLayer::new`].
    pub fn embedding(weights: &Weights<'_>, entries: usize, width: usize, alone: bool) -> Result<Self> {
        let own = Self::new(&weights.tables(), LayerGeometry::Embedding { entries, width }, false)?;
        match own.weight {
            LayerWeight::Frozen(weight) if alone && (weights.in_host() || weight.is_in_few_bytes()) => {
                Ok(Self { weight: LayerWeight::Frozen(weight.waiting_in_host()?), ..own })
            }
            weight => Ok(Self { weight, ..own }),
        }
    }

    /// The linear layer that an embedding's table is when it is read the other way round, `y = W x`; the table is held
    /// once. `path` is the layer's own.
    pub(crate) fn tied_to(embedding: &Self, path: &str) -> Result<Self> {
        let weight = match &embedding.weight {
            LayerWeight::Frozen(weight) => LayerWeight::Frozen(weight.shallow_clone()),
            LayerWeight::Trained { leaf, kind } => LayerWeight::Trained { leaf: leaf.shallow_clone(), kind: *kind },
        };
        let geometry = LayerGeometry::linear(embedding.geometry.outputs(), embedding.geometry.inputs());
        Ok(Self {
            path: path.to_owned(),
            weight,
            bias: None,
            geometry,
            adapters: Vec::new(),
            tied: Some(embedding.path.clone()),
        })
    }

    /// The factors of a normalisation, `[features]`: on the device in the compute dtype, however layers are held.
    ///
    /// # Errors
    /// As of [`AdaptableLayer::new`].
    pub(crate) fn norm(weights: &Weights<'_>, features: usize) -> Result<Self> {
        Self::new(&weights.plain(), LayerGeometry::Norm { features }, false)
    }

    /// What adapters on the weights of a mixture's experts hang on, which are one parameter for them:
    /// `[experts, outputs, inputs]`. The weights themselves are elsewhere; the mixture applies the factors.
    pub(crate) fn experts(weights: &Weights<'_>, geometry: LayerGeometry) -> Result<Self> {
        Ok(Self {
            path: weights.prefix().to_owned(),
            weight: LayerWeight::Frozen(FrozenWeight::plain(Tensor::f_empty([0], (weights.kind(), weights.device()))?)),
            bias: None,
            geometry,
            adapters: Vec::new(),
            tied: None,
        })
    }

    /// The factors for each expert that act in a pass, in a dtype: of each adapter those `[rank, inputs]` and
    /// `[outputs, rank]`, and what their product counts.
    pub(crate) fn expert_factors(&self, kind: Kind, pass: &Pass) -> Result<Vec<ExpertFactors>> {
        let mut all = Vec::new();
        for (adapter, strength) in self.adapters_in(pass) {
            let [down, up] = [EXPERTS_DOWN, EXPERTS_UP].map(|name| -> Result<Vec<Tensor>> {
                let factors = adapter.parameters.get(adapter.variant.name(), name)?;
                Ok(factors.f_to_kind(kind)?.f_unbind(0)?)
            });
            all.push(ExpertFactors { down: down?, up: up?, scale: adapter.parameters.scale * strength * pass.sign() });
        }
        Ok(all)
    }

    /// The factors of a normalisation as they act in a pass: the base's, or those that are trained in their place.
    pub(crate) fn factors(&self, pass: &Pass) -> Result<Tensor> {
        let base = || match &self.weight {
            LayerWeight::Frozen(weight) => Ok(weight.whole()?),
            LayerWeight::Trained { leaf, .. } => Ok::<_, Error>(leaf.shallow_clone()),
        };
        match self.adapters_in(pass) {
            [] => base(),
            [(adapter, 1.0)] if !pass.reversed && adapter.parameters.tensors.contains_key(WEIGHT_VALUE) => {
                Ok(adapter.parameters.tensors[WEIGHT_VALUE].shallow_clone())
            }
            several => {
                let base = base()?;
                let mut sum = base.f_to_kind(Kind::Float)?;
                for (adapter, strength) in several {
                    let change = adapter.variant.delta_weight(&TchBackend, self, &adapter.parameters)?;
                    sum = sum.f_add(&change.f_mul_scalar(strength * pass.sign())?)?;
                }
                Ok(sum.f_to_kind(base.kind())?)
            }
        }
    }

    /// A linear layer whose weight `[outputs, inputs]` and bias are parts of larger tensors. A frozen one is copied, so
    /// that the whole can go.
    pub(crate) fn of_part(weights: &Weights<'_>, weight: Tensor, bias: Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.size2()?;
        let weight = if weight.requires_grad() { weight } else { weight.f_contiguous()? };
        Ok(Self {
            path: weights.prefix().to_owned(),
            weight: weights.hold("weight", weight)?,
            bias: Some(bias),
            geometry: LayerGeometry::linear(inputs as usize, outputs as usize),
            adapters: Vec::new(),
            tied: None,
        })
    }

    /// A layer of any geometry.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::WeightShape`] where the source lacks a weight or has another shape;
    /// [`Error::Storage`] where it cannot be held as asked; out of memory.
    pub fn new(weights: &Weights<'_>, geometry: LayerGeometry, bias: bool) -> Result<Self> {
        Ok(Self {
            path: weights.prefix().to_owned(),
            weight: weights.layer("weight", &geometry.weight_shape())?,
            bias: bias.then(|| weights.tensor("bias", &[geometry.outputs()])).transpose()?,
            geometry,
            adapters: Vec::new(),
            tied: None,
        })
    }

    /// Its dotted path inside its network.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The path of the embedding whose table it reads the other way round, where it has none of its own.
    pub fn tied(&self) -> Option<&str> {
        self.tied.as_deref()
    }

    /// Rows of an embedding's table in f32, `[numbers, width]`, in host memory.
    ///
    /// # Errors
    /// If a number is not below the table's entries; out of memory.
    pub fn rows(&self, numbers: &[i64]) -> Result<Tensor> {
        let places = Tensor::f_from_slice(numbers)?;
        let rows = match &self.weight {
            LayerWeight::Frozen(weight) if weight.waits() => weight.embed(&places)?,
            LayerWeight::Frozen(weight) => weight.embed(&places.f_to_device(self.device())?)?,
            LayerWeight::Trained { leaf, .. } => leaf.f_index_select(0, &places.f_to_device(self.device())?)?,
        };
        Ok(rows.f_detach()?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?)
    }

    /// Its shape.
    pub fn geometry(&self) -> LayerGeometry {
        self.geometry
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.weight.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.weight.device()
    }

    /// Its weight, where in this pass that alone makes its output: frozen, without a bias and without an adapter.
    pub(crate) fn frozen(&self, pass: &Pass) -> Option<&FrozenWeight> {
        match &self.weight {
            LayerWeight::Frozen(weight) if self.bias.is_none() && self.adapters_in(pass).is_empty() => Some(weight),
            _ => None,
        }
    }

    /// Whether anything of it is trained: an adapter, or its own weight.
    pub(crate) fn learns(&self) -> bool {
        !self.adapters.is_empty() || matches!(self.weight, LayerWeight::Trained { .. })
    }

    /// The adapters that act in a pass.
    fn adapters_in(&self, pass: &Pass) -> &[(AttachedAdapter, f64)] {
        if pass.without_adapters { &[] } else { &self.adapters }
    }

    /// Bytes of its weight as it is held.
    pub fn weight_bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// Hangs an adapter on the layer, in place of any other.
    pub fn attach(&mut self, adapter: AttachedAdapter) {
        self.adapters = vec![(adapter, 1.0)];
    }

    /// Hangs an adapter on the layer beside those that it carries: `strength` times what it changes of the layer's output is
    /// added to theirs. For inference; what trains is alone on its layer.
    pub fn attach_beside(&mut self, adapter: AttachedAdapter, strength: f64) {
        self.adapters.push((adapter, strength));
    }

    /// Takes all adapters off.
    pub fn detach(&mut self) {
        self.adapters.clear();
    }

    /// The adapter it carries, the first of several.
    pub fn adapter(&self) -> Option<&AttachedAdapter> {
        self.adapters.first().map(|(adapter, _)| adapter)
    }

    /// The layer's output, with its adapters' updates where it carries any.
    ///
    /// # Errors
    /// [`Error::Torch`] where the input does not fit the layer; out of memory.
    pub fn forward(&self, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.forward_from(self, input, pass)
    }

    /// Rows of an embedding's table, where that waits in host memory: `[…, width]` on the device for numbers `[…]` (i64)
    /// in host memory. `None` where the table is on the device, and a pass looks them up itself.
    ///
    /// # Errors
    /// If a number is not below the table's entries; out of memory.
    pub(crate) fn looked_up(&self, numbers: &Tensor) -> Result<Option<Tensor>> {
        match &self.weight {
            LayerWeight::Frozen(weight) if weight.waits() => Ok(Some(weight.embed(numbers)?)),
            _ => Ok(None),
        }
    }

    /// [`Self::forward`] of an embedding whose rows may have been [looked up](Self::looked_up) before.
    pub(crate) fn forward_looked_up(&self, input: &Tensor, rows: Option<&Tensor>, pass: &Pass) -> Result<Tensor> {
        match rows {
            Some(rows) => self.forward_from(&LookedUp { layer: self, rows }, input, pass),
            None => self.forward(input, pass),
        }
    }

    fn forward_from(&self, base: &dyn BaseLayer<TchBackend>, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let alone = || Ok(base.forward(input)?);
        let with = |adapter: &AttachedAdapter| -> Result<Tensor> {
            let dropout = pass.dropout.as_ref().map(|dropout| Dropout {
                items: dropout.items.iter().map(|item| item.at(&self.path)).collect(),
                ..*dropout
            });
            if let Some(trained) = TokenRows::of(&adapter.parameters) {
                return trained.applied(self.geometry, &base.forward(input)?, input);
            }
            Ok(adapter.variant.forward(&TchBackend, base, &adapter.parameters, input, dropout.as_ref())?)
        };
        match self.adapters_in(pass) {
            [] => alone(),
            [(adapter, 1.0)] if !pass.reversed => with(adapter),
            [(adapter, 1.0)] if adapter.is_of_factors() => with(&adapter.reversed()),
            several => {
                let base: Tensor = alone()?;
                let mut sum = base.shallow_clone();
                for (adapter, strength) in several {
                    let change = with(adapter)?.f_sub(&base)?;
                    sum = sum.f_add(&change.f_mul_scalar(strength * pass.sign())?)?;
                }
                Ok(sum)
            }
        }
    }
}

impl BaseLayer<TchBackend> for AdaptableLayer {
    fn geometry(&self) -> LayerGeometry {
        self.geometry
    }

    fn forward(&self, input: &Tensor) -> lora_core::Result<Tensor> {
        Ok(self.weight.apply(&self.geometry, input, self.bias.as_ref()).map_err(torch)?)
    }

    fn weight(&self) -> lora_core::Result<Tensor> {
        Ok(self.weight.in_compute_dtype().map_err(torch)?)
    }

    fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(Tensor::shallow_clone)
    }

    fn forward_low_rank(
        &self,
        input: &Tensor,
        down: &Tensor,
        up: &Tensor,
        scale: f64,
    ) -> lora_core::Result<Option<Tensor>> {
        let (LayerWeight::Frozen(weight), LayerGeometry::Linear { .. }) = (&self.weight, &self.geometry) else {
            return Ok(None);
        };
        Ok(Some(weight.apply_low_rank(input, self.bias.as_ref(), down, up, scale)?))
    }
}

/// An embedding whose base rows were looked up before the pass.
struct LookedUp<'l> {
    layer: &'l AdaptableLayer,
    rows: &'l Tensor,
}

impl BaseLayer<TchBackend> for LookedUp<'_> {
    fn geometry(&self) -> LayerGeometry {
        self.layer.geometry
    }

    /// A tensor of its own, which an update may be added into.
    fn forward(&self, _input: &Tensor) -> lora_core::Result<Tensor> {
        Ok(if self.layer.learns() {
            self.rows.f_detach_copy().map_err(lora_torch::Error::from)?
        } else {
            self.rows.shallow_clone()
        })
    }

    fn weight(&self) -> lora_core::Result<Tensor> {
        BaseLayer::weight(self.layer)
    }

    fn bias(&self) -> Option<Tensor> {
        BaseLayer::bias(self.layer)
    }
}

/// A network whose layers can carry adapters.
pub trait Adaptable {
    /// The part of the base model it is.
    fn component(&self) -> lora_core::Component;

    /// Calls `visit` on each layer that can carry an adapter, in a fixed order.
    ///
    /// # Errors
    /// [`Error::InUse`] while a loss of the network is alive; layers may have been visited by then.
    fn visit_layers(&mut self, visit: &mut dyn FnMut(&mut AdaptableLayer)) -> Result<()>;

    /// Paths and shapes of those layers.
    ///
    /// # Errors
    /// As [`Adaptable::visit_layers`].
    fn adaptable_layers(&mut self) -> Result<Vec<lora_core::target::TargetLayer>> {
        let component = self.component();
        let mut layers = Vec::new();
        self.visit_layers(&mut |layer| {
            layers.push(lora_core::target::TargetLayer {
                path: ModulePath::new(component, layer.path.clone()),
                geometry: layer.geometry,
            });
        })?;
        Ok(layers)
    }
}

/// Normalisation over groups of channels; `[batch, channels, height, width]`.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    epsilon: f64,
}

impl GroupNorm {
    pub(crate) fn new(weights: &Weights<'_>, channels: usize, groups: usize, epsilon: f64) -> Result<Self> {
        let (weight, bias) = (weights.tensor("weight", &[channels])?, weights.tensor("bias", &[channels])?);
        Ok(Self { weight, bias, groups: groups as i64, epsilon })
    }

    /// The normalised input through SiLU; only the input is kept for the backward pass.
    pub(crate) fn forward_silu(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.f_to_kind(input.kind())?, self.bias.f_to_kind(input.kind())?);
        Ok(group_norm_silu(input, self.groups, &weight, &bias, self.epsilon)?)
    }

    pub(crate) fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.f_to_kind(input.kind())?, self.bias.f_to_kind(input.kind())?);
        Ok(input.f_group_norm(self.groups, Some(&weight), Some(&bias), self.epsilon, true)?)
    }
}

/// Normalisation over the last axis.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    width: i64,
}

impl LayerNorm {
    pub(crate) fn new(weights: &Weights<'_>, width: usize) -> Result<Self> {
        let (weight, bias) = (weights.tensor("weight", &[width])?, weights.tensor("bias", &[width])?);
        Ok(Self { weight, bias, width: width as i64 })
    }

    pub(crate) fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.f_to_kind(input.kind())?, self.bias.f_to_kind(input.kind())?);
        Ok(input.f_layer_norm([self.width], Some(&weight), Some(&bias), 1e-5, true)?)
    }
}

/// Width of an attention head where no config names the heads of a network of these widths: 64, as in every published
/// one, or the largest power of two that divides them all.
pub(crate) fn head_width(widths: &[usize]) -> usize {
    widths.iter().fold(64, |head, width| head.min(1 << width.trailing_zeros().min(6)))
}

/// Scaled dot-product attention over `[batch, tokens, width]` with the width split into heads; libtorch picks its
/// fastest kernel (flash, memory-efficient) for the device. One of them takes every width of a head in multiples of 8,
/// the 512 of the autoencoder too, and none forms all scores at once, so that nothing is left to slice.
///
/// Every kernel multiplies queries by keys into fp32 and takes the softmax there, the plain one included: scores beyond
/// fp16's range, as Stable Diffusion 2.1 has them at 768 pixels, need no other way. Configs' `upcast_attention` asks
/// for this, and is met without being read.
pub(crate) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let split = |tensor: &Tensor| -> Result<Tensor> {
        let (batch, tokens, width) = tensor.size3()?;
        Ok(tensor.f_view([batch, tokens, heads as i64, width / heads as i64])?.f_transpose(1, 2)?)
    };
    let (batch, tokens, width) = query.size3()?;
    let (query, key, value) = (split(query)?, split(key)?, split(value)?);
    let mixed =
        Tensor::f_scaled_dot_product_attention(&query, &key, &value, None::<&Tensor>, 0.0, causal, None, false)?;
    Ok(mixed.f_transpose(1, 2)?.f_reshape([batch, tokens, width])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scores of 2^18 and half of it: infinities in fp16.
    #[test]
    fn scores_beyond_half_precision_are_weighed_all_the_same() {
        let mut devices = vec![Device::Cpu];
        devices.extend(lora_torch::tch::Cuda::is_available().then_some(Device::Cuda(0)));
        for device in devices {
            let ones = Tensor::ones([1, 4, 64], (Kind::Half, device));
            let (query, value) = (&ones * 512.0, Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).to_device(device));
            let key = &ones * Tensor::from_slice(&[64.0f32, 32.0, 32.0, 32.0]).view([1, 4, 1]).to_device(device);
            let value = value.view([1, 4, 1]) * Tensor::ones([1, 4, 64], (Kind::Float, device));
            let (key, value) = (key.to_kind(Kind::Half), value.to_kind(Kind::Half));
            let mixed = attention(&query, &key, &value, 1, false).unwrap();
            assert_eq!(mixed, ones, "{device:?}: the first value alone counts");
        }
    }

    #[test]
    fn heads_are_as_wide_as_published_ones_or_as_divides() {
        assert_eq!(head_width(&[320, 640, 1280, 1280]), 64);
        assert_eq!(head_width(&[1024]), 64);
        assert_eq!(head_width(&[32, 64, 96, 96]), 32);
        assert_eq!(head_width(&[6, 9]), 1);
    }
}
