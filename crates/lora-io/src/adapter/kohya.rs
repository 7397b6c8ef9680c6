//! The kohya/WebUI layout, which the WebUI, Forge, ComfyUI, diffusers and sd-scripts all read, with LyCORIS' suffixes
//! for the variants that LyCORIS has.
//!
//! A module is named as [`super::names`] says; its tensors are `.lora_down.weight`, `.lora_up.weight` and `.alpha`, or
//! LyCORIS' `.hada_w1_a`, `.lokr_w1`, `.dora_scale` and so on. What is particular here:
//!
//! - **One alpha in the whole file.** diffusers takes the most frequent alpha for attention layers and loses the others,
//!   so a plain LoRA with another alpha has the ratio folded into `lora_up`. Alpha is an F32 scalar whatever the dtype.
//! - **Zero partners.** diffusers refuses a text-encoder LoRA that has only q, k or v. Such a file gets an `out_proj`
//!   for each adapted layer whose factors are zero; the metadata lists them (`ZERO_PARTNERS`) and reading drops them.
//! - **A user's own variants** are spelt `.<variant>.<tensor>` and listed in the metadata (`CUSTOM_VARIANTS`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_core::backend::CpuBackend;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};

use super::{AdapterFile, Format, canonical, diffusers, names, parts};
use crate::family::{FAMILIES, Family};
use crate::metadata::{HASH, refresh_with};
use crate::safetensors::{Entry, SafetensorsFile, TensorSource, header, verify, write as write_file};
use crate::{Error, Result, hash};

/// Metadata key: names of modules that are there for diffusers' sake only, separated by commas.
pub(crate) const ZERO_PARTNERS: &str = "lora_zero_partners";
/// Metadata key: names of variants that no other tool knows, separated by commas.
pub(crate) const CUSTOM_VARIANTS: &str = "lora_custom_variants";

/// Writes an adapter, then reads the file back and checks it. The adapter's metadata goes into the header, with the
/// hashes that the field's tools expect (`sshs_model_hash`, `sshs_legacy_hash`) added. Modules are named as adapters
/// for the family are; [`super::family()`] tells it where nobody knows. Returns what could not be kept as it was.
///
/// # Errors
/// [`Error::Module`] for a module that has no form in this layout or holds NaN or infinity, [`Error::Io`] where the
/// file cannot be written.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, family: Option<&Family>, dtype: DType) -> Result<Vec<String>> {
    let path = path.as_ref();
    let common = common_alpha(adapter);
    let mut notes = Vec::new();
    let (mut folded, mut peft_dora) = (0, 0);
    let mut custom = BTreeSet::new();
    let mut tensors = BTreeMap::new();
    let mut insert = |name: &str, module: &AdapterModule| -> Result<()> {
        super::whole(name, module)?;
        let spelt = parts::spell(module, dtype).map_err(|reason| Error::Module { module: name.to_owned(), reason })?;
        for (suffix, tensor) in spelt {
            super::finite(name, &suffix, &tensor)?;
            tensors.insert(format!("{name}.{suffix}"), tensor);
        }
        Ok(())
    };
    let mut separate = 0;
    let modules = canonical::fused(adapter, family, &mut separate).map_err(|(path, reason)| match reason {
        None => nameless(&path),
        Some(reason) => Error::Module { module: path.to_string(), reason },
    })?;
    if separate > 0 {
        notes.push(format!(
            "{separate} modules with factors of their own lie on layers that are one in this layout: each becomes a part of \
             one module of their ranks together, which is the same update"
        ));
    }
    for (name, (component, module)) in &modules {
        peft_dora += usize::from(parts::is_respelt_dora(module));
        if is_custom(&module.variant) {
            custom.insert(module.variant.clone());
        }
        let ratio = module.alpha / common;
        // Of transformers every program reads each alpha, and modules that were put together have their own.
        let folds = *component != Component::TRANSFORMER;
        if folds && module.is_lora() && ratio != 1.0 && module.tensors.contains_key("up") {
            folded += 1;
            insert(name, &module.with_alpha(common).unwrap_or_else(|| module.clone()))?;
        } else {
            insert(name, module)?;
        }
    }
    let partners = zero_partners(adapter);
    for (module_path, module) in &partners {
        insert(&named(module_path, family)?, module)?;
    }
    if folded > 0 {
        notes.push(format!("{folded} modules had another alpha than {common}; the ratio is folded into their factors"));
    }
    if peft_dora > 0 {
        notes.push(
            "DoRA's magnitudes are written as LyCORIS' dora_scale along the outputs, whose norm has an epsilon of 1.2e-7; \
             ComfyUI takes the norm of the base alone there"
                .into(),
        );
    }

    let mut metadata = adapter.metadata.clone();
    // What belongs to the file that the adapter came from. diffusers would follow its own record here too.
    let stale = [ZERO_PARTNERS, CUSTOM_VARIANTS, diffusers::METADATA, HASH];
    metadata.retain(|key, _| !key.starts_with("sshs_") && !stale.contains(&key.as_str()));
    if folded > 0 {
        let alphas = adapter.modules.values().map(|module| if module.is_lora() { common } else { module.alpha });
        refresh_with(&mut metadata, &adapter.modules, &alphas.collect::<Vec<_>>());
    }
    if !partners.is_empty() {
        let list: Result<Vec<_>> = partners.keys().map(|path| named(path, family)).collect();
        metadata.insert(ZERO_PARTNERS.into(), list?.join(","));
    }
    if !custom.is_empty() {
        metadata.insert(CUSTOM_VARIANTS.into(), custom.into_iter().collect::<Vec<_>>().join(","));
    }
    let (model_hash, legacy_hash) = kohya_hashes(path, &tensors, &metadata)?;
    metadata.insert("sshs_model_hash".into(), model_hash);
    metadata.insert("sshs_legacy_hash".into(), legacy_hash);

    write_file(path, &tensors, &metadata)?;
    verify(path, &tensors.entries())?;
    Ok(notes)
}

