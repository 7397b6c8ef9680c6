//! LoRA files for transformers that denoise by flow matching, under the names of every writer that is known: each is read as the
//! same adapter, recognised, and written again in the others' layouts. What programs make of them is `consumers`'.

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::{Adapter, Component, DType, HostTensor, ModulePath};
use lora_io::adapter::{self, AdapterFile, Format};
use lora_io::family::{self, Family};
use lora_io::safetensors::write;

const RANK: usize = 4;
const ALPHA: f64 = 2.0;
const INPUTS: usize = 6;

/// Outputs of a layer of diffusers' tree. FLUX.2 is told from FLUX.1 by how much its layers widen, where names are the same.
fn outputs(path: &str) -> usize {
    match path.rsplit('.').next() {
        Some("to_qkv_mlp_proj") => 9 * INPUTS,
        Some("linear_in") => 6 * INPUTS,
        _ => 5,
    }
}

/// A family, how its files say what they are for where names do not, and layers of the original tree with those of diffusers'
/// that they are made of.
struct Names {
    family: &'static Family,
    said: &'static [(&'static str, &'static str)],
    layers: &'static [(&'static str, &'static [&'static str])],
}

static FAMILIES: [Names; 7] = [
    Names {
        family: &family::flux::FAMILY,
        said: &[],
        layers: &[
            (
                "double_blocks.0.img_attn.qkv",
                &["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"],
            ),
            ("double_blocks.0.txt_attn.proj", &["transformer_blocks.0.attn.to_add_out"]),
            ("double_blocks.0.img_mlp.0", &["transformer_blocks.0.ff.net.0.proj"]),
            ("single_blocks.0.linear2", &["single_transformer_blocks.0.proj_out"]),
        ],
    },
    Names {
        family: &family::chroma::FAMILY,
        said: &[("ss_base_model_version", "chroma")],
        layers: &[
            ("double_blocks.0.img_attn.proj", &["transformer_blocks.0.attn.to_out.0"]),
            ("double_blocks.0.txt_mlp.2", &["transformer_blocks.0.ff_context.net.2"]),
            ("single_blocks.0.linear2", &["single_transformer_blocks.0.proj_out"]),
        ],
    },
    Names {
        family: &family::flux2::FAMILY,
        said: &[],
        layers: &[
            (
                "double_blocks.0.img_attn.qkv",
                &["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"],
            ),
            ("double_blocks.0.img_mlp.0", &["transformer_blocks.0.ff.linear_in"]),
            ("single_blocks.0.linear1", &["single_transformer_blocks.0.attn.to_qkv_mlp_proj"]),
        ],
    },
    Names {
        family: &family::sd3::FAMILY,
        said: &[],
        layers: &[
            (
                "joint_blocks.0.x_block.attn.qkv",
                &["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"],
            ),
            ("joint_blocks.0.context_block.mlp.fc1", &["transformer_blocks.0.ff_context.net.0.proj"]),
            ("joint_blocks.0.x_block.attn2.proj", &["transformer_blocks.0.attn2.to_out.0"]),
        ],
    },
    Names {
        family: &family::qwen_image::FAMILY,
        said: &[],
        layers: &[
            ("transformer_blocks.0.attn.to_q", &["transformer_blocks.0.attn.to_q"]),
            ("transformer_blocks.0.attn.add_v_proj", &["transformer_blocks.0.attn.add_v_proj"]),
            ("transformer_blocks.0.img_mlp.net.0.proj", &["transformer_blocks.0.img_mlp.net.0.proj"]),
        ],
    },
    Names {
        family: &family::z_image::FAMILY,
        said: &[],
        layers: &[
            (
                "layers.0.attention.qkv",
                &["layers.0.attention.to_q", "layers.0.attention.to_k", "layers.0.attention.to_v"],
            ),
            ("layers.0.attention.out", &["layers.0.attention.to_out.0"]),
            ("layers.0.feed_forward.w1", &["layers.0.feed_forward.w1"]),
        ],
    },
    Names {
        family: &family::anima::FAMILY,
        said: &[("ss_base_model_version", "anima")],
        layers: &[
            ("blocks.0.self_attn.q_proj", &["transformer_blocks.0.attn1.to_q"]),
            ("blocks.0.cross_attn.output_proj", &["transformer_blocks.0.attn2.to_out.0"]),
            ("blocks.0.mlp.layer1", &["transformer_blocks.0.ff.net.0.proj"]),
        ],
    },
];

