//! Frozen weights in few bytes: stored in half precision, 8-bit floats or 8-bit integers with one factor for each
//! output, NF4 ([`crate::nf4`]), or as they lie in a file, in GGUF's blocks ([`lora_core::blocks`]) or 8-bit floats. They
//! are made whole for one layer at a time, in the forward pass and again in the backward pass. Those of any of these
//! forms may live in host memory and come to the device when they are needed ([`crate::staging`]).

use std::convert::Infallible;
use std::ffi::{c_int, c_void};
use std::fmt;

use lora_core::LayerGeometry;
use lora_core::blocks::BlockKind;
use tch::{Device, Kind, Tensor};

use crate::backend::apply_layer;
use crate::dry;
use crate::nf4::Nf4;
use crate::shim::{RawTensor, new_tensor};
use crate::staging::Staging;
use crate::tensor::from_bytes;
use crate::{Error, Result};

/// How frozen weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// IEEE half precision.
    Half,
    /// bfloat16.
    BFloat16,
    /// 8-bit floats (e4m3), scaled so that each output's largest weight is 448.
    Float8,
    /// 8-bit integers, scaled so that each output's largest weight is 127.
    Int8,
    /// 4 bits on quantiles of the normal distribution, in blocks of 64 whose factors are stored in 8 bits.
    Nf4,
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Half => "fp16",
            Self::BFloat16 => "bf16",
            Self::Float8 => "fp8",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
        })
    }
}

/// A frozen weight of a layer, whole or in few bytes.
#[derive(Debug)]
pub struct FrozenWeight {
    stored: Stored,
    shape: Vec<i64>,
    /// What it computes in.
    kind: Kind,
    /// The ring that it passes through, and its number there.
    staged: Option<(Staging, i64)>,
    /// Where it computes, if it waits in host memory for its rows to be looked up there.
    waits: Option<Device>,
}

#[derive(Debug)]
enum Stored {
    /// Of any float dtype.
    Plain(Tensor),
    /// With a factor for each output, `[outputs, 1, …]`.
    Scaled { values: Tensor, scale: Tensor },
    /// In blocks of 64.
    Nf4(Nf4),
    /// Bytes of blocks as in GGUF files. `portable`: made whole by libtorch's operations alone.
    Blocks { bytes: Tensor, kind: BlockKind, portable: bool },
}

impl Stored {
    /// The same with each tensor made another.
    fn map<E>(&self, each: impl Fn(&Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        Ok(match self {
            Self::Plain(values) => Self::Plain(each(values)?),
            Self::Scaled { values, scale } => Self::Scaled { values: each(values)?, scale: each(scale)? },
            Self::Nf4(own) => Self::Nf4(own.shallow_clone().moved(
                each(own.packed())?,
                each(own.absmax())?,
                each(own.nested())?,
                each(own.offset())?,
            )),
            Self::Blocks { bytes, kind, portable } => {
                Self::Blocks { bytes: each(bytes)?, kind: *kind, portable: *portable }
            }
        })
    }
}

/// `LoraStored` of `cpp/stored.h`.
#[repr(C)]
pub(crate) struct RawStored {
    values: *const RawTensor,
    scale: *const RawTensor,
    absmax: *const RawTensor,
    nested: *const RawTensor,
    offset: *const RawTensor,
    shape: *const i64,
    axes: usize,
    portable: c_int,
    blocks: c_int,
    staging: *const c_void,
    staged: i64,
}

unsafe extern "C" {
    fn lora_frozen(
        input: *const RawTensor,
        weight: *const RawStored,
        bias: *const RawTensor,
        convolution: c_int,
        stride: i64,
        padding: i64,
        groups: i64,
        output: *mut *mut RawTensor,
    ) -> c_int;
    fn lora_frozen_low_rank(
        input: *const RawTensor,
        weight: *const RawStored,
        bias: *const RawTensor,
        down: *const RawTensor,
        up: *const RawTensor,
        scale: f64,
        output: *mut *mut RawTensor,
    ) -> c_int;
    fn lora_frozen_whole(weight: *const RawStored, kind: c_int, output: *mut *mut RawTensor) -> c_int;
}

/// Numbers that are scaled at once: bounds what that needs beside the weight.
const CHUNK: usize = 1 << 20;

impl FrozenWeight {
    /// As it is.
    pub fn plain(weight: Tensor) -> Self {
        Self { shape: weight.size(), kind: weight.kind(), stored: Stored::Plain(weight), staged: None, waits: None }
    }