/// Whether the layout has a form of every module, to be asked before hours are spent on training.
///
/// # Errors
/// [`Error::Module`] for the first module that has none.
pub fn check(adapter: &Adapter, family: Option<&Family>) -> Result<()> {
    for (path, module) in &adapter.modules {
        named(path, family)?;
        parts::spell(module, DType::F32).map_err(|reason| Error::Module { module: path.to_string(), reason })?;
    }
    Ok(())
}

fn named(module: &ModulePath, family: Option<&Family>) -> Result<String> {
    names::kohya(module, family).ok_or_else(|| nameless(module))
}

fn nameless(module: &ModulePath) -> Error {
    Error::Module {
        module: module.to_string(),
        reason: "the kohya layout has no name for it; write another format (peft for language models)".into(),
    }
}

fn is_custom(variant: &str) -> bool {
    VariantRegistry::<CpuBackend>::default().get(variant).is_err()
}

/// Reads a file of this layout.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] or [`Error::Tensor`] where it cannot be read; [`Error::Unmatched`] with the
/// keys that are no part of an adapter.
pub fn read(path: impl AsRef<Path>) -> Result<AdapterFile> {
    from_file(&SafetensorsFile::open(path)?, &FAMILIES)
}

pub(super) fn from_file(file: &SafetensorsFile, families: &[&'static Family]) -> Result<AdapterFile> {
    let path_of = |name: &str| match names::is_kohya(name) {
        true => names::from_kohya(name, families),
        false => names::from_dotted(name),
    };
    let scales = diffusers::Scales::of(file)?;
    let listed = |key: &str| -> BTreeSet<String> {
        file.metadata().get(key).map(|list| list.split(',').map(str::to_owned).collect()).unwrap_or_default()
    };
    let (partners, custom) = (listed(ZERO_PARTNERS), listed(CUSTOM_VARIANTS));
    let custom_part = |name: &str| -> Option<(String, String, String)> {
        let (module, rest) = name.split_once('.')?;
        let (variant, tensor) = rest.split_once('.')?;
        custom.contains(variant).then(|| (module.to_owned(), variant.to_owned(), tensor.to_owned()))
    };
    let mut own: BTreeMap<String, AdapterModule> = BTreeMap::new();
    for name in file.names() {
        if let Some((module, variant, tensor)) = custom_part(name) {
            let entry = own.entry(module.clone()).or_insert_with(|| AdapterModule {
                variant,
                tensors: BTreeMap::new(),
                rank: 1,
                alpha: 1.0,
            });
            entry.tensors.insert(tensor, file.get(name)?.to_host()?);
            if let Ok(alpha) = file.get(&format!("{module}.alpha")) {
                entry.alpha = alpha.scalar()?;
            }
        }
    }
    let is_own = |name: &str| name.split_once('.').is_some_and(|(module, _)| own.contains_key(module));
    let mut sorted = super::sort(file, super::Whole::default(), is_own)?;
    for name in &partners {
        let is_zero =
            |parts: &parts::Parts| parts.get("lora_up").is_some_and(|up| up.to_f32().iter().all(|&value| value == 0.0));
        if sorted.modules.get(name).is_some_and(is_zero) {
            sorted.modules.remove(name);
        }
    }
    if sorted.modules.is_empty() && sorted.problems.is_empty() && !own.is_empty() {
        let mut adapter = Adapter { metadata: file.metadata().clone(), ..Adapter::default() };
        adapter.modules = own.into_iter().map(|(name, module)| (path_of(&name), module)).collect();
        let family = super::family(&adapter);
        let dtypes = file.names().filter_map(|name| file.get(name).ok()).map(|view| view.dtype()).collect();
        return Ok(AdapterFile {
            path: file.path().to_owned(),
            adapter,
            format: Format::Kohya,
            family,
            dtypes,
            notes: sorted.notes,
        });
    }
    let mut read = super::assemble(file, Format::Kohya, sorted, path_of, |name, path, parts| {
        if names::is_kohya(name) { None } else { scales.context(path, parts) }
    })?;
    read.adapter.modules.extend(own.into_iter().map(|(name, module)| (path_of(&name), module)));
    Ok(read)
}

/// The alpha of most plain modules (the smallest of equally frequent ones).
fn common_alpha(adapter: &Adapter) -> f64 {
    let mut counts: BTreeMap<u64, (usize, f64)> = BTreeMap::new();
    for module in adapter.modules.values().filter(|module| module.is_lora() && module.alpha != 0.0) {
        counts.entry(module.alpha.to_bits()).or_insert((0, module.alpha)).0 += 1;
    }
    counts.into_values().max_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1))).map_or(1.0, |(_, alpha)| alpha)
}

