//! What every variant must do on every backend, as functions that the tests of each backend call: those of this crate,
//! of `lora-torch`, and of a user's own. A variant is a row in [`ROWS`], or a [`Row`] of the user's.
//!
//! Checked: the first values have the shapes that the variant announces and leave the base as it is; a random adapter's
//! forward pass is that of its merged weight; strength 0 is the base, bit for bit; taking it out gives the base back, or
//! the variant says that it cannot; half-precision factors give the same update within their rounding.

use std::collections::BTreeMap;

use crate::backend::Backend;
use crate::merge::{Applied, merged_bias, merged_weight};
use crate::random::Stream;
use crate::variant::{BaseLayer, FrozenLayer, Parameters, Request, Variant};
use crate::{DType, Error, HostTensor, LayerGeometry, Result};

/// One kind of layer of the suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// 12 → 20 with bias.
    Linear,
    /// 16 → 16 without bias.
    Square,
    /// 3×3, 6 → 8, stride 2, with bias.
    Conv,
    /// 1×1, 6 → 8, with bias.
    Pointwise,
    /// 3×3, 8 → 12 in 4 groups.
    Grouped,
    /// 30 rows of 8.
    Embedding,
}

use Layer::{Conv, Embedding, Grouped, Linear, Pointwise, Square};

impl Layer {
    /// All of them.
    pub const ALL: [Layer; 6] = [Linear, Square, Conv, Pointwise, Grouped, Embedding];

    /// Its geometry.
    pub fn geometry(self) -> LayerGeometry {
        match self {
            Linear => LayerGeometry::linear(12, 20),
            Square => LayerGeometry::linear(16, 16),
            Conv => LayerGeometry::conv2d(6, 8, 3, 2, 1),
            Pointwise => LayerGeometry::conv2d(6, 8, 1, 1, 0),
            Grouped => {
                LayerGeometry::Conv2d { in_channels: 8, out_channels: 12, kernel: 3, stride: 1, padding: 1, groups: 4 }
            }
            Embedding => LayerGeometry::Embedding { entries: 30, width: 8 },
        }
    }

    /// A frozen layer with random weights.
    ///
    /// # Errors
    /// [`Error::Backend`] where the backend cannot take the tensors up.
    pub fn frozen<B: Backend>(self, backend: &B, like: &B::Tensor) -> Result<FrozenLayer<B>> {
        let geometry = self.geometry();
        let bias = matches!(self, Linear | Conv | Pointwise).then(|| random(&[geometry.outputs()], 1.0, 2));
        Ok(FrozenLayer {
            backend: backend.clone(),
            geometry,
            weight: backend.upload(&random(&geometry.weight_shape(), 1.0, 1), like)?,
            bias: bias.map(|bias| backend.upload(&bias, like)).transpose()?,
        })
    }

    /// An input batch of 3: `[3, 5, in]`, `[3, in, 7, 6]`, or row numbers `[3, 4]`.
    #[expect(clippy::missing_panics_doc, reason = "twelve elements are of the shape [3, 4]")]
    pub fn input(self) -> HostTensor {
        let inputs = self.geometry().inputs();
        match self {
            Linear | Square => random(&[3, 5, inputs], 1.0, 3),
            Embedding => {
                HostTensor::from_f32([3, 4], (0..12).map(|row| (row * 7 % 30) as f32).collect()).expect("twelve rows")
            }
            _ => random(&[3, inputs, 7, 6], 1.0, 3),
        }
    }
}

/// A variant and what it is asked to do.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The variant's name in the registry.
    pub variant: &'static str,
    /// Rank.
    pub rank: usize,
    /// [`Parameters::scale`].
    pub scale: f64,
    /// Options by name.
    pub options: &'static [(&'static str, f64)],
    /// The layers that it adapts; of all others it must say that it does not.
    pub layers: &'static [Layer],
}

const MATRICES: &[Layer] = &[Linear, Square, Conv, Pointwise, Grouped];
const UNGROUPED: &[Layer] = &[Linear, Square, Conv, Pointwise];