    /// In fewer bytes; it goes on computing in the weight's own dtype. The first axis is that of the outputs.
    ///
    /// # Errors
    /// [`Error::Storage`] for a weight that is not of floats, has no elements, or holds NaN or infinity where factors
    /// are needed; out of memory.
    pub fn stored(weight: &Tensor, storage: Storage) -> Result<Self> {
        let (shape, kind) = (weight.size(), weight.kind());
        let refused = |reason| Err(Error::Storage { shape: weight.size(), storage, reason });
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            return refused("it is not of floats");
        }
        if weight.numel() == 0 {
            return refused("it has no elements");
        }
        let (stored, factors) = match storage {
            Storage::Half => (Stored::Plain(weight.f_to_kind(Kind::Half)?), None),
            Storage::BFloat16 => (Stored::Plain(weight.f_to_kind(Kind::BFloat16)?), None),
            Storage::Float8 | Storage::Int8 => {
                let (values, scale) = scaled(weight, storage)?;
                let factors = Some(scale.shallow_clone());
                (Stored::Scaled { values, scale }, factors)
            }
            Storage::Nf4 => {
                let own = Nf4::quantise(weight)?;
                let factors = Some(own.offset().shallow_clone());
                (Stored::Nf4(own), factors)
            }
        };
        // One number that is not finite makes its factor such a number, and with it all its neighbours.
        if let Some(factors) = factors
            && factors.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0
        {
            return refused("it holds numbers that are not finite, or too large for f32");
        }
        Ok(Self { stored, shape, kind, staged: None, waits: None })
    }