/// The modules to add so that diffusers takes the text encoder's part.
fn zero_partners(adapter: &Adapter) -> BTreeMap<ModulePath, AdapterModule> {
    let text: Vec<_> = adapter.modules.iter().filter(|(path, _)| path.component == Component::TEXT_ENCODER).collect();
    let recognised = ["out_proj", "fc1", "fc2"];
    if text.iter().any(|(path, _)| recognised.iter().any(|name| path.path.ends_with(name))) {
        return BTreeMap::new();
    }
    let mut partners = BTreeMap::new();
    for (path, module) in text {
        // A text encoder's attention is square: its out_proj has the shapes of q, k and v.
        if let Some((layer, _)) = path.path.rsplit_once('.').filter(|_| module.is_lora()) {
            let mut partner = module.clone();
            partner.tensors.values_mut().for_each(|tensor| *tensor = HostTensor::zeros(tensor.shape()));
            partners.insert(ModulePath::new(Component::TEXT_ENCODER, format!("{layer}.out_proj")), partner);
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
    let (header, entries): (Vec<u8>, Vec<Entry>) = header(path, tensors.entries(), &ours.collect())?;
    let data = || entries.iter().map(|entry| tensors[&entry.name].bytes());
    Ok((hash::sha256_of(data()), hash::auto_v1_of(std::iter::once(&*header).chain(data()))))
}

#[cfg(test)]
mod tests {
    use lora_core::LayerGeometry;
    use lora_core::random::Stream;
    use lora_core::target::TargetLayer;

    use super::*;

    fn random(shape: Vec<usize>, seed: u64) -> HostTensor {
        let count = shape.iter().product();
        HostTensor::from_f32(shape, Stream::new(seed).normals(count)).unwrap()
    }

    /// Reads and holds against layers.
    fn read(path: &Path, layers: &[TargetLayer]) -> Result<Adapter> {
        let mut adapter = super::read(path)?.adapter;
        crate::adapter::fit(path, &mut adapter, layers)?;
        Ok(adapter)
    }

    fn layer(component: Component, path: &str, geometry: LayerGeometry) -> TargetLayer {
        TargetLayer { path: ModulePath::new(component, path), geometry }
    }

    fn layers() -> Vec<TargetLayer> {
        let text = |name: &str| {
            layer(
                Component::TEXT_ENCODER,
                &format!("text_model.encoder.layers.0.self_attn.{name}"),
                LayerGeometry::linear(8, 8),
            )
        };
        vec![
            layer(Component::UNET, "mid_block.attentions.0.proj_in", LayerGeometry::conv2d(6, 6, 1, 1, 0)),
            layer(Component::UNET, "mid_block.resnets.0.conv1", LayerGeometry::conv2d(6, 5, 3, 1, 1)),
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

    /// As adapters for the family that they show.
    fn write(path: &Path, adapter: &Adapter, dtype: DType) -> Result<Vec<String>> {
        super::write(path, adapter, crate::adapter::family(adapter), dtype)
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
        let path_of = ModulePath::new(Component::UNET, "mid_block.attentions.0.proj_in");
        let adapter = Adapter { modules: BTreeMap::from([(path_of, module)]), metadata: BTreeMap::new() };
        for (dtype, expected) in [
            (DType::F32, "b4f6fbc12fa0f3a912dd4831d1b0a8367590c8408127fd7933442247e951aee9"),
            (DType::F16, "b0f901bae22b5bb7a34ab7e4219800d993ab9d968c0c45cfffeb81b624c7e910"),
        ] {
            write(&path, &adapter, dtype).unwrap();
            assert_eq!(hash::sha256(SafetensorsFile::open(&path).unwrap().data()), expected);
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
        assert!(error.contains("no such layer") && error.contains("self_attn.q_proj"), "{error}");
        let mut changed = layers();
        changed[0].geometry = LayerGeometry::conv2d(7, 6, 1, 1, 0);
        assert!(read(&path, &changed).unwrap_err().to_string().contains("does not fit"));
        let tensors = BTreeMap::from([(
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight".to_owned(),
            HostTensor::zeros([5, 2, 1, 1]),
        )]);
        write_file(&path, &tensors, &BTreeMap::new()).unwrap();
        assert!(read(&path, &layers()).unwrap_err().to_string().contains("missing"));
    }
}
