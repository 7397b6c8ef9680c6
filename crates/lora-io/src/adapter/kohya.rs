//! The kohya/WebUI layout, which the WebUI, Forge, ComfyUI, diffusers and sd-scripts all read.
//!
//! A module is named `lora_unet_` or `lora_te_` and its path with underscores; its tensors are `.lora_down.weight`,
//! `.lora_up.weight` and `.alpha`. What is particular here:
//!
//! - **One alpha in the whole file.** diffusers takes the most frequent alpha for attention layers and loses the others,
//!   so a module with another alpha has the ratio folded into `lora_up`. Alpha is an F32 scalar whatever the dtype.
//! - **Zero partners.** diffusers refuses a text-encoder LoRA that has only q, k or v. Such a file gets an `out_proj`
//!   for each adapted layer whose factors are zero; the metadata lists them ([`ZERO_PARTNERS`]) and reading drops them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_core::target::TargetLayer;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};

use crate::safetensors::{
    Entry, SafetensorsFile, TensorSource, TensorView, Written, header, verify, write as write_file,
};
use crate::{Error, Result, hash};

/// Metadata key: names of modules that are there for diffusers' sake only, separated by commas.
pub const ZERO_PARTNERS: &str = "lora_zero_partners";

const DOWN: &str = ".lora_down.weight";
const UP: &str = ".lora_up.weight";
const ALPHA: &str = ".alpha";

/// A module's name in the file.
pub fn file_name(module: &ModulePath) -> String {
    let prefix = match module.component {
        Component::TextEncoder => "lora_te",
        _ => "lora_unet",
    };
    format!("{prefix}_{}", module.path.replace('.', "_"))
}

/// Writes an adapter of the plain `lora` variant, then reads the file back and checks it. The adapter's metadata goes
/// into the header, with the hashes that the field's tools expect (`sshs_model_hash`, `sshs_legacy_hash`) added.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, dtype: DType) -> Result<Written> {
    let path = path.as_ref();
    let alpha = common_alpha(adapter);
    let mut tensors = BTreeMap::new();
    let mut insert = |name: String, down: &HostTensor, up: HostTensor| -> Result<()> {
        for (suffix, tensor) in [(DOWN, down.to_dtype(dtype)), (UP, up.to_dtype(dtype))] {
            if !tensor.is_finite() {
                let reason = format!(
                    "`{}` holds NaN or infinity in {dtype}; save as bf16 or fp32, or train with a lower learning rate",
                    &suffix[1..]
                );
                return Err(Error::Module { module: name, reason });
            }
            tensors.insert(format!("{name}{suffix}"), tensor);
        }
        tensors.insert(
            format!("{name}{ALPHA}"),
            HostTensor::from_f32([], vec![alpha as f32]).expect("one value, no axes"),
        );
        Ok(())
    };
    for (module, adapter_module) in &adapter.modules {
        let (down, up) = factors(module, adapter_module)?;
        let ratio = (adapter_module.alpha / alpha) as f32;
        let up = if ratio == 1.0 {
            up.clone()
        } else {
            let folded = up.to_f32().iter().map(|value| value * ratio).collect();
            HostTensor::from_f32(up.shape(), folded).expect("the shape is unchanged")
        };
        insert(file_name(module), down, up)?;
    }
    let partners = zero_partners(adapter);
    for (module, (down, up)) in &partners {
        insert(file_name(module), down, up.clone())?;
    }

    let mut metadata = adapter.metadata.clone();
    metadata.retain(|key, _| !key.starts_with("sshs_") && key != ZERO_PARTNERS);
    if !partners.is_empty() {
        metadata.insert(ZERO_PARTNERS.into(), partners.keys().map(file_name).collect::<Vec<_>>().join(","));
    }
    let (model_hash, legacy_hash) = kohya_hashes(path, &tensors, &metadata)?;
    metadata.insert("sshs_model_hash".into(), model_hash);
    metadata.insert("sshs_legacy_hash".into(), legacy_hash);

    let written = write_file(path, &tensors, &metadata)?;
    verify(path, &tensors.entries())?;
    Ok(written)
}

