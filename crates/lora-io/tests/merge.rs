//! Merging: the right tensors change, by the right amount, rounded once; all others are copied bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_core::random::Stream;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath, Strength};
use lora_io::merge::{MergeOptions, MergeReport, Weighted, merge};
use lora_io::safetensors::{SafetensorsFile, write};

fn random(shape: &[usize], seed: u64) -> HostTensor {
    HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap()
}

fn lora(outputs: usize, inputs: usize, rank: usize, seed: u64) -> AdapterModule {
    let tensors = BTreeMap::from([
        ("down".to_owned(), random(&[rank, inputs], seed)),
        ("up".to_owned(), random(&[outputs, rank], seed + 1)),
    ]);
    AdapterModule { variant: "lora".into(), tensors, rank, alpha: rank as f64 / 2.0 }
}

fn weighted(modules: Vec<(ModulePath, AdapterModule)>, strength: f64) -> Weighted {
    let adapter = Adapter { modules: modules.into_iter().collect(), ..Adapter::default() };
    Weighted { name: "it".into(), adapter, strength: Strength::from(strength) }
}

fn run(base: &Path, adapters: &[Weighted], output: &Path, options: MergeOptions) -> lora_io::Result<MergeReport> {
    merge(base, adapters, output, &options, &VariantRegistry::default(), &|_, _| {})
}

fn file(folder: &Path, name: &str, tensors: &[(&str, HostTensor)]) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let tensors: BTreeMap<String, HostTensor> =
        tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    write(&path, &tensors, &BTreeMap::from([("kept".to_owned(), "yes".to_owned())])).unwrap();
    path
}

fn tensor(path: &Path, name: &str) -> HostTensor {
    SafetensorsFile::open(path).unwrap().get(name).unwrap().to_host().unwrap()
}

/// `W + factor · up · down` over rows, in f64.
fn expected(weight: &HostTensor, module: &AdapterModule, factor: f64) -> Vec<f64> {
    let (down, up) = (module.tensors["down"].to_f32(), module.tensors["up"].to_f32());
    let rank = module.rank;
    let columns = down.len() / rank;
    let product = |row: usize, column: usize| -> f64 {
        (0..rank).map(|k| f64::from(up[row * rank + k]) * f64::from(down[k * columns + column])).sum()
    };
    let values = weight.to_f32();
    (0..values.len())
        .map(|place| f64::from(values[place]) + factor * product(place / columns, place % columns))
        .collect()
}

const TO_Q: &str = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight";

fn to_q() -> ModulePath {
    ModulePath::new(Component::UNET, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
}

#[test]
fn one_rounding_in_the_bases_own_type_and_copies_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        // Larger than a tile, so that rows are cut.
        let weight = random(&[3000, 800], 1).to_dtype(dtype);
        let other = random(&[7, 3], 2).to_dtype(dtype);
        let base =
            file(folder.path(), "base", &[(TO_Q, weight.clone()), ("first_stage_model.x.weight", other.clone())]);
        let module = lora(3000, 800, 4, 3);
        let output = folder.path().join("merged");
        let report =
            run(&base, &[weighted(vec![(to_q(), module.clone())], 0.7)], &output, MergeOptions::default()).unwrap();
        assert_eq!((report.changed, report.copied), (1, 1));
        assert_eq!(tensor(&output, "first_stage_model.x.weight"), other);
        let merged = tensor(&output, TO_Q);
        assert_eq!(merged.dtype(), dtype);
        let exact = expected(&weight, &module, 0.7 * 0.5);
        let unit = match dtype {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            _ => 2f64.powi(-22),
        };
        for (found, exact) in merged.to_f32().iter().zip(&exact) {
            // Half a unit in the last place, and what f32 sums may be off.
            assert!((f64::from(*found) - exact).abs() <= exact.abs() * unit + 4e-6, "{dtype}: {found} {exact}");
        }
        let metadata = SafetensorsFile::open(&output).unwrap().metadata().clone();
        assert_eq!(metadata["kept"], "yes");
        assert!(metadata["lora_merged"].contains("0.7"));

        let back = folder.path().join("back");
        let options = MergeOptions { unmerge: true, ..MergeOptions::default() };
        run(&output, &[weighted(vec![(to_q(), module)], 0.7)], &back, options).unwrap();
        let apart = lora_core::conformance::distance(&tensor(&back, TO_Q), &weight);
        assert!(apart < 2.0 * unit, "{dtype}: {apart:e}");
    }
}

