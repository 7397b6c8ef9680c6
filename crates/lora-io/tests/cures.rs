//! What `lora check` names as a cure is carried out here, on files that have the problem: afterwards the program that
//! had it has it no longer.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_core::compose::{self, ExtractOptions};
use lora_core::rank::RankPolicy;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, DType, HostTensor, Strength};
use lora_io::adapter::{self, Format};
use lora_io::consumers::{Consumer, Cure, Inventory, Opinion, Verdict, opinions};
use lora_io::merge::{self, MergeOptions, Weighted};
use lora_io::safetensors::write;
use serde_json::{Value, json};
use support::{file, random};

type Tensors = Vec<(String, HostTensor)>;

const KOHYA: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
const DOTTED: &str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
const LAYER: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A pair of a rank on a layer of 16 × 16.
fn pair(module: &str, down: &str, up: &str, rank: usize) -> Tensors {
    vec![(format!("{module}{down}"), random(&[rank, 16], 1)), (format!("{module}{up}"), random(&[16, rank], 2))]
}

fn kohya(extra: &[(&str, HostTensor)]) -> Tensors {
    let mut tensors = pair(KOHYA, ".lora_down.weight", ".lora_up.weight", 4);
    tensors.extend(extra.iter().map(|(part, tensor)| (format!("{KOHYA}{part}"), tensor.clone())));
    tensors
}

fn named(parts: &[(&str, HostTensor)]) -> Tensors {
    parts.iter().map(|(part, tensor)| (format!("{KOHYA}{part}"), tensor.clone())).collect()
}

fn scalar(value: f32) -> HostTensor {
    HostTensor::from_f32([], vec![value]).unwrap()
}