/// Reads a file against the base's layers; every tensor must belong to one, with both halves and the right shapes.
pub fn read(path: impl AsRef<Path>, layers: &[TargetLayer]) -> Result<Adapter> {
    let path = path.as_ref();
    let file = SafetensorsFile::open(path)?;
    let by_name: BTreeMap<String, &TargetLayer> = layers.iter().map(|layer| (file_name(&layer.path), layer)).collect();
    let partners: BTreeSet<&str> =
        file.metadata().get(ZERO_PARTNERS).map(|list| list.split(',').collect()).unwrap_or_default();

    let mut modules: BTreeMap<&str, BTreeMap<&str, TensorView<'_>>> = BTreeMap::new();
    let mut problems = Vec::new();
    for name in file.names() {
        let (module, part) = name.split_once('.').unwrap_or((name, ""));
        if !by_name.contains_key(module) {
            problems.push(format!("`{name}` (this base has no such layer)"));
        } else if !["lora_down.weight", "lora_up.weight", "alpha"].contains(&part) {
            problems.push(format!("`{name}` (not a tensor of a plain LoRA)"));
        } else {
            modules.entry(module).or_default().insert(part, file.get(name)?);
        }
    }
    let mut adapter = Adapter { metadata: file.metadata().clone(), ..Adapter::default() };
    for (name, parts) in modules {
        let layer = by_name[name];
        let (Some(down), Some(up)) = (parts.get("lora_down.weight"), parts.get("lora_up.weight")) else {
            problems.push(format!("`{name}` (one of lora_down.weight and lora_up.weight is missing)"));
            continue;
        };
        let rank = down.shape().first().copied().unwrap_or(0);
        let expected =
            [layer.geometry.with_outputs(rank).weight_shape(), layer.geometry.pointwise_from(rank).weight_shape()];
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        // The same numbers as 2-D factors of a 1×1 convolution, or the other way round, are the same module.
        if rank == 0 || count(&expected[0]) != count(down.shape()) || count(&expected[1]) != count(up.shape()) {
            problems.push(format!(
                "`{name}` (shapes {:?} and {:?} do not fit this base's {:?})",
                down.shape(),
                up.shape(),
                layer.geometry
            ));
            continue;
        }
        let alpha = match parts.get("alpha") {
            Some(alpha) => alpha.scalar()?,
            None => rank as f64,
        };
        let [down_shape, up_shape] = expected;
        let shaped = |view: &TensorView<'_>, shape: Vec<usize>| -> Result<HostTensor> {
            view.to_host()?.reshape(shape).map_err(|error| Error::tensor(path, view.name(), error.to_string()))
        };
        let (down, up) = (shaped(down, down_shape)?, shaped(up, up_shape)?);
        if partners.contains(name) && up.to_f32().iter().all(|&value| value == 0.0) {
            continue;
        }
        // Some tools write 0 for "as the rank".
        let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
        let tensors = BTreeMap::from([("down".to_owned(), down), ("up".to_owned(), up)]);
        adapter.modules.insert(layer.path.clone(), AdapterModule { variant: "lora".into(), tensors, rank, alpha });
    }
    if !problems.is_empty() {
        let (count, shown) = (problems.len(), problems.len().min(5));
        let mut list = problems[..shown].join("; ");
        if count > shown {
            list.push_str("; …");
        }
        return Err(Error::Unmatched { path: path.to_owned(), count, list });
    }
    if adapter.modules.is_empty() {
        return Err(Error::format(path, "holds no LoRA modules"));
    }
    Ok(adapter)
}

/// The alpha of most modules (the smallest of equally frequent ones).
fn common_alpha(adapter: &Adapter) -> f64 {
    let mut counts: BTreeMap<u64, (usize, f64)> = BTreeMap::new();
    for module in adapter.modules.values() {
        counts.entry(module.alpha.to_bits()).or_insert((0, module.alpha)).0 += 1;
    }
    counts.into_values().max_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1))).map_or(1.0, |(_, alpha)| alpha)
}

fn factors<'a>(path: &ModulePath, module: &'a AdapterModule) -> Result<(&'a HostTensor, &'a HostTensor)> {
    let refused = |reason: String| Error::Module { module: path.to_string(), reason };
    if module.variant != "lora" {
        return Err(refused(format!("the kohya layout is written for plain LoRA, this is `{}`", module.variant)));
    }
    match (module.tensors.get("down"), module.tensors.get("up")) {
        (Some(down), Some(up)) if module.tensors.len() == 2 => Ok((down, up)),
        _ => Err(refused(format!("a plain LoRA has the tensors down and up, found {:?}", module.tensors.keys()))),
    }
}

