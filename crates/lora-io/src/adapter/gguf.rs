//! Adapters in GGUF, as llama.cpp's runtime takes them (`convert_lora_to_gguf.py` writes the same): plain LoRA of a
//! language model, tensors `<base tensor>.lora_a` `[rank, in]` and `.lora_b` `[out, rank]`, one alpha for all,
//! scale = alpha / rank. For some architectures the rows of query and key projections are in llama.cpp's order
//! (see [`crate::gguf::names`]); adapters of experts have a third axis in front and are written, not read; of embeddings `lora_a` is stored transposed, `[entries, rank]`.
//!
//! Which architecture it is, and how many heads it has, stands in the adapter's metadata under the header's own keys
//! (`general.architecture`, `llama.attention.head_count` …); [`set_architecture`] puts it there. Files of other programs do
//! not tell the heads: those of architectures whose rows have another order are read with [`read_for`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_core::variant::{EXPERTS_DOWN, EXPERTS_UP, LoraFactors};
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};

use super::{AdapterFile, Format, finite, scaled, unmatched};
use crate::family::language;
use crate::gguf::names::{Architecture, Order, is_reordered, reorder};
use crate::gguf::{self, GgufFile, TensorType, Value};
use crate::safetensors::StoredDType;
use crate::{Error, Result};

/// Prefix of the metadata of other formats in the header.
const METADATA: &str = "lora.metadata.";

/// Notes an architecture in an adapter, for [`write()`].
pub fn set_architecture(adapter: &mut Adapter, architecture: &Architecture) {
    for (key, value) in architecture.values() {
        let value = match value {
            Value::Text(text) => text,
            Value::Unsigned(number) => number.to_string(),
            _ => continue,
        };
        adapter.metadata.insert(key, value);
    }
}

fn architecture(adapter: &Adapter) -> Result<Architecture> {
    let text = |key: &str| adapter.metadata.get(key);
    let missing = || Error::Module {
        module: "general.architecture".into(),
        reason: "a GGUF adapter names the architecture and heads of its base; name the base model too (--base)".into(),
    };
    let name = text("general.architecture").ok_or_else(missing)?;
    let number = |part: &str| text(&format!("{name}.attention.{part}")).and_then(|text| text.parse().ok());
    let (heads, kv_heads) = number("head_count").zip(number("head_count_kv")).ok_or_else(missing)?;
    Ok(Architecture { name: name.clone(), heads, kv_heads })
}

/// Whether a file holds a part of an adapter.
///
/// # Errors
/// If it is a whole model.
pub(crate) fn is_adapter(file: &GgufFile) -> Result<()> {
    let of_lora = |name: &str| name.ends_with(".lora_a") || name.ends_with(".lora_b");
    if file.text("general.type") == Some("adapter") || file.names().any(of_lora) {
        return Ok(());
    }
    let found = "a whole model in GGUF, not a LoRA; are base and LoRA swapped?".into();
    Err(Error::Family { path: file.path().to_owned(), found })
}

/// Reads a file that tells the heads of its base, or whose architecture needs none.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] where it cannot be read or is none; [`Error::Format`] for a file of `llama` that
/// does not tell the heads: [`read_for`] takes them from a base.
pub fn read(path: impl AsRef<Path>) -> Result<AdapterFile> {
    let file = GgufFile::open(path)?;
    is_adapter(&file)?;
    let architecture = Architecture::of_gguf(&file);
    let named = |part: &str| file.names().any(|name| name.contains(part));
    match architecture {
        Ok(architecture) => from_file(&file, &architecture),
        // Heads matter for a few architectures, and there for two layers alone.
        Err(_)
            if file.text("general.architecture").is_some_and(|name| !is_reordered(name))
                || !named("attn_q.") && !named("attn_k.") =>
        {
            let name = file.text("general.architecture").unwrap_or_default().to_owned();
            from_file(&file, &Architecture { name, heads: 1, kv_heads: 1 })
        }
        Err(_) => Err(Error::format(
            file.path(),
            "is a GGUF adapter of a model whose rows are in an order that depends on the base's heads; name the base model \
             (--base)",
        )),
    }
}

/// Reads a file with the base's architecture at hand.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] where it cannot be read, is no adapter, or is for another architecture.
pub fn read_for(path: impl AsRef<Path>, architecture: &Architecture) -> Result<AdapterFile> {
    let file = GgufFile::open(path)?;
    is_adapter(&file)?;
    if file.text("general.architecture") != Some(&architecture.name) {
        let reason = format!(
            "is for architecture `{}`, the base is `{}`",
            file.text("general.architecture").unwrap_or_default(),
            architecture.name
        );
        return Err(Error::format(file.path(), reason));
    }
    from_file(&file, architecture)
}

