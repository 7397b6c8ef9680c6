//! Bases against diffusers' pipelines and PEFT on small models that are too large to lie here: `TINY_MODELS` names the folder
//! with them, each of a kind as `flux/flux_dev` with `model` (a diffusers folder), `original` (single files),
//! `expected.safetensors`, `train.safetensors` and LoRA files. Without it nothing is tested.

use std::path::{Path, PathBuf};

use lora_core::Adapter;
use lora_core::variant::VariantRegistry;
use lora_io::adapter;
use lora_io::safetensors::SafetensorsFile;
use lora_torch::tensor::from_host;

use super::*;
use crate::base::Encoded;
use crate::config::Format;
use crate::optimiser::OptimiserState;
use crate::parameters::ParameterList;
use crate::trainable::{AdapterOptions, TrainableAdapter};

/// A folder of models and the kind that they are of.
const MODELS: [(&str, &Kind, &[&str]); 4] = [
    ("flux/flux_dev", &flux::KIND, &["flux1", "flux1_checkpoint"]),
    ("flux/flux_schnell", &flux::KIND, &["flux1", "flux1_checkpoint"]),
    ("sd3/sd3", &sd3::KIND, &["sd3_incl_clips_t5"]),
    ("sd3/sd35", &sd3::KIND, &["sd3_incl_clips_t5"]),
];

struct Model {
    folder: PathBuf,
    kind: &'static Kind,
    originals: &'static [&'static str],
    expected: SafetensorsFile,
    train: SafetensorsFile,
}

fn models() -> Vec<Model> {
    let Some(root) = std::env::var_os("TINY_MODELS") else { return Vec::new() };
    let open = |(name, kind, originals): (&str, &'static Kind, &'static [&'static str])| {
        let folder = Path::new(&root).join(name);
        let file = |name: &str| SafetensorsFile::open(folder.join(format!("{name}.safetensors"))).unwrap();
        Model { kind, originals, expected: file("expected"), train: file("train"), folder }
    };
    MODELS.into_iter().map(open).collect()
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
        for (component, name) in
            [(Component::TEXT_ENCODER, "clip_l"), (Component::TEXT_ENCODER_2, "t5xxl"), (VAE, "ae")]
        {
            if checkpoint.component(component).is_err() {
                checkpoint.replace(component, original(name)).unwrap();
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
        let of = |name: &str| tensor(file, &format!("{prefix}{name}")).index_select(0, &Tensor::from_slice(rows));
        Inputs::default().with("states", Some(of("context"))).with("pooled", Some(of("pooled")))
    }
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
                let places = integers(&model.expected, &format!("text.{index}.positions"));
                let states = inputs.get("states").unwrap().get(0).index_select(0, &Tensor::from_slice(&places));
                let error = distance(&states, &tensor(&model.expected, &format!("text.{index}.context")));
                let pooled = tensor(&model.expected, &format!("text.{index}.pooled"));
                let pooled = distance(&inputs.get("pooled").unwrap().get(0), &pooled);
                println!("{} {layout} {index}: {error:e} {pooled:e}", model.folder.display());
                if layout == "model" || model.kind.family.name == "flux" {
                    assert!(error < 1e-5 && pooled < 1e-5, "{layout}, {index}: {error:e} {pooled:e}");
                }
            }
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
                let found = transformer.velocity(&of("latents"), &of("sigma"), &inputs, &Pass::default()).unwrap();
                let error = distance(&found, &of("velocity"));
                println!("{} {layout} {call}: {error:e}", model.folder.display());
                assert!(error < 1e-5, "{layout}, {call}: {error:e}");
            }
            for (file, velocity) in [
                ("lora_diffusers_split", "velocity_final_split"),
                ("lora_kohya_fused", "velocity_final_fused"),
                ("lora_comfyui_fused", "velocity_final_fused"),
                ("lora_diffusers_fused", "velocity_final_fused"),
            ] {
                let read = adapter::read(model.folder.join(format!("{file}.safetensors"))).unwrap().adapter;
                attached(&mut base, &read);
                let inputs = model.given(&model.expected, "transformer.a.", &[0]);
                let inputs = base.with_guidance(inputs, 1, 3.5).unwrap();
                let of = |name: &str| tensor(&model.expected, &format!("transformer.a.{name}"));
                let transformer = base.transformer().unwrap();
                let found = transformer.velocity(&of("latents"), &of("sigma"), &inputs, &Pass::default()).unwrap();
                let error = distance(&found, &of(velocity));
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
        let (latents, noise) = (tensor(&model.train, "latents"), tensor(&model.train, "noise"));
        let sigmas = tensor(&model.train, "sigmas");
        for step in 0..20 {
            let rows = &picks[2 * step..2 * step + 2];
            let inputs = model.given(&model.train, "given.", rows);
            let inputs = base.with_guidance(inputs, 2, 3.5).unwrap();
            let of_step = |tensor: &Tensor| tensor.get(step as i64);
            let levels = Vec::<f64>::try_from(of_step(&sigmas).to_kind(Number::Double)).unwrap();
            let latents = latents.index_select(0, &Tensor::from_slice(rows));
            let loss = VelocityLoss::new(&latents, &of_step(&noise), &levels, &[], None).unwrap();
            let loss = base.loss(&loss.into_inputs().and(inputs), &Pass::default()).unwrap();
            loss.backward();
            parameters.settle(&loss.detach(), 1.0, f64::INFINITY).unwrap();
            parameters.step(|_: Component, _| 1e-3).unwrap();
            parameters.clear_gradients().unwrap();
        }
        let found = trained.export().unwrap();
        let expected = adapter::read(model.folder.join("lora_final_split.safetensors")).unwrap().adapter;
        let mut worst = 0.0f64;
        for (path, module) in &expected.modules {
            for (name, tensor) in &module.tensors {
                let of = |host| from_host(host, Device::Cpu).unwrap();
                worst = worst.max(distance(&of(&found.modules[path].tensors[name]), &of(tensor)));
            }
        }
        println!("{}: {worst:e}", model.folder.display());
        assert!(worst < 1e-4, "{}: {worst:e}", model.folder.display());
    }
}

#[test]
fn samples_are_those_of_the_pipelines() {
    for model in models().into_iter().filter(|model| model.kind.family.name == "flux") {
        let mut base = model.base("model");
        let prompt = "a photo of a cat, sitting on the window-sill; it's 7 o'clock";
        let mut kept = BTreeMap::new();
        for encoder in model.kind.encoders {
            kept.insert(encoder.component, base.encode(encoder.component, Encoded::Caption(prompt)).unwrap());
        }
        let _guard = no_grad_guard();
        let levels = (model.kind.sample_levels)(&base.checkpoint, 4, 8 * 12).unwrap();
        let unpacked =
            |tokens: Tensor| tokens.view([1, 8, 12, 16, 2, 2]).permute([0, 3, 1, 4, 2, 5]).reshape([1, 16, 16, 24]);
        let noise = unpacked(tensor(&model.expected, "sample.noise"));
        let (Guidance::Contrast(guidance) | Guidance::Told(guidance)) = base.guidance;
        let found = base.denoised(&noise, [&kept, &kept], &levels, guidance).unwrap();
        let error = distance(&found, &unpacked(tensor(&model.expected, "sample.latents")));
        println!("{}: {error:e}", model.folder.display());
        assert!(error < 1e-4, "{}: {error:e}", model.folder.display());
    }
}
