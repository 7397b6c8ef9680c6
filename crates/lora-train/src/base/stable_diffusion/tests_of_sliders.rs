//! Concept sliders against the paper's formula as diffusers and PEFT compute it (`tools/golden/make_slider.py`).

use lora_core::variant::{Lora, Parameters};
use lora_core::{HostTensor, LayerGeometry};
use lora_data::sliders::Contrast;
use lora_io::safetensors::SafetensorsFile;
use lora_models::diffusion::Sampler;
use lora_models::layers::AttachedAdapter;
use lora_models::synthetic::SyntheticModel;
use lora_models::weights::synthetic_uniform;
use lora_torch::tensor::from_host;

use super::*;
use crate::config::Format;

const CPU: Device = Device::Cpu;

/// Where each item's way ends, whether the adapter acts the other way round on it, the guidance, and how much it counts.
const ITEMS: [(usize, bool, f64, f64); 2] = [(455, false, 4.0, 1.0), (120, true, 2.0, 2.0)];

fn named(name: &str, shape: &[usize], scale: f64) -> Tensor {
    let values = synthetic_uniform(name, shape.iter().product()).map(|u| scale as f32 * u).collect();
    from_host(&HostTensor::from_f32(shape, values).unwrap(), CPU).unwrap()
}

fn given(item: usize, name: &str, shape: &[usize]) -> Tensor {
    named(&format!("input.slider.{item}.{name}"), shape, 3f64.sqrt())
}

fn base(folder: &std::path::Path) -> StableDiffusion {
    let path = folder.join("base.safetensors");
    SyntheticModel::tiny().write(&path, DType::F32).unwrap();
    let text = format!(
        "base_model: {}\noutput_dir: o\nslider_steps: 10\nmax_resolution: 128\nsliders:\n\
         - {{target: target 0, positive: positive 0, negative: negative 0}}\n\
         - {{target: target 1, positive: positive 1, negative: negative 1, guidance_scale: 2, weight: 2}}\n",
        path.display()
    );
    let config = TrainConfig::from_text::<&str>(&text, Format::Yaml, &[]).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    let mut base = StableDiffusion::open(&Opening::new(&config, &checkpoint, CPU, DType::F32), &SD1_KIND).unwrap();
    base.load(UNET, Held::default()).unwrap();
    base
}

/// The golden file's LoRAs, by the names of their factors.
fn adapted(base: &mut StableDiffusion) -> BTreeMap<String, Tensor> {
    let mut leaves = BTreeMap::new();
    let unet = base.adaptable(UNET).unwrap();
    unet.visit_layers(&mut |layer| {
        if ![".attn2.to_v", ".attn2.to_out.0"].iter().any(|end| layer.path().ends_with(end)) {
            return;
        }
        let LayerGeometry::Linear { in_features, out_features } = layer.geometry() else { return };
        let mut factor = |part: &str, shape: [usize; 2], scale: f64| {
            let name = format!("lora.unet.{}.{part}", layer.path());
            let leaf = named(&name, &shape, scale).set_requires_grad(true);
            leaves.insert(name, leaf.shallow_clone());
            (part.to_owned(), leaf)
        };
        let down = factor("down", [4, in_features], (3.0 / in_features as f64).sqrt());
        let tensors = [down, factor("up", [out_features, 4], 0.02)].into();
        layer.attach(AttachedAdapter { variant: Arc::new(Lora), parameters: Parameters { tensors, scale: 0.5 } });
    })
    .unwrap();
    leaves
}

fn item(number: usize) -> Item {
    let states = |prompt: &str| {
        let states = given(number, prompt, &[1, 77, 128]);
        BTreeMap::from([(TEXT_ENCODER, Tensors::from([("states".to_owned(), states)]))])
    };
    let prompt = |name: &str| format!("{name} {number}");
    let beside = [("positive", prompt("positive")), ("negative", prompt("negative")), ("empty", String::new())];
    let (.., guidance_scale, weight) = ITEMS[number];
    Item {
        caption: prompt("target"),
        encoded: states("target"),
        beside: beside.into_iter().map(|(name, caption)| (caption, states(name))).collect(),
        example: Some(Example::Contrast(Contrast {
            target: prompt("target"),
            positive: prompt("positive"),
            negative: prompt("negative"),
            guidance_scale,
            size: (128, 128),
        })),
        weight,
        draw: Stream::new(7 + number as u64),
    }
}

