//! Stable Diffusion 2 and XL in both layouts, against diffusers: the same weights under the same names, LoRAs merged
//! into the right tensors, the single file written as it is published.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_core::variant::VariantRegistry;
use lora_core::{Component, DType, HostTensor, Strength};
use lora_io::adapter::{self, Format};
use lora_io::checkpoint::{Checkpoint, CheckpointSource, Replaced, write_single_file};
use lora_io::family::adapter::Signs;
use lora_io::family::tree::Canonical;
use lora_io::family::{ComponentNames, FAMILIES, Family, Names, sd2, sdxl};
use lora_io::merge::{MergeOptions, Weighted, extract, matches, merge};
use lora_io::safetensors::{SafetensorsFile, write};

const MADE: [&Family; 2] = [&sd2::FAMILY, &sdxl::FAMILY];

fn golden(family: &Family, what: &str) -> PathBuf {
    Path::new("tests/golden/families").join(format!("{}{what}.safetensors", family.name))
}

fn tensors(path: &Path) -> BTreeMap<String, HostTensor> {
    let file = SafetensorsFile::open(path).unwrap();
    // Positions are integers.
    file.names().filter_map(|name| Some((name.to_owned(), file.get(name).unwrap().to_host().ok()?))).collect()
}

/// The family as a diffusers folder.
fn folder(family: &Family, at: &Path) -> PathBuf {
    let base = at.join(format!("{}-folder", family.name));
    let mut components: BTreeMap<String, BTreeMap<String, HostTensor>> = BTreeMap::new();
    for (name, tensor) in tensors(&golden(family, "-folder")) {
        let (component, name) = name.split_once('.').unwrap();
        components.entry(component.to_owned()).or_default().insert(name.to_owned(), tensor);
    }
    for (component, weights) in components {
        let own = base.join(&component);
        std::fs::create_dir_all(&own).unwrap();
        let file = if component.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
        write(own.join(format!("{file}.safetensors")), &weights, &BTreeMap::new()).unwrap();
        std::fs::write(own.join("config.json"), "{}").unwrap();
    }
    base
}

/// Both layouts of a family.
fn bases(family: &Family, at: &Path) -> [PathBuf; 2] {
    [golden(family, ""), folder(family, at)]
}

fn weights(checkpoint: &Checkpoint) -> BTreeMap<String, HostTensor> {
    let all = checkpoint.components().flat_map(|(component, weights)| {
        weights
            .names()
            .map(move |name| (format!("{component}.{name}"), weights.tensor(name).unwrap().to_host().unwrap()))
    });
    all.collect()
}

#[test]
fn both_layouts_show_the_weights_that_diffusers_has() {
    let at = tempfile::tempdir().unwrap();
    for family in MADE {
        let expected = tensors(&golden(family, "-folder"));
        let mut hashes = BTreeSet::new();
        for base in bases(family, at.path()) {
            let checkpoint = Checkpoint::open(&base).unwrap();
            assert_eq!(checkpoint.family(), family);
            assert_eq!(checkpoint.unused(), [""; 0], "{}", base.display());
            assert_eq!(weights(&checkpoint), expected, "{}", base.display());
            hashes.insert(checkpoint.components().map(|(_, own)| own.sha256().unwrap()).collect::<Vec<_>>());
        }
        assert_eq!(hashes.len(), 1, "one identity whatever the layout");
    }
    let marked = Checkpoint::open(golden(&sdxl::FAMILY, "")).unwrap();
    assert!(marked.is_marked("v_pred") && marked.is_marked("ztsnr"));
    assert!(!Checkpoint::open(golden(&sd2::FAMILY, "")).unwrap().is_marked("v_pred"));
}

