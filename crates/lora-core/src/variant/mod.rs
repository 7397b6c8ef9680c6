//! Adapter variants: the trait that every formula implements, and the registry that finds one by its name.
//! One family, one file. A variant of a user's own crate registers in the same way as ours.
//!
//! Tools agree on the plain formulas and differ in conventions (which axis DoRA's norm runs along, whether OFT's
//! rotation is exact …). A name stands for one formula with one convention, so the canonical adapter says by its
//! variant's name what its numbers mean; the table is in the crate's README.

mod dora;
mod dropout;
mod full;
mod glora;
mod hra;
mod ia3;
mod loha;
mod lokr;
mod lora;
mod oft;
mod residual;
mod vera;

pub use dora::Dora;
pub use dropout::Dropout;
pub use full::Full;
pub use glora::Glora;
pub use hra::Hra;
pub use ia3::Ia3;
pub use loha::Loha;
pub use lokr::Lokr;
pub(crate) use lora::shares;
pub use lora::{Lora, LoraFactors};
pub use oft::{Boft, Oft};
pub use residual::Residual;
pub use vera::Vera;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::backend::Backend;
use crate::random::Stream;
use crate::{AdapterModule, Error, HostTensor, LayerGeometry, Result};

/// The frozen layer under an adapter, whatever its weights are stored as.
///
/// # Errors
/// What computes gives [`Error::Shape`] where the input does not fit the layer, and [`Error::Backend`] where the
/// library fails.
#[expect(clippy::missing_errors_doc, reason = "said above for all operations")]
pub trait BaseLayer<B: Backend> {
    /// Its shape.
    fn geometry(&self) -> LayerGeometry;
    /// Its output without any adapter.
    fn forward(&self, input: &B::Tensor) -> Result<B::Tensor>;
    /// Its weight, in the dtype it computes in.
    fn weight(&self) -> Result<B::Tensor>;
    /// Its bias.
    fn bias(&self) -> Option<B::Tensor>;
    /// Its output with `scale · up(down(x))` added, from a layer that computes both in fewer steps than one after the
    /// other. The factors, of the shapes that [`Lora`] has on linear layers, come in the dtype of the input.
    fn forward_low_rank(
        &self,
        _input: &B::Tensor,
        _down: &B::Tensor,
        _up: &B::Tensor,
        _scale: f64,
    ) -> Result<Option<B::Tensor>> {
        Ok(None)
    }
}

/// A frozen layer whose weight lies in a backend as it is.
#[derive(Debug)]
pub struct FrozenLayer<B: Backend> {
    /// The backend.
    pub backend: B,
    /// The layer's shape.
    pub geometry: LayerGeometry,
    /// Its weight, of the geometry's shape.
    pub weight: B::Tensor,
    /// Its bias, `[outputs]`.
    pub bias: Option<B::Tensor>,
}

impl<B: Backend> BaseLayer<B> for FrozenLayer<B> {
    fn geometry(&self) -> LayerGeometry {
        self.geometry
    }
    fn forward(&self, input: &B::Tensor) -> Result<B::Tensor> {
        self.backend.apply(&self.geometry, input, &self.weight, self.bias.as_ref())
    }
    fn weight(&self) -> Result<B::Tensor> {
        Ok(self.backend.share(&self.weight))
    }
    fn bias(&self) -> Option<B::Tensor> {
        self.bias.as_ref().map(|bias| self.backend.share(bias))
    }
}

/// What a new adapter on a layer should be.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Rank, or the size of a block for rotations.
    pub rank: usize,
    /// The factor on the update that it will be trained with.
    pub scale: f64,
    /// The variant's own numbers by name; switches are 0 and 1. See [`Variant::options`].
    pub options: BTreeMap<String, f64>,
}

impl Request {
    /// A rank, with scale 1 and no options.
    pub fn rank(rank: usize) -> Self {
        Self { rank, scale: 1.0, options: BTreeMap::new() }
    }

    /// An option that is a whole number.
    pub fn whole(&self, name: &str, default: usize) -> usize {
        self.options.get(name).map_or(default, |&value| value.max(0.0) as usize)
    }