/// Latents of an item along its way from noise.
fn denoised(base: &StableDiffusion, item: &Item, noise: &Tensor, end: usize, reversed: bool) -> Tensor {
    let _guard = no_grad_guard();
    let sampler = Sampler::until(&base.schedule, 10, end).unwrap();
    let (pass, empty) = (Pass { reversed, ..Pass::default() }, item.asked(""));
    let fresh = |_: usize| Ok(noise.shallow_clone());
    base.denoised((&sampler, 3.0, &pass), noise, fresh, [&empty.encoded, &item.encoded], None).unwrap()
}

fn number(tensor: &Tensor) -> f64 {
    f64::try_from(tensor).unwrap()
}

#[test]
fn the_way_the_loss_and_its_gradients_are_the_papers() {
    let golden = format!("{}/../lora-models/tests/golden/tiny_slider.safetensors", env!("CARGO_MANIFEST_DIR"));
    let golden = SafetensorsFile::open(golden).unwrap();
    let tensor = |name: &str| from_host(&golden.get(name).unwrap().to_host().unwrap(), CPU).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut base = base(folder.path());
    let leaves = adapted(&mut base);
    let items = [item(0), item(1)];
    let noised: Vec<Tensor> = (0..2)
        .map(|index| {
            let (end, reversed, ..) = ITEMS[index];
            denoised(&base, &items[index], &given(index, "noise", &[1, 4, 16, 16]), end, reversed)
        })
        .collect();
    let (found, expected) = (Tensor::cat(&noised, 0), tensor("noised"));
    let far = number(&(&found - &expected).norm()) / number(&expected.norm());
    assert!(far < 1e-5, "latents: {far}");

    let slider = base.slider.as_ref().unwrap();
    let times = ITEMS.map(|(end, ..)| end as f64);
    let inputs = base.with_prompts(slider, &items, &[expected], &times, None).unwrap();
    let expected = golden.get("loss").unwrap().scalar().unwrap();
    for recompute in [false, true] {
        let loss = base.loss(&inputs, &Pass { recompute, ..Pass::default() }).unwrap();
        assert!((number(&loss) / expected - 1.0).abs() < 1e-5, "loss {}, expected {expected}", number(&loss));
        loss.backward();
        assert_eq!(leaves.len() + 2, golden.len());
        for (name, leaf) in &leaves {
            let (gradient, expected) = (leaf.grad(), tensor(name));
            let far = number(&(&gradient - &expected).norm());
            assert!(far < 1e-3 * number(&expected.norm()) + 1e-8, "{name}, recompute {recompute}: {far:e}");
            let _ = leaf.grad().zero_();
        }
    }
}

#[test]
fn a_micro_batch_is_what_each_item_draws_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut base = base(folder.path());
    adapted(&mut base);
    assert_eq!(base.captions("target 1"), ["", "negative 1", "positive 1"]);
    assert!(
        base.networks().iter().all(|network| network.component != VAE && network.trains == (network.component == UNET))
    );
    let mut items: Vec<Item> = (0..2).map(item).collect();
    let inputs = base.inputs(&items).unwrap();
    let mut ways = 0;
    for (index, item) in items.iter().enumerate() {
        let noise = from_f32(&item.draw.at("noise").normals(1024), &[1, 4, 16, 16], CPU).unwrap();
        let (end, reversed) = (base.timestep(&item.draw), item.draw.at("slider_strength").uniform() < 0.5);
        let expected = denoised(&base, item, &noise, end, reversed);
        let other = denoised(&base, item, &noise, end, !reversed);
        let found = inputs.get("noised").unwrap().narrow(0, index as i64, 1);
        assert!(found.allclose(&expected, 1e-6, 1e-6, false), "{index}");
        ways += usize::from(!found.allclose(&other, 1e-6, 1e-6, false));
    }
    // Before DDIM's first step there is no way.
    assert!(ways > 0);
    items[0].example = None;
    assert!(base.inputs(&items).unwrap_err().to_string().contains("prompts of a slider"));
}
