//! Combining adapters as PEFT's `add_weighted_adapter` does, and the first values of PiSSA and OLoRA with their conversion
//! to a plain LoRA: against the golden files `combine-*` and `init-*`.
//!
//! Tolerance: 1e-5 relative L2 of the update `scale · B A` (signs of singular vectors are arbitrary, the product is not).

mod support;

use std::collections::BTreeMap;

use lora_core::backend::CpuBackend;
use lora_core::compose::{Keep, MajoritySign, Method, Pruning, combine};
use lora_core::conformance::distance;
use lora_core::linalg::{as_matrix, multiply};
use lora_core::rank::RankPolicy;
use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath, Strength};
use support::Golden;

fn path() -> ModulePath {
    ModulePath::new(Component::Unet, "mid_block.resnets.0.conv1")
}

/// `scale · up · down`.
fn product(up: &HostTensor, down: &HostTensor, scale: f64) -> HostTensor {
    let (up_values, down_values) = (up.to_f32(), down.to_f32());
    let product = multiply(as_matrix(&up_values, up.shape()), as_matrix(&down_values, down.shape()));
    let (rows, columns) = (product.nrows(), product.ncols());
    let places = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
    let values = places.map(|place| product[place] * scale as f32).collect();
    HostTensor::from_f32([rows, columns], values).unwrap()
}

fn plain(down: &HostTensor, up: &HostTensor, alpha: f64) -> Adapter {
    let rank = down.shape()[0];
    let tensors = BTreeMap::from([("down".to_owned(), down.clone()), ("up".to_owned(), up.clone())]);
    let module = AdapterModule { variant: "lora".into(), tensors, rank, alpha };
    Adapter { modules: BTreeMap::from([(path(), module)]), metadata: BTreeMap::new() }
}

#[test]
fn combinations_are_pefts() {
    let mut checked = 0;
    for golden in Golden::all("combine-") {
        let options: serde_json::Value = serde_json::from_str(&golden.metadata["options"]).unwrap();
        let numbers =
            |key: &str| -> Vec<f64> { options[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect() };
        let tensor = |name: String| golden.tensors[&name].clone();
        let adapters: Vec<Adapter> = (0..3)
            .map(|i| {
                let factor = |side| tensor(format!("adapters.{i}.lora_{side}"));
                plain(&factor("A"), &factor("B"), numbers("alphas")[i])
            })
            .collect();
        let strengths: Vec<Strength> = numbers("weights").into_iter().map(Strength::from).collect();
        let rank = options["result"]["r"].as_u64().unwrap() as usize;
        let result_scale = options["result"]["lora_alpha"].as_f64().unwrap() / rank as f64;
        let kind = options["combination_type"].as_str().unwrap();
        let sign = match options["majority_sign_method"].as_str().unwrap() {
            "total" => MajoritySign::Total,
            _ => MajoritySign::Frequency,
        };
        let whole = kind.strip_suffix("_svd");
        let pruning = |keep, majority| {
            let pruning = Pruning { keep, density: options["density"].as_f64().unwrap(), majority };
            match whole {
                Some(_) => Method::PrunedSvd(pruning, RankPolicy::Fixed(rank)),
                None => Method::Pruned(pruning),
            }
        };
        let method = match whole.unwrap_or(kind) {
            "cat" => Method::Concatenate,
            "svd" => Method::Svd(RankPolicy::Fixed(rank)),
            "linear" => Method::Linear,
            "ties" => pruning(Keep::Largest, Some(sign)),
            "magnitude_prune" => pruning(Keep::Largest, None),
            // Its masks are another generator's: compared where all is kept.
            "dare_linear" => pruning(Keep::Random { seed: 0 }, None),
            "dare_ties" => pruning(Keep::Random { seed: 0 }, Some(sign)),
            other => panic!("{other}"),
        };
        let parts: Vec<_> = adapters.iter().zip(&strengths).collect();
        let (combined, _) = combine(&parts, method).unwrap();
        let module = &combined.modules[&path()];
        assert_eq!(module.rank, rank, "{}", golden.name);
        let found = product(&module.tensors["up"], &module.tensors["down"], module.scale());
        let expected = product(&tensor("result.lora_B".into()), &tensor("result.lora_A".into()), result_scale);
        let apart = distance(&found, &expected);
        assert!(apart < 1e-5, "{}: {apart:e}", golden.name);
        checked += 1;
    }
    assert!(checked >= 15, "{checked} files checked");
}