    /// An option that is a switch.
    pub fn switch(&self, name: &str) -> bool {
        self.options.get(name).is_some_and(|&value| value != 0.0)
    }
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
    /// A module's tensors, with the dtype and device of `like`.
    ///
    /// # Errors
    /// [`Error::Backend`] where the backend has no memory for them.
    pub fn upload(backend: &B, module: &AdapterModule, like: &B::Tensor) -> Result<Self> {
        let on = |(name, host): (&String, &HostTensor)| Ok((name.clone(), backend.upload(host, like)?));
        Ok(Self { tensors: module.tensors.iter().map(on).collect::<Result<_>>()?, scale: module.scale() })
    }

    /// One tensor by name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where there is none of this name; it names `variant`.
    pub fn get(&self, variant: &str, name: &str) -> Result<&B::Tensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::MissingTensor { variant: variant.to_owned(), tensor: name.to_owned() })
    }
}

/// What a module changes of its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changes {
    /// The weight.
    pub weight: bool,
    /// The bias.
    pub bias: BiasChange,
}

/// What a module changes of a layer's bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BiasChange {
    /// Nothing.
    Never,
    /// The bias of a layer that has one.
    WhereThere,
    /// The bias, which the layer must have.
    Always,
}

impl Changes {
    /// The weight alone.
    pub const WEIGHT: Self = Self { weight: true, bias: BiasChange::Never };
    /// The weight, and the bias of a layer that has one.
    pub(crate) const WEIGHT_AND_BIAS: Self = Self { weight: true, bias: BiasChange::WhereThere };
}

/// The formula of one kind of adapter.
pub trait Variant<B: Backend>: Debug + Send + Sync {
    /// The name it is registered and configured under.
    fn name(&self) -> &str;

    /// Names of the numbers that [`Request::options`] may hold for it.
    fn options(&self) -> &[&'static str] {
        &[]
    }

    /// Names and shapes of its tensors on a layer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a kind of layer that the variant has no form for; [`Error::Option`] for an option
    /// with an impossible value; [`Error::Shape`] where rank or options do not fit the layer.
    fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>>;

    /// The tensors that training starts from, such that the update is zero: all zero, unless the variant says
    /// otherwise. `stream` is the layer's own.
    ///
    /// # Errors
    /// As of [`Variant::shapes`]; [`Error::NoConvergence`] where the base's weight is decomposed and holds NaN or
    /// infinity.
    fn initialise(
        &self,
        _backend: &B,
        base: &dyn BaseLayer<B>,
        request: &Request,
        _stream: &Stream,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let shapes = self.shapes(&base.geometry(), request)?;
        Ok(shapes.into_iter().map(|(name, shape)| (name, HostTensor::zeros(shape))).collect())
    }

    /// Rank and alpha that a module trained with this request records, given the alpha that was asked for: their ratio
    /// is [`Parameters::scale`]. Variants without a scale record 1 and 1.
    fn rank_and_alpha(&self, _geometry: &LayerGeometry, request: &Request, alpha: f64) -> (usize, f64) {
        (request.rank, alpha)
    }

    /// Whether a tensor of this name is trained (true unless the variant says otherwise).
    fn is_trained(&self, _tensor: &str) -> bool {
        true
    }

    /// Whether a trained tensor of this name stands between the rank and the outputs, which LoRA+ gives a higher
    /// learning rate.
    fn is_up(&self, tensor: &str) -> bool {
        [lora::UP, lora::EMBEDDING_UP, EXPERTS_UP].contains(&tensor)
    }

    /// Whether a module that has the tensors `down` and `up` and no others changes a weight by `scale · up · down` and
    /// nothing else, so that rows of the update can be computed apart.
    fn merges_by_factors(&self) -> bool {
        false
    }

    /// What a module with these tensors changes of a layer.
    fn changes(&self, _tensors: &BTreeMap<String, HostTensor>) -> Changes {
        Changes::WEIGHT
    }

    /// Whether the forward pass on such a layer takes its trained tensors in the dtype of the input and in no other, so
    /// that copies in that dtype may stand in for them.
    fn computes_in_input_dtype(&self, _geometry: &LayerGeometry) -> bool {
        false
    }

    /// Whether ΔW is the same on any base weight.
    fn is_additive(&self) -> bool {
        true
    }

    /// The update ΔW in the shape of the base's weight, its scale included. `base` is asked for its weight by those
    /// variants only whose update depends on it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::Shape`] where the parameters are not those of this variant on this layer;
    /// [`Error::Backend`] where the backend fails.
    fn delta_weight(&self, backend: &B, base: &dyn BaseLayer<B>, parameters: &Parameters<B>) -> Result<B::Tensor>;