#[test]
fn several_adapters_add_up_and_zero_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let weight = random(&[20, 12], 1);
    let base = file(folder.path(), "base", &[(TO_Q, weight.clone())]);
    let output = folder.path().join("merged");
    let (a, b) = (lora(20, 12, 2, 5), lora(20, 12, 3, 7));
    let adapters = |x: f64, y: f64| [weighted(vec![(to_q(), a.clone())], x), weighted(vec![(to_q(), b.clone())], y)];
    run(&base, &adapters(1.0, -0.5), &output, MergeOptions::default()).unwrap();
    let first = expected(&weight, &a, 0.5);
    let both = expected(&HostTensor::from_f32([20, 12], first.iter().map(|&v| v as f32).collect()).unwrap(), &b, -0.25);
    for (found, exact) in tensor(&output, TO_Q).to_f32().iter().zip(&both) {
        assert!((f64::from(*found) - exact).abs() < 1e-5);
    }
    run(&base, &adapters(0.0, 0.0), &output, MergeOptions::default()).unwrap();
    assert_eq!(std::fs::read(&output).unwrap(), std::fs::read(&base).unwrap(), "the same file");
}

#[test]
fn fused_query_key_and_value_change_by_thirds() {
    let folder = tempfile::tempdir().unwrap();
    let name = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight";
    let weight = random(&[24, 8], 1);
    let base = file(folder.path(), "base", &[(name, weight.clone())]);
    let output = folder.path().join("merged");
    let module = lora(8, 8, 2, 3);
    let path = ModulePath::new(Component::TEXT_ENCODER, "text_model.encoder.layers.3.self_attn.k_proj");
    run(&base, &[weighted(vec![(path, module.clone())], 1.0)], &output, MergeOptions::default()).unwrap();
    let (found, before) = (tensor(&output, name), weight.to_f32());
    assert_eq!(found.to_f32()[..64], before[..64]);
    assert_eq!(found.to_f32()[128..], before[128..]);
    let middle = HostTensor::from_f32([8, 8], before[64..128].to_vec()).unwrap();
    for (found, exact) in found.to_f32()[64..128].iter().zip(expected(&middle, &module, 0.5)) {
        assert!((f64::from(*found) - exact).abs() < 1e-5);
    }
}

/// Variants that scale a bias find the part of it that is theirs.
#[test]
fn a_bias_in_the_fused_tensor_changes_in_its_own_rows() {
    let folder = tempfile::tempdir().unwrap();
    let name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight";
    let bias_name = name.replace("weight", "bias");
    let (weight, bias) = (random(&[6, 2], 1), random(&[6], 2));
    let base = file(folder.path(), "base", &[(name, weight.clone()), (&bias_name, bias.clone())]);
    let tensors = BTreeMap::from([("output".to_owned(), HostTensor::from_f32([2], vec![1.0, -0.5]).unwrap())]);
    let module = AdapterModule { variant: "ia3".into(), tensors, rank: 1, alpha: 1.0 };
    let path = ModulePath::new(Component::TEXT_ENCODER, "text_model.encoder.layers.0.self_attn.v_proj");
    let output = folder.path().join("merged");
    run(&base, &[weighted(vec![(path, module)], 1.0)], &output, MergeOptions::default()).unwrap();
    let factors = [1.0, 1.0, 1.0, 1.0, 2.0, 0.5];
    for (row, factor) in factors.into_iter().enumerate() {
        assert_eq!(tensor(&output, &bias_name).to_f32()[row], bias.to_f32()[row] * factor);
        for place in [2 * row, 2 * row + 1] {
            assert_eq!(tensor(&output, name).to_f32()[place], weight.to_f32()[place] * factor);
        }
    }
}

#[test]
fn models_of_no_known_family_merge_by_name_or_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let raw = |name: &str| ModulePath::new(Component::MODEL, name);
    let one = weighted(vec![(raw("lora_unet_double_blocks_0_img_attn_proj"), lora(6, 4, 1, 1))], 1.0);
    let base = file(folder.path(), "base", &[("double_blocks.0.img_attn.proj.weight", random(&[6, 4], 2))]);
    let output = folder.path().join("merged");
    assert_eq!(run(&base, std::slice::from_ref(&one), &output, MergeOptions::default()).unwrap().changed, 1);
    let two = file(
        folder.path(),
        "two",
        &[
            ("double_blocks.0.img_attn.proj.weight", random(&[6, 4], 2)),
            ("double.blocks_0.img_attn.proj.weight", random(&[6, 4], 2)),
        ],
    );
    let error = run(&two, std::slice::from_ref(&one), &output, MergeOptions::default()).unwrap_err().to_string();
    assert!(error.contains("may both be meant"), "{error}");
    let none = file(folder.path(), "none", &[("other.weight", random(&[6, 4], 2))]);
    let error = run(&none, &[one], &output, MergeOptions::default()).unwrap_err().to_string();
    assert!(error.contains("no such layer"), "{error}");
}