#[test]
fn query_key_and_value_of_one_tensor_are_views_of_its_rows() {
    let checkpoint = Checkpoint::open(golden(&sdxl::FAMILY, "")).unwrap();
    let encoder = checkpoint.component(Component::TEXT_ENCODER_2).unwrap();
    let place = |name: &str| {
        let name = format!("text_model.encoder.layers.1.self_attn.{name}.weight");
        let view = encoder.tensor(&name).unwrap();
        assert_eq!(view.shape(), encoder.shape(&name).unwrap());
        (view.bytes().as_ptr() as usize, view.bytes().len())
    };
    let [(q, size), (k, _), (v, _)] = ["q_proj", "k_proj", "v_proj"].map(place);
    assert_eq!((q + size, k + size), (k, v));
    encoder.release("text_model.encoder.layers.1.self_attn.k_proj.weight");
}

#[test]
fn a_lora_changes_what_it_changes_in_diffusers() {
    let at = tempfile::tempdir().unwrap();
    for family in MADE {
        let read = adapter::read(golden(family, "-lora")).unwrap();
        // Nothing but its sizes tells an adapter for SD 2 from one for SD 1, and these are not the published ones.
        assert_eq!(read.family, (*family == sdxl::FAMILY).then_some(family));
        let changed = tensors(&golden(family, "-merged"));
        assert_eq!(changed.len(), read.adapter.modules.len());
        for base in bases(family, at.path()) {
            matches(&base, read.adapter.clone()).unwrap();
            let output = at.path().join("merged");
            let weighted =
                [Weighted { name: "it".into(), adapter: read.adapter.clone(), strength: Strength::from(1.0) }];
            let options = MergeOptions { dtype: Some(DType::F32), ..MergeOptions::default() };
            merge(&base, &weighted, &output, &options, &VariantRegistry::default(), &|_, _| {}).unwrap();
            let before = weights(&Checkpoint::open(&base).unwrap());
            for (name, found) in weights(&Checkpoint::open(&output).unwrap()) {
                let expected = changed.get(&name).unwrap_or(&before[&name]);
                let apart = lora_core::conformance::distance(&found, expected);
                assert!(apart < 1e-7, "{}: {name} is {apart:e} apart", base.display());
            }
            match output.is_dir() {
                true => std::fs::remove_dir_all(&output).unwrap(),
                false => std::fs::remove_file(&output).unwrap(),
            }
        }
    }
}

#[test]
fn factors_by_block_are_those_of_the_family() {
    let at = tempfile::tempdir().unwrap();
    let output = at.path().join("merged");
    for (family, count, other) in [(&sd2::FAMILY, 25, 23), (&sdxl::FAMILY, 23, 25)] {
        let read = adapter::read(golden(family, "-lora")).unwrap();
        let run = |blocks: usize| {
            let strength = Strength { blocks: vec![0.0; blocks], ..Strength::of_text_and_others(0.0, 1.0) };
            let weighted = [Weighted { name: "it".into(), adapter: read.adapter.clone(), strength }];
            let options = MergeOptions::default();
            merge(golden(family, ""), &weighted, &output, &options, &VariantRegistry::default(), &|_, _| {})
        };
        assert_eq!(run(count).unwrap().changed, 0, "every factor is zero");
        let error = run(other).unwrap_err().to_string();
        assert!(error.contains(&format!("which has {count}")), "{error}");
    }
}

#[test]
fn the_lora_comes_back_from_the_merged_model() {
    let at = tempfile::tempdir().unwrap();
    for family in MADE {
        let read = adapter::read(golden(family, "-lora")).unwrap();
        for base in bases(family, at.path()) {
            let output = at.path().join(format!("{}-tuned", base.file_stem().unwrap().to_str().unwrap()));
            let weighted =
                [Weighted { name: "it".into(), adapter: read.adapter.clone(), strength: Strength::from(1.0) }];
            let options = MergeOptions { dtype: Some(DType::F32), ..MergeOptions::default() };
            merge(&base, &weighted, &output, &options, &VariantRegistry::default(), &|_, _| {}).unwrap();
            let targets = lora_core::target::Targets::parse(&["attention-mlp"]).unwrap();
            let ranks = lora_core::compose::ExtractOptions::default();
            let found = extract(&base, &output, &targets, &ranks).unwrap().adapter;
            assert!(found.modules.keys().eq(read.adapter.modules.keys()), "{}", base.display());
        }
    }
}