/// Whose layer names a layout has.
#[derive(Clone, Copy, PartialEq)]
enum Tree {
    Original,
    Diffusers,
}

/// How a layout spells a module's factors.
#[derive(Clone, Copy)]
enum Parts {
    /// `lora_down`, `lora_up`, `alpha`.
    Kohya,
    /// `lora_A`, `lora_B`, and the alpha in the header, as diffusers writes it.
    Peft,
    /// `lora_A`, `lora_B`, `alpha`.
    PeftWithAlpha,
}

/// Who writes so, how names begin, whether dots become underscores.
type Layout = (&'static str, &'static str, bool, Tree, Parts);

const LAYOUTS: [Layout; 11] = [
    ("kohya", "lora_unet_", true, Tree::Original, Parts::Kohya),
    ("kohya on diffusers' layers", "lora_unet_", true, Tree::Diffusers, Parts::Kohya),
    ("diffusers", "transformer.", false, Tree::Diffusers, Parts::Peft),
    ("ComfyUI", "diffusion_model.", false, Tree::Original, Parts::PeftWithAlpha),
    ("ComfyUI with kohya's parts", "diffusion_model.", false, Tree::Original, Parts::Kohya),
    ("ai-toolkit", "diffusion_model.", false, Tree::Diffusers, Parts::PeftWithAlpha),
    ("OneTrainer's older", "lora_transformer_", true, Tree::Diffusers, Parts::Kohya),
    ("OneTrainer's dotted", "transformer.", false, Tree::Diffusers, Parts::Kohya),
    ("LyCORIS' wrapper", "lycoris_", true, Tree::Diffusers, Parts::Kohya),
    ("bare", "", false, Tree::Diffusers, Parts::Peft),
    ("bare with alphas", "", false, Tree::Diffusers, Parts::PeftWithAlpha),
];

/// Numbers that belong to a name.
fn numbers(name: &str, count: usize) -> Vec<f32> {
    let seed: usize = name.bytes().map(usize::from).sum();
    (0..count).map(|at| ((seed + 7 * at) % 13) as f32 / 8.0 - 0.75).collect()
}

/// The layers that a layout names, with the factors of each: `[RANK, INPUTS]`, `[outputs, RANK]`.
fn factors(names: &Names, tree: Tree) -> Vec<(&'static str, Vec<f32>, Vec<f32>)> {
    let up = |path: &str| numbers(path, outputs(path) * RANK);
    let mut all = Vec::new();
    for &(original, parts) in names.layers {
        let down = numbers(original, RANK * INPUTS);
        match tree {
            Tree::Original => all.push((original, down, parts.iter().flat_map(|path| up(path)).collect())),
            Tree::Diffusers => all.extend(parts.iter().map(|&path| (path, down.clone(), up(path)))),
        }
    }
    all
}

