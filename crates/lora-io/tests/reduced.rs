//! Plain LoRAs of other adapters and of checkpoints: what goes beside the factors, ranks of layers that are one where
//! they are written, and what the result says of its base.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::compose::{self, ExtractOptions};
use lora_core::conformance::distance;
use lora_core::rank::RankPolicy;
use lora_core::target::Targets;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath, Strength};
use lora_io::adapter::{self, Format};
use lora_io::family::flux;
use lora_io::merge::{self, MergeOptions, Weighted};

mod support;

use support::{file, random, tensor};

fn of(variant: &str, tensors: &[(&str, HostTensor)]) -> AdapterModule {
    let tensors = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    AdapterModule { variant: variant.into(), tensors, rank: 1, alpha: 1.0 }
}

fn adapter(modules: Vec<(ModulePath, AdapterModule)>) -> Adapter {
    Adapter { modules: modules.into_iter().collect(), ..Adapter::default() }
}

/// Merges into a file beside the base.
fn merged(base: &Path, adapter: &Adapter, name: &str) -> std::path::PathBuf {
    let out = base.with_file_name(name);
    let weighted = Weighted { name: name.into(), adapter: adapter.clone(), strength: Strength::default() };
    merge::merge(base, &[weighted], &out, &MergeOptions::default(), &VariantRegistry::default(), &|_, _| {}).unwrap();
    out
}

fn fixed(rank: usize) -> ExtractOptions {
    ExtractOptions { policy: RankPolicy::Fixed(rank), limit: rank, ..ExtractOptions::default() }
}

fn layer(path: &str) -> ModulePath {
    ModulePath::new(Component::TRANSFORMER, path)
}

const QKV: &str = "double_blocks.0.img_attn.qkv";
const PIECES: [&str; 3] =
    ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"];

/// A FLUX.1 with one layer of queries, keys and values, and one that no preset of targets names.
fn flux_base(path: &Path, qkv: HostTensor, time: HostTensor) {
    file(
        path,
        &[
            (&format!("{QKV}.weight"), qkv),
            ("time_in.in_layer.weight", time),
            ("single_blocks.0.linear1.weight", random(&[56, 8], 9)),
        ],
    );
}

#[test]
fn flattening_keeps_what_an_adapter_does_to_biases() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.safetensors");
    let name = |leaf: &str| format!("model.layers.0.self_attn.{leaf}");
    let tensors = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|leaf| {
        [(format!("{}.weight", name(leaf)), random(&[6, 6], 1)), (format!("{}.bias", name(leaf)), random(&[6], 2))]
    });
    let tensors: Vec<_> = tensors.into_iter().flatten().collect();
    file(&base, &tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect::<Vec<_>>());
    let path = |leaf: &str| ModulePath::new(Component::LANGUAGE_MODEL, name(leaf));
    let mut with_bias = AdapterModule::of_factors(random(&[2, 6], 3), random(&[6, 2], 4), false, 2, 1.0);
    with_bias.tensors.insert("bias".into(), random(&[6], 5));
    let whole = adapter(vec![
        (path("q_proj"), of("ia3", &[("output", random(&[6], 6))])),
        (path("k_proj"), with_bias),
        (path("v_proj"), of("full", &[("weight", random(&[6, 6], 7)), ("bias", random(&[6], 8))])),
        (path("o_proj"), of("full", &[("bias", random(&[6], 9))])),
    ]);
    let (flat, outcomes) = merge::flatten(&base, &whole, &fixed(6), &VariantRegistry::default()).unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.kept > 0.999));
    assert!(!flat.modules.values().any(|module| module.variant == "ia3"));
    // Factors that were there stay as they are.
    assert_eq!(flat.modules[&path("k_proj")], whole.modules[&path("k_proj")]);
    let (expected, found) = (merged(&base, &whole, "whole"), merged(&base, &flat, "flat"));
    for (name, before) in &tensors {
        let (expected, found) = (tensor(&expected, name), tensor(&found, name));
        assert!(distance(&found, &expected) < 1e-5 && (name.ends_with("o_proj.weight") || found != *before), "{name}");
    }
    // PEFT has a place for a bias beside factors, others say that they have none.
    let mut of_peft = flat.clone();
    of_peft.modules.remove(&path("o_proj"));
    let written = folder.path().join("peft");
    adapter::write(&written, &of_peft, Format::Peft, DType::F32).unwrap();
    let back = adapter::read(&written).unwrap().adapter;
    assert_eq!(back.modules[&path("v_proj")].tensors["bias"], flat.modules[&path("v_proj")].tensors["bias"]);
    let refused = adapter::write(folder.path().join("d"), &of_peft, Format::Diffusers, DType::F32).unwrap_err();
    assert!(refused.to_string().contains("bias"), "{refused}");
}

#[test]
fn a_flattened_variant_on_several_layers_in_one_has_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.safetensors");
    flux_base(&base, random(&[24, 8], 1), random(&[8, 8], 2));
    let whole = adapter(vec![(layer(QKV), of("lokr", &[("w1", random(&[4, 2], 3)), ("w2", random(&[6, 4], 4))]))]);
    let (flat, _) = merge::flatten(&base, &whole, &fixed(8), &VariantRegistry::default()).unwrap();
    assert_eq!(flat.modules.keys().map(|path| path.path.as_str()).collect::<Vec<_>>(), {
        let mut pieces = PIECES;
        pieces.sort_unstable();
        pieces
    });
    let name = format!("{QKV}.weight");
    let (expected, found) = (merged(&base, &whole, "whole"), merged(&base, &flat, "flat"));
    assert!(distance(&tensor(&found, &name), &tensor(&expected, &name)) < 1e-5);
}

