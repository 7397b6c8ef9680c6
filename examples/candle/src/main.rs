//! The adapter formulas on another tensor library: a backend for candle, with which every variant passes the conformance
//! suite (merging included) and a LoRA file merges into a model of candle's tensors.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor};
use lora_core::backend::{Backend, CpuBackend};
use lora_core::conformance::{ROWS, check, distance};
use lora_core::merge::{Applied, merged_weight};
use lora_core::random::Stream;
use lora_core::variant::{FrozenLayer, Lora, Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, Error, HostTensor, LayerGeometry, ModulePath, Result};
use lora_io::adapter::{self, Format};

#[derive(Debug, Clone)]
struct Candle;

fn failed(error: candle_core::Error) -> Error {
    Error::Backend(Box::new(error))
}

impl Backend for Candle {
    type Tensor = Tensor;

    fn shape(&self, tensor: &Tensor) -> Vec<usize> {
        tensor.dims().to_vec()
    }
    fn share(&self, tensor: &Tensor) -> Tensor {
        tensor.clone()
    }
    fn detach(&self, tensor: &Tensor) -> Tensor {
        tensor.detach()
    }
    fn upload(&self, host: &HostTensor, like: &Tensor) -> Result<Tensor> {
        let tensor = Tensor::from_vec(host.to_f32().into_owned(), host.shape(), like.device());
        tensor.and_then(|tensor| tensor.to_dtype(like.dtype())).map_err(failed)
    }
    fn to_host(&self, tensor: &Tensor) -> Result<HostTensor> {
        let values = tensor.flatten_all().and_then(|flat| flat.to_dtype(DType::F32)?.to_vec1()).map_err(failed)?;
        HostTensor::from_f32(tensor.dims(), values)
    }
    fn cast_like(&self, tensor: &Tensor, like: &Tensor) -> Result<Tensor> {
        tensor.to_dtype(like.dtype()).map_err(failed)
    }
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        b.broadcast_as(a.dims()).and_then(|b| &a + b).map_err(failed)
    }
    fn mul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.broadcast_mul(b).map_err(failed)
    }
    fn div(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.broadcast_div(b).map_err(failed)
    }
    fn scale(&self, tensor: &Tensor, factor: f64) -> Result<Tensor> {
        (tensor * factor).map_err(failed)
    }
    fn sqrt(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.sqrt().map_err(failed)
    }
    fn at_least(&self, tensor: &Tensor, least: f64) -> Result<Tensor> {
        tensor.maximum(least).map_err(failed)
    }
    fn sum(&self, tensor: &Tensor, axes: &[usize]) -> Result<Tensor> {
        tensor.sum_keepdim(axes).map_err(failed)
    }
    fn matmul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.contiguous().and_then(|a| a.matmul(&b.contiguous()?)).map_err(failed)
    }
    fn reshape(&self, tensor: &Tensor, shape: &[usize]) -> Result<Tensor> {
        tensor.reshape(shape).map_err(failed)
    }
    fn permute(&self, tensor: &Tensor, order: &[usize]) -> Result<Tensor> {
        tensor.permute(order).and_then(|turned| turned.contiguous()).map_err(failed)
    }
    fn select(&self, tensor: &Tensor, axis: usize, indices: &[usize]) -> Result<Tensor> {
        let indices: Vec<u32> = indices.iter().map(|&index| index as u32).collect();
        let indices = Tensor::new(indices, tensor.device());
        indices.and_then(|indices| tensor.contiguous()?.index_select(&indices, axis)).map_err(failed)
    }
    fn apply(
        &self,
        geometry: &LayerGeometry,
        input: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let output = || match *geometry {
            LayerGeometry::Conv2d { stride, padding, groups, out_channels, .. } => {
                let output = input.conv2d(weight, padding, stride, 1, groups)?;
                bias.map_or(Ok(output.clone()), |bias| output.broadcast_add(&bias.reshape((1, out_channels, 1, 1))?))
            }
            LayerGeometry::Embedding { width, .. } => {
                let rows = weight.index_select(&input.flatten_all()?.to_dtype(DType::U32)?, 0)?;
                rows.reshape([input.dims(), &[width]].concat())
            }
            _ => {
                let output = input.broadcast_matmul(&weight.transpose(D::Minus1, D::Minus2)?)?;
                bias.map_or(Ok(output.clone()), |bias| output.broadcast_add(bias))
            }
        };
        output().map_err(failed)
    }
}

/// A LoRA file for the model below, as another program would have left it.
fn lora_file(folder: &std::path::Path) -> lora_io::Result<()> {
    let random = |[rows, columns]: [usize; 2], seed| {
        HostTensor::from_f32([rows, columns], Stream::new(seed).normals(rows * columns)).expect("as many")
    };
    let mut adapter = Adapter::default();
    for (path, (rows, columns)) in
        [("model.layers.0.mlp.up_proj", (32, 16)), ("model.layers.0.mlp.down_proj", (16, 32))]
    {
        let tensors =
            BTreeMap::from([("down".to_owned(), random([4, columns], 1)), ("up".to_owned(), random([rows, 4], 2))]);
        let module = AdapterModule { variant: "lora".into(), tensors, rank: 4, alpha: 2.0 };
        adapter.modules.insert(ModulePath::new(Component::LANGUAGE_MODEL, path), module);
    }
    adapter::write(folder, &adapter, Format::Peft, lora_core::DType::F32).map(drop)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let variants = VariantRegistry::<Candle>::default();
    let like = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
    for row in ROWS {
        check(&Candle, &like, &*variants.get(row.variant)?, row)?;
    }
    println!("{} rows of the conformance suite pass on candle", ROWS.len());

    let mut model = BTreeMap::from([
        ("model.layers.0.mlp.up_proj", Tensor::randn(0f32, 1.0, (32, 16), &Device::Cpu)?),
        ("model.layers.0.mlp.down_proj", Tensor::randn(0f32, 1.0, (16, 32), &Device::Cpu)?),
    ]);
    let file = std::env::temp_dir().join(format!("lora-for-candle-{}", std::process::id()));
    lora_file(&file)?;
    for (path, module) in &adapter::read(&file)?.adapter.modules {
        let weight = model.get_mut(&*path.path).ok_or("the file names a layer that the model does not have")?;
        let geometry = LayerGeometry::linear(weight.dim(1)?, weight.dim(0)?);
        let base = FrozenLayer { backend: Candle, geometry, weight: weight.clone(), bias: None };
        let parameters = Parameters::upload(&Candle, module, weight)?;
        let merged = merged_weight(&Candle, &base, &[Applied { variant: &Lora, parameters, strength: 0.8 }])?;
        let base = FrozenLayer { backend: CpuBackend, geometry, weight: Candle.to_host(weight)?, bias: None };
        let parameters = Parameters::upload(&CpuBackend, module, &base.weight)?;
        let ours = merged_weight(&CpuBackend, &base, &[Applied { variant: &Lora, parameters, strength: 0.8 }])?;
        let there = Candle.to_host(&merged)?;
        let (moved, apart) = (distance(&there, &base.weight), distance(&there, &ours));
        println!("{path}: merged; the weight moved by {moved:.2} of its size, {apart:.0e} from the built-in backend's");
        assert!(apart < 1e-6, "more than f32 rounding");
        *weight = merged;
    }
    Ok(std::fs::remove_dir_all(file)?)
}
