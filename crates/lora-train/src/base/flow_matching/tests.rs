//! Captions and samples of Z-Image, FLUX.2 klein, Chroma, Qwen-Image and Anima as a run makes them, against transformers and
//! diffusers (`tools/golden/make_z_image.py`, `make_flux2.py`, `make_chroma.py`, `make_qwen_image.py`, `make_anima.py`).

use lora_io::safetensors::SafetensorsFile;
use lora_models::synthetic::{SyntheticAnima, SyntheticChroma, SyntheticFlux2, SyntheticQwenImage, SyntheticZImage};
use lora_models::weights::synthetic_uniform;
use lora_torch::tch::Kind as Number;
use lora_torch::tensor::from_host;

use super::*;
use crate::base::Encoded;
use crate::config::Format;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden");

/// Vocabularies of Qwen's and of T5's kind.
const QWEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-models/tests/golden/z_image/tokenizer");
const T5: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../lora-data/tests/golden/t5");

/// Rows of FLUX.2's states that the golden file keeps.
const ROWS: [i64; 7] = [0, 5, 17, 31, 60, 150, 511];

const PROMPTS: [&str; 4] = [
    "a photo of a cat, sitting on the window-sill; it's 7 o'clock",
    "",
    "Größe 漢字 🙂 <|im_end|> (word:1.2)",
    "tag 0, tag 1, tag 2, tag 3, tag 4, tag 5, tag 6, tag 7, tag 8, tag 9, tag 10, tag 11, tag 12, tag 13, tag 14, tag 15, \
     tag 16, tag 17, tag 18, tag 19, tag 20, tag 21, tag 22, tag 23",
];

fn expected(kind: &Kind, name: &str) -> Tensor {
    let file = SafetensorsFile::open(format!("{GOLDEN}/{}/expected.safetensors", kind.family.name)).unwrap();
    from_host(&file.get(name).unwrap().to_host().unwrap(), Device::Cpu).unwrap()
}

/// Length of the difference over that of the reference.
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    f64::try_from((found - expected).norm()).unwrap() / f64::try_from(expected.norm()).unwrap()
}

/// A tiny base of a kind with its text encoder and transformer loaded.
fn base(kind: &'static Kind, folder: &std::path::Path, keys: &[&str]) -> FlowMatching {
    match kind.family.name {
        "anima" => SyntheticAnima::tiny().write(folder, DType::F32),
        "chroma" => SyntheticChroma::tiny().write(folder, DType::F32),
        "flux2" => SyntheticFlux2::tiny().write(folder, DType::F32),
        "qwen_image" => SyntheticQwenImage::tiny().write(folder, DType::F32),
        _ => SyntheticZImage::tiny().write(folder, DType::F32),
    }
    .unwrap();
    let tokenizers: &[(&str, &str)] = match kind.family.name {
        "anima" => &[("tokenizer", QWEN), ("t5_tokenizer", T5)],
        "chroma" => &[("tokenizer", T5)],
        _ => &[("tokenizer", QWEN)],
    };
    for (name, from) in tokenizers {
        std::fs::create_dir_all(folder.join(name)).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(format!("{from}/{file}"), folder.join(name).join(file)).unwrap();
        }
    }
    let data = if keys.iter().any(|key| key.starts_with("sliders")) { "" } else { "train_data_dir: d\n" };
    let text = format!("base_model: {}\n{data}output_dir: o\nmax_resolution: 64\n", folder.display());
    let config = TrainConfig::from_text(&text, Format::Yaml, keys).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    check_parts(&checkpoint, &config).unwrap();
    let opening = Opening::new(&config, &checkpoint, Device::Cpu, DType::F32);
    let mut base = FlowMatching::open(&opening, kind).unwrap();
    for network in [Component::TEXT_ENCODER, TRANSFORMER] {
        base.load(network, Held::default()).unwrap();
    }
    base
}

/// What is kept of each of the prompts, held against the golden file; `rows` are those of the states that it has.
fn kept(base: &mut FlowMatching, rows: Option<&[i64]>) -> Vec<BTreeMap<Component, Tensors>> {
    let mut kept = Vec::new();
    for (index, prompt) in PROMPTS.iter().enumerate() {
        let encoded = base.encode(Component::TEXT_ENCODER, Encoded::Caption(prompt)).unwrap();
        let states = &encoded["states"];
        let states =
            rows.map_or_else(|| states.shallow_clone(), |rows| states.index_select(0, &Tensor::from_slice(rows)));
        let error = distance(&states, &expected(base.kind, &format!("text.{index}")));
        assert!(error < 1e-5, "{prompt}: {error:e}");
        kept.push(BTreeMap::from([(Component::TEXT_ENCODER, encoded)]));
    }
    kept
}