    /// As it lies in a GGUF file: `bytes` of a weight `[outputs, inputs]` in whole blocks, row after row, which stay as
    /// they are. It computes in `kind`: f32, bf16 or f16.
    ///
    /// # Errors
    /// Where rows are not whole blocks, the number of bytes is not the shape's, `kind` is another, or memory runs out.
    pub fn packed(bytes: &[u8], blocks: BlockKind, shape: [usize; 2], kind: Kind, device: Device) -> Result<Self> {
        let own_shape = shape.map(|side| side as i64).to_vec();
        let refused = |reason| Err(Error::Blocks { shape: own_shape.clone(), blocks, reason });
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16) {
            return refused("what computes with it is not in f32, bf16 or f16");
        }
        let Some(expected) = blocks.bytes(shape) else { return refused("its rows are not whole blocks") };
        if expected == 0 {
            return refused("it has no elements");
        }
        if bytes.len() != expected {
            return Err(Error::Size { what: format!("a weight in {blocks}"), expected, found: bytes.len() });
        }
        let bytes = from_bytes("blocks", bytes, Kind::Uint8, &[expected], Kind::Uint8, device)?;
        Ok(Self {
            stored: Stored::Blocks { bytes, kind: blocks, portable: false },
            shape: own_shape,
            kind,
            staged: None,
            waits: None,
        })
    }

    /// As it lies in a file of 8-bit floats: `values` are of e4m3, `scale`, where there is one, is a factor for all of
    /// them (one number) or for each output (`[outputs]`, or that with further axes of 1). It computes in `kind`, to
    /// which the factors are rounded as well.
    ///
    /// # Errors
    /// Where `values` are of another type, the scale is of another shape, as one for each tile of a matrix, or memory runs out.
    pub fn float8(values: Tensor, scale: Option<&Tensor>, kind: Kind) -> Result<Self> {
        let shape = values.size();
        let refused = |reason| Err(Error::Storage { shape: values.size(), storage: Storage::Float8, reason });
        if values.kind() != Kind::Float8e4m3fn || shape.is_empty() || values.numel() == 0 {
            return refused("its values are not numbers of e4m3 along axes");
        }
        let Some(scale) = scale else {
            return Ok(Self { stored: Stored::Plain(values), shape, kind, staged: None, waits: None });
        };
        let mut one_each = vec![1; shape.len()];
        one_each[0] = shape[0];
        let scale = match scale.numel() as i64 {
            1 => scale.f_reshape([1])?.f_expand([shape[0]], false)?,
            count if count == shape[0] && scale.size().first() == Some(&count) => scale.f_reshape([count])?,
            _ => return refused("its scale is neither one number nor one for each output"),
        };
        let scale = scale.f_to_device(values.device())?.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(&*one_each)?;
        Ok(Self { stored: Stored::Scaled { values, scale }, shape, kind, staged: None, waits: None })
    }

    /// The same weight, which stays in host memory from now on and passes through a ring of device memory. All are
    /// moved before the first is used.
    ///
    /// # Errors
    /// Out of host memory.
    pub fn staged(self, staging: &Staging) -> Result<Self> {
        let (stored, id) = match self.stored {
            Stored::Plain(values) => {
                let ([values, ..], id) = staging.add([Some(&values), None, None, None, None])?;
                (Stored::Plain(host(values)?), id)
            }
            Stored::Scaled { values, scale } => {
                let ([values, scale, ..], id) = staging.add([Some(&values), Some(&scale), None, None, None])?;
                (Stored::Scaled { values: host(values)?, scale: host(scale)? }, id)
            }
            Stored::Nf4(own) => {
                let parts = [Some(own.packed()), None, Some(own.absmax()), Some(own.nested()), Some(own.offset())];
                let ([packed, _, absmax, nested, offset], id) = staging.add(parts)?;
                (Stored::Nf4(own.moved(host(packed)?, host(absmax)?, host(nested)?, host(offset)?)), id)
            }
            Stored::Blocks { bytes, kind, portable } => {
                let ([bytes, ..], id) = staging.add([Some(&bytes), None, None, None, None])?;
                (Stored::Blocks { bytes: host(bytes)?, kind, portable }, id)
            }
        };
        Ok(Self { stored, staged: Some((staging.clone(), id)), ..self })
    }

    /// The same weight, which waits in host memory for its rows to be looked up ([`Self::embed`]); to do anything else
    /// with it, all of it is copied to where it computes. On the CPU it is there already.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn waiting_in_host(self) -> Result<Self> {
        let device = self.device();
        if dry::platform(device).is_cpu() || self.staged.is_some() || self.waits.is_some() {
            return Ok(self);
        }
        let stored = self.stored.map(|own| match dry::is_dry(device) {
            // A plan counts the device's memory: one number stands for all.
            true => Tensor::f_zeros(vec![1; own.dim()], (own.kind(), Device::Cpu))?.f_expand(own.size(), false),
            false => own.f_to_device(Device::Cpu),
        })?;
        Ok(Self { stored, waits: Some(device), ..self })
    }

    /// The weight where it computes, if it waits elsewhere.
    fn fetched(&self) -> Result<Option<Self>> {
        let Some(device) = self.waits else { return Ok(None) };
        let stored = self.stored.map(|own| own.f_to_device(device))?;
        Ok(Some(Self { stored, shape: self.shape.clone(), kind: self.kind, staged: None, waits: None }))
    }

    /// The same weight, whose bytes are there once.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let Ok(stored) = self.stored.map::<Infallible>(|own| Ok(own.shallow_clone()));
        Self { stored, shape: self.shape.clone(), kind: self.kind, staged: self.staged.clone(), waits: self.waits }
    }

    /// In NF4 already.
    #[cfg(test)]
    pub(crate) fn nf4(own: Nf4, shape: Vec<i64>, kind: Kind) -> Self {
        Self { stored: Stored::Nf4(own), shape, kind, staged: None, waits: None }
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        if let Some((staging, _)) = &self.staged {
            return staging.device();
        }
        if let Some(device) = self.waits {
            return device;
        }
        match &self.stored {
            Stored::Plain(values) | Stored::Scaled { values, .. } => values.device(),
            Stored::Nf4(own) => own.packed().device(),
            Stored::Blocks { bytes, .. } => bytes.device(),
        }
    }

    /// Bytes that it takes where it lives.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        match &self.stored {
            Stored::Plain(values) => of(values),
            Stored::Scaled { values, scale } => of(values) + of(scale),
            Stored::Nf4(own) => [own.packed(), own.absmax(), own.nested(), own.offset()].into_iter().map(of).sum(),
            Stored::Blocks { bytes, .. } => of(bytes),
        }
    }

    /// The whole weight.
    ///
    /// # Errors
    /// Out of memory.
    pub fn whole(&self) -> Result<Tensor> {
        if let Some(own) = self.fetched()? {
            return own.whole();
        }
        if let (Stored::Plain(values), None) = (&self.stored, &self.staged) {
            return Ok(values.f_to_kind(self.kind)?);
        }
        // libtorch's own numbers of its dtypes.
        let kind = match self.kind {
            Kind::Half => 5,
            Kind::Double => 7,
            Kind::BFloat16 => 15,
            _ => 6,
        };
        // SAFETY: what `raw` points to lives in `self`.
        new_tensor(|output| unsafe { lora_frozen_whole(&self.raw(), kind, output) })
    }

    /// Rows of a weight `[words, width]`, as an embedding looks them up: `[…, width]` in the type that it computes in,
    /// for `words` `[…]` (i64). No other row is made whole, but for weights in NF4 or in a ring; of a weight that waits in
    /// host memory these rows alone come to where it computes, which waits for it.
    ///
    /// # Errors
    /// Where the weight does not have two axes, the number of a word is not below the rows, or memory runs out.
    pub fn embed(&self, words: &Tensor) -> Result<Tensor> {
        let &[outputs, width] = &*self.shape else {
            return Err(Error::Torch(format!("an embedding has two axes, and this weight is {:?}", self.shape)));
        };
        let places = match self.waits {
            Some(device) if dry::is_dry(device) => Tensor::f_zeros([words.numel() as i64], (Kind::Int64, Device::Cpu))?,
            Some(_) => words.f_reshape([-1])?.f_to_device(Device::Cpu)?,
            None => words.f_reshape([-1])?,
        };
        let stored = match &self.stored {
            Stored::Plain(values) if self.staged.is_none() => Stored::Plain(select(values, &places)?),
            Stored::Scaled { values, scale } if self.staged.is_none() => {
                Stored::Scaled { values: select(values, &places)?, scale: select(scale, &places)? }
            }
            Stored::Blocks { bytes, kind, portable } if self.staged.is_none() => {
                let bytes = select(&bytes.f_view([outputs, -1])?, &places)?.f_view([-1])?;
                Stored::Blocks { bytes, kind: *kind, portable: *portable }
            }
            _ => Stored::Plain(select(&self.whole()?, &places)?),
        };
        let shape = vec![places.size1()?, width];
        let rows = Self { stored, shape, kind: self.kind, staged: None, waits: self.waits };
        Ok(rows.whole()?.f_view(&*[&words.size()[..], &[width]].concat())?)
    }

    /// The layer's output, as [`apply_layer`] gives it.
    ///
    /// # Errors
    /// As of [`apply_layer`].
    pub fn apply(&self, geometry: &LayerGeometry, input: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if matches!(geometry, LayerGeometry::Embedding { .. }) && !self.is_whole() {
            return self.embed(input);
        }
        if let Some(own) = self.fetched()? {
            return own.apply(geometry, input, bias);
        }
        let (convolution, stride, padding, groups) = match *geometry {
            LayerGeometry::Conv2d { stride, padding, groups, .. } => (1, stride as i64, padding as i64, groups as i64),
            // libtorch's own keeps no input where the weight needs no gradient.
            LayerGeometry::Linear { .. } if !self.is_whole() => (0, 1, 0, 1),
            _ => return apply_layer(geometry, input, &self.whole()?, bias),
        };
        let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
        // SAFETY: live `torch::Tensor*`, or null where the shim allows it, for the length of the call; it takes
        // references of its own.
        new_tensor(|output| unsafe {
            lora_frozen(input.as_ptr(), &self.raw(), bias, convolution, stride, padding, groups, output)
        })
    }

    /// The output of a linear layer, `[…, outputs]` of an input `[…, inputs]`, with the update `scale · up(down(x))` of
    /// a LoRA added: `down` `[rank, inputs]`, `up` `[outputs, rank]`, both in the dtype of the input. As a whole it
    /// takes half as many kernels as one after the other, and nothing of the output's or the input's size on the side.
    ///
    /// # Errors
    /// [`Error::Torch`] where shapes or number types do not go together; out of memory.
    pub fn apply_low_rank(
        &self,
        input: &Tensor,
        bias: Option<&Tensor>,
        down: &Tensor,
        up: &Tensor,
        scale: f64,
    ) -> Result<Tensor> {
        if let Some(own) = self.fetched()? {
            return own.apply_low_rank(input, bias, down, up, scale);
        }
        let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
        let (down, up) = (down.as_ptr(), up.as_ptr());
        // SAFETY: live `torch::Tensor*`, or null where the shim allows it, for the length of the call; it takes
        // references of its own.
        new_tensor(|output| unsafe { lora_frozen_low_rank(input.as_ptr(), &self.raw(), bias, down, up, scale, output) })
    }

    /// Whether it [waits in host memory](Self::waiting_in_host).
    pub fn waits(&self) -> bool {
        self.waits.is_some()
    }

    /// Whether it is stored in another form than it computes in.
    pub fn is_in_few_bytes(&self) -> bool {
        !matches!(&self.stored, Stored::Plain(values) if values.kind() == self.kind)
    }

    fn is_whole(&self) -> bool {
        self.staged.is_none() && self.waits.is_none() && !self.is_in_few_bytes()
    }

    /// Pointers into `self`.
    pub(crate) fn raw(&self) -> RawStored {
        let none = std::ptr::null();
        let (values, scale, nf4, blocks, portable) = match &self.stored {
            Stored::Plain(values) => (values.as_ptr(), none, None, None, false),
            Stored::Scaled { values, scale } => (values.as_ptr(), scale.as_ptr(), None, None, false),
            Stored::Nf4(own) => (own.packed().as_ptr(), none, Some(own), None, own.is_portable()),
            Stored::Blocks { bytes, kind, portable } => (bytes.as_ptr(), none, None, Some(kind), *portable),
        };
        RawStored {
            values,
            scale,
            absmax: nf4.map_or(none, |own| own.absmax().as_ptr()),
            nested: nf4.map_or(none, |own| own.nested().as_ptr()),
            offset: nf4.map_or(none, |own| own.offset().as_ptr()),
            shape: self.shape.as_ptr(),
            axes: self.shape.len(),
            portable: portable.into(),
            blocks: blocks.map_or(0, |kind| kind.gguf() as c_int),
            staging: self.staged.as_ref().map_or(std::ptr::null(), |(staging, _)| staging.as_ptr()),
            staged: self.staged.as_ref().map_or(0, |(_, id)| *id),
        }
    }
}