    /// The update of the bias, `[outputs]`, for the few variants that have one.
    ///
    /// # Errors
    /// As of [`Variant::delta_weight`].
    fn delta_bias(
        &self,
        _backend: &B,
        _base: &dyn BaseLayer<B>,
        _parameters: &Parameters<B>,
    ) -> Result<Option<B::Tensor>> {
        Ok(None)
    }

    /// The adapted layer's output. The default computes with `W + ΔW`; override where something cheaper is equal.
    /// Of the dropouts the default knows the one of whole modules.
    ///
    /// # Errors
    /// As of [`Variant::delta_weight`], and where the input does not fit the layer.
    fn forward(
        &self,
        backend: &B,
        base: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        input: &B::Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<B::Tensor> {
        forward_with_weight(self, backend, base, parameters, input, dropout)
    }

    /// The base weight from a weight that this adapter was merged into with `strength`. `merged` holds that weight.
    /// Additive variants subtract; the others say what they can.
    ///
    /// # Errors
    /// [`Error::NotReversible`] where the merged weight does not determine the base: keep the base; otherwise as of
    /// [`Variant::delta_weight`].
    fn unmerge(
        &self,
        backend: &B,
        merged: &dyn BaseLayer<B>,
        parameters: &Parameters<B>,
        strength: f64,
    ) -> Result<B::Tensor> {
        if !self.is_additive() {
            return Err(Error::NotReversible { variant: self.name().to_owned() });
        }
        let delta = self.delta_weight(backend, merged, parameters)?;
        backend.add(backend.scale(&delta, -strength)?, &merged.weight()?)
    }

    /// The module as files hold it, from the module as it was trained (the same, unless the variant says otherwise).
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::Shape`] where the module is not one of this variant.
    fn export(&self, module: AdapterModule) -> Result<AdapterModule> {
        Ok(module)
    }
}

/// Variants by name.
#[derive(Debug, Clone)]
pub struct VariantRegistry<B: Backend>(BTreeMap<String, Arc<dyn Variant<B>>>);

impl<B: Backend> Default for VariantRegistry<B> {
    /// The variants of this crate.
    fn default() -> Self {
        let ours: [Arc<dyn Variant<B>>; 22] = [
            Arc::new(Lora),
            Arc::new(Dora::PEFT),
            Arc::new(Dora::LYCORIS),
            Arc::new(Dora::LYCORIS_LOHA),
            Arc::new(Dora::LYCORIS_LOKR),
            Arc::new(Residual::Pissa),
            Arc::new(Residual::FastPissa),
            Arc::new(Residual::Olora),
            Arc::new(Loha),
            Arc::new(Lokr),
            Arc::new(Oft::Lycoris),
            Arc::new(Oft::PeftExact),
            Arc::new(Oft::PeftNeumann),
            Arc::new(Boft::Lycoris),
            Arc::new(Boft::Peft),
            Arc::new(Ia3::Peft),
            Arc::new(Ia3::Lycoris),
            Arc::new(Vera),
            Arc::new(Glora::Lycoris),
            Arc::new(Glora::Peft),
            Arc::new(Hra),
            Arc::new(Full),
        ];
        Self(ours.into_iter().map(|variant| (variant.name().to_owned(), variant)).collect())
    }
}

impl<B: Backend> VariantRegistry<B> {
    /// Adds a variant under its own name, which must be free.
    ///
    /// # Errors
    /// [`Error::DuplicateVariant`] where it is not free.
    pub fn register(&mut self, variant: impl Variant<B> + 'static) -> Result<()> {
        let name = variant.name().to_owned();
        if self.0.contains_key(&name) {
            return Err(Error::DuplicateVariant { name });
        }
        self.0.insert(name, Arc::new(variant));
        Ok(())
    }

    /// The variant of a name.
    ///
    /// # Errors
    /// [`Error::UnknownVariant`], with the names that are known.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Variant<B>>> {
        self.0.get(name).cloned().ok_or_else(|| Error::UnknownVariant {
            name: name.to_owned(),
            known: self.0.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The forward pass with `W + ΔW`, which is every variant's definition.
fn forward_with_weight<B: Backend, V: Variant<B> + ?Sized>(
    variant: &V,
    backend: &B,
    base: &dyn BaseLayer<B>,
    parameters: &Parameters<B>,
    input: &B::Tensor,
    dropout: Option<&Dropout>,
) -> Result<B::Tensor> {
    if let Some(dropout) = dropout {
        dropout.modules_only(variant.name())?;
    }
    let weight = base.weight()?;
    let delta = backend.cast_like(&variant.delta_weight(backend, base, parameters)?, &weight)?;
    let effective = backend.add(delta, &weight)?;
    let bias = match (base.bias(), variant.delta_bias(backend, base, parameters)?) {
        (Some(bias), Some(delta)) => Some(backend.add(backend.cast_like(&delta, &bias)?, &bias)?),
        (None, Some(delta)) => Some(backend.cast_like(&delta, &weight)?),
        (bias, None) => bias,
    };
    let adapted = backend.apply(&base.geometry(), input, &effective, bias.as_ref())?;
    match dropout.map(|dropout| dropout.module_mask(&backend.shape(&adapted))).transpose()?.flatten() {
        None => Ok(adapted),
        Some(mask) => {
            // base + mask · (adapted - base), which keeps each item's own draw.
            let base = base.forward(input)?;
            let update = backend.add(backend.scale(&base, -1.0)?, &adapted)?;
            backend.add(backend.mul(&update, &backend.upload(&mask, &base)?)?, &base)
        }
    }
}

/// The shape that a tensor of a variant must have, or the error that says so.
fn expect(variant: &str, tensor: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape {
        what: format!("`{tensor}` of variant `{variant}`"),
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    })
}

/// Name of a weight that takes the place of the base's, among the tensors of `full`.
pub const WEIGHT_VALUE: &str = "weight_value";
/// Name of rows of an embedding that take the place of the base's, `[tokens, width]`, among the tensors of `full`.
pub const TOKEN_ROWS: &str = "token_rows";
/// Name of the numbers of these rows, `[tokens]`, as floats, which hold any vocabulary's exactly.
pub const TOKENS: &str = "tokens";
/// Names of the factors of an update of all experts of a layer, whose weights are one tensor: `[experts, rank, inputs]`
/// and `[experts, outputs, rank]`, among the tensors of `lora`.
pub const EXPERTS_DOWN: &str = "experts_down";
/// See [`EXPERTS_DOWN`].
pub const EXPERTS_UP: &str = "experts_up";
/// Name of a bias that takes the place of the base's, among the tensors of `lora` and `full`.
pub const BIAS_VALUE: &str = "bias_value";

/// The change from the base's bias to the one that takes its place, where a module has one.
fn replaced_bias<B: Backend>(
    backend: &B,
    base: &dyn BaseLayer<B>,
    parameters: &Parameters<B>,
    variant: &str,
) -> Result<Option<B::Tensor>> {
    let Some(value) = parameters.tensors.get(BIAS_VALUE) else { return Ok(None) };
    expect(variant, BIAS_VALUE, &[base.geometry().outputs()], &backend.shape(value))?;
    match base.bias() {
        Some(bias) => backend.add(backend.scale(&backend.cast_like(&bias, value)?, -1.0)?, value).map(Some),
        None => backend.scale(value, 1.0).map(Some),
    }
}

/// The error of a layer that a variant cannot adapt.
fn unsupported(variant: &str, geometry: &LayerGeometry, reason: &str) -> Error {
    Error::Unsupported { variant: variant.to_owned(), layer: format!("{geometry:?}"), reason: reason.to_owned() }
}

use lora::is_grouped;

fn at_least_one(rank: usize) -> Result<usize> {
    if rank == 0 {
        return Err(Error::Option { key: "lora_rank", value: "0".into(), reason: "a rank is at least 1".into() });
    }
    Ok(rank)
}

/// Uniform in ±1/√fan_in, which is Kaiming's rule with a = √5 (what PEFT, sd-scripts and LyCORIS start from).
fn kaiming(shape: &[usize], fan_in: usize, stream: &Stream, name: &str) -> Result<HostTensor> {
    let bound = 1.0 / (fan_in.max(1) as f32).sqrt();
    let mut stream = stream.at(name);
    let values = (0..shape.iter().product()).map(|_| (2.0 * stream.uniform() - 1.0) * bound).collect();
    HostTensor::from_f32(shape, values)
}

/// Normal with a standard deviation.
fn normal(shape: &[usize], deviation: f32, stream: &Stream, name: &str) -> Result<HostTensor> {
    let mut values = stream.at(name).normals(shape.iter().product());
    values.iter_mut().for_each(|value| *value *= deviation);
    HostTensor::from_f32(shape, values)
}