const fn row(
    variant: &'static str,
    rank: usize,
    scale: f64,
    options: &'static [(&'static str, f64)],
    layers: &'static [Layer],
) -> Row {
    Row { variant, rank, scale, options, layers }
}

/// The variants of this crate.
pub const ROWS: &[Row] = &[
    row("lora", 4, 0.5, &[], &Layer::ALL),
    row("lora", 3, 2.0, &[("tucker", 1.0)], &Layer::ALL),
    row("dora", 4, 0.5, &[], &Layer::ALL),
    row("lycoris-dora", 4, 0.5, &[], MATRICES),
    row("lycoris-dora", 4, 0.5, &[("on_input", 1.0), ("tucker", 1.0)], MATRICES),
    row("lycoris-dora-loha", 2, 0.5, &[], MATRICES),
    row("lycoris-dora-loha", 2, 0.5, &[("on_input", 1.0)], MATRICES),
    row("lycoris-dora-lokr", 1, 0.5, &[("factor", 2.0)], MATRICES),
    row("pissa", 4, 0.5, &[], UNGROUPED),
    row("pissa-fast", 4, 2.0, &[("iterations", 4.0)], UNGROUPED),
    row("olora", 4, 2.0, &[], UNGROUPED),
    row("loha", 3, 0.5, &[], MATRICES),
    row("loha", 3, 0.5, &[("tucker", 1.0)], MATRICES),
    row("lokr", 1, 0.5, &[], MATRICES),
    row("lokr", 1, 0.5, &[("factor", 2.0), ("tucker", 1.0)], MATRICES),
    row("lokr", 1, 1.0, &[("full_matrix", 1.0)], MATRICES),
    row("lokr", 1, 0.5, &[("decompose_both", 1.0)], MATRICES),
    row("oft", 4, 0.0, &[], MATRICES),
    row("oft", 4, 0.01, &[("rescale", 1.0)], MATRICES),
    row("peft-oft", 3, 1.0, &[], &[Linear, Square, Pointwise]),
    row("peft-oft", 4, 1.0, &[("block_share", 1.0)], &[Linear, Square, Pointwise]),
    row("peft-oft-neumann", 3, 1.0, &[], &[Linear, Square, Pointwise]),
    row("boft", 10, 0.0, &[], MATRICES),
    row("boft", 10, 0.02, &[("rescale", 1.0)], MATRICES),
    row("peft-boft", 4, 1.0, &[], MATRICES),
    row("ia3", 1, 1.0, &[], MATRICES),
    row("ia3", 1, 1.0, &[("on_input", 1.0)], MATRICES),
    row("lycoris-ia3", 1, 1.0, &[], MATRICES),
    row("vera", 5, 1.0, &[], &[Linear, Square]),
    row("glora", 3, 0.5, &[], UNGROUPED),
    row("peft-glora", 3, 1.0, &[], &[Linear, Square]),
    row("peft-hra", 4, 1.0, &[], UNGROUPED),
    row("full", 1, 1.0, &[("bias", 1.0)], &Layer::ALL),
];

impl Row {
    /// The request.
    pub fn request(&self) -> Request {
        let options = self.options.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        Request { rank: self.rank, scale: self.scale, options }
    }

    /// Tensors that have been trained a little: the first values with noise on all that is trained.
    ///
    /// # Errors
    /// What the variant's `initialise` gives on this layer.
    pub fn trained<B: Backend>(
        &self,
        backend: &B,
        variant: &dyn Variant<B>,
        base: &dyn BaseLayer<B>,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let mut tensors = variant.initialise(backend, base, &self.request(), &Stream::new(7))?;
        for (place, (name, tensor)) in tensors.iter_mut().enumerate() {
            if variant.is_trained(name) {
                let noise = random(tensor.shape(), 0.2, 10 + place as u64);
                let noisy = tensor.to_f32().iter().zip(&*noise.to_f32()).map(|(a, b)| a + b).collect();
                *tensor = HostTensor::from_f32(tensor.shape(), noisy)?;
            }
        }
        Ok(tensors)
    }
}