/// The modules to add so that diffusers takes the text encoder's part.
fn zero_partners(adapter: &Adapter) -> BTreeMap<ModulePath, (HostTensor, HostTensor)> {
    let text: Vec<_> = adapter.modules.iter().filter(|(path, _)| path.component == Component::TextEncoder).collect();
    let recognised = ["out_proj", "fc1", "fc2"];
    if text.iter().any(|(path, _)| recognised.iter().any(|name| path.path.ends_with(name))) {
        return BTreeMap::new();
    }
    let mut partners = BTreeMap::new();
    for (path, module) in text {
        // A text encoder's attention is square: its out_proj has the shapes of q, k and v.
        if let (Some((layer, _)), Ok((down, up))) = (path.path.rsplit_once('.'), factors(path, module)) {
            let partner = ModulePath::new(Component::TextEncoder, format!("{layer}.out_proj"));
            partners.insert(partner, (HostTensor::zeros(down.shape()), HostTensor::zeros(up.shape())));
        }
    }
    partners
}

/// `sshs_model_hash` and `sshs_legacy_hash`: over the tensor bytes, and AutoV1 of the file with its `ss_*` keys alone.
fn kohya_hashes(
    path: &Path,
    tensors: &BTreeMap<String, HostTensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<(String, String)> {
    let ours =
        metadata.iter().filter(|(key, _)| key.starts_with("ss_")).map(|(key, value)| (key.clone(), value.clone()));
    let (header, entries): (Vec<u8>, Vec<Entry>) = header(path, tensors, &ours.collect())?;
    let data: Vec<u8> = entries.iter().flat_map(|entry| tensors[&entry.name].bytes()).copied().collect();
    Ok((hash::sha256(&data), hash::auto_v1_of(&header, &data)))
}

#[cfg(test)]
mod tests {
    use lora_core::LayerGeometry;
    use lora_core::random::Stream;

    use super::*;

    fn random(shape: Vec<usize>, seed: u64) -> HostTensor {
        let count = shape.iter().product();
        HostTensor::from_f32(shape, Stream::new(seed).normals(count)).unwrap()
    }

    fn layer(component: Component, path: &str, geometry: LayerGeometry) -> TargetLayer {
        TargetLayer { path: ModulePath::new(component, path), geometry }
    }

    fn layers() -> Vec<TargetLayer> {
        let text = |name: &str| {
            layer(
                Component::TextEncoder,
                &format!("text_model.encoder.layers.0.self_attn.{name}"),
                LayerGeometry::linear(8, 8),
            )
        };
        vec![
            layer(Component::Unet, "mid_block.attentions.0.proj_in", LayerGeometry::conv2d(6, 6, 1, 1, 0)),
            layer(Component::Unet, "mid_block.resnets.0.conv1", LayerGeometry::conv2d(6, 5, 3, 1, 1)),
            text("q_proj"),
            text("v_proj"),
            text("out_proj"),
        ]
    }

    /// An adapter on the first `count` layers; the alpha of the last differs.
    fn adapter(count: usize) -> Adapter {
        let modules = layers().into_iter().take(count).enumerate().map(|(index, layer)| {
            let tensors = BTreeMap::from([
                ("down".to_owned(), random(layer.geometry.with_outputs(2).weight_shape(), index as u64)),
                ("up".to_owned(), random(layer.geometry.pointwise_from(2).weight_shape(), 10 + index as u64)),
            ]);
            let alpha = if index + 1 == count { 4.0 } else { 1.0 };
            (layer.path, AdapterModule { variant: "lora".into(), tensors, rank: 2, alpha })
        });
        Adapter { modules: modules.collect(), metadata: BTreeMap::from([("ss_x".into(), "1".into())]) }
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_update() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let adapter = adapter(4);
        write(&path, &adapter, DType::F32).unwrap();
        let back = read(&path, &layers()).unwrap();
        assert_eq!(back.modules.keys().collect::<Vec<_>>(), adapter.modules.keys().collect::<Vec<_>>());
        for (path, module) in &adapter.modules {
            let other = &back.modules[path];
            assert_eq!(other.alpha, 1.0, "one alpha in the whole file");
            assert_eq!(other.tensors["down"], module.tensors["down"]);
            for (a, b) in other.tensors["up"].to_f32().iter().zip(&*module.tensors["up"].to_f32()) {
                assert_eq!(f64::from(*a) * other.scale(), f64::from(*b) * module.scale());
            }
        }
        assert_eq!(back.metadata["ss_x"], "1");
        assert_eq!(back.metadata["sshs_model_hash"], hash::sha256(SafetensorsFile::open(&path).unwrap().data()));
    }

    #[test]
    fn bytes_are_the_same_from_run_to_run() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        write(&a, &adapter(5), DType::F16).unwrap();
        write(&b, &adapter(5), DType::F16).unwrap();
        assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    }

    #[test]
    fn text_encoders_with_q_and_v_alone_get_recorded_zero_partners() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write(&path, &adapter(4), DType::F16).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let partner = "lora_te_text_model_encoder_layers_0_self_attn_out_proj";
        assert_eq!(file.metadata()[ZERO_PARTNERS], partner);
        assert!(
            file.get(&format!("{partner}.lora_up.weight"))
                .unwrap()
                .to_host()
                .unwrap()
                .to_f32()
                .iter()
                .all(|&v| v == 0.0)
        );
        assert_eq!(read(&path, &layers()).unwrap().modules.len(), 4);
        // With out_proj trained there is nothing to add.
        write(&path, &adapter(5), DType::F16).unwrap();
        assert!(!SafetensorsFile::open(&path).unwrap().metadata().contains_key(ZERO_PARTNERS));
    }

    #[test]
    fn the_published_hashes_come_out() {
        // Computed with the Python package safetensors 0.8.0 (see its header and data order).
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let tensors = BTreeMap::from([
            ("down".to_owned(), HostTensor::from_f32([1, 2], vec![1.0, 2.0]).unwrap()),
            ("up".to_owned(), HostTensor::from_f32([2, 1], vec![3.0, 4.0]).unwrap()),
        ]);
        let module = AdapterModule { variant: "lora".into(), tensors, rank: 1, alpha: 4.0 };
        let path_of = ModulePath::new(Component::Unet, "mid_block.attentions.0.proj_in");
        let adapter = Adapter { modules: BTreeMap::from([(path_of, module)]), metadata: BTreeMap::new() };
        for (dtype, expected) in [
            (DType::F32, "b4f6fbc12fa0f3a912dd4831d1b0a8367590c8408127fd7933442247e951aee9"),
            (DType::F16, "b0f901bae22b5bb7a34ab7e4219800d993ab9d968c0c45cfffeb81b624c7e910"),
        ] {
            assert_eq!(write(&path, &adapter, dtype).unwrap().data_sha256, expected);
        }
    }

    #[test]
    fn overflow_in_half_precision_is_an_error() {
        let mut adapter = adapter(1);
        adapter
            .modules
            .values_mut()
            .next()
            .unwrap()
            .tensors
            .insert("up".into(), HostTensor::from_f32([6, 2, 1, 1], vec![1e6; 12]).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let error = write(&path, &adapter, DType::F16).unwrap_err().to_string();
        assert!(error.contains("lora_unet_mid_block_attentions_0_proj_in") && error.contains("bf16"), "{error}");
        assert!(!path.exists());
        write(&path, &adapter, DType::BF16).unwrap();
    }

    #[test]
    fn tensors_that_fit_nothing_are_listed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write(&path, &adapter(3), DType::F32).unwrap();
        let error = read(&path, &layers()[..1]).unwrap_err().to_string();
        assert!(error.contains("no such layer") && error.contains("self_attn_q_proj"), "{error}");
        let mut changed = layers();
        changed[0].geometry = LayerGeometry::conv2d(7, 6, 1, 1, 0);
        assert!(read(&path, &changed).unwrap_err().to_string().contains("do not fit"));
        let tensors = BTreeMap::from([(
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight".to_owned(),
            HostTensor::zeros([5, 2, 1, 1]),
        )]);
        write_file(&path, &tensors, &BTreeMap::new()).unwrap();
        assert!(read(&path, &layers()).unwrap_err().to_string().contains("missing"));
    }
}
