//! Combining adapters as PEFT's `add_weighted_adapter` does, and the first values of PiSSA and OLoRA with their conversion
//! to a plain LoRA: against the golden files `combine-*` and `init-*`.
//!
//! Tolerance: 1e-5 relative L2 of the update `scale · B A` (signs of singular vectors are arbitrary, the product is not).

mod support;

use std::collections::BTreeMap;

use lora_core::backend::{Backend, CpuBackend};
use lora_core::compose::{Keep, MajoritySign, Method, Pruning, combine};
use lora_core::conformance::distance;
use lora_core::merge::{Applied, merged_weight};
use lora_core::random::Stream;
use lora_core::rank::RankPolicy;
use lora_core::variant::{FrozenLayer, Parameters, Request, VariantRegistry};
use lora_core::{Adapter, AdapterModule, Component, HostTensor, ModulePath, Strength};
use support::{Golden, product};

fn path() -> ModulePath {
    ModulePath::new(Component::UNET, "mid_block.resnets.0.conv1")
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

#[test]
fn pissa_and_olora_begin_and_end_as_pefts() {
    let registry = VariantRegistry::<CpuBackend>::default();
    for name in ["pissa", "olora"] {
        let golden = Golden::all(&format!("init-{name}")).remove(0);
        let tensor = |name: &str| &golden.tensors[name];
        let (rank, scale) = (4, 2.0);
        let base = FrozenLayer {
            backend: CpuBackend,
            geometry: golden.geometry(),
            weight: tensor("weight").clone(),
            bias: None,
        };
        let variant = registry.get(name).unwrap();
        let request = Request { scale, ..Request::rank(rank) };
        let first = variant.initialise(&CpuBackend, &base, &request, &Stream::new(0)).unwrap();
        let taken_out = CpuBackend.add(base.weight.clone(), &CpuBackend.scale(tensor("residual"), -1.0).unwrap());
        let apart = distance(&product(&first["up"], &first["down"], scale), &taken_out.unwrap());
        assert!(apart < 1e-5, "{name}: {apart:e}");

        // Trained from PEFT's first values: the plain LoRA in the file gives PEFT's weight on the untouched base.
        let tensors = [
            ("down", "trained.lora_A"),
            ("up", "trained.lora_B"),
            ("initial_down", "file.lora_A.weight"),
            ("initial_up", "file.lora_B.weight"),
        ];
        let tensors = tensors.map(|(own, peer)| (own.to_owned(), tensor(peer).clone())).into();
        let module = AdapterModule { variant: name.into(), tensors, rank, alpha: scale * rank as f64 };
        let exported = variant.export(module).unwrap();
        assert_eq!((exported.variant.as_str(), exported.rank, exported.scale()), ("lora", 2 * rank, scale));
        for (own, peer) in [("down", "converted.lora_A"), ("up", "converted.lora_B")] {
            assert_eq!(&exported.tensors[own], tensor(peer), "{name} {own}");
        }
        let plain = registry.get("lora").unwrap();
        let parameters = Parameters::upload(&CpuBackend, &exported, &base.weight).unwrap();
        let applied = [Applied { variant: &*plain, parameters, strength: 1.0 }];
        let merged = merged_weight(&CpuBackend, &base, &applied).unwrap();
        assert!(distance(&merged, tensor("effective")) < 1e-5, "{name}");
    }
}