/// Runs the whole suite for one row; `like` is any f32 tensor of the backend, for its device. The message of an error
/// names the row, the layer and what failed.
///
/// # Errors
/// The first check that fails, as text.
pub fn check<B: Backend>(
    backend: &B,
    like: &B::Tensor,
    variant: &dyn Variant<B>,
    row: &Row,
) -> std::result::Result<(), String> {
    for layer in Layer::ALL {
        let adapts = row.layers.contains(&layer);
        let announced = variant.shapes(&layer.geometry(), &row.request());
        let wrong = match (adapts, announced) {
            (true, Ok(shapes)) => check_layer(backend, like, variant, row, layer, &shapes),
            (false, Err(Error::Unsupported { .. } | Error::Shape { .. })) => Ok(()),
            (true, Err(error)) => Err(error.to_string()),
            (false, other) => Err(format!("is not listed for this layer, but gives {other:?}")),
        };
        wrong.map_err(|wrong| format!("{row:?} on {layer:?}: {wrong}"))?;
    }
    Ok(())
}

fn check_layer<B: Backend>(
    backend: &B,
    like: &B::Tensor,
    variant: &dyn Variant<B>,
    row: &Row,
    layer: Layer,
    shapes: &BTreeMap<String, Vec<usize>>,
) -> std::result::Result<(), String> {
    let text = |error: Error| error.to_string();
    let base = layer.frozen(backend, like).map_err(text)?;
    let input = backend.upload(&layer.input(), like).map_err(text)?;
    let weight = backend.to_host(&base.weight).map_err(text)?;
    let upload = |tensors: &BTreeMap<String, HostTensor>, dtype: DType| -> Result<Parameters<B>> {
        let on = |(name, host): (&String, &HostTensor)| {
            Ok((name.clone(), backend.upload(&host.to_dtype(dtype).to_dtype(DType::F32), like)?))
        };
        Ok(Parameters { tensors: tensors.iter().map(on).collect::<Result<_>>()?, scale: row.scale })
    };

    let first = variant.initialise(backend, &base, &row.request(), &Stream::new(7)).map_err(text)?;
    let found: BTreeMap<_, _> = first.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect();
    if found != *shapes {
        return Err(format!("announces {shapes:?}, starts with {found:?}"));
    }
    let parameters = upload(&first, DType::F32).map_err(text)?;
    let at_start = variant.forward(backend, &base, &parameters, &input, None).map_err(text)?;
    close(backend, &at_start, &base.forward(&input).map_err(text)?, 1e-5, "the first values change the base")?;

    let trained = row.trained(backend, variant, &base).map_err(text)?;
    let applied = |strength: f64, dtype: DType| -> Result<[Applied<'_, B>; 1]> {
        Ok([Applied { variant, parameters: upload(&trained, dtype)?, strength }])
    };
    let one = applied(1.0, DType::F32).map_err(text)?;
    let output = variant.forward(backend, &base, &one[0].parameters, &input, None).map_err(text)?;
    let unchanged = backend.to_host(&base.forward(&input).map_err(text)?).map_err(text)?;
    if distance(&backend.to_host(&output).map_err(text)?, &unchanged) < 1e-3 {
        return Err("a trained adapter changes nothing".into());
    }
    let merged = merged_weight(backend, &base, &one).map_err(text)?;
    let bias = merged_bias(backend, &base, &one).map_err(text)?.or(base.bias());
    let expected = backend.apply(&base.geometry, &input, &merged, bias.as_ref()).map_err(text)?;
    close(backend, &output, &expected, 1e-5, "forward is not that of the merged weight")?;

    let none = merged_weight(backend, &base, &applied(0.0, DType::F32).map_err(text)?).map_err(text)?;
    if backend.to_host(&none).map_err(text)? != weight {
        return Err("strength 0 is not the base".into());
    }

    for strength in [1.0, -0.6] {
        let there = merged_weight(backend, &base, &applied(strength, DType::F32).map_err(text)?).map_err(text)?;
        let merged = FrozenLayer { backend: backend.clone(), geometry: base.geometry, weight: there, bias: None };
        match variant.unmerge(backend, &merged, &one[0].parameters, strength) {
            Ok(back) => close(backend, &back, &base.weight, 1e-4, "unmerging does not give the base back")?,
            Err(Error::NotReversible { .. }) if !variant.is_additive() => {}
            Err(error) => return Err(error.to_string()),
        }
    }

    for (dtype, tolerance) in [(DType::F16, 0.01), (DType::BF16, 0.08)] {
        let half = merged_weight(backend, &base, &applied(1.0, dtype).map_err(text)?).map_err(text)?;
        close(backend, &half, &merged, tolerance, "factors in half precision give another update")?;
    }
    Ok(())
}