/// States of captions, `rows` of them where the golden file has no others; then four steps from noise, to the first prompt against the
/// second, at each of these strengths of guidance.
fn captions_and_samples_are_those_of_the_pipeline(kind: &'static Kind, rows: Option<&[i64]>, guided: f64) {
    let folder = tempfile::tempdir().unwrap();
    let mut base = base(kind, folder.path(), &[]);
    let kept = kept(&mut base, rows);
    let (levels, channels) = ((kind.sample_levels)(&base.checkpoint, 4, 24).unwrap(), base.vae.latent_channels);
    let values = synthetic_uniform("input.sample.noise", channels * 8 * 12).map(|u| 3f64.sqrt() as f32 * u);
    let noise = from_f32(&values.collect::<Vec<_>>(), &[1, channels, 8, 12], Device::Cpu).unwrap();
    let _guard = no_grad_guard();
    for (name, guidance) in [("sample.plain", 1.0), ("sample.guided", guided)] {
        let found = base.denoised(&noise, [&kept[0], &kept[1]], &levels, (guidance, &Pass::default())).unwrap();
        let error = distance(&found, &expected(base.kind, name));
        // Chroma's pipeline rounds a noise level to thousandths and back, which turns its fastest sinusoids by 6e-5.
        assert!(error < 2e-5, "{name}: {error:e}");
    }
}

#[test]
fn captions_and_samples_of_z_image_are_those_of_the_pipeline() {
    // The pipeline's guidance counts from 0: its 2 is 3 here.
    captions_and_samples_are_those_of_the_pipeline(&z_image::KIND, None, 3.0);
}

#[test]
fn captions_and_samples_of_flux2_are_those_of_the_pipeline() {
    captions_and_samples_are_those_of_the_pipeline(&flux2::KIND, Some(&ROWS), 4.0);
}

#[test]
fn captions_and_samples_of_chroma_are_those_of_the_pipeline() {
    captions_and_samples_are_those_of_the_pipeline(&chroma::KIND, None, 4.0);
}

#[test]
fn captions_and_samples_of_qwen_image_are_those_of_the_pipeline() {
    captions_and_samples_are_those_of_the_pipeline(&qwen_image::KIND, None, 4.0);
}

#[test]
fn captions_and_samples_of_anima_are_those_of_the_pipeline() {
    captions_and_samples_are_those_of_the_pipeline(&anima::KIND, None, 4.0);
}

#[test]
fn long_captions_are_cut_as_the_pipeline_cuts_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut base = base(&z_image::KIND, folder.path(), &["max_sequence_length=20"]);
    let encoded = base.encode(Component::TEXT_ENCODER, Encoded::Caption(PROMPTS[0])).unwrap();
    // Nothing before a token depends on what comes behind it.
    assert!(distance(&encoded["states"], &expected(base.kind, "text.0").narrow(0, 0, 20)) < 1e-5);
    assert_eq!(base.caption_length(PROMPTS[0]), Some(32));
}

/// Without an adapter all that is missing from an answer is the wished change.
#[test]
fn a_slider_is_of_velocities_at_the_end_of_a_way_from_noise() {
    let folder = tempfile::tempdir().unwrap();
    let slider = "sliders=[{target = 'a cat', positive = 'a fat cat', negative = '', guidance_scale = 2}]";
    let mut base = base(&z_image::KIND, folder.path(), &[slider, "slider_steps=5"]);
    let mut kept = |caption: &str| {
        let encoded = base.encode(Component::TEXT_ENCODER, Encoded::Caption(caption)).unwrap();
        BTreeMap::from([(Component::TEXT_ENCODER, encoded)])
    };
    let (encoded, beside) = (kept("a cat"), ["", "a fat cat"].map(|caption| (caption.to_owned(), kept(caption))));
    let [contrast] = base.config.sliders[0].contrasts((64, 64)).try_into().unwrap();
    let draw = Stream::new(5);
    let item = Item {
        caption: "a cat".into(),
        encoded,
        beside: beside.into(),
        example: Some(Example::Contrast(contrast)),
        weight: 1.0,
        draw: draw.clone(),
    };
    assert_eq!(base.captions("a cat"), ["", "a fat cat"]);
    let inputs = base.inputs(std::slice::from_ref(&item)).unwrap();

    let _guard = no_grad_guard();
    let noise = from_f32(&draw.at("noise").normals(16 * 64), &[1, 16, 8, 8], Device::Cpu).unwrap();
    let level = base.noise_level(&draw, Shape::Picture(64, 64)).unwrap();
    let mut levels = (base.kind.sample_levels)(&base.checkpoint, 5, 16).unwrap();
    levels.retain(|own| *own > level);
    assert!(!levels.is_empty());
    levels.push(level);
    let way = (3.0, &Pass::default());
    let expected = base.denoised(&noise, [&item.encoded, &item.beside[""]], &levels, way).unwrap();
    let noised = inputs.get("noised").unwrap();
    assert!(noised.allclose(&expected, 1e-5, 1e-5, false));

    let level = Tensor::from_slice(&[level as f32]);
    let velocity = |of: &str| {
        let inputs = base.kept(&item.beside[of], 1).unwrap();
        base.transformer().unwrap().velocity(noised, &level, &inputs, &Pass::default()).unwrap()
    };
    let change: Tensor = (velocity("a fat cat") - velocity("")) * 2.0;
    let (loss, expected) = (base.loss(&inputs, &Pass::default()).unwrap(), change.square().mean(Number::Float));
    assert!((f64::try_from(loss).unwrap() / f64::try_from(expected).unwrap() - 1.0).abs() < 1e-5);
}