/// Files with problems: image adapters, which are files, and adapters of language models, which are PEFT folders.
fn samples() -> Vec<(&'static str, Tensors, Option<Value>)> {
    let config = |changes: &[(&str, Value)]| {
        let mut config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model", "r": 4, "lora_alpha": 8,
            "target_modules": ["q_proj"], "bias": "none",
        });
        for (field, value) in changes {
            config[*field] = value.clone();
        }
        config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        Some(config)
    };
    let peft = |rank: usize| pair(LAYER, ".lora_A.weight", ".lora_B.weight", rank);
    let with = |extra: &[(&str, HostTensor)]| {
        let mut tensors = peft(4);
        tensors.extend(extra.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())));
        tensors
    };
    let one = |shape: &[usize]| random(shape, 3);
    let mixed = [
        pair(DOTTED, ".lora_A.weight", ".lora_B.weight", 4),
        pair("lora_unet_mid_block_attentions_0_proj_in", ".lora_down.weight", ".lora_up.weight", 4),
    ];
    let half = [
        pair(DOTTED, ".lora_A.weight", ".lora_B.weight", 4),
        pair("unet.mid_block.attentions.0.proj_in", ".lora.down.weight", ".lora.up.weight", 4),
    ];
    let loha = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        .map(|name| (format!("{KOHYA}.{name}"), one(if name.ends_with('a') { &[16, 4] } else { &[4, 16] })));
    vec![
        ("diffusers names", pair(DOTTED, ".lora_A.weight", ".lora_B.weight", 4), None),
        (
            "old diffusers names",
            pair(&DOTTED.replace("attn1.to_q", "attn1.processor.to_q_lora"), ".down.weight", ".up.weight", 4),
            None,
        ),
        ("names of two conventions", mixed.concat(), None),
        ("names of two spellings", half.concat(), None),
        (
            "ComfyUI's generic names",
            pair(
                "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
                ".lora_up.weight",
                ".lora_down.weight",
                16,
            ),
            None,
        ),
        (
            "LyCORIS' wrapper",
            pair(&KOHYA.replace("lora_unet", "lycoris"), ".lora_down.weight", ".lora_up.weight", 4),
            None,
        ),
        (
            "sd-scripts' OFT",
            vec![
                (KOHYA.replace("lora_unet", "oft_unet") + ".oft_blocks", one(&[4, 4, 4])),
                (KOHYA.replace("lora_unet", "oft_unet") + ".alpha", scalar(0.01)),
            ],
            None,
        ),
        (
            "kohya names of Stable Diffusion 3",
            pair("lora_unet_joint_blocks_0_x_block_attn_proj", ".lora_down.weight", ".lora_up.weight", 4),
            None,
        ),
        (
            "generic names of FLUX.1",
            pair("diffusion_model.double_blocks.0.img_attn.proj", ".lora_A.weight", ".lora_B.weight", 4),
            None,
        ),
        ("kohya with PEFT's parts", pair(KOHYA, ".lora_A.weight", ".lora_B.weight", 4), None),
        ("a scalar", kohya(&[(".scalar", scalar(0.5))]), None),
        ("DoRA", kohya(&[(".dora_scale", one(&[16, 1]))]), None),
        ("DoRA along the inputs", kohya(&[(".dora_scale", one(&[1, 16]))]), None),
        ("LoHa", loha.to_vec(), None),
        ("IA3", named(&[(".weight", one(&[16])), (".on_input", scalar(0.0))]), None),
        ("OFT", named(&[(".oft_blocks", one(&[4, 4, 4])), (".alpha", scalar(0.0))]), None),
        (
            "OFT with rescale",
            named(&[(".oft_blocks", one(&[4, 4, 4])), (".rescale", one(&[16, 1])), (".alpha", scalar(0.0))]),
            None,
        ),
        (
            "GLoRA",
            named(&[
                (".a1.weight", one(&[16, 4])),
                (".a2.weight", one(&[4, 16])),
                (".b1.weight", one(&[16, 4])),
                (".b2.weight", one(&[4, 16])),
            ]),
            None,
        ),
        ("no config", pair(&LAYER["base_model.model.".len()..], ".lora_A.weight", ".lora_B.weight", 4), None),
        ("no rank", peft(4), config(&[("r", Value::Null), ("lora_alpha", json!(8))])),
        ("no method", peft(4), config(&[("peft_type", Value::Null)])),
        ("rsLoRA", peft(4), config(&[("use_rslora", json!(true))])),
        (
            "patterns",
            peft(8),
            config(&[("rank_pattern", json!({"q_proj": 8})), ("alpha_pattern", json!({"q_proj": 3}))]),
        ),
        ("a name inside", pair(LAYER, ".lora_A.mine.weight", ".lora_B.mine.weight", 4), config(&[])),
        ("bare names", pair(&LAYER["base_model.model.".len()..], ".lora_A.weight", ".lora_B.weight", 4), config(&[])),
        ("targets elsewhere", peft(4), config(&[("target_modules", json!(["v_proj"]))])),
        ("a high rank", peft(600), config(&[("r", json!(600))])),
        (
            "DoRA",
            with(&[(&format!("{LAYER}.lora_magnitude_vector"), one(&[16]))]),
            config(&[("use_dora", json!(true))]),
        ),
        ("PiSSA", peft(4), config(&[("init_lora_weights", json!("pissa"))])),
        ("OLoRA", peft(4), config(&[("init_lora_weights", json!("olora"))])),
        (
            "a layer saved whole",
            with(&[("base_model.model.model.norm.weight", one(&[16]))]),
            config(&[("modules_to_save", json!(["norm"]))]),
        ),
        (
            "a trained bias",
            with(&[(&format!("{LAYER}.base_layer.bias"), one(&[16]))]),
            config(&[("bias", json!("lora_only"))]),
        ),
        (
            "LoRA's own bias",
            with(&[(&format!("{LAYER}.lora_B.bias"), one(&[16]))]),
            config(&[("lora_bias", json!(true))]),
        ),
        (
            "IA3 in a folder",
            vec![(format!("{LAYER}.ia3_l"), one(&[16, 1]))],
            config(&[("peft_type", json!("IA3")), ("feedforward_modules", json!([]))]),
        ),
        (
            "LoHa in a folder",
            ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
                .map(|name| (format!("{LAYER}.{name}"), one(if name.ends_with('a') { &[16, 4] } else { &[4, 16] })))
                .to_vec(),
            config(&[("peft_type", json!("LOHA")), ("alpha", json!(4))]),
        ),
        (
            "an embedding",
            with(&[
                ("base_model.model.model.embed_tokens.lora_embedding_A", one(&[4, 16])),
                ("base_model.model.model.embed_tokens.lora_embedding_B", one(&[16, 4])),
                ("base_model.model.model.embed_tokens.base_layer.weight", one(&[16, 16])),
            ]),
            config(&[("target_modules", json!(["q_proj", "embed_tokens"]))]),
        ),
        (
            "the output layer",
            with(&[
                ("base_model.model.lm_head.lora_A.weight", one(&[4, 16])),
                ("base_model.model.lm_head.lora_B.weight", one(&[16, 4])),
            ]),
            config(&[("target_modules", json!(["q_proj", "lm_head"]))]),
        ),
    ]
}