fn from_file(file: &GgufFile, architecture: &Architecture) -> Result<AdapterFile> {
    if file.text("general.type") != Some("adapter") || file.text("adapter.type") != Some("lora") {
        let reason = "is no LoRA adapter in GGUF (`general.type` = adapter, `adapter.type` = lora)";
        return Err(Error::format(file.path(), reason));
    }
    let alpha = file.float("adapter.lora.alpha").filter(|alpha| alpha.is_finite());
    let alpha = alpha.ok_or_else(|| Error::format(file.path(), "has no finite number `adapter.lora.alpha`"))?;
    let mut adapter = Adapter::default();
    for (key, value) in file.values() {
        if let (Some(key), Value::Text(text)) = (key.strip_prefix(METADATA), value) {
            adapter.metadata.insert(key.to_owned(), text.clone());
        }
    }
    set_architecture(&mut adapter, architecture);
    let mut dtypes = BTreeSet::new();
    let mut problems = Vec::new();
    let names: BTreeSet<&str> = file.names().collect();
    for name in file.names() {
        let (stem, other) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
            (Some(stem), _) => (stem, format!("{stem}.lora_b")),
            (_, Some(stem)) => (stem, format!("{stem}.lora_a")),
            _ => {
                problems.push(format!("`{name}` (no half of a pair)"));
                continue;
            }
        };
        if !names.contains(other.as_str()) {
            problems.push(format!("`{name}` (`{other}` is missing)"));
            continue;
        }
        let Some(module) = stem.strip_suffix(".weight").and_then(|name| architecture.module(name)) else {
            problems.push(format!("`{name}` (no layer that is known here)"));
            continue;
        };
        dtypes.extend(file.tensor_type(name).map(|kind| match kind {
            TensorType::F16 => StoredDType::F16,
            TensorType::BF16 => StoredDType::BF16,
            _ => StoredDType::F32,
        }));
        if name.ends_with(".lora_a") {
            match from_pair(&module, file.tensor(name)?, file.tensor(&other)?, alpha, architecture) {
                Ok(own) => drop(adapter.modules.insert(ModulePath::new(Component::LANGUAGE_MODEL, &*module), own)),
                Err(reason) => problems.push(format!("`{name}` ({reason})")),
            }
        }
    }
    unmatched(file.path(), problems)?;
    if adapter.modules.is_empty() {
        return Err(Error::format(file.path(), "holds no adapter modules"));
    }
    Ok(AdapterFile {
        path: file.path().to_owned(),
        adapter,
        format: Format::Gguf,
        family: Some(&language::FAMILY),
        dtypes,
        notes: Vec::new(),
    })
}

fn from_pair(
    module: &str,
    a: HostTensor,
    b: HostTensor,
    alpha: f64,
    architecture: &Architecture,
) -> Result<AdapterModule, String> {
    let embedding = is_embedding(module);
    let a = if embedding { transposed(&a)? } else { a };
    let (&[rank, _], &[rows, other]) = (a.shape(), b.shape()) else {
        return Err(format!("shapes {:?} and {:?} are no matrices", a.shape(), b.shape()));
    };
    if rank != other || rank == 0 {
        return Err(format!("ranks {rank} and {other} differ"));
    }
    let b = match architecture.reordered(module) {
        Some(heads) => reordered(&b, rows, heads, Order::FromGguf)?,
        None => b,
    };
    Ok(AdapterModule::of_factors(a, b, embedding, rank, alpha))
}

fn is_embedding(module: &str) -> bool {
    module == "model.embed_tokens"
}

fn transposed(tensor: &HostTensor) -> Result<HostTensor, String> {
    let &[rows, columns] = tensor.shape() else { return Err(format!("{:?} is no matrix", tensor.shape())) };
    let values = tensor.to_f32();
    let turned = (0..columns).flat_map(|j| (0..rows).map(move |i| i * columns + j)).map(|place| values[place]);
    let turned = HostTensor::from_f32([columns, rows], turned.collect()).map_err(|error| error.to_string())?;
    Ok(turned.to_dtype(tensor.dtype()))
}

fn reordered(tensor: &HostTensor, rows: usize, heads: usize, order: Order) -> Result<HostTensor, String> {
    let values = reorder(&tensor.to_f32(), rows, heads, order)
        .ok_or_else(|| format!("{rows} rows are no pairs in {heads} heads"))?;
    let ordered = HostTensor::from_f32(tensor.shape(), values).map_err(|error| error.to_string())?;
    Ok(ordered.to_dtype(tensor.dtype()))
}

