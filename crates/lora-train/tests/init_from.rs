//! A run begins with an adapter of another rank, of other layers, of another variant: what it has learnt is there at the first
//! step, as far as the run's rank holds it.

mod common;

use std::path::{Path, PathBuf};

use common::{prepare, tolerance, workspace};
use lora_core::backend::CpuBackend;
use lora_core::merge::{Applied, geometry, merged_weight};
use lora_core::variant::{FrozenLayer, Parameters, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath};
use lora_io::adapter;
use lora_io::checkpoint::Checkpoint;
use lora_train::Session;

/// A file that has learnt something.
fn learnt(folder: &Path, name: &str, keys: &[&str]) -> PathBuf {
    let own = ["save_precision=fp32", "learning_rate=2e-2", "max_train_steps=6", "train_text_encoder=false"];
    let mut session = prepare(folder, &[&own, keys].concat());
    while session.step().unwrap().is_some() {}
    session.save(name).unwrap()
}

fn begun(folder: &Path, from: &Path, keys: &[&str]) -> Session {
    let from = format!("init_from={}", from.display());
    prepare(folder, &[&["train_text_encoder=false", &*from], keys].concat())
}

/// The whole update of a module on the base's own weight, by the formulas on the CPU.
fn update(folder: &Path, path: &ModulePath, module: &AdapterModule) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder.join("base.safetensors")).unwrap();
    let weight = checkpoint.component(path.component).unwrap().tensor(&format!("{}.weight", path.path)).unwrap();
    let base = HostTensor::from_f32(weight.shape(), weight.to_host().unwrap().to_f32().into_owned()).unwrap();
    let geometry = geometry(module, base.shape()).unwrap();
    let before = base.to_f32().into_owned();
    let layer = FrozenLayer { backend: CpuBackend, geometry, weight: base, bias: None };
    let variant = VariantRegistry::default().get(&module.variant).unwrap();
    let parameters = Parameters::upload(&CpuBackend, module, &HostTensor::zeros([1])).unwrap();
    let applied = [Applied { variant: &*variant, parameters, strength: 1.0 }];
    let merged = merged_weight(&CpuBackend, &layer, &applied).unwrap();
    merged.to_f32().iter().zip(before).map(|(merged, before)| merged - before).collect()
}

/// How much of one adapter's updates another lacks, over all modules of the first, as a share of their norm.
fn lost(folder: &Path, whole: &Adapter, part: &Adapter) -> f64 {
    let (mut lost, mut all) = (0.0f64, 0.0f64);
    for (path, module) in &whole.modules {
        let (whole, part) = (update(folder, path, module), update(folder, path, &part.modules[path]));
        lost += whole.iter().zip(&part).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        all += whole.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    }
    (lost / all).sqrt()
}

fn notes(session: &Session) -> Vec<String> {
    session.summary().notes
}

fn first_loss(session: &mut Session) -> f64 {
    session.step().unwrap().unwrap().loss
}

#[test]
fn a_higher_rank_begins_where_a_lower_one_ended_and_learns_with_all_of_it() {
    let folder = workspace();
    let from = learnt(folder.path(), "four", &[]);
    let mut same = begun(folder.path(), &from, &[]);
    for keys in
        [&["lora_rank=8", "lora_alpha=8"][..], &["lora_rank=8", "lora_alpha=2", "use_rslora=true"], &["lora_alpha=1"]]
    {
        let mut grown = begun(folder.path(), &from, keys);
        let before = grown.adapter().unwrap().export().unwrap();
        assert!(lost(folder.path(), &same.adapter().unwrap().export().unwrap(), &before) < 1e-5, "{keys:?}");
        assert!(notes(&grown).iter().any(|note| note.contains("100.00% is kept")), "{:?}", notes(&grown));
        let other = first_loss(&mut begun(folder.path(), &from, &[]));
        assert!((first_loss(&mut grown) - other).abs() < tolerance(1e-6), "{keys:?}");
        // Ranks that are new have an effect after a step.
        let after = grown.adapter().unwrap().export().unwrap();
        // Where a picture is one place wide, attention to it does not depend on queries and keys.
        let moves = |(path, module): &(&ModulePath, &AdapterModule)| {
            module.tensors["up"] != before.modules[*path].tensors["up"]
        };
        let moved: Vec<_> = after.modules.iter().filter(moves).collect();
        assert!(2 * moved.len() > after.modules.len(), "{keys:?}");
        let all_learn = |module: &AdapterModule| {
            let up = module.tensors["up"].to_f32().into_owned();
            (0..module.rank).all(|rank| up.iter().skip(rank).step_by(module.rank).any(|&value| value != 0.0))
        };
        assert!(moved.iter().all(|(_, module)| all_learn(module)), "{keys:?}");
    }
    first_loss(&mut same);
}

