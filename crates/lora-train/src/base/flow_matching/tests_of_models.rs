//! Bases against diffusers' pipelines and PEFT on small models that are too large to lie here: `TINY_MODELS` names the folder
//! with them, each of a kind as `flux/flux_dev` with `model` (a diffusers folder), `original` (single files),
//! `expected.safetensors`, `train.safetensors` and LoRA files. Without it nothing is tested.

use std::path::{Path, PathBuf};

use lora_core::Adapter;
use lora_core::variant::VariantRegistry;
use lora_io::adapter;
use lora_io::safetensors::SafetensorsFile;
use lora_models::networks::load_vae;
use lora_torch::tch::Kind as Number;
use lora_torch::tensor::from_host;

use super::layout::LENGTHS;
use super::*;
use crate::base::Encoded;
use crate::config::Format;
use crate::optimiser::OptimiserState;
use crate::parameters::ParameterList;
use crate::trainable::{AdapterOptions, TrainableAdapter};

/// A folder of models, the kind that they are of, and their single files that the transformer is in.
const MODELS: [(&str, &Kind, &[&str]); 6] = [
    ("flux/flux_dev", &flux::KIND, &["flux1", "flux1_checkpoint"]),
    ("flux/flux_schnell", &flux::KIND, &["flux1", "flux1_checkpoint"]),
    ("sd3/sd3", &sd3::KIND, &["sd3_incl_clips_t5"]),
    ("sd3/sd35", &sd3::KIND, &["sd3_incl_clips_t5"]),
    ("flux2", &flux2::KIND, &["flux2_klein"]),
    ("qwen_image", &qwen_image::KIND, &["qwen_image"]),
];

/// Single files that hold one part.
const PARTS: [(Component, &str); 7] = [
    (Component::TEXT_ENCODER, "clip_l"),
    (Component::TEXT_ENCODER, "qwen_3"),
    (Component::TEXT_ENCODER, "qwen_2.5_vl"),
    (Component::TEXT_ENCODER_2, "t5xxl"),
    (VAE, "ae"),
    (VAE, "flux2_ae"),
    (VAE, "qwen_image_vae"),
];

struct Model {
    folder: PathBuf,
    kind: &'static Kind,
    originals: &'static [&'static str],
    expected: SafetensorsFile,
    train: SafetensorsFile,
}