/// A base that all samples fit: a file for image models, a folder for language models.
fn bases(folder: &Path) -> [PathBuf; 2] {
    let (image, language) = (folder.join("image.safetensors"), folder.join("language"));
    let unet = "model.diffusion_model";
    file(
        &image,
        &[
            (&format!("{unet}.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"), random(&[16, 16], 8)),
            (&format!("{unet}.middle_block.1.proj_in.weight"), random(&[16, 16, 1, 1], 9)),
            ("cond_stage_model.transformer.text_model.x", random(&[1], 1)),
        ],
    );
    file(
        &language.join("model.safetensors"),
        &[
            ("model.embed_tokens.weight", random(&[16, 16], 10)),
            ("lm_head.weight", random(&[16, 16], 11)),
            ("model.norm.weight", random(&[16], 12)),
            ("model.layers.0.self_attn.q_proj.weight", random(&[16, 16], 13)),
            ("model.layers.0.self_attn.q_proj.bias", random(&[16], 14)),
        ],
    );
    std::fs::write(language.join("config.json"), r#"{"tie_word_embeddings": false}"#).unwrap();
    [image, language]
}

fn judge(consumer: Consumer, path: &Path) -> Opinion {
    let all = opinions(&Inventory::read(path).unwrap());
    all.into_iter().find(|opinion| opinion.consumer == consumer).unwrap()
}

/// Carries a cure out as the command does; returns where the cured adapter is, if it is still one.
fn cured(cure: &Cure, path: &Path, base: &Path, folder: &Path) -> Result<Option<PathBuf>, String> {
    let text = |error: lora_io::Error| error.to_string();
    let out = folder.join("cured");
    let _ = (std::fs::remove_dir_all(&out), std::fs::remove_file(&out));
    let read = adapter::read(path).map_err(text)?;
    let to = |adapter: &Adapter, format: Format| {
        adapter::write(&out, adapter, format, DType::F32).map_err(|error| error.to_string())
    };
    let variants = VariantRegistry::default();
    let native = if path.is_dir() { Format::Peft } else { Format::Kohya };
    match cure {
        Cure::ToKohya => to(&read.adapter, Format::Kohya)?,
        Cure::ToDiffusers => to(&read.adapter, Format::Diffusers)?,
        Cure::ToPeft => to(&read.adapter, Format::Peft)?,
        Cure::ToPortable => to(&adapter::portable::portable(&read.adapter).map_err(text)?.0, Format::Peft)?,
        Cure::Flatten => {
            let options = ExtractOptions { policy: RankPolicy::Fixed(8), limit: 8, ..ExtractOptions::default() };
            to(&merge::flatten(base, &read.adapter, &options, &variants).map_err(text)?.0, native)?
        }
        Cure::FlattenToPeft => {
            let options = ExtractOptions { policy: RankPolicy::Fixed(8), limit: 8, ..ExtractOptions::default() };
            to(&merge::flatten(base, &read.adapter, &options, &variants).map_err(text)?.0, Format::Peft)?
        }
        Cure::Resize => {
            to(&compose::resize(&read.adapter, RankPolicy::Fixed(16)).map_err(|error| error.to_string())?.0, native)?
        }
        Cure::Merge => {
            let weighted = Weighted { name: "it".into(), adapter: read.adapter, strength: Strength::from(1.0) };
            merge::merge(base, &[weighted], &out, &MergeOptions::default(), &variants, &|_, _| {}).map_err(text)?;
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(out))
}

#[test]
fn every_cure_that_is_named_works() {
    let folder = tempfile::tempdir().unwrap();
    let [image, language] = bases(folder.path());
    let (mut wrong, mut tried) = (Vec::new(), BTreeSet::new());
    for (what, tensors, config) in samples() {
        let place = folder.path().join("sample");
        let _ = (std::fs::remove_dir_all(&place), std::fs::remove_file(&place));
        let tensors: BTreeMap<String, HostTensor> = tensors.into_iter().collect();
        match &config {
            Some(config) => {
                std::fs::create_dir_all(&place).unwrap();
                write(place.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
                std::fs::write(place.join("adapter_config.json"), config.to_string()).unwrap();
            }
            None => drop(write(&place, &tensors, &BTreeMap::new()).unwrap()),
        }
        let base = if config.is_some() || what == "no config" { &language } else { &image };
        for opinion in opinions(&Inventory::read(&place).unwrap()) {
            for problem in &opinion.problems {
                let Some(cure) = &problem.cure else { continue };
                tried.insert(cure.to_string());
                let case = format!("{what}, {}: {} → {cure}", opinion.consumer, problem.what);
                match cured(cure, &place, base, folder.path()) {
                    Err(error) => wrong.push(format!("{case}: {error}")),
                    Ok(None) => {}
                    Ok(Some(path)) => {
                        let after = judge(opinion.consumer, &path);
                        let same = after.problems.iter().any(|other| other.what == problem.what);
                        if same || after.verdict == Verdict::NothingLoaded {
                            wrong.push(format!("{case}: still {:?}: {:?}", after.verdict, after.problems));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    use Cure::{Flatten, Merge, Resize, ToDiffusers, ToKohya, ToPeft, ToPortable};
    for cure in [ToKohya, ToDiffusers, ToPeft, ToPortable, Flatten, Merge, Resize] {
        assert!(tried.contains(&cure.to_string()), "{cure} is named for no sample");
    }
}