#[test]
fn names_in_kohyas_layout_are_written_as_they_were_read() {
    let at = tempfile::tempdir().unwrap();
    for family in MADE {
        let source = golden(family, "-lora");
        let read = adapter::read(&source).unwrap();
        let path = at.path().join("back.safetensors");
        adapter::write(&path, &read.adapter, Format::Kohya, DType::F32).unwrap();
        assert_eq!(tensors(&path), tensors(&source));
    }
}

#[test]
fn the_single_file_is_written_as_it_is_published() {
    let at = tempfile::tempdir().unwrap();
    for family in MADE {
        let published = tensors_as_stored(&golden(family, ""));
        for base in bases(family, at.path()) {
            let path = at.path().join("written.safetensors");
            let checkpoint = Checkpoint::open(&base).unwrap();
            let source = Replaced { checkpoint: &checkpoint, weights: BTreeMap::new() };
            write_single_file(&path, &source, DType::F16, &BTreeMap::new()).unwrap();
            let written = tensors_as_stored(&path);
            for (name, tensor) in &written {
                // SD 2's last layer is not used: a copy of the one before it stands there.
                if !name.contains("cond_stage_model.model.transformer.resblocks.2.") {
                    assert_eq!(Some(tensor), published.get(name), "{name}");
                }
            }
            let not_written: Vec<&String> = published.keys().filter(|name| !written.contains_key(*name)).collect();
            let no_weights = |name: &&String| {
                let sd2 = "cond_stage_model.model.text_projection";
                !name.contains('.') || name.ends_with("position_ids") || name.ends_with("logit_scale") || **name == sd2
            };
            assert!(not_written.iter().all(no_weights), "{not_written:?}");
            let again = Checkpoint::open(&path).unwrap();
            assert_eq!(weights(&again), weights(&checkpoint));
            // What says how the base was trained goes with it; buffers of the schedule do not.
            assert_eq!(again.is_marked("v_pred"), checkpoint.is_marked("v_pred"));
            assert!(!again.is_marked("alphas_cumprod"));
        }
    }
}

fn tensors_as_stored(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let file = SafetensorsFile::open(path).unwrap();
    let stored = |name: &str| {
        let view = file.get(name).unwrap();
        (name.to_owned(), (view.shape().to_vec(), view.bytes().to_vec()))
    };
    file.names().map(stored).collect()
}

/// A checkpoint that lacks one part of a tensor that holds three.
struct WithoutKey<'c>(Replaced<'c>);

impl CheckpointSource for WithoutKey<'_> {
    fn family(&self) -> &'static Family {
        self.0.family()
    }
    fn components(&self) -> Vec<Component> {
        self.0.components()
    }
    fn weights(&self, component: Component) -> Vec<(String, Vec<usize>)> {
        let mut weights = self.0.weights(component);
        weights.retain(|(name, _)| name != "text_model.encoder.layers.0.self_attn.k_proj.bias");
        weights
    }
    fn values(&self, component: Component, name: &str, shape: &[usize]) -> lora_io::Result<HostTensor> {
        self.0.values(component, name, shape)
    }
}

#[test]
fn tensors_that_cannot_be_put_together_or_taken_apart_are_named() {
    let at = tempfile::tempdir().unwrap();
    let path = at.path().join("x.safetensors");
    let checkpoint = Checkpoint::open(golden(&sd2::FAMILY, "")).unwrap();
    let source = WithoutKey(Replaced { checkpoint: &checkpoint, weights: BTreeMap::new() });
    let error = write_single_file(&path, &source, DType::F16, &BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("resblocks.0.attn.in_proj_bias") && error.contains("q_proj.bias"), "{error}");
    assert!(!path.exists());

    let mut damaged = tensors(&golden(&sdxl::FAMILY, ""));
    let name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight";
    damaged.insert(name.into(), HostTensor::zeros([25, 8]));
    write(&path, &damaged, &BTreeMap::new()).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("[25, 8]") && error.contains("3 parts"), "{error}");
    damaged.retain(|name, _| !name.starts_with("conditioner.embedders.1."));
    write(&path, &damaged, &BTreeMap::new()).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("has no text encoder 2") && error.contains("Stable Diffusion XL"), "{error}");
}