#[test]
fn folders_are_merged_whole() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let weight = random(&[6, 4], 1);
    file(&base, "unet/model.safetensors", &[("mid_block.attentions.0.proj_in.weight", weight.clone())]);
    file(&base, "vae/model.safetensors", &[("encoder.conv_in.weight", random(&[2, 2], 2))]);
    std::fs::write(base.join("model_index.json"), "{}").unwrap();
    std::fs::write(base.join("unet/pytorch_model.bin"), "old weights").unwrap();
    let path = ModulePath::new(Component::UNET, "mid_block.attentions.0.proj_in");
    let adapters = [weighted(vec![(path, lora(6, 4, 1, 3))], 1.0)];
    let output = folder.path().join("merged");
    let report = run(&base, &adapters, &output, MergeOptions::default()).unwrap();
    assert!(report.notes[0].contains("pytorch_model.bin"));
    assert_ne!(tensor(&output.join("unet/model.safetensors"), "mid_block.attentions.0.proj_in.weight"), weight);
    assert_eq!(std::fs::read(output.join("model_index.json")).unwrap(), b"{}");
    assert!(output.join("vae/model.safetensors").exists() && !output.join("unet/pytorch_model.bin").exists());
    // Neither over what is there, nor over what is read.
    assert!(
        run(&base, &adapters, &output, MergeOptions::default()).unwrap_err().to_string().contains("exists already")
    );
    assert!(run(&base, &adapters, &base, MergeOptions::default()).unwrap_err().to_string().contains("which is read"));
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let base = file(folder.path(), "base", &[(TO_Q, random(&[20, 12], 1).to_dtype(DType::F16))]);
    let output = folder.path().join("merged");
    let of = |module: AdapterModule, strength: f64| [weighted(vec![(to_q(), module)], strength)];
    for (adapters, expected) in [
        (of(lora(21, 12, 2, 1), 1.0), "`up` [21, 2] do not fit this base's weight [20, 12]"),
        (of(lora(20, 12, 2, 1), 1e7), "write bf16 or fp32"),
        (of(AdapterModule { variant: "unheard-of".into(), ..lora(20, 12, 2, 1) }, 1.0), "unheard-of"),
    ] {
        let error = run(&base, &adapters, &output, MergeOptions::default()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("attn1.to_q"), "{error}");
        assert!(!output.exists());
    }
    assert!(run(&base, &of(lora(20, 12, 2, 1), 1.0), &base, MergeOptions::default()).is_err());
    let head = ModulePath::new(Component::LANGUAGE_MODEL, "lm_head");
    let tied = file(folder.path(), "tied", &[("model.embed_tokens.weight", random(&[20, 12], 1))]);
    let error = run(&tied, &[weighted(vec![(head, lora(20, 12, 2, 1))], 1.0)], &output, MergeOptions::default());
    assert!(error.unwrap_err().to_string().contains("ties its output"));
}

/// Variants that need their whole tensor, on a weight and on a bias.
#[test]
fn other_variants_merge_through_their_own_formulas() {
    let folder = tempfile::tempdir().unwrap();
    let bias_name = TO_Q.replace(".weight", ".bias");
    let (weight, bias) = (random(&[4, 3], 1), random(&[4], 2));
    let base = file(folder.path(), "base", &[(TO_Q, weight.clone()), (&bias_name, bias.clone())]);
    let output = folder.path().join("merged");
    let offset = HostTensor::from_f32([4], vec![1.0, 0.0, -0.5, 2.0]).unwrap();
    let tensors = BTreeMap::from([("output".to_owned(), offset.clone())]);
    let module = AdapterModule { variant: "ia3".into(), tensors, rank: 1, alpha: 1.0 };
    let adapters = [weighted(vec![(to_q(), module)], 1.0)];
    run(&base, &adapters, &output, MergeOptions::default()).unwrap();
    let factor = |row: usize| 1.0 + offset.to_f32()[row];
    for (place, found) in tensor(&output, TO_Q).to_f32().iter().enumerate() {
        assert!((found - weight.to_f32()[place] * factor(place / 3)).abs() < 1e-6);
    }
    for (row, found) in tensor(&output, &bias_name).to_f32().iter().enumerate() {
        assert!((found - bias.to_f32()[row] * factor(row)).abs() < 1e-6);
    }
}
