//! Checkpoints written in the single-file layout read back as the same networks.

use lora_core::{Component, DType};
use lora_io::checkpoint::Checkpoint;
use lora_io::family::sd1;
use lora_models::diffusion::{Prediction, noise_schedule};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{ClipConfig, ClipTextEncoder, Unet, load_text_encoder, load_unet, load_vae};
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::{Held, ShapesOnly, SyntheticWeights, Weights};
use lora_torch::tch::{Device, Kind, Tensor, no_grad};

#[test]
fn a_single_file_is_the_network_it_was_written_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.safetensors");
    let model = SyntheticModel::tiny();
    model.write(&path, DType::F32).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.unused().is_empty());

    let loaded = load_unet(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap();
    assert_eq!(*loaded.config(), model.unet);
    assert_eq!(
        *load_text_encoder(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap().config(),
        model.text_encoder
    );
    assert_eq!(*load_vae(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap().config(), model.vae);

    let weights = SyntheticWeights::new("unet");
    let built = Unet::new(&Weights::new(&weights, Kind::Float, Device::Cpu), model.unet).unwrap();
    let sample = Tensor::randn([1, 4, 8, 8], (Kind::Float, Device::Cpu));
    let context = Tensor::randn([1, 77, 128], (Kind::Float, Device::Cpu));
    let answer = |unet: &Unet| no_grad(|| unet.forward(&sample, &[7.0], &context, &Pass::default()).unwrap());
    assert_eq!(answer(&loaded), answer(&built));
}

/// A file without configs does not tell heads and activation: heads are as wide as divides where projections are linear, the
/// activation is for whoever knows the family.
#[test]
fn a_single_file_with_openclip_s_names_is_the_network_it_was_written_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.safetensors");
    let model = SyntheticModel::tiny_sd2();
    model.write(&path, DType::F32).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.family(), model.family);
    assert!(checkpoint.unused().is_empty());
    let detected = ClipConfig::detect(checkpoint.component(Component::TEXT_ENCODER).unwrap()).unwrap();
    assert_eq!(ClipConfig { exact_gelu: true, ..detected }, model.text_encoder);

    let loaded = load_unet(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap();
    assert_eq!(*loaded.config(), model.unet);
    let weights = SyntheticWeights::new("text_encoder");
    let built = ClipTextEncoder::new(&Weights::new(&weights, Kind::Float, Device::Cpu), model.text_encoder).unwrap();
    let stored = checkpoint.component(Component::TEXT_ENCODER).unwrap();
    let loaded = ClipTextEncoder::new(&Weights::new(stored, Kind::Float, Device::Cpu), model.text_encoder).unwrap();
    let tokens = Tensor::from_slice(&(0..77i64).collect::<Vec<_>>()).view([1, 77]);
    let answer = |encoder: &ClipTextEncoder| no_grad(|| encoder.forward(&tokens, 1, &Pass::default()).unwrap());
    assert_eq!(answer(&loaded), answer(&built));
}

/// The full architecture's names and shapes, without its two gigabytes: the counts and the checksum are published ones.
#[test]
fn the_full_architecture_has_the_known_tensors_and_targets() {
    let model = SyntheticModel::full();
    let lists = model.weight_shapes().unwrap();
    let count = |component: Component| lists[&component].len();
    assert_eq!((count(Component::UNET), count(Component::VAE), count(Component::TEXT_ENCODER)), (686, 248, 196));
    let parameters = |component: Component| {
        lists[&component].iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>()
    };
    assert_eq!(parameters(Component::UNET), 859_520_964);
    assert_eq!(parameters(Component::TEXT_ENCODER), 123_060_480);
    assert_eq!(parameters(Component::VAE), 83_653_863);

    let mut originals = Vec::new();
    for (&component, list) in &lists {
        let layout = sd1::FAMILY.component(component).unwrap().single_file.unwrap();
        let names: Vec<&str> = list.iter().map(|(name, _)| name.as_str()).collect();
        let depths = layout.tree.depths_of_canonical(&names);
        let stored: Vec<String> = names.iter().map(|name| layout.tree.stored(name, &depths).unwrap().0).collect();
        let reread = layout.tree.depths_of_stored(&stored.iter().map(String::as_str).collect::<Vec<_>>());
        for (name, stored) in names.iter().zip(&stored) {
            assert_eq!(layout.tree.weights(stored, &reread).unwrap()[0].0, *name);
            originals.push(format!("{}{stored}", layout.place));
        }
    }
    originals.sort();
    originals.dedup();
    assert_eq!(originals.len(), 686 + 248 + 196, "no two weights share an original name");
}

#[test]
fn the_full_architecture_of_stable_diffusion_2_has_the_known_parameters_and_targets() {
    let model = SyntheticModel::full_sd2();
    let lists = model.weight_shapes().unwrap();
    let parameters =
        |component| -> usize { lists[&component].iter().map(|(_, shape)| shape.iter().product::<usize>()).sum() };
    assert_eq!(parameters(Component::UNET), 865_910_724);
    assert_eq!(parameters(Component::TEXT_ENCODER), 340_387_840);
    assert_eq!(parameters(Component::VAE), 83_653_863);
    // sd-scripts adapts 192 modules of the U-Net with 432,128 numbers a rank, 138 of the text encoder with 423,936.
    let targets = lora_core::target::Targets::parse(&["attention-mlp"]).unwrap();
    let chosen = |network: &mut dyn Adaptable| {
        let chosen = targets.select(&network.adaptable_layers().unwrap()).unwrap();
        let numbers = chosen.iter().map(|target| target.geometry.inputs() + target.geometry.outputs());
        (chosen.len(), numbers.sum::<usize>())
    };
    let (source, other) = (SyntheticWeights::new("unet"), SyntheticWeights::new("text_encoder"));
    let (unet, text) = (ShapesOnly::new(&source), ShapesOnly::new(&other));
    let weights = |shapes| Weights::new(shapes, Kind::Float, Device::Cpu);
    assert_eq!(chosen(&mut Unet::new(&weights(&unet), model.unet).unwrap()), (192, 432_128));
    assert_eq!(chosen(&mut ClipTextEncoder::new(&weights(&text), model.text_encoder).unwrap()), (138, 423_936));
}

#[test]
fn the_published_sdxl_has_its_sizes_and_sd_scripts_targets() {
    let model = SyntheticModel::full_sdxl();
    let shapes = model.weight_shapes().unwrap();
    let parameters = |component: Component| -> usize {
        shapes[&component].iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    };
    assert_eq!(parameters(Component::UNET), 2_567_463_684);
    assert_eq!(parameters(Component::TEXT_ENCODER), 123_060_480);
    assert_eq!(parameters(Component::TEXT_ENCODER_2), 694_659_840);
    // What sd-scripts adapts by default: 722 modules of the U-Net, 72 and 192 of the text encoders, with so many numbers a
    // rank.
    let targets = lora_core::target::Targets::parse(&["attention-mlp"]).unwrap();
    let chosen = |network: &mut dyn Adaptable| {
        let chosen = targets.select(&network.adaptable_layers().unwrap()).unwrap();
        let numbers = chosen.iter().map(|target| target.geometry.inputs() + target.geometry.outputs());
        (chosen.len(), numbers.sum::<usize>())
    };
    let sources = ["unet", "text_encoder", "text_encoder_2"].map(SyntheticWeights::new);
    let [unet, first, second] = sources.each_ref().map(|source| ShapesOnly::new(source));
    let weights = |shapes| Weights::new(shapes, Kind::Float, Device::Cpu);
    assert_eq!(chosen(&mut Unet::new(&weights(&unet), model.unet).unwrap()), (722, 2_659_840));
    assert_eq!(chosen(&mut ClipTextEncoder::new(&weights(&first), model.text_encoder).unwrap()), (72, 165_888));
    let second = ClipTextEncoder::new(&weights(&second), model.text_encoder_2.unwrap()).unwrap();
    assert_eq!(chosen(&mut second.of(Component::TEXT_ENCODER_2)), (192, 737_280));
}

#[test]
fn every_default_target_of_sd_scripts_is_there() {
    let mut names = Vec::new();
    let weights = SyntheticWeights::new("unet");
    let tiny = SyntheticModel::tiny();
    let mut unet = Unet::new(&Weights::new(&weights, Kind::Float, Device::Cpu), tiny.unet).unwrap();
    let targets = lora_core::target::Targets::parse(&["attention-mlp"]).unwrap();
    for layer in targets.select(&unet.adaptable_layers().unwrap()).unwrap() {
        names.push(sd1::FAMILY.kohya(&layer.path).unwrap());
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

/// A diffusers folder with the same weights is the same network; what its configs say counts.
#[test]
fn a_diffusers_folder_is_read_with_its_configs() {
    let folder = tempfile::tempdir().unwrap();
    let model = SyntheticModel::tiny();
    for (component, list) in model.weight_shapes().unwrap() {
        let weights = SyntheticWeights::new(component.name());
        // An older release's spelling of the autoencoder's attention, a newer one's of the text encoder.
        let spelled = |name: &str| match component {
            Component::VAE => name.replace(".to_out.0.", ".proj_attn.").replace(".to_q.", ".query."),
            Component::TEXT_ENCODER => name.trim_start_matches("text_model.").to_owned(),
            _ => name.to_owned(),
        };
        let tensors: std::collections::BTreeMap<_, _> =
            list.iter().map(|(name, shape)| (spelled(name), weights.values(name, shape))).collect();
        let path = folder.path().join(component.name());
        std::fs::create_dir(&path).unwrap();
        let file = if component == Component::TEXT_ENCODER { "model" } else { "diffusion_pytorch_model" };
        lora_io::safetensors::write(path.join(format!("{file}.safetensors")), &tensors, &Default::default()).unwrap();
        let config = match component {
            Component::UNET => r#"{"attention_head_dim": [8, 8, 4, 8], "norm_num_groups": 32}"#,
            Component::VAE => r#"{"scaling_factor": 0.25}"#,
            _ => r#"{"num_attention_heads": 4, "hidden_act": "quick_gelu"}"#,
        };
        std::fs::write(path.join("config.json"), config).unwrap();
    }
    let scheduler = folder.path().join("scheduler");
    std::fs::create_dir(&scheduler).unwrap();

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(load_unet(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap().config().heads, [8, 8, 4, 8]);
    assert_eq!(load_text_encoder(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap().config().heads, 4);
    assert_eq!(load_vae(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap().config().scaling_factor, 0.25);
    let schedule = |config: &str| {
        std::fs::write(scheduler.join("scheduler_config.json"), config).unwrap();
        noise_schedule(&Checkpoint::open(folder.path()).unwrap())
    };
    let velocity = schedule(r#"{"prediction_type": "v_prediction"}"#).unwrap();
    assert!(velocity.prediction() == Prediction::Velocity && !velocity.has_zero_terminal_snr());
    let zero = schedule(r#"{"prediction_type": "v_prediction", "rescale_betas_zero_snr": true}"#).unwrap();
    assert!(zero.prediction() == Prediction::Velocity && zero.has_zero_terminal_snr());
    for (config, reason) in [
        (r#"{"prediction_type": "sample"}"#, "prediction_type `sample`"),
        (r#"{"beta_schedule": "linear"}"#, "beta_schedule is `linear`; expected scaled_linear"),
        (
            r#"{"prediction_type": "epsilon", "rescale_betas_zero_snr": true}"#,
            "expected a network that predicts velocity",
        ),
    ] {
        let error = schedule(config).unwrap_err().to_string();
        assert!(error.contains(reason), "{config}: {error}");
    }

    // What is wrong is named with its file.
    let error = |checkpoint: lora_io::Result<Checkpoint>| match checkpoint {
        Ok(checkpoint) => load_unet(&checkpoint, Kind::Float, Device::Cpu, Held::default()).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    let text = folder.path().join("text_encoder/config.json");
    std::fs::write(&text, r#"{"num_attention_heads": 4, "hidden_act": "gelu", "num_hidden_layers": 2}"#).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let text = ClipConfig::detect(checkpoint.component(Component::TEXT_ENCODER).unwrap()).unwrap();
    assert_eq!(text, ClipConfig { heads: 4, layers: 2, exact_gelu: true, ..model.text_encoder });
    let unet = folder.path().join("unet/config.json");
    std::fs::write(&unet, r#"{"attention_head_dim": 7}"#).unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("7 attention heads"));
    std::fs::write(&unet, r#"{"attention_head_dim": [5, "10"]}"#).unwrap();
    let found = error(Checkpoint::open(folder.path()));
    assert!(found.contains(r#"unet: config.json: attention_head_dim is [5,"10"]; expected a whole number"#), "{found}");
    std::fs::write(&unet, "{").unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("config.json"));
    std::fs::remove_file(folder.path().join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    std::fs::write(&unet, "{}").unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("vae"));
    let index = r#"{"weight_map": {"a": "../../etc/passwd"}}"#;
    std::fs::write(folder.path().join("vae/diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
    assert!(error(Checkpoint::open(folder.path())).contains("../../etc/passwd"));
}

#[test]
fn other_models_are_named_and_damaged_ones_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let open = |names: &[&str]| {
        let tensors: std::collections::BTreeMap<_, _> =
            names.iter().map(|name| ((*name).to_owned(), lora_core::HostTensor::zeros([1]))).collect();
        lora_io::safetensors::write(&path, &tensors, &Default::default()).unwrap();
        Checkpoint::open(&path).unwrap_err().to_string()
    };
    for (name, found) in [
        ("conditioner.embedders.0.transformer.x", "Stable Diffusion XL"),
        ("cond_stage_model.model.x", "Stable Diffusion 2.x"),
        ("double_blocks.0.x", "FLUX.1"),
        ("model.layers.0.x", "language model"),
        ("unet.x.lora_A.weight", "a LoRA, not a base"),
        ("first_stage_model.encoder.conv_in.weight", "autoencoder alone"),
        ("something", "no model that is known"),
    ] {
        let error = open(&[name]);
        assert!(error.contains(found), "{name}: {error}");
    }
    assert!(open(&["cond_stage_model.transformer.text_model.x"]).contains("has no"));
    // The right names with a weight missing or of another shape.
    SyntheticModel::tiny().write(&path, DType::F16).unwrap();
    let file = lora_io::safetensors::SafetensorsFile::open(&path).unwrap();
    let mut tensors: std::collections::BTreeMap<_, _> =
        file.names().map(|name| (name.to_owned(), file.get(name).unwrap().to_host().unwrap())).collect();
    drop(file);
    let name = "model.diffusion_model.middle_block.1.norm.weight";
    let missing = tensors.remove(name).unwrap();
    let damaged = folder.path().join("damaged.safetensors");
    let load = |tensors: &std::collections::BTreeMap<_, _>| {
        lora_io::safetensors::write(&damaged, tensors, &Default::default()).unwrap();
        load_unet(&Checkpoint::open(&damaged).unwrap(), Kind::Float, Device::Cpu, Held::default())
            .unwrap_err()
            .to_string()
    };
    let error = load(&tensors);
    assert!(error.contains("mid_block.attentions.0.norm.weight") && error.contains("damaged.safetensors"), "{error}");
    tensors.insert(name.into(), missing.reshape([8, 8]).unwrap());
    assert!(load(&tensors).contains("[8, 8], expected [64]"));
    tensors.insert(name.into(), lora_core::HostTensor::zeros([64]));
    // Shapes that sizes are read off, without the axes they should have.
    tensors.insert("model.diffusion_model.input_blocks.0.0.weight".into(), lora_core::HostTensor::zeros([]));
    assert!(load(&tensors).contains("conv_in.weight"));
    let vocabulary = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
    tensors.insert(vocabulary.into(), lora_core::HostTensor::zeros([10, 128]));
    lora_io::safetensors::write(&damaged, &tensors, &Default::default()).unwrap();
    let error =
        load_text_encoder(&Checkpoint::open(&damaged).unwrap(), Kind::Float, Device::Cpu, Held::default()).unwrap_err();
    assert!(error.to_string().contains("10 tokens"));
}