/// Those that are there.
fn models() -> Vec<Model> {
    let Some(root) = std::env::var_os("TINY_MODELS") else { return Vec::new() };
    let open = |(name, kind, originals): (&str, &'static Kind, &'static [&'static str])| {
        let folder = Path::new(&root).join(name);
        let file = |name: &str| SafetensorsFile::open(folder.join(format!("{name}.safetensors"))).unwrap();
        let there = folder.join("model").is_dir();
        there.then(|| Model {
            kind,
            originals,
            expected: file("expected"),
            train: file("train"),
            folder: folder.clone(),
        })
    };
    MODELS.into_iter().filter_map(open).collect()
}

fn tensor(file: &SafetensorsFile, name: &str) -> Tensor {
    from_host(&file.get(name).unwrap().to_host().unwrap(), Device::Cpu).unwrap()
}

fn integers(file: &SafetensorsFile, name: &str) -> Vec<i64> {
    let view = file.get(name).unwrap();
    view.bytes().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    f64::try_from((found - expected).norm()).unwrap() / f64::try_from(expected.norm()).unwrap()
}

impl Model {
    /// The base in a layout, with all but the autoencoder loaded.
    fn base(&self, layout: &str) -> FlowMatching {
        let original = |name: &str| self.folder.join("original").join(format!("{name}.safetensors"));
        let model = self.folder.join("model");
        let at = if layout == "model" { model.clone() } else { original(layout) };
        let last = self.kind.encoders.last().unwrap();
        let tokenizer = model.join(last.tokenizer.unwrap());
        let text = format!(
            "base_model: {}\ntrain_data_dir: d\noutput_dir: o\nmax_resolution: 64\ntokenizer: {}\ntext_cleaning: none\nguidance_scale: 3.5\n",
            at.display(),
            tokenizer.display()
        );
        let text = if self.kind.family.name == "flux" { text } else { text.replace("guidance_scale: 3.5\n", "") };
        let config = TrainConfig::from_text(&text, Format::Yaml, &[] as &[&str]).unwrap();
        let mut checkpoint = Checkpoint::open(&at).unwrap();
        for (component, name) in PARTS {
            if checkpoint.component(component).is_err() && original(name).exists() {
                // No shape of Qwen2.5's shows how wide a head is where that is not the published one's.
                let from = if name == "qwen_2.5_vl" { model.join("text_encoder") } else { original(name) };
                checkpoint.replace(component, from).unwrap();
            }
        }
        check_parts(&checkpoint, &config).unwrap();
        let checkpoint = Arc::new(checkpoint);
        let opening = Opening::new(&config, &checkpoint, Device::Cpu, DType::F32);
        let mut base = FlowMatching::open(&opening, self.kind).unwrap();
        let encoders = self.kind.encoders.iter().map(|encoder| encoder.component);
        encoders.chain([TRANSFORMER]).for_each(|network| base.load(network, Held::default()).unwrap());
        base
    }

    /// What the file gives the transformer for the call of a name.
    fn given(&self, file: &SafetensorsFile, prefix: &str, rows: &[i64]) -> Inputs {
        let of = |name: &str| {
            let name = format!("{prefix}{name}");
            file.contains(&name).then(|| tensor(file, &name).index_select(0, &Tensor::from_slice(rows)))
        };
        let lengths = file.contains(&format!("{prefix}mask")).then(|| {
            let mask = integers(file, &format!("{prefix}mask"));
            let width = of("context").unwrap().size()[1] as usize;
            let length = |&row: &i64| mask[row as usize * width..][..width].iter().sum();
            Tensor::from_slice(&rows.iter().map(length).collect::<Vec<i64>>())
        });
        Inputs::default().with("states", of("context")).with("pooled", of("pooled")).with(LENGTHS, lengths)
    }

    /// LoRA files, and the velocity with each.
    fn adapters(&self) -> Vec<(String, String)> {
        let of = |layers: &str| {
            ["diffusers", "kohya", "comfyui"]
                .map(|layout| (format!("lora_{layout}_{layers}"), format!("velocity_final_{layers}")))
        };
        let there = |(file, _): &(String, String)| self.folder.join(format!("{file}.safetensors")).exists();
        of("split").into_iter().chain(of("fused")).filter(there).collect()
    }
}

/// Latents as bases have them, of a file's: FLUX.2's lie in squares of 2 by 2 there.
fn latents(stored: Tensor) -> Tensor {
    let size = stored.size();
    let &[.., 128, height, width] = size.as_slice() else { return stored };
    let squares = stored.view([-1, 32, 2, 2, height, width]).permute([0, 1, 4, 2, 5, 3]);
    let shape = [&size[..size.len() - 3], &[32, 2 * height, 2 * width]].concat();
    squares.reshape(shape.as_slice())
}

#[test]
fn captions_are_those_of_the_pipelines_in_every_layout() {
    for model in models() {
        let prompts: serde_json::Value =
            serde_json::from_slice(&std::fs::read(model.folder.join("expected.json")).unwrap()).unwrap();
        for layout in std::iter::once("model").chain(model.originals.iter().copied()) {
            // OpenCLIP's heads cannot be told from a file without a config where they are not 64 wide.
            let base = model.base(layout);
            for (index, prompt) in prompts["prompts"].as_array().unwrap().iter().enumerate() {
                let mut encoded = Tensors::new();
                for encoder in model.kind.encoders {
                    encoded.extend(
                        base.encoders
                            .of(encoder.component)
                            .unwrap()
                            .encode(prompt.as_str().unwrap(), Device::Cpu)
                            .unwrap(),
                    );
                }
                let inputs = (model.kind.layout)(&[&encoded], Device::Cpu).unwrap();
                let places = format!("text.{index}.positions");
                let mut states = inputs.get("states").unwrap().get(0);
                if model.expected.contains(&places) {
                    states = states.index_select(0, &Tensor::from_slice(&integers(&model.expected, &places)));
                }
                let error = distance(&states, &tensor(&model.expected, &format!("text.{index}.context")));
                let pooled = inputs.find("pooled").map_or(0.0, |pooled| {
                    distance(&pooled.get(0), &tensor(&model.expected, &format!("text.{index}.pooled")))
                });
                println!("{} {layout} {index}: {error:e} {pooled:e}", model.folder.display());
                if layout == "model" || model.kind.family.name != "sd3" {
                    assert!(error < 1e-5 && pooled < 1e-5, "{layout}, {index}: {error:e} {pooled:e}");
                }
            }
        }
    }
}

#[test]
fn latents_are_those_of_diffusers_in_every_layout() {
    for model in models() {
        for layout in std::iter::once("model").chain(model.originals.iter().copied()) {
            let base = model.base(layout);
            let vae = load_vae(&base.checkpoint, Number::Float, Device::Cpu, Held::default()).unwrap();
            let _guard = no_grad_guard();
            let of = |name: &str| tensor(&model.expected, &format!("vae.{name}"));
            for shape in ["square", "wide"] {
                let encoded = vae.encode(&of(&format!("{shape}.image"))).unwrap();
                let normalised = vae.config().normalised(&encoded.mean).unwrap();
                let mean = distance(&encoded.mean, &of(&format!("{shape}.mean")).view_as(&encoded.mean));
                let normalised = distance(&normalised, &latents(of(&format!("{shape}.normalised_mean"))));
                // A file without a config has the published statistics, which these are not.
                let known = layout == "model" || model.kind.family.name != "qwen_image";
                assert!(mean < 1e-5 && (normalised < 1e-5 || !known), "{layout}, {shape}: {mean:e} {normalised:e}");
            }
            let decoded = vae.decode(&of("decode_in")).unwrap();
            let error = distance(&decoded, &of("decode_out").view_as(&decoded));
            println!("{} {layout}: {error:e}", model.folder.display());
            assert!(error < 1e-5, "{layout}: {error:e}");
        }
    }
}

#[test]
fn velocities_are_the_same_in_every_layout_and_with_adapters_of_every_layout() {
    for model in models() {
        for layout in std::iter::once("model").chain(model.originals.iter().copied()) {
            let mut base = model.base(layout);
            let _guard = no_grad_guard();
            for call in ["a", "b"] {
                let of = |name: &str| tensor(&model.expected, &format!("transformer.{call}.{name}"));
                let rows: Vec<i64> = (0..of("sigma").size()[0]).collect();
                let inputs = model.given(&model.expected, &format!("transformer.{call}."), &rows);
                let inputs = base.with_guidance(inputs, rows.len(), 3.5).unwrap();
                let transformer = base.transformer().unwrap();
                let noised = latents(of("latents"));
                let found = transformer.velocity(&noised, &of("sigma"), &inputs, &Pass::default()).unwrap();
                let error = distance(&found, &latents(of("velocity")));
                println!("{} {layout} {call}: {error:e}", model.folder.display());
                assert!(error < 1e-5, "{layout}, {call}: {error:e}");
            }
            for (file, velocity) in model.adapters() {
                let read = adapter::read(model.folder.join(format!("{file}.safetensors"))).unwrap().adapter;
                attached(&mut base, &read);
                let inputs = model.given(&model.expected, "transformer.a.", &[0]);
                let inputs = base.with_guidance(inputs, 1, 3.5).unwrap();
                let of = |name: &str| tensor(&model.expected, &format!("transformer.a.{name}"));
                let transformer = base.transformer().unwrap();
                let noised = latents(of("latents"));
                let found = transformer.velocity(&noised, &of("sigma"), &inputs, &Pass::default()).unwrap();
                let error = distance(&found, &latents(of(&velocity)));
                println!("{} {layout} {file}: {error:e}", model.folder.display());
                assert!(error < 1e-5, "{layout}, {file}: {error:e}");
                base.adaptable(TRANSFORMER).unwrap().visit_layers(&mut |layer| layer.detach()).unwrap();
            }
        }
    }
}

/// Hangs an adapter on the transformer.
fn attached(base: &mut FlowMatching, from: &Adapter) -> (TrainableAdapter, ParameterList) {
    let network = base.adaptable(TRANSFORMER).unwrap();
    let mut targets = network.adaptable_layers().unwrap();
    targets.retain(|target| from.modules.contains_key(&target.path));
    assert_eq!(targets.len(), from.modules.len());
    let (mut trained, mut parameters) = (TrainableAdapter::default(), ParameterList::new(OptimiserState::adamw(), 0.0));
    let rank = from.modules.values().next().unwrap().rank;
    let options = AdapterOptions::lora(rank, from.modules.values().next().unwrap().alpha, 0);
    let variants = VariantRegistry::default();
    trained.attach(network, &targets, &variants, &options, Some(from), &mut parameters).unwrap();
    (trained, parameters)
}

#[test]
fn twenty_steps_are_those_of_peft() {
    for model in models() {
        let mut base = model.base("model");
        let from = adapter::read(model.folder.join("lora_init_split.safetensors")).unwrap().adapter;
        let (trained, mut parameters) = attached(&mut base, &from);
        let picks = integers(&model.train, "picks");
        let (encoded, noise) = (latents(tensor(&model.train, "latents")), tensor(&model.train, "noise"));
        let sigmas = tensor(&model.train, "sigmas");
        for step in 0..20 {
            let rows = &picks[2 * step..2 * step + 2];
            let inputs = model.given(&model.train, "given.", rows);
            let inputs = base.with_guidance(inputs, 2, 3.5).unwrap();
            let of_step = |tensor: &Tensor| tensor.get(step as i64);
            let levels = Vec::<f64>::try_from(of_step(&sigmas).to_kind(Number::Double)).unwrap();
            let encoded = encoded.index_select(0, &Tensor::from_slice(rows));
            let loss =
                VelocityLoss::new(&encoded, [&latents(of_step(&noise)); 2], &levels, &[], None, &Difference::default())
                    .unwrap();
            let loss = base.loss(&loss.into_inputs().and(inputs), &Pass::default()).unwrap();
            loss.backward();
            parameters.settle(&loss.detach(), 1.0, f64::INFINITY).unwrap();
            parameters.step(|_| 1e-3).unwrap();
            parameters.clear_gradients().unwrap();
        }
        let found = trained.export().unwrap();
        let expected = adapter::read(model.folder.join("lora_final_split.safetensors")).unwrap().adapter;
        let mut worst = (0.0f64, String::new());
        for (path, module) in &expected.modules {
            for (name, tensor) in &module.tensors {
                let of = |host| from_host(host, Device::Cpu).unwrap();
                let error = distance(&of(&found.modules[path].tensors[name]), &of(tensor));
                if error > worst.0 {
                    worst = (error, format!("{path} {name}"));
                }
            }
        }
        println!("{}: {worst:?}", model.folder.display());
        assert!(worst.0 < 1e-4, "{}: {worst:?}", model.folder.display());
    }
}

#[test]
fn samples_are_those_of_the_pipelines() {
    for model in models().into_iter().filter(|model| model.kind.family.name != "sd3") {
        let mut base = model.base("model");
        let said: serde_json::Value =
            serde_json::from_slice(&std::fs::read(model.folder.join("expected.json")).unwrap()).unwrap();
        let prompts = ["prompt", "negative_prompt"].map(|key| said["sample"][key].as_str().unwrap_or_default());
        let kept = prompts.map(|prompt| {
            let mut kept = BTreeMap::new();
            for encoder in model.kind.encoders {
                kept.insert(encoder.component, base.encode(encoder.component, Encoded::Caption(prompt)).unwrap());
            }
            kept
        });
        let _guard = no_grad_guard();
        let levels = (model.kind.sample_levels)(&base.checkpoint, 4, 8 * 12).unwrap();
        // Rows of tokens, or squares of 2 by 2.
        let unpacked = |stored: Tensor| match stored.size().as_slice() {
            [_, _, 64] => stored.view([1, 8, 12, 16, 2, 2]).permute([0, 3, 1, 4, 2, 5]).reshape([1, 16, 16, 24]),
            _ => latents(stored),
        };
        let noise = unpacked(tensor(&model.expected, "sample.noise"));
        let found =
            base.denoised(&noise, [&kept[0], &kept[1]], &levels, (base.guidance.strength(), &Pass::default())).unwrap();
        // FLUX.2's pipeline gives them as its autoencoder takes them.
        let found = if model.kind.family.name == "flux2" { base.vae.denormalised(&found).unwrap() } else { found };
        let error = distance(&found, &unpacked(tensor(&model.expected, "sample.latents")));
        println!("{}: {error:e}", model.folder.display());
        assert!(error < 1e-4, "{}: {error:e}", model.folder.display());
    }
}
