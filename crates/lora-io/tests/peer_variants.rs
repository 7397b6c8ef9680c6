//! Every variant against PEFT and LyCORIS: their files are read here, and give the outputs and the weights that the peers'
//! live layers gave (which is not always what the peers merge; see the note of each golden file).
//!
//! Tolerance: 1e-5 relative L2; the peers computed in f64, we in f32.

mod support;

use lora_core::backend::{Backend, CpuBackend};
use lora_core::conformance::distance;
use lora_core::merge::{Applied, merged_bias, merged_weight};
use lora_core::variant::{FrozenLayer, Parameters, VariantRegistry};
use lora_core::{Error, HostTensor};
use support::Golden;

#[test]
fn files_of_the_peers_give_what_the_peers_compute() {
    let registry = VariantRegistry::<CpuBackend>::default();
    let like = HostTensor::zeros([1]);
    let (mut checked, mut refused, mut wrong) = (0, Vec::new(), Vec::new());
    for golden in Golden::all("peft-").into_iter().chain(Golden::all("lycoris-")) {
        let module = match golden.module(false) {
            Ok(module) => module,
            Err(error) => {
                refused.push(format!("{}: {error}", golden.name));
                continue;
            }
        };
        let variant = registry.get(&module.variant).unwrap();
        let tensor = |name: &str| golden.tensors[name].clone();
        let geometry = golden.geometry();
        let bias = golden.tensors.get("bias").cloned();
        let base = FrozenLayer { backend: CpuBackend, geometry, weight: tensor("weight"), bias };
        let parameters = Parameters::upload(&CpuBackend, &module, &like).unwrap();
        let applied = [Applied { variant: &*variant, parameters, strength: 1.0 }];
        let merged = match merged_weight(&CpuBackend, &base, &applied) {
            Ok(merged) => merged,
            Err(error @ (Error::Unsupported { .. } | Error::Shape { .. })) => {
                refused.push(format!("{}: {error}", golden.name));
                continue;
            }
            Err(error) => panic!("{}: {error}", golden.name),
        };
        // PEFT's live layer is no change of a weight there; what its merge makes of it counts.
        if !golden.tensors.contains_key("effective") {
            assert!(distance(&merged, &tensor("merged")) < 1e-5, "{}", golden.name);
            continue;
        }
        checked += 1;
        if UNDETERMINED.contains(&&*golden.name) {
            continue;
        }
        let mut hold = |what: &str, found: &HostTensor, expected: &HostTensor| {
            let apart = distance(found, expected);
            if apart > 1e-5 {
                wrong.push(format!("{} ({}): {what} {apart:e}", golden.name, module.variant));
            }
        };
        hold("weight", &merged, &tensor("effective"));
        let merged_bias = merged_bias(&CpuBackend, &base, &applied).unwrap().or(base.bias.clone());
        if let Some(expected) = golden.tensors.get("effective_bias") {
            hold("bias", merged_bias.as_ref().unwrap(), expected);
        }
        if golden.metadata["kind"] != "norm" {
            let input = tensor("input");
            let live = variant.forward(&CpuBackend, &base, &applied[0].parameters, &input, None).unwrap();
            hold("forward", &live, &tensor("output"));
            let output = CpuBackend.apply(&geometry, &input, &merged, merged_bias.as_ref()).unwrap();
            hold("merged forward", &output, &tensor("output"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked > 95, "{checked} files checked");
    // What cannot be applied as its peer does is refused, not guessed at.
    let names: Vec<&str> = refused.iter().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(names, REFUSED, "{}", refused.join("\n"));
}

/// LyCORIS trains whole-matrix LoKr under rsLoRA with the scale √rank and GLoRA with alpha / √rank, but their files do not
/// tell that it was so; every reader, LyCORIS' own included, applies 1 and alpha / rank.
const UNDETERMINED: [&str; 2] = ["lycoris-glora-linear-rslora", "lycoris-lokr-linear-full-rslora"];

/// PEFT's LoRA on grouped convolutions, which changes no weight; its rotation of embeddings.
const REFUSED: &[&str] = &["peft-lora-conv-grouped", "peft-oft-embedding"];