#[test]
fn ranks_are_those_of_the_layers_that_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let down = random(&[6, 8], 1);
    let up = |seed| AdapterModule::of_factors(down.clone(), random(&[8, 6], seed), false, 6, 3.0);
    let own = adapter(PIECES.iter().zip(2..).map(|(piece, seed)| (layer(piece), up(seed))).collect());
    adapter::write_as(&path, &own, Format::Kohya, Some(&flux::FAMILY), DType::F32).unwrap();
    let read = adapter::read(&path).unwrap();
    let layers = adapter::in_layers_of(read.format, &read.adapter, read.family);
    let (resized, outcomes) = compose::resize(&layers, RankPolicy::Fixed(4)).unwrap();
    assert_eq!((outcomes.len(), outcomes[0].rank), (1, 4));
    adapter::write_as(&path, &resized, Format::Kohya, read.family, DType::F32).unwrap();
    let written = tensor(&path, "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight");
    assert_eq!(written.shape(), [4, 8]);
    // What is kept is what a decomposition of all rows in one keeps.
    let all: Vec<f32> = own
        .modules
        .values()
        .flat_map(|module| {
            support::product(&module.tensors["up"], &module.tensors["down"], module.scale()).to_f32().into_owned()
        })
        .collect();
    let (_, best) =
        compose::flatten(&HostTensor::from_f32([24, 8], all).unwrap(), &ExtractOptions { exact: true, ..fixed(4) })
            .unwrap();
    assert!((outcomes[0].kept - best).abs() < 1e-5, "{} {best}", outcomes[0].kept);
}

#[test]
fn a_difference_of_rank_three_is_extracted_at_rank_three_and_what_is_left_out_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let (base, tuned) = (folder.path().join("base.safetensors"), folder.path().join("tuned.safetensors"));
    let (weight, time) = (random(&[24, 8], 1), random(&[8, 8], 2));
    let delta = support::product(&random(&[24, 3], 3), &random(&[3, 8], 4), 1.0);
    let sum: Vec<f32> = weight.to_f32().iter().zip(&*delta.to_f32()).map(|(a, b)| a + b).collect();
    flux_base(&base, weight.clone(), time);
    flux_base(&tuned, HostTensor::from_f32([24, 8], sum).unwrap(), random(&[8, 8], 5));
    let targets = Targets::parse(&["attention".to_owned()]).unwrap();
    let found = merge::extract(&base, &tuned, &targets, &fixed(3)).unwrap();
    assert_eq!((found.family.unwrap().name, found.outcomes.len(), found.outcomes[0].rank), ("flux", 1, 3));
    assert!(found.notes[0].contains("1 tensors") && found.notes[0].contains("time_in"), "{:?}", found.notes);
    let metadata: BTreeMap<_, _> =
        found.adapter.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(metadata["ss_base_model_version"], "flux1");
    assert_eq!((metadata["ss_network_dim"], metadata["ss_network_alpha"]), ("3", "3.0"));
    let path = folder.path().join("a.safetensors");
    adapter::write_as(&path, &found.adapter, Format::Kohya, found.family, DType::F32).unwrap();
    let read = |part: &str| tensor(&path, &format!("lora_unet_double_blocks_0_img_attn_qkv.{part}.weight"));
    assert_eq!(read("lora_down").shape(), [3, 8]);
    assert!(distance(&support::product(&read("lora_up"), &read("lora_down"), 1.0), &delta) < 1e-4);
}

#[test]
fn updates_on_the_same_rows_are_of_the_untouched_base() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.safetensors");
    flux_base(&base, random(&[24, 8], 1), random(&[8, 8], 2));
    let oft = of("lycoris-ia3", &[("output", random(&[24], 3))]);
    let one = adapter(vec![(layer(QKV), oft)]);
    let two = adapter(vec![(layer(PIECES[1]), of("lycoris-ia3", &[("input", random(&[8], 4))]))]);
    let weighted =
        |adapter: &Adapter| Weighted { name: "it".into(), adapter: adapter.clone(), strength: Strength::default() };
    let out = folder.path().join("both.safetensors");
    let both = [weighted(&one), weighted(&two)];
    merge::merge(&base, &both, &out, &MergeOptions::default(), &VariantRegistry::default(), &|_, _| {}).unwrap();
    let name = format!("{QKV}.weight");
    let values = |path: &Path| tensor(path, &name).to_f32().into_owned();
    let (before, first, second) =
        (values(&base), values(&merged(&base, &one, "one")), values(&merged(&base, &two, "two")));
    for (index, found) in values(&out).into_iter().enumerate() {
        let expected = first[index] + second[index] - before[index];
        assert!((found - expected).abs() < 1e-5, "{index}: {found} {expected}");
    }
}

#[test]
fn factors_by_block_are_refused_where_a_family_has_no_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.safetensors");
    flux_base(&base, random(&[24, 8], 1), random(&[8, 8], 2));
    let module = AdapterModule::of_factors(random(&[2, 8], 1), random(&[8, 2], 2), false, 2, 2.0);
    let strength = Strength { blocks: vec![0.0; 25], ..Strength::default() };
    let weighted = [Weighted { name: "it".into(), adapter: adapter(vec![(layer(PIECES[0]), module)]), strength }];
    let out = folder.path().join("out.safetensors");
    let merged =
        merge::merge(&base, &weighted, &out, &MergeOptions::default(), &VariantRegistry::default(), &|_, _| {});
    let error = merged.unwrap_err().to_string();
    assert!(error.contains("25 factors by block") && error.contains("none") && !out.exists(), "{error}");
}
