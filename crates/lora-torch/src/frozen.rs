//! Frozen weights in few bytes: stored in half precision, 8-bit floats or 8-bit integers with one factor for each
//! output, NF4 ([`crate::nf4`]), or as they lie in a file, in GGUF's blocks ([`crate::blocks`]) or 8-bit floats. They
//! are made whole for one layer at a time, in the forward pass and again in the backward pass. Those of any of these
//! forms may live in host memory and come to the device when they are needed ([`crate::staging`]).

use std::convert::Infallible;
use std::ffi::{c_int, c_void};
use std::fmt;

use lora_core::LayerGeometry;
use tch::{Device, Kind, Tensor};

use crate::backend::apply_layer;
use crate::blocks::BlockKind;
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

    fn is_whole(&self) -> bool {
        self.staged.is_none()
            && self.waits.is_none()
            && matches!(&self.stored, Stored::Plain(values) if values.kind() == self.kind)
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
mod tests {
    use super::*;

    const ALL: [(Storage, f64); 5] = [
        (Storage::Half, 6e-4),
        (Storage::BFloat16, 5e-3),
        (Storage::Float8, 7e-2),
        (Storage::Int8, 1e-2),
        // Half of the widest gap between codes, -1 to -0.696, and what the factor's own 8 bits lose.
        (Storage::Nf4, 0.17),
    ];

    fn random(shape: &[i64]) -> Tensor {
        crate::seed(7);
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn largest(tensor: &Tensor) -> f64 {
        tensor.abs().max().double_value(&[])
    }

    #[test]
    fn storages_round_as_they_say() {
        let weight = random(&[16, 24]) * random(&[16, 1]).abs();
        for (storage, tolerance) in ALL {
            let own = FrozenWeight::stored(&weight, storage).unwrap();
            // What shares a largest value: an output, or a block of 64.
            let together = if storage == Storage::Nf4 { [6, 64] } else { [16, 24] };
            let most = weight.view(together).abs().amax([1i64], true);
            // Integers err by half a step of that, floats by a share of the value.
            let error = largest(&((own.whole().unwrap() - &weight).view(together) / &most));
            assert!(error > 0.0 && error < tolerance, "{storage:?}: {error}");
            assert_eq!(own.kind(), Kind::Float);
        }
        let bytes = |storage| FrozenWeight::stored(&weight, storage).unwrap().bytes();
        assert_eq!((bytes(Storage::Half), bytes(Storage::Int8)), (2 * 384, 384 + 64));
        assert_eq!(bytes(Storage::Nf4), 384 / 2 + 6 + 4 + 4);
        // By hand: the largest is 127 steps.
        let own = FrozenWeight::stored(&Tensor::from_slice(&[2.54f32, -1.27, 0.02, 0.0]).view([1, 4]), Storage::Int8);
        let own = own.unwrap();
        let Stored::Scaled { values, .. } = &own.stored else { panic!("{own:?}") };
        assert_eq!(Vec::<i8>::try_from(values.view([-1])).unwrap(), [127, -64, 1, 0]);
        let zeros = FrozenWeight::stored(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)), Storage::Int8).unwrap();
        assert_eq!(largest(&zeros.whole().unwrap()), 0.0);
    }

    /// The same arithmetic on the same whole weight, so that it is the same to the bit, but where sums are taken in
    /// another order: tiles of large weights, and libtorch's own backward pass of a convolution.
    #[test]
    fn outputs_and_gradients_are_those_of_the_whole_weight() {
        let grouped =
            LayerGeometry::Conv2d { in_channels: 6, out_channels: 10, kernel: 3, stride: 1, padding: 1, groups: 2 };
        let layers = [
            (LayerGeometry::linear(6, 10), vec![2, 5, 6], true),
            (LayerGeometry::conv2d(6, 10, 3, 1, 1), vec![2, 6, 7, 9], false),
            (LayerGeometry::conv2d(6, 10, 3, 2, 1), vec![2, 6, 8, 9], false),
            (LayerGeometry::conv2d(6, 10, 1, 1, 0), vec![1, 6, 4, 4], false),
            (grouped, vec![2, 6, 5, 4], false),
            // Two tiles, of rows that do not begin a block of NF4 each.
            (LayerGeometry::linear(2050, 1100), vec![3, 2050], false),
            (LayerGeometry::conv2d(250, 1024, 3, 1, 1), vec![1, 250, 3, 3], false),
        ];
        for (geometry, shape, exact) in layers {
            let weight_shape: Vec<i64> = geometry.weight_shape().iter().map(|&side| side as i64).collect();
            let (weight, bias) = (random(&weight_shape) * 0.1, random(&[weight_shape[0]]));
            let stored = ALL.map(|(storage, _)| FrozenWeight::stored(&weight, storage).unwrap());
            for own in stored.into_iter().chain([FrozenWeight::plain(weight.shallow_clone())]) {
                let (a, b) = (random(&shape).set_requires_grad(true), random(&shape).set_requires_grad(true));
                let output = own.apply(&geometry, &a, Some(&bias)).unwrap();
                let expected = apply_layer(&geometry, &b, &own.whole().unwrap(), Some(&bias)).unwrap();
                let toward = random(&output.size());
                (&output * &toward).sum(Kind::Float).backward();
                (&expected * &toward).sum(Kind::Float).backward();
                for (own, expected) in [(output, expected), (a.grad(), b.grad())] {
                    let apart = largest(&(&own - &expected)) / largest(&expected);
                    assert!(apart <= if exact { 0.0 } else { 2e-6 }, "{geometry:?} {apart}");
                }
            }
        }
        let wrong = FrozenWeight::stored(&random(&[10, 6]), Storage::Int8).unwrap();
        assert!(wrong.apply(&LayerGeometry::linear(6, 10), &random(&[2, 7]), None).is_err());
    }

    /// The same sums, but for the order of additions.
    #[test]
    fn a_low_rank_update_is_that_of_its_products() {
        for (inputs, outputs, lead) in [(6, 10, vec![2, 5]), (2050, 1100, vec![3]), (64, 48, vec![1, 2, 3])] {
            let weight = random(&[outputs, inputs]) * 0.1;
            let stored = ALL.map(|(storage, _)| FrozenWeight::stored(&weight, storage).unwrap());
            for (own, scale) in stored
                .into_iter()
                .chain([FrozenWeight::plain(weight.shallow_clone())])
                .zip([1.0, 0.5, 3.0].into_iter().cycle())
            {
                let bias = (scale != 0.5).then(|| random(&[outputs]));
                let shape = [&lead[..], &[inputs]].concat();
                let leaves = || {
                    [random(&shape), random(&[4, inputs]), random(&[outputs, 4])]
                        .map(|leaf| leaf.set_requires_grad(true))
                };
                let ([a, down, up], others) = (leaves(), leaves());
                let output = own.apply_low_rank(&a, bias.as_ref(), &down, &up, scale).unwrap();
                let [b, other_down, other_up] = &others;
                let update = b.linear(other_down, None::<&Tensor>).linear(other_up, None::<&Tensor>) * scale;
                let expected = b.linear(&own.whole().unwrap(), bias.as_ref()) + update;
                let toward = random(&output.size());
                (&output * &toward).sum(Kind::Float).backward();
                (&expected * &toward).sum(Kind::Float).backward();
                let pairs =
                    [(&a, b), (&down, other_down), (&up, other_up)].map(|(own, other)| (own.grad(), other.grad()));
                for (own, expected) in [(output, expected)].into_iter().chain(pairs) {
                    let apart = largest(&(&own - &expected)) / largest(&expected);
                    assert!(own.size() == expected.size() && apart < 4e-6, "{inputs} {scale}: {apart}");
                }
            }
        }
        // Of factors alone: an input without a gradient, as the captions' are, gets none.
        let own = FrozenWeight::plain(random(&[10, 6]).to_kind(Kind::BFloat16));
        let [input, down, up] = [[7, 6], [2, 6], [10, 2]].map(|shape| random(&shape).to_kind(Kind::BFloat16));
        let down = down.set_requires_grad(true);
        let output = own.apply_low_rank(&input, None, &down, &up, 1.0).unwrap();
        output.sum(Kind::Float).backward();
        assert!(
            output.kind() == Kind::BFloat16 && down.grad().defined() && !input.grad().defined() && !up.grad().defined()
        );
        assert!(own.apply_low_rank(&input, None, &up, &down, 1.0).is_err());
    }

    /// Random blocks with factors from 1e-3 to 0.1, as weights have them.
    fn random_blocks(blocks: BlockKind, shape: [usize; 2]) -> Vec<u8> {
        let (size, factors) = match blocks {
            BlockKind::Q4_0 | BlockKind::Q5_0 | BlockKind::Q8_0 => (blocks.block().1, &[0][..]),
            BlockKind::Q6_K => (blocks.block().1, &[208][..]),
            _ => (blocks.block().1, &[0, 2][..]),
        };
        let mut stream = lora_core::random::Stream::new(blocks.gguf().into());
        let mut bytes: Vec<u8> = (0..blocks.bytes(shape).unwrap()).map(|_| stream.next_u32() as u8).collect();
        for block in bytes.chunks_exact_mut(size) {
            for &place in factors {
                let factor = half::f16::from_f32(1e-3 + 0.099 * stream.next_u32() as f32 / u32::MAX as f32);
                block[place..place + 2].copy_from_slice(&factor.to_le_bytes());
            }
        }
        bytes
    }

    /// What runs where there are no loops, tried on the CPU: several chunks, and tiles.
    #[test]
    fn blocks_by_libtorchs_operations_are_those_of_the_loops() {
        for blocks in BlockKind::ALL {
            for (shape, kind) in [
                ([3, 512], Kind::Half),
                ([1100, 4096], Kind::BFloat16),
                ([2, 768], Kind::Float),
                ([1, 256], Kind::Float),
            ] {
                let bytes = random_blocks(blocks, shape);
                let own = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
                let mut other = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
                let Stored::Blocks { portable, .. } = &mut other.stored else { panic!("{other:?}") };
                *portable = true;
                assert!(own.whole().unwrap().equal(&other.whole().unwrap()), "{blocks} {shape:?} {kind:?}");
            }
        }
    }

    #[test]
    fn layers_in_blocks_compute_what_their_whole_weights_do() {
        let staging = Staging::new(Device::Cpu).unwrap();
        let layers = BlockKind::ALL.map(|blocks| {
            // Two tiles.
            let shape = [1100, 2048];
            let bytes = random_blocks(blocks, shape);
            let own = FrozenWeight::packed(&bytes, blocks, shape, Kind::Float, Device::Cpu).unwrap();
            let whole = own.whole().unwrap();
            (blocks, own.staged(&staging).unwrap(), whole)
        });
        for (blocks, own, whole) in layers {
            let (a, b) = (random(&[3, 2048]).set_requires_grad(true), random(&[3, 2048]).set_requires_grad(true));
            let output = own.apply(&LayerGeometry::linear(2048, 1100), &a, None).unwrap();
            let expected = b.linear(&whole, None::<&Tensor>);
            let toward = random(&[3, 1100]);
            (&output * &toward).sum(Kind::Float).backward();
            (&expected * &toward).sum(Kind::Float).backward();
            for (own, expected) in [(output, expected), (a.grad(), b.grad())] {
                let apart = largest(&(&own - &expected)) / largest(&expected);
                assert!(apart < 2e-6, "{blocks}: {apart}");
            }
        }
    }

    #[test]
    fn an_embedding_looks_up_rows_of_the_whole_weight() {
        let weight = random(&[20, 256]);
        let words = Tensor::from_slice(&[3i64, 0, 19, 3, 7, 7]).view([2, 3]);
        let mut all: Vec<FrozenWeight> =
            ALL.iter().map(|&(storage, _)| FrozenWeight::stored(&weight, storage).unwrap()).collect();
        all.push(FrozenWeight::plain(weight.shallow_clone()));
        all.push(FrozenWeight::float8(weight.to_kind(Kind::Float8e4m3fn), None, Kind::BFloat16).unwrap());
        all.extend(BlockKind::ALL.map(|blocks| {
            let bytes = random_blocks(blocks, [20, 256]);
            FrozenWeight::packed(&bytes, blocks, [20, 256], Kind::BFloat16, Device::Cpu).unwrap()
        }));
        let staging = Staging::new(Device::Cpu).unwrap();
        let bytes = random_blocks(BlockKind::Q8_0, [20, 256]);
        let staged = FrozenWeight::packed(&bytes, BlockKind::Q8_0, [20, 256], Kind::Half, Device::Cpu).unwrap();
        all.push(staged.staged(&staging).unwrap());
        for own in &all {
            let found = own.embed(&words).unwrap();
            let expected = own.whole().unwrap().index_select(0, &words.view([-1])).view([2, 3, 256]);
            assert!(found.equal(&expected) && found.kind() == own.kind(), "{own:?}");
        }
        assert!(all[0].embed(&(&words + 1)).is_err());
        assert!(FrozenWeight::plain(random(&[2, 2, 2])).embed(&words).is_err());
    }

    #[test]
    fn numbers_of_8_bits_come_from_a_file_as_they_are() {
        let whole = random(&[6, 10]);
        let values = whole.to_kind(Kind::Float8e4m3fn);
        let back = values.to_kind(Kind::Float);
        let of = |scale: Option<&Tensor>| FrozenWeight::float8(values.shallow_clone(), scale, Kind::Float);
        assert!(of(None).unwrap().whole().unwrap().equal(&back));
        let one = Tensor::from(0.25f32);
        assert!(of(Some(&one)).unwrap().whole().unwrap().equal(&(&back * &one)));
        assert!(of(Some(&one.view([1]))).unwrap().whole().unwrap().equal(&(&back * &one)));
        let each = random(&[6, 1]);
        assert!(of(Some(&each)).unwrap().whole().unwrap().equal(&(&back * &each)));
        assert!(of(Some(&each.view([6]))).unwrap().whole().unwrap().equal(&(&back * &each)));
        let output = of(Some(&each)).unwrap().apply(&LayerGeometry::linear(10, 6), &random(&[2, 10]), None).unwrap();
        assert_eq!(output.size(), [2, 6]);
        // A factor for each tile of a matrix, and values of another type.
        for refused in [of(Some(&random(&[3, 2]))), FrozenWeight::float8(whole, None, Kind::Float)] {
            assert!(matches!(refused, Err(Error::Storage { storage: Storage::Float8, .. })));
        }
    }

    unsafe extern "C" {
        fn lora_host_scaled(
            bytes: *const c_void,
            fp8: c_int,
            scale: *const f32,
            row: i64,
            count: i64,
            kind: c_int,
            values: *mut c_void,
        ) -> c_int;
        fn lora_host_blocks(
            packed: *const c_void,
            blocks: c_int,
            numbers: c_int,
            size: c_int,
            count: i64,
            kind: c_int,
            values: *mut c_void,
        ) -> c_int;
    }

    /// CUDA's kernel, compiled for the host.
    #[test]
    fn the_kernel_of_blocks_gives_the_numbers_of_the_loops() {
        for blocks in BlockKind::ALL {
            for (number, kind) in [Kind::Float, Kind::Half, Kind::BFloat16].into_iter().enumerate() {
                let shape = [5, 768];
                let bytes = random_blocks(blocks, shape);
                let own = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
                let found = Tensor::empty([5, 768], (kind, Device::Cpu));
                let (numbers, size) = blocks.block();
                // SAFETY: bytes of whole blocks, and a contiguous tensor of as many numbers.
                crate::shim::checked(unsafe {
                    lora_host_blocks(
                        bytes.as_ptr().cast(),
                        blocks.gguf() as c_int,
                        numbers as c_int,
                        size as c_int,
                        found.numel() as i64,
                        number as c_int,
                        found.data_ptr(),
                    )
                })
                .unwrap();
                assert!(found.equal(&own.whole().unwrap()), "{blocks} {kind:?}");
            }
        }
    }

    /// On a machine with a GPU: the kernel gives the bits of the CPU's loops, and nothing else runs.
    #[test]
    fn the_kernel_of_blocks_gives_the_same_numbers() {
        if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
            println!("not run: {}", crate::device::cuda());
            return;
        }
        for blocks in BlockKind::ALL {
            for (shape, kind) in [([5, 768], Kind::Float), ([1100, 2048], Kind::Half), ([3, 256], Kind::BFloat16)] {
                let bytes = random_blocks(blocks, shape);
                let of = |device| FrozenWeight::packed(&bytes, blocks, shape, kind, device).unwrap();
                let (there, expected) = (of(Device::Cuda(0)), of(Device::Cpu).whole().unwrap());
                drop(there.whole().unwrap());
                let (found, counted) = crate::profile::operations(|| there.whole().unwrap()).unwrap();
                assert!(found.to_device(Device::Cpu).equal(&expected), "{blocks} {shape:?} {kind:?}");
                assert_eq!(counted.total().work, 0, "{:?}", counted.by_name);
            }
        }
    }

    /// CUDA's kernels, compiled for the host.
    #[test]
    fn the_kernels_arithmetic_is_that_of_libtorchs_operations() {
        for storage in [Storage::Int8, Storage::Float8] {
            for shape in [vec![40, 12, 3, 3], vec![77, 65], vec![300, 320], vec![1, 3]] {
                for (number, kind) in [Kind::Float, Kind::Half, Kind::BFloat16].into_iter().enumerate() {
                    let weight = Tensor::randn(&*shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                    let own = FrozenWeight::stored(&weight, storage).unwrap();
                    let Stored::Scaled { values, scale } = &own.stored else { panic!("{storage}") };
                    let found = Tensor::empty(&*shape, (kind, Device::Cpu));
                    let row = weight.numel() as i64 / shape[0];
                    // SAFETY: contiguous tensors of the sizes that are said.
                    crate::shim::checked(unsafe {
                        lora_host_scaled(
                            values.data_ptr(),
                            (storage == Storage::Float8).into(),
                            scale.data_ptr().cast(),
                            row,
                            weight.numel() as i64,
                            number as c_int,
                            found.data_ptr(),
                        )
                    })
                    .unwrap();
                    assert_eq!(found, own.whole().unwrap(), "{storage} {shape:?} {kind:?}");
                }
            }
        }
    }

    /// As if the CPU were elsewhere: rows are looked up in host memory, and all else is done with the weight fetched.
    #[test]
    fn what_waits_in_host_memory_gives_the_same_numbers() {
        let weight = random(&[70, 64]);
        let words = Tensor::from_slice(&[3i64, 69, 0, 3, 12, 12]).view([2, 3]);
        let (geometry, input) = (LayerGeometry::linear(64, 70), random(&[3, 64]));
        for storage in [Storage::BFloat16, Storage::Int8, Storage::Float8, Storage::Nf4] {
            let own = FrozenWeight::stored(&weight, storage).unwrap();
            let waiting = FrozenWeight { waits: Some(Device::Cpu), ..own.shallow_clone() };
            assert_eq!(
                waiting.embed(&words).unwrap(),
                own.whole().unwrap().index_select(0, &words.view([-1])).view([2, 3, 64])
            );
            assert_eq!(waiting.whole().unwrap(), own.whole().unwrap());
            let [one, other] = [&waiting, &own].map(|weight| weight.apply(&geometry, &input, None).unwrap());
            assert_eq!(one, other);
            assert_eq!(waiting.shallow_clone().device(), Device::Cpu);
        }
    }

    /// On a machine with a GPU: the kernels give the bits of libtorch's operations, and nothing else runs.
    #[test]
    fn the_kernels_give_the_same_numbers() {
        if !matches!(crate::device::cuda(), crate::device::CudaStatus::Available(_)) {
            println!("not run: {}", crate::device::cuda());
            return;
        }
        for storage in [Storage::Int8, Storage::Float8] {
            for (shape, kind) in [
                (vec![40, 12, 3, 3], Kind::Float),
                (vec![77, 65], Kind::Half),
                (vec![300, 320], Kind::BFloat16),
                (vec![1, 3], Kind::Half),
            ] {
                let weight = random(&shape).to_kind(kind);
                let expected = FrozenWeight::stored(&weight, storage).unwrap().whole().unwrap();
                let there = FrozenWeight::stored(&weight.to_device(Device::Cuda(0)), storage).unwrap();
                drop(there.whole().unwrap());
                let (found, counted) = crate::profile::operations(|| there.whole().unwrap()).unwrap();
                assert_eq!(found.to_device(Device::Cpu), expected, "{storage} {shape:?} {kind:?}");
                assert_eq!(counted.total().work, 0, "{:?}", counted.by_name);
            }
        }
    }

    #[test]
    fn half_precision_computes_in_its_own_dtype() {
        let geometry = LayerGeometry::linear(64, 48);
        let weight = (random(&[48, 64]) * 0.1).to_kind(Kind::BFloat16);
        for storage in [Storage::Nf4, Storage::Int8, Storage::Float8] {
            let own = FrozenWeight::stored(&weight, storage).unwrap();
            let input = random(&[3, 64]).to_kind(Kind::BFloat16).set_requires_grad(true);
            let output = own.apply(&geometry, &input, None).unwrap();
            assert_eq!(output, input.linear(&own.whole().unwrap(), None::<&Tensor>));
            output.sum(Kind::Float).backward();
            assert_eq!((output.kind(), input.grad().kind()), (Kind::BFloat16, Kind::BFloat16));
        }
    }
}