#[test]
fn a_lower_rank_keeps_what_the_note_says() {
    let folder = workspace();
    let from = learnt(folder.path(), "four", &["target_modules=all-conv"]);
    let whole = adapter::read(&from).unwrap().adapter;
    let cut = begun(folder.path(), &from, &["target_modules=all-conv", "lora_rank=1", "lora_alpha=1"]);
    let cut_adapter = cut.adapter().unwrap().export().unwrap();
    assert!(cut_adapter.modules.values().all(|module| module.rank == 1));
    let lost = lost(folder.path(), &whole, &cut_adapter);
    let notes = notes(&cut);
    let note = notes.iter().find(|note| note.contains("init_from four.safetensors")).unwrap();
    let kept: f64 = note.split("norm ").nth(1).unwrap().split('%').next().unwrap().parse().unwrap();
    // Of all updates together, and of their mean, it is about the same.
    assert!(lost > 0.05 && (lost - f64::sqrt(1.0 - (kept / 100.0).powi(2))).abs() < 0.1, "{lost} {note}");
}

#[test]
fn other_targets_begin_anew_and_change_nothing() {
    let folder = workspace();
    let from = learnt(folder.path(), "attention", &[]);
    let mut wide = begun(folder.path(), &from, &["target_modules=attention-mlp"]);
    let known = adapter::read(&from).unwrap().adapter.modules.len();
    let all = wide.targets().len();
    let note = format!("{} of {all} targeted layers are not in the file", all - known);
    assert!(all > known && notes(&wide).iter().any(|own| own.contains(&note)), "{:?}", notes(&wide));
    let same = first_loss(&mut begun(folder.path(), &from, &[]));
    assert!((first_loss(&mut wide) - same).abs() < tolerance(1e-6));
}

#[test]
fn other_variants_are_flattened_to_the_rank_of_the_run() {
    let folder = workspace();
    for (variant, exact) in [("loha", 16), ("lycoris-dora", 64), ("lokr", 64)] {
        let options = ["target_modules=*attn2*", &format!("variant={variant}")];
        let from = learnt(folder.path(), variant, &options);
        let file = adapter::read(&from).unwrap().adapter;
        assert!(file.modules.values().all(|module| module.variant == variant));
        let keys = ["target_modules=*attn2*", "variant=lora", &format!("lora_rank={exact}"), "lora_alpha=4"];
        let plain = begun(folder.path(), &from, &keys);
        let exported = plain.adapter().unwrap().export().unwrap();
        assert!(exported.modules.values().all(|module| module.is_lora() && module.rank == exact));
        assert!(lost(folder.path(), &file, &exported) < 1e-3, "{variant}");
        // Of its own variant it goes on as it is.
        let own = begun(folder.path(), &from, &options).adapter().unwrap().export().unwrap();
        assert!(own.modules == file.modules, "{variant}");
    }
    let from = folder.path().join("out/loha.safetensors");
    let low = begun(folder.path(), &from, &["target_modules=*attn2*", "lora_rank=2", "lora_alpha=2"]);
    let lost = lost(folder.path(), &adapter::read(&from).unwrap().adapter, &low.adapter().unwrap().export().unwrap());
    assert!(lost > 0.01 && lost < 0.95, "{lost}");
    assert!(low.adapter().unwrap().begun().iter().all(|own| own.module.component == Component::UNET && own.kept < 1.0));
}

#[test]
fn a_dora_of_another_rank_keeps_its_magnitudes() {
    let folder = workspace();
    let from = learnt(folder.path(), "dora", &["variant=dora", "target_modules=*attn2*"]);
    let grown = begun(folder.path(), &from, &["variant=dora", "target_modules=*attn2*", "lora_rank=6", "lora_alpha=3"]);
    let file = adapter::read(&from).unwrap().adapter;
    assert!(lost(folder.path(), &file, &grown.adapter().unwrap().export().unwrap()) < 1e-4);
}