#[test]
fn what_is_not_opened_is_described_by_what_is_in_it() {
    let at = tempfile::tempdir().unwrap();
    let path = at.path().join("x.safetensors");
    let open = |names: &[&str]| {
        let tensors: BTreeMap<_, _> = names.iter().map(|name| ((*name).to_owned(), HostTensor::zeros([1]))).collect();
        write(&path, &tensors, &BTreeMap::new()).unwrap();
        Checkpoint::open(&path).unwrap_err().to_string()
    };
    for (names, found) in [
        (&["model.layers.0.self_attn.q_proj.weight"][..], "a language model"),
        (&["double_blocks.0.img_attn.qkv.weight"], "expected 3 parts"),
        (&["conditioner.embedders.0.model.ln_final.weight"], "refiner"),
        (&["a.x", "a.y", "b.x"], "3 tensors (F32) whose names begin with `a`, `b`; known are"),
        (&["1", "2", "3", "4", "5"], "`1`, `2`, `3`, `4`, …"),
    ] {
        let error = open(names);
        assert!(error.contains(found), "{names:?}: {error}");
    }
    let error = Checkpoint::open(at.path()).unwrap_err().to_string();
    assert!(error.contains("without any of the folders") && error.contains("text_encoder"), "{error}");
    let refiner = folder(&sdxl::FAMILY, at.path());
    std::fs::remove_dir_all(refiner.join("text_encoder")).unwrap();
    let error = Checkpoint::open(&refiner).unwrap_err().to_string();
    assert!(error.contains("without its first text encoder") && error.contains("refiner"), "{error}");
    // A folder whose layout is known and whose family is not trained here is opened all the same.
    for component in ["transformer", "vae"] {
        let folder = at.path().join("flux").join(component);
        std::fs::create_dir_all(&folder).unwrap();
        let name =
            if component == "vae" { "decoder.conv_in.weight" } else { "single_transformer_blocks.0.proj_out.bias" };
        let tensors = BTreeMap::from([(name.to_owned(), HostTensor::zeros([1]))]);
        write(folder.join("diffusion_pytorch_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
    }
    let flux = Checkpoint::open(at.path().join("flux")).unwrap();
    assert_eq!(flux.family().name, "flux");
    assert!(flux.component(Component::TRANSFORMER).is_ok() && flux.component(Component::UNET).is_err());
}

/// A base that a program brings itself: one network in a single file.
static OWN: Family = Family {
    name: "own",
    title: "a base of one's own",
    image: true,
    tells: |base| base.begins("prior."),
    components: &[ComponentNames {
        component: Component::TRANSFORMER,
        folder: None,
        single_file: Some(Names { place: "prior.", tree: &Canonical }),
        kohya: None,
        required: true,
    }],
    words: &[],
    signs: Signs::NONE,
    labels: None,
    layers: Vec::new,
    block_factors: None,
};

#[test]
fn a_programs_own_family_is_opened_beside_the_known_ones() {
    let at = tempfile::tempdir().unwrap();
    let path = at.path().join("own.safetensors");
    let weight = HostTensor::from_f32([2], vec![1.0, 2.0]).unwrap();
    write(&path, &BTreeMap::from([("prior.norm.weight".to_owned(), weight.clone())]), &BTreeMap::new()).unwrap();
    assert!(Checkpoint::open(&path).is_err());
    let families: Vec<&'static Family> = [&OWN].into_iter().chain(FAMILIES).collect();
    let checkpoint = Checkpoint::open_among(&path, &families).unwrap();
    assert_eq!(checkpoint.family(), &OWN);
    let network = checkpoint.component(Component::TRANSFORMER).unwrap();
    assert_eq!(network.tensor("norm.weight").unwrap().to_host().unwrap(), weight);
    let written = at.path().join("written.safetensors");
    let source = Replaced { checkpoint: &checkpoint, weights: BTreeMap::new() };
    write_single_file(&written, &source, DType::F32, &BTreeMap::new()).unwrap();
    assert_eq!(std::fs::read(written).unwrap(), std::fs::read(path).unwrap());
}
