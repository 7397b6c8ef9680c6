//! Training of every variant against PEFT and LyCORIS: the gradients that the peers' live layers give for their own files.
//!
//! Tolerance: 1e-4 relative L2 of all gradients of a layer together; the peers computed in f64, we in f32.

#[path = "../../lora-io/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;

use lora_core::HostTensor;
use lora_core::conformance::distance;
use lora_core::variant::{FrozenLayer, Parameters, VariantRegistry};
use lora_torch::TchBackend;
use lora_torch::tch::{Device, Kind, Tensor};
use lora_torch::tensor::{from_host, to_host};
use support::Golden;

#[test]
fn gradients_are_those_of_the_peers() {
    let registry = VariantRegistry::<TchBackend>::default();
    let here = |tensor: &HostTensor| from_host(tensor, Device::Cpu).unwrap().to_kind(Kind::Float);
    let (mut checked, mut wrong) = (0, Vec::new());
    for golden in Golden::all("peft-").into_iter().chain(Golden::all("lycoris-")) {
        // Whether a file can be applied at all is lora-io's test.
        let (Ok(module), Ok(expected)) = (golden.module(false), golden.module(true)) else { continue };
        if golden.metadata["kind"] == "norm" || UNDETERMINED.contains(&&*golden.name) {
            continue;
        }
        let variant = registry.get(&module.variant).unwrap();
        let base = FrozenLayer {
            backend: TchBackend,
            geometry: golden.geometry(),
            weight: here(&golden.tensors["weight"]),
            bias: golden.tensors.get("bias").map(here),
        };
        let leaf = |(name, tensor): (&String, &HostTensor)| {
            (name.clone(), here(tensor).set_requires_grad(variant.is_trained(name)))
        };
        let tensors: BTreeMap<String, Tensor> = module.tensors.iter().map(leaf).collect();
        let parameters = Parameters::<TchBackend> { tensors, scale: module.scale() };
        let Ok(output) = variant.forward(&TchBackend, &base, &parameters, &here(&golden.tensors["input"]), None) else {
            continue;
        };
        (output * here(&golden.tensors["probe"])).sum(Kind::Float).backward();
        checked += 1;
        for (name, tensor) in parameters.tensors.iter().filter(|(name, _)| variant.is_trained(name)) {
            let gradient = to_host(&tensor.grad()).unwrap();
            let mut peer = expected.tensors[name].clone();
            if module.variant == "ia3" {
                // Read as factors, which are one more than the offsets kept here.
                let gradients = peer.to_f32().iter().map(|value| value + 1.0).collect();
                peer = HostTensor::from_f32(peer.shape(), gradients).unwrap();
            }
            let apart = distance(&gradient, &peer);
            if apart > 1e-4 {
                wrong.push(format!("{} ({}): {name} {apart:e}", golden.name, module.variant));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked > 80, "{checked} files checked");
}

/// See lora-io's `peer_variants`: the file does not tell the scale.
const UNDETERMINED: [&str; 2] = ["lycoris-glora-linear-rslora", "lycoris-lokr-linear-full-rslora"];