/// L2 distance relative to the expected tensor.
pub fn distance(found: &HostTensor, expected: &HostTensor) -> f64 {
    if found.shape() != expected.shape() {
        return f64::INFINITY;
    }
    let square = |value: f32| f64::from(value).powi(2);
    let (found, expected) = (found.to_f32(), expected.to_f32());
    let apart: f64 = found.iter().zip(&*expected).map(|(a, b)| square(a - b)).sum();
    let size: f64 = expected.iter().map(|&value| square(value)).sum();
    (apart / size.max(1e-30)).sqrt()
}

fn close<B: Backend>(
    backend: &B,
    found: &B::Tensor,
    expected: &B::Tensor,
    tolerance: f64,
    what: &str,
) -> std::result::Result<(), String> {
    let host = |tensor| backend.to_host(tensor).map_err(|error| error.to_string());
    let distance = distance(&host(found)?, &host(expected)?);
    if distance <= tolerance { Ok(()) } else { Err(format!("{what}: relative distance {distance:e}")) }
}

fn random(shape: &[usize], deviation: f32, seed: u64) -> HostTensor {
    let mut values = Stream::new(seed).normals(shape.iter().product());
    values.iter_mut().for_each(|value| *value *= deviation);
    HostTensor::from_f32(shape, values).expect("as many values as the shape has places")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CpuBackend;
    use crate::variant::{Lora, VariantRegistry};

    #[test]
    fn every_variant_conforms_on_the_cpu() {
        let (registry, like) = (VariantRegistry::<CpuBackend>::default(), HostTensor::zeros([1]));
        let wrong: Vec<String> = ROWS
            .iter()
            .filter_map(|row| check(&CpuBackend, &like, &*registry.get(row.variant).unwrap(), row).err())
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        for name in registry.names() {
            assert!(ROWS.iter().any(|row| row.variant == name), "`{name}` has no row");
        }
    }

    /// The suite can fail: a variant whose forward pass forgets the scale is found out.
    #[test]
    fn a_wrong_variant_is_found_out() {
        #[derive(Debug)]
        struct Forgetful;
        impl Variant<CpuBackend> for Forgetful {
            fn name(&self) -> &str {
                "forgetful"
            }
            fn shapes(&self, geometry: &LayerGeometry, request: &Request) -> Result<BTreeMap<String, Vec<usize>>> {
                Variant::<CpuBackend>::shapes(&Lora, geometry, request)
            }
            fn initialise(
                &self,
                backend: &CpuBackend,
                base: &dyn BaseLayer<CpuBackend>,
                request: &Request,
                stream: &Stream,
            ) -> Result<BTreeMap<String, HostTensor>> {
                Lora.initialise(backend, base, request, stream)
            }
            fn delta_weight(
                &self,
                backend: &CpuBackend,
                base: &dyn BaseLayer<CpuBackend>,
                parameters: &Parameters<CpuBackend>,
            ) -> Result<HostTensor> {
                Lora.delta_weight(backend, base, parameters)
            }
            fn forward(
                &self,
                backend: &CpuBackend,
                base: &dyn BaseLayer<CpuBackend>,
                parameters: &Parameters<CpuBackend>,
                input: &HostTensor,
                _: Option<&crate::variant::Dropout>,
            ) -> Result<HostTensor> {
                let unscaled = Parameters { tensors: parameters.tensors.clone(), scale: 1.0 };
                Lora.forward(backend, base, &unscaled, input, None)
            }
        }
        let error = check(&CpuBackend, &HostTensor::zeros([1]), &Forgetful, &ROWS[0]).unwrap_err();
        assert!(error.contains("not that of the merged weight"), "{error}");
    }
}