/// The matrices that an adapter of all experts of a layer changes in llama.cpp's model, which has gate and up apart: names,
/// `lora_a` `[experts, rank, inputs]`, `lora_b` `[experts, outputs, rank]`.
fn experts(
    architecture: &Architecture,
    path: &ModulePath,
    module: &AdapterModule,
) -> Option<Vec<(String, HostTensor, HostTensor)>> {
    let (down, up) = (module.tensors.get(EXPERTS_DOWN)?, module.tensors.get(EXPERTS_UP)?);
    let (index, part) = path.path.strip_prefix("model.layers.")?.split_once('.')?;
    let name = |part: &str| format!("blk.{index}.ffn_{part}_exps");
    match part {
        "mlp.experts.down_proj" => Some(vec![(name("down"), down.clone(), up.clone())]),
        "mlp.experts.gate_up_proj" => {
            let &[experts, outputs, rank] = up.shape() else { return None };
            let values = up.to_f32();
            // gpt-oss has the rows of the two in turn, the others one half each.
            let alternate = architecture.name == "gpt-oss";
            let half = |second: usize| {
                let row = |place: usize| if alternate { 2 * place + second } else { second * (outputs / 2) + place };
                let rows = (0..experts).flat_map(|expert| (0..outputs / 2).map(move |place| (expert, place)));
                let starts = rows.map(|(expert, place)| (expert * outputs + row(place)) * rank);
                let values = starts.flat_map(|start| values[start..start + rank].to_vec()).collect();
                HostTensor::from_f32([experts, outputs / 2, rank], values).ok()
            };
            Some(vec![(name("gate"), down.clone(), half(0)?), (name("up"), down.clone(), half(1)?)])
        }
        _ => None,
    }
}

/// Writes plain LoRA of a language model. Alphas that differ, or scales that are not alpha / rank, are folded into the
/// factors; the returned notes say so.
///
/// # Errors
/// [`Error::Module`] for a module that is no plain LoRA (flatten it first), is no language model's, or is on a layer
/// that GGUF has no name for; [`Error::Io`] where the file cannot be written.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, dtype: DType) -> Result<Vec<String>> {
    let architecture = architecture(adapter)?;
    let mut notes = Vec::new();
    let alphas: Vec<f64> = adapter.modules.values().map(|module| module.alpha).collect();
    let alpha = alphas.first().copied().unwrap_or(1.0);
    let same = alphas.iter().all(|other| *other == alpha) && alpha != 0.0;
    let alpha = if same { alpha } else { adapter.modules.values().map(|module| module.rank).max().unwrap_or(1) as f64 };
    if !same {
        notes.push(format!("one alpha for all, {alpha}: the modules' own scales are folded into `lora_b`"));
    }
    let mut tensors = BTreeMap::new();
    for (module_path, module) in &adapter.modules {
        let failed = |reason: String| Error::Module { module: module_path.to_string(), reason };
        super::whole(&module_path.to_string(), module)?;
        if let Some(parts) = experts(&architecture, module_path, module) {
            for (name, down, up) in parts {
                let up = scaled(&up, module.scale() * module.rank as f64 / alpha);
                for (suffix, tensor) in [("lora_a", down), ("lora_b", up)] {
                    let tensor = tensor.to_dtype(dtype);
                    finite(&module_path.to_string(), suffix, &tensor)?;
                    tensors.insert(format!("{name}.weight.{suffix}"), tensor);
                }
            }
            continue;
        }
        if module_path.component != Component::LANGUAGE_MODEL {
            return Err(failed("GGUF adapters are for language models; take kohya or diffusers for this one".into()));
        }
        let Some(name) = architecture.stored(&module_path.path) else {
            return Err(failed(format!("architecture `{}` has no such layer that is known here", architecture.name)));
        };
        let embedding = is_embedding(&module_path.path);
        let factors = module.factors().filter(|factors| factors.embedding == embedding);
        let Some(LoraFactors { down: a, up: b, .. }) = factors else {
            let reason = format!("only plain LoRA is written here, this is {}; flatten it first", module.variant);
            return Err(failed(reason));
        };
        let (&[rank, _], &[rows, _]) = (a.shape(), b.shape()) else {
            return Err(failed(format!("shapes {:?} and {:?} are no matrices", a.shape(), b.shape())));
        };
        let a = if embedding { transposed(a).map_err(failed)? } else { a.clone() };
        let b = scaled(b, module.scale() * rank as f64 / alpha);
        let b = match architecture.reordered(&module_path.path) {
            Some(heads) => reordered(&b, rows, heads, Order::ToGguf).map_err(failed)?,
            None => b,
        };
        for (suffix, tensor) in [("lora_a", a), ("lora_b", b)] {
            let tensor = tensor.to_dtype(dtype);
            finite(&module_path.to_string(), suffix, &tensor)?;
            tensors.insert(format!("{name}.weight.{suffix}"), tensor);
        }
    }
    let mut values = BTreeMap::from(architecture.values());
    values.insert("general.type".into(), Value::Text("adapter".into()));
    values.insert("adapter.type".into(), Value::Text("lora".into()));
    values.insert("adapter.lora.alpha".into(), Value::Float(alpha));
    let own: BTreeSet<String> = values.keys().cloned().collect();
    for (key, value) in adapter.metadata.iter().filter(|(key, _)| !own.contains(*key)) {
        values.insert(format!("{METADATA}{key}"), Value::Text(value.clone()));
    }
    gguf::write(path, &values, &tensors)?;
    Ok(notes)
}
