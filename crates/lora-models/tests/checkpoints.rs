//! Checkpoints written in the single-file layout read back as the same networks.

use lora_core::DType;
use lora_io::checkpoint::{Checkpoint, Part};
use lora_models::layers::{Adaptable, Pass};
use lora_models::stable_diffusion::{Unet, load_text_encoder, load_unet, load_vae};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor, no_grad};

#[test]
fn a_single_file_is_the_network_it_was_written_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.safetensors");
    let model = SyntheticModel::tiny();
    model.write(&path, DType::F32).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.unused().is_empty());

    let loaded = load_unet(&checkpoint, Kind::Float, Device::Cpu).unwrap();
    assert_eq!(*loaded.config(), model.unet);
    assert_eq!(*load_text_encoder(&checkpoint, Kind::Float, Device::Cpu).unwrap().config(), model.text_encoder);
    assert_eq!(*load_vae(&checkpoint, Kind::Float, Device::Cpu).unwrap().config(), model.vae);

    let weights = SyntheticWeights::new("unet");
    let built = Unet::new(&Weights::new(&weights, Kind::Float, Device::Cpu), model.unet).unwrap();
    let sample = Tensor::randn([1, 4, 8, 8], (Kind::Float, Device::Cpu));
    let context = Tensor::randn([1, 77, 128], (Kind::Float, Device::Cpu));
    let answer = |unet: &Unet| no_grad(|| unet.forward(&sample, &[7.0], &context, &Pass::default()).unwrap());
    assert_eq!(answer(&loaded), answer(&built));
}

/// The full architecture's names and shapes, without its two gigabytes: the counts and the checksum are published ones.
#[test]
fn the_full_architecture_has_the_known_tensors_and_targets() {
    let model = SyntheticModel::full();
    let lists = model.weight_shapes().unwrap();
    let count = |part: Part| lists[&part].len();
    assert_eq!((count(Part::Unet), count(Part::Vae), count(Part::TextEncoder)), (686, 248, 196));
    let parameters = |part: Part| lists[&part].iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>();
    assert_eq!(parameters(Part::Unet), 859_520_964);
    assert_eq!(parameters(Part::TextEncoder), 123_060_480);
    assert_eq!(parameters(Part::Vae), 83_653_863);

    let layout = lora_io::checkpoint::LdmNames::of_diffusers(
        &lists[&Part::Unet].iter().map(|(name, _)| name).collect::<Vec<_>>(),
        &lists[&Part::Vae].iter().map(|(name, _)| name).collect::<Vec<_>>(),
    );
    let mut originals = Vec::new();
    for (&part, list) in &lists {
        for (name, _) in list {
            let original = layout.original(part, name).unwrap();
            assert_eq!(layout.canonical(&original), Some((part, name.clone())));
            originals.push(original);
        }
    }
    let reread = lora_io::checkpoint::LdmNames::of_ldm(&originals);
    assert!(originals.iter().all(|name| reread.canonical(name).is_some()));
    originals.sort();
    originals.dedup();
    assert_eq!(originals.len(), 686 + 248 + 196, "no two weights share an original name");
}

#[test]
fn every_default_target_of_sd_scripts_is_there() {
    let mut names = Vec::new();
    let weights = SyntheticWeights::new("unet");
    let tiny = SyntheticModel::tiny();
    let mut unet = Unet::new(&Weights::new(&weights, Kind::Float, Device::Cpu), tiny.unet).unwrap();
    let targets = lora_core::target::Targets::parse(&["attention-mlp"]).unwrap();
    for layer in targets.select(&unet.adaptable_layers()).unwrap() {
        names.push(lora_io::adapter::kohya::file_name(&layer.path));
    }
    assert_eq!(names.len(), 192);
    // Depth and names do not depend on width; the text encoder's are spelled out.
    for layer in 0..12 {
        for module in
            ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
        {
            names.push(format!("lora_te_text_model_encoder_layers_{layer}_{module}"));
        }
    }
    names.sort();
    let digest = sha256(names.join("\n").as_bytes());
    assert_eq!(digest, "3b0b58f74c4028ff0a5fc6dced3aca89994271e636ccb8378589702b85067cc4");
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
