//! What the base answers, adapted and not, and what is said of it.

use lora_core::LayerGeometry;
use lora_core::variant::{Lora, Parameters};
use lora_data::RgbPicture;
use lora_data::crop::CropPlan;
use lora_models::layers::AttachedAdapter;
use lora_models::synthetic::SyntheticModel;

use super::*;
use crate::config::Format;

/// A tiny base with its text encoder and its U-Net loaded.
fn tiny(path: &std::path::Path, keys: &[&str]) -> StableDiffusion {
    let text = format!("base_model: {}\ntrain_data_dir: d\noutput_dir: o\n", path.display());
    let config = TrainConfig::from_text(&text, Format::Yaml, keys).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(path).unwrap());
    let opening = Opening::new(&config, &checkpoint, Device::Cpu, DType::F32);
    let mut base = StableDiffusion::open(&opening, &SD1_KIND).unwrap();
    for component in [TEXT_ENCODER, UNET] {
        base.load(component, Held::default()).unwrap();
    }
    base
}

/// Random LoRAs of rank 2 on the linear layers of both networks; their factors.
fn adapted(base: &mut StableDiffusion) -> Vec<Tensor> {
    let mut leaves = Vec::new();
    for component in [TEXT_ENCODER, UNET] {
        let network = base.adaptable(component).unwrap();
        network
            .visit_layers(&mut |layer| {
                let LayerGeometry::Linear { in_features, out_features } = layer.geometry() else { return };
                let leaf = |name: &str, shape: [usize; 2]| {
                    let values = Stream::new(7).at(layer.path()).at(name).normals(shape[0] * shape[1]);
                    (from_f32(&values, &shape, Device::Cpu).unwrap() * 0.1).set_requires_grad(true)
                };
                let tensors = BTreeMap::from([
                    ("down".to_owned(), leaf("down", [2, in_features])),
                    ("up".to_owned(), leaf("up", [out_features, 2])),
                ]);
                leaves.extend(tensors.values().map(Tensor::shallow_clone));
                let parameters = Parameters { tensors, scale: 0.5 };
                layer.attach(AttachedAdapter { variant: Arc::new(Lora), parameters });
            })
            .unwrap();
    }
    leaves
}

/// The loss and its gradient against the same of two bases apart, one of which never had an adapter.
#[test]
fn what_is_kept_are_the_answers_of_the_base_without_its_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.safetensors");
    SyntheticModel::tiny().write(&path, DType::F32).unwrap();
    let weights = ["prior_prompt=a thing", "prior_prompt_weight=0.5", "prior_blank_weight=2", "prior_mask_weight=3"];
    let (mut base, bare) = (tiny(&path, &[&weights[..], &["min_snr_gamma=5"]].concat()), tiny(&path, &[]));
    let leaves = adapted(&mut base);
    let item = |number: u64| {
        let values = |name: &str, count| Stream::new(number).at(name).normals(count);
        let latents = from_f32(&values("latents", 256), &[4, 8, 8], Device::Cpu).unwrap();
        let mask = from_f32(&values("mask", 64), &[1, 8, 8], Device::Cpu).unwrap().sigmoid();
        let drawn = Tensors::from([("latents".to_owned(), latents), ("mask".to_owned(), mask)]);
        Item {
            caption: format!("picture {number}"),
            encoded: BTreeMap::from([(VAE, drawn)]),
            beside: BTreeMap::new(),
            example: None,
            weight: 1.0 + number as f64,
            draw: Stream::new(number),
        }
    };
    let items = [item(1), item(2)];
    let inputs = base.inputs(&items).unwrap();
    let asked = vec!["a thing".to_owned(), String::new()];
    assert_eq!((base.captions("picture 1"), base.figures()), (asked, &["prior_loss"][..]));

    let answer = |base: &StableDiffusion, captions: [&str; 2]| {
        let text = base.encoders[0].text(&captions, Device::Cpu, &Pass::default()).unwrap();
        let (noised, times) = (inputs.get("noised").unwrap(), inputs.get("times").unwrap());
        let conditions = Conditions { context: &text.states, added: None };
        base.unet().unwrap().forward_embedded(noised, times, conditions, &Pass::default()).unwrap()
    };
    let (mask, factors) = (inputs.get("mask").unwrap(), inputs.get("factors").unwrap());
    let mean =
        |squares: Tensor| (squares.flatten(1, -1).mean_dim(1, false, Number::Float) * factors).mean(Number::Float);
    let far = |captions: [&str; 2]| (answer(&base, captions) - answer(&bare, captions).detach()).square();
    let captions = ["picture 1", "picture 2"];
    let kept = mean(far(["a thing"; 2])) * 0.5 + mean(far([""; 2])) * 2.0 + mean(far(captions) * (1.0 - mask)) * 3.0;
    let own = mean((answer(&base, captions) - inputs.get("target").unwrap()).square() * mask);
    let gradients = Tensor::run_backward(&[&own + &kept], &leaves, false, false);

    for recompute in [false, true] {
        let told = base.loss(&inputs, &Pass { recompute, ..Pass::default() }).unwrap();
        let near = |found: Tensor, expected: &Tensor| {
            let (found, expected) = (f64::try_from(found).unwrap(), f64::try_from(expected).unwrap());
            assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
        };
        near(told.get(0), &(&own + &kept));
        near(told.get(1), &kept);
        // Blocks that are computed again hand gradients to the leaves themselves.
        told.get(0).backward();
        for (leaf, expected) in leaves.iter().zip(&gradients) {
            let far = f64::try_from((leaf.grad() - expected).norm()).unwrap();
            // What cancels out is 1e-5 apart between two orders of sums.
            assert!(far <= 1e-3 * f64::try_from(expected.norm()).unwrap() + 4e-5, "recompute {recompute}: {far}");
            let _ = leaf.grad().zero_();
        }
    }
    assert!(f64::try_from(&kept).unwrap() > 1e-4);
}

#[test]
fn layers_behind_the_states_that_are_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.safetensors");
    SyntheticModel::tiny_sdxl().write(&path, DType::F16).unwrap();
    let text = format!("base_model: {}\ntrain_data_dir: d\noutput_dir: o\n", path.display());
    let config = TrainConfig::from_text::<&str>(&text, Format::Yaml, &[]).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    let opening = Opening::new(&config, &checkpoint, Device::Cpu, DType::F32);
    let mut base = StableDiffusion::open(&opening, &SDXL_KIND).unwrap();
    for component in [TEXT_ENCODER, Component::TEXT_ENCODER_2] {
        base.load(component, Held::default()).unwrap();
    }
    // Of two layers the last; of the second encoder's the pooled vector comes from it.
    assert_eq!(base.unread(), ["text_encoder.text_model.encoder.layers.1."]);
}

#[test]
fn sizes_are_those_of_the_part_that_is_shown() {
    let picture = RgbPicture::new(20, 10, vec![7; 600]).unwrap();
    let whole = PictureSample::new(picture, None).unwrap();
    assert_eq!(sizes_of(&whole), [10.0, 20.0, 0.0, 0.0, 10.0, 20.0]);
    let plan = CropPlan { resized: (16, 8), offset: (5, 1), target: (8, 6) };
    let part = whole.crop(&plan).unwrap();
    assert_eq!(sizes_of(&part), [10.0, 20.0, 1.0, 5.0, 6.0, 8.0]);
    // Of a mirrored picture the left edge is what was the right one: 16 - 5 - 8.
    assert_eq!(sizes_of(&part.mirror()), [10.0, 20.0, 1.0, 3.0, 6.0, 8.0]);
}