fn written(path: &Path, names: &Names, (_, prefix, flat, tree, parts): Layout) -> AdapterFile {
    let mut tensors = BTreeMap::new();
    for (layer, down, up) in factors(names, tree) {
        let layer = if flat { layer.replace('.', "_") } else { layer.to_owned() };
        let [a, b] = match parts {
            Parts::Kohya => ["lora_down", "lora_up"],
            Parts::Peft | Parts::PeftWithAlpha => ["lora_A", "lora_B"],
        };
        let rows = up.len() / RANK;
        tensors.insert(format!("{prefix}{layer}.{a}.weight"), HostTensor::from_f32([RANK, INPUTS], down).unwrap());
        tensors.insert(format!("{prefix}{layer}.{b}.weight"), HostTensor::from_f32([rows, RANK], up).unwrap());
        if !matches!(parts, Parts::Peft) {
            tensors.insert(format!("{prefix}{layer}.alpha"), HostTensor::from_f32([], vec![ALPHA as f32]).unwrap());
        }
    }
    let said = names.said.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let mut metadata: BTreeMap<String, String> = said.collect();
    if matches!(parts, Parts::Peft) {
        let record = format!("{{\"transformer.lora_alpha\": {ALPHA}, \"transformer.r\": {RANK}}}");
        metadata.insert("lora_adapter_metadata".into(), record);
    }
    write(path, &tensors, &metadata).unwrap();
    adapter::read(path).unwrap()
}

/// What each module adds to its layer's weight.
fn updates(adapter: &Adapter) -> BTreeMap<ModulePath, Vec<f64>> {
    let of = |module: &lora_core::AdapterModule| {
        let (down, up) = (module.tensors["down"].to_f32(), module.tensors["up"].to_f32());
        let width = down.len() / module.rank;
        let entry = |row: &[f32], column: usize| -> f64 {
            row.iter().enumerate().map(|(at, &left)| f64::from(left) * f64::from(down[at * width + column])).sum()
        };
        let rows = up.chunks(module.rank);
        rows.flat_map(|row| (0..width).map(move |column| (row, column)))
            .map(|(row, column)| module.scale() * entry(row, column))
            .collect()
    };
    adapter.modules.iter().map(|(path, module)| (path.clone(), of(module))).collect()
}

fn is_same(found: &Adapter, expected: &BTreeMap<ModulePath, Vec<f64>>, what: &str) {
    let found = updates(found);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (path, values) in expected {
        let worst = found[path].iter().zip(values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(found[path].len() == values.len() && worst < 1e-6, "{what}, {path}: {worst:e}");
    }
}

#[test]
fn files_of_every_writer_are_the_same_adapter_and_become_each_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    for names in &FAMILIES {
        // By the formula itself.
        let expected: BTreeMap<ModulePath, Vec<f64>> = factors(names, Tree::Diffusers)
            .into_iter()
            .map(|(layer, down, up)| {
                let entry = |row: usize, column: usize| -> f64 {
                    let product = |at| f64::from(up[row * RANK + at]) * f64::from(down[at * INPUTS + column]);
                    (0..RANK).map(product).sum::<f64>() * ALPHA / RANK as f64
                };
                let values = (0..outputs(layer)).flat_map(|row| (0..INPUTS).map(move |column| (row, column)));
                let values = values.map(|(row, column)| entry(row, column)).collect();
                (ModulePath::new(Component::TRANSFORMER, layer), values)
            })
            .collect();
        for layout in LAYOUTS {
            let what = format!("{}, {}", names.family, layout.0);
            let read = written(&path, names, layout);
            assert_eq!(read.family, Some(names.family), "{what}");
            is_same(&read.adapter, &expected, &what);
            assert!(read.adapter.modules.values().all(|module| module.alpha == ALPHA), "{what}: alphas are kept");
            for format in [Format::Kohya, Format::Diffusers] {
                let what = format!("{what} to {format}");
                let out = folder.path().join("b.safetensors");
                match format {
                    Format::Kohya => adapter::kohya::write(&out, &read.adapter, read.family, DType::F32),
                    _ => adapter::write(&out, &read.adapter, format, DType::F32),
                }
                .unwrap();
                let back = adapter::read(&out).unwrap();
                assert_eq!(back.family, Some(names.family), "{what}");
                is_same(&back.adapter, &expected, &what);
            }
        }
    }
}