/// Rows of a matrix.
fn select(values: &Tensor, places: &Tensor) -> Result<Tensor> {
    let kind = values.kind();
    if kind != Kind::Float8e4m3fn {
        return Ok(values.f_index_select(0, places)?);
    }
    // libtorch looks nothing up in them.
    Ok(values.f_view_dtype(Kind::Uint8)?.f_index_select(0, places)?.f_view_dtype(kind)?)
}

/// A tensor that was given to be moved comes back.
fn host(moved: Option<Tensor>) -> Result<Tensor> {
    moved.ok_or_else(|| Error::Torch("a part of a weight was lost on its way to host memory".into()))
}

/// Values in a byte each and the factor of each output, some outputs at a time.
fn scaled(weight: &Tensor, storage: Storage) -> Result<(Tensor, Tensor)> {
    let (own, largest) = if storage == Storage::Int8 { (Kind::Int8, 127.0) } else { (Kind::Float8e4m3fn, 448.0) };
    let shape = weight.size();
    let mut one_each = vec![1; shape.len()];
    one_each[0] = shape[0];
    let values = Tensor::f_empty(&*shape, (own, weight.device()))?;
    let scale = Tensor::f_empty(&*one_each, (Kind::Float, weight.device()))?;
    let step = (CHUNK * shape[0] as usize / weight.numel()).max(1);
    // Of a dry run's chunks the first is one of the largest.
    let end = if dry::is_dry(weight.device()) { step as i64 } else { shape[0] };
    for start in (0..shape[0].min(end)).step_by(step) {
        let count = shape[0].min(start + step as i64) - start;
        let part = weight.f_narrow(0, start, count)?.f_to_kind(Kind::Float)?;
        let most = part.f_view([count, -1])?.f_abs()?.f_amax([1i64], false)?;
        one_each[0] = count;
        // An output of zeros has no scale; any does.
        let factor = most.f_div_scalar(largest)?.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_view(&*one_each)?;
        let part = part.f_div(&factor)?;
        let part = if own == Kind::Int8 { part.f_round()?.f_clamp(-127.0, 127.0)? } else { part };
        values.f_narrow(0, start, count)?.f_copy_(&part)?;
        scale.f_narrow(0, start, count)?.f_copy_(&factor)?;
    }
    Ok((values, scale))
}

#[cfg(test)]
mod tests;
