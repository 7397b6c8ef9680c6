//! Weights in GGUF's blocks against what gguf makes of the same bytes (`tools/golden/make_blocks.py`).

use std::collections::BTreeMap;

use lora_core::blocks::BlockKind;
use lora_torch::frozen::FrozenWeight;
use lora_torch::tch::{Device, Kind, Tensor};

fn golden() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/blocks.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

#[test]
fn what_comes_back_is_what_gguf_gives_to_the_bit() {
    let golden = golden();
    for blocks in BlockKind::ALL {
        let (bytes, values) = (&golden[&format!("{blocks:?}.bytes")], &golden[&format!("{blocks:?}.values")]);
        let bytes = Vec::<u8>::try_from(bytes.flatten(0, -1)).unwrap();
        let shape = [values.size()[0] as usize, values.size()[1] as usize];
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let own = FrozenWeight::packed(&bytes, blocks, shape, kind, Device::Cpu).unwrap();
            let whole = own.whole().unwrap();
            assert!(whole.equal(&values.to_kind(kind)), "{blocks} {kind:?}");
            assert_eq!((whole.kind(), own.bytes()), (kind, bytes.len()));
        }
    }
}

#[test]
fn bytes_that_do_not_fit_are_refused() {
    let refused = |bytes: usize, shape, kind| {
        let found = FrozenWeight::packed(&vec![0; bytes], BlockKind::Q4_K, shape, kind, Device::Cpu);
        found.unwrap_err().to_string()
    };
    assert_eq!(refused(287, [2, 256], Kind::Float), "a weight in q4_k: 288 bytes expected for its shape, 287 found");
    assert!(refused(288, [4, 128], Kind::Float).contains("q4_k: its rows are not whole blocks"));
    assert!(refused(0, [usize::MAX, 256], Kind::Float).contains("not whole blocks"));
    assert!(refused(0, [0, 256], Kind::Float).contains("no elements"));
    assert!(refused(288, [2, 256], Kind::Double).contains("not in f32"));
}
