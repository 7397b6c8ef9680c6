//! NF4 against what bitsandbytes makes of the same weights and what it gives back (`tools/golden/make_nf4.py`).

use std::collections::BTreeMap;

use lora_torch::frozen::{FrozenWeight, Storage};
use lora_torch::nf4::Nf4;
use lora_torch::tch::{Kind, Tensor};

const NAMES: [&str; 6] = ["linear", "convolution", "odd", "outliers", "half", "bfloat16"];

fn golden() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/nf4.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// The largest difference, in shares of the largest expected number.
fn apart(own: &Tensor, expected: &Tensor) -> f64 {
    let (own, expected) = (own.to_kind(Kind::Double).flatten(0, -1), expected.to_kind(Kind::Double).flatten(0, -1));
    ((own - &expected).abs().max() / expected.abs().max()).double_value(&[])
}

#[test]
fn codes_and_factors_are_those_of_bitsandbytes() {
    let golden = golden();
    for name in NAMES {
        let of = |part: &str| &golden[&format!("{name}.{part}")];
        let own = Nf4::quantise(of("weight")).unwrap();
        assert_eq!(own.packed(), of("packed"), "{name}");
        assert_eq!(own.absmax(), of("absmax"), "{name}");
        // Both are sums of f32, whose order is nobody's promise: one unit in the last place of f32.
        assert!(apart(own.offset(), of("offset")) < 1.2e-7, "{name}");
        assert!(apart(own.nested(), of("nested")) < 1.2e-7, "{name}");
    }
}

#[test]
fn what_comes_back_is_what_bitsandbytes_gives() {
    let golden = golden();
    for name in NAMES {
        let weight = &golden[&format!("{name}.weight")];
        let own = FrozenWeight::stored(weight, Storage::Nf4).unwrap();
        let (whole, expected) = (own.whole().unwrap(), &golden[&format!("{name}.back")]);
        assert_eq!((whole.size(), whole.kind()), (weight.size(), weight.kind()));
        // The factor is a product and a sum in f32: two units in the last place; rounding to the weight's own dtype.
        let tolerance = match weight.kind() {
            Kind::Half => 4.9e-4,
            Kind::BFloat16 => 3.9e-3,
            _ => 2.4e-7,
        };
        let error = apart(&whole, expected);
        assert!(error <= tolerance, "{name}: {error}");
        // 4 bits each, 8 for each block of 64, 32 for each 256 of those, and one offset.
        let (count, blocks) = (weight.numel(), weight.numel().div_ceil(64));
        assert_eq!(own.bytes(), count.div_ceil(2) + blocks + 4 * blocks.div_ceil(256) + 4, "{name}");
    }
}
