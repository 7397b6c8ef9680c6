//! Adapter files of any names and shapes: an error or an adapter, never a panic, in reading and in merging.

use std::collections::BTreeMap;

use lora_core::HostTensor;
use lora_core::Strength;
use lora_core::health::health;
use lora_core::variant::VariantRegistry;
use lora_io::adapter;
use lora_io::consumers::{Inventory, opinions};
use lora_io::merge::{MergeOptions, Weighted, merge};
use lora_io::safetensors::write;
use proptest::prelude::*;

const MODULES: &[&str] = &[
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_x",
    "unet.mid_block.attentions.0.proj_in",
    "base_model.model.model.layers.0.self_attn.q_proj",
    "lora_unet_",
    "",
];

const SUFFIXES: &[&str] = &[
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_mid.weight",
    ".alpha",
    ".scalar",
    ".dora_scale",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".hada_t1",
    ".hada_t2",
    ".lokr_w1",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_t2",
    ".oft_blocks",
    ".rescale",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".diff",
    ".diff_b",
    ".w_norm",
    ".on_input",
    ".weight",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".oft_R.weight",
    ".boft_R",
    ".boft_s",
    ".ia3_l",
    ".vera_lambda_b",
    ".vera_lambda_d",
    ".glora_A.X",
    ".glora_B.Xd",
    "_lora.down.weight",
];

fn tensors() -> impl Strategy<Value = BTreeMap<String, HostTensor>> {
    let name = (prop::sample::select(MODULES), prop::sample::select(SUFFIXES)).prop_map(|(a, b)| format!("{a}{b}"));
    let shape = prop::collection::vec(prop::sample::select(&[0usize, 1, 2, 3, 4, 8][..]), 0..5);
    let tensor =
        shape.prop_map(|shape| HostTensor::from_f32(shape.clone(), vec![0.5; shape.iter().product()]).unwrap());
    prop::collection::btree_map(name, tensor, 1..7)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_names_and_shapes_are_survived(tensors in tensors(), peft in any::<bool>(), method in 0usize..6) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter_model.safetensors");
        write(&path, &tensors, &BTreeMap::new()).unwrap();
        if peft {
            let method = ["LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3"][method];
            let config = format!("{{\"peft_type\": \"{method}\", \"r\": 2, \"lora_alpha\": 0}}");
            std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        }
        let place = if peft { folder.path().to_owned() } else { path };
        if let Ok(inventory) = Inventory::read(&place) {
            opinions(&inventory);
        }
        if let Ok(read) = adapter::read(&place) {
            health(&read.adapter);
            let base = BTreeMap::from([
                ("mid_block.attentions.0.proj_in.weight".to_owned(), HostTensor::zeros([8, 4, 1, 1])),
                ("text_model.encoder.layers.0.mlp.fc1.weight".to_owned(), HostTensor::zeros([4, 4])),
                ("model.layers.0.self_attn.q_proj.weight".to_owned(), HostTensor::zeros([8, 8])),
                ("x.weight".to_owned(), HostTensor::zeros([3])),
            ]);
            let base_path = folder.path().join("base");
            write(&base_path, &base, &BTreeMap::new()).unwrap();
            for format in adapter::Format::ALL {
                let _ = adapter::write(folder.path().join("again"), &read.adapter, format, read.dtype());
            }
            let weighted = Weighted { name: "x".into(), adapter: read.adapter, strength: Strength::from(0.5) };
            let out = folder.path().join("merged");
            let _ = merge(&base_path, &[weighted], &out, &MergeOptions::default(), &VariantRegistry::default(), &|_, _| {});
        }
    }
}
