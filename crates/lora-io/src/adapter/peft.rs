//! PEFT's folder: `adapter_model.safetensors` with names `base_model.model.<module>.lora_A.weight`, and
//! `adapter_config.json`, without which neither scale nor method is known.
//!
//! Read: LoRA (rsLoRA, DoRA, embeddings, experts, rank and alpha patterns, `lora_bias`, layers and biases saved whole,
//! trained tokens, PiSSA and OLoRA as they are trained), trained tokens alone, LoHa, LoKr, OFT, BOFT, IA3, VeRA, GLoRA,
//! HRA. `fan_in_fan_out` says nothing that the base does not show. Written: LoRA and DoRA, with every field that PEFT,
//! vLLM and mistral.rs ask for. A field that changes the mathematics and is not supported is an error; PEFT itself
//! would pass over it, or over tensors that it does not know, in silence.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use lora_core::variant::{BIAS_VALUE, EXPERTS_DOWN, TOKEN_ROWS, TOKENS, WEIGHT_VALUE};
use lora_core::{Adapter, AdapterModule, Component, DType, HostTensor, ModulePath};
use serde_json::{Map, Value, json};

use super::diffusers::{self, most_common};
use super::parts::{LORA_BIAS, Parts, PeftContext};
use super::patterns::{self, Patterns};
use super::peft_experts::{TargetParameters, by_expert, of_all_experts, target_of, wrapper_of};
use super::{AdapterFile, Format, Whole, names};
use crate::metadata::HASH;
use crate::safetensors::{SafetensorsFile, TensorSource, verify, write as write_file};
use crate::{Error, Result, atomic};

pub(super) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// What a configuration says that the adapter does not know.
#[derive(Debug, Clone, Default)]
pub struct Extra {
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// `lora_dropout`.
    pub dropout: f64,
}

/// Reads a folder.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] or [`Error::Tensor`] where a file is missing or damaged or `adapter_config.json`
/// asks for what is not known here; [`Error::Unmatched`] with the keys that are no part of an adapter.
pub fn read(folder: impl AsRef<Path>) -> Result<AdapterFile> {
    let folder = folder.as_ref();
    let config_path = folder.join(CONFIG);
    if !config_path.exists() {
        return Err(without_config(folder));
    }
    let config = crate::json::read(&config_path)?;
    let weights = folder.join(WEIGHTS);
    if !weights.exists() && folder.join("adapter_model.bin").exists() {
        let reason = "holds a PyTorch pickle only, which can run any code when it is read; save it again with safe_serialization=True";
        return Err(Error::format(folder, reason));
    }
    let file = SafetensorsFile::open(&weights)?;
    let is_lora = file.names().any(|name| name.contains(".lora_A."));
    let config = Config::parse(&config_path, &config, is_lora)?;

    // VeRA's matrices belong to all modules; GLoRA writes the zeros of the paths that it does not train.
    let shared = |name: &str| {
        ["base_model.vera_A", "base_model.vera_B"].contains(&name)
            || name.contains(".glora_") && name.ends_with(".zeros")
    };
    let vera = match (file.get("base_model.vera_A"), file.get("base_model.vera_B")) {
        (Ok(a), Ok(b)) => Some((a.to_host()?, b.to_host()?)),
        _ => None,
    };
    let sorted = super::sort(&file, config.whole, shared)?;
    for name in sorted.modules.keys() {
        config.parameters.path(name).map_err(|reason| Error::format(&weights, format!("`{name}` {reason}")))?;
    }
    if !config.tokens.is_empty() && !sorted.modules.values().any(|parts| parts.contains_key(TOKEN_ROWS)) {
        let reason = "field `trainable_token_indices`: the file beside it has no rows of these tokens";
        return Err(Error::format(&config_path, reason));
    }
    // CLIP encoders of one pipeline have the same names: the folder says which it is, as this crate and diffusers name
    // them.
    let second = folder.file_name().is_some_and(|name| name == Component::TEXT_ENCODER_2.name());
    let path_of = |name: &str| {
        let path = config.parameters.path(name).unwrap_or_else(|_| names::from_dotted(name));
        let is_second = second && path.component == Component::TEXT_ENCODER;
        if is_second { ModulePath::new(Component::TEXT_ENCODER_2, path.path) } else { path }
    };
    let mut read = super::assemble(&file, Format::Peft, sorted, path_of, |_, path, parts| {
        Some(config.context(path, parts, vera.clone()))
    })?;
    for (path, module) in &mut read.adapter.modules {
        if config.parameters.contains(path) {
            let refused = |reason| Error::Module { module: path.to_string(), reason };
            *module = by_expert(module.clone(), config.rank_of(path) as usize).map_err(refused)?;
        }
    }
    read.path = folder.to_owned();
    if let Some(variant) = config.residual {
        read.notes.push(format!(
            "trained as {variant} and saved unconverted: what PEFT took out of the base is worked out of the base; name \
             --residual where the base is the changed one"
        ));
    }
    for (key, value) in [("base_model_name_or_path", &config.base_model), ("task_type", &config.task_type)] {
        if let Some(value) = value {
            read.adapter.metadata.insert(key.into(), value.clone());
        }
    }
    Ok(read)
}

/// The error of a folder that is no adapter's.
pub(crate) fn without_config(folder: &Path) -> Error {
    let below = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut adapters: Vec<String> = below
        .filter(|path| path.join(CONFIG).exists())
        .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    adapters.sort();
    if !adapters.is_empty() {
        let found = format!("holds adapters in folders of their own; name one of them: {}", adapters.join(", "));
        return Error::format(folder, found);
    }
    if folder.join("model_index.json").exists() || folder.join("config.json").exists() {
        let found = "the folder of a whole model, not of an adapter; are base and LoRA swapped?".into();
        return Error::Family { path: folder.to_owned(), found };
    }
    Error::format(
        folder,
        format!("has no {CONFIG}, so it is no adapter of PEFT's; name a file, or the folder that holds it"),
    )
}

/// The fields that mean something here.
struct Config {
    method: String,
    alpha: Option<f64>,
    rank: f64,
    alphas: Patterns,
    ranks: Patterns,
    rank_stabilised: bool,
    neumann: bool,
    /// Which trained tensors of the base the file holds.
    whole: Whole,
    dora: bool,
    orthogonal: bool,
    limit: Option<f64>,
    residual: Option<&'static str>,
    feedforward: Vec<String>,
    parameters: TargetParameters,
    /// Trained tokens: the ending of the modules' names, and the tokens' numbers.
    tokens: Vec<(String, Vec<u32>)>,
    base_model: Option<String>,
    task_type: Option<String>,
}

impl Config {
    /// `is_lora` says that the tensors are a LoRA's, where the configuration does not name a method.
    fn parse(path: &Path, config: &Value, is_lora: bool) -> Result<Self> {
        let wrong = |field: &str, reason: String| Error::format(path, format!("field `{field}`: {reason}"));
        let fields = config.as_object().ok_or_else(|| Error::format(path, "is no JSON object"))?;
        let unnamed = if is_lora { "LORA" } else { "" };
        let method = fields.get("peft_type").and_then(Value::as_str).unwrap_or(unnamed).to_owned();
        const METHODS: &[&str] =
            &["LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "GLORA", "HRA", "TRAINABLE_TOKENS"];
        if !METHODS.contains(&method.as_str()) {
            return Err(wrong("peft_type", format!("`{method}` is not supported; known are {}", METHODS.join(", "))));
        }
        let set = |field: &str| {
            fields.get(field).is_some_and(|value| match value {
                Value::Null => false,
                Value::Bool(on) => *on,
                Value::Array(items) => !items.is_empty(),
                Value::Object(items) => !items.is_empty(),
                Value::Number(number) => number.as_f64() != Some(0.0),
                Value::String(text) => !text.is_empty(),
            })
        };
        for (field, remedy) in [
            ("use_qalora", "QALoRA is not read"),
            ("use_bdlora", "block-diagonal LoRA is not read"),
            ("alora_invocation_tokens", "activated LoRA is not read"),
            ("layer_replication", "replicated layers are not read"),
            ("megatron_config", "Megatron's parallel layers are not read"),
        ] {
            if set(field) {
                return Err(wrong(field, format!("{} changes the mathematics; {remedy}", fields[field])));
            }
        }
        let residual = match fields.get("init_lora_weights").and_then(Value::as_str) {
            Some(init) => residual(init).map_err(|reason| wrong("init_lora_weights", reason))?,
            None => None,
        };
        let number = |field: &str| -> Result<Option<f64>> {
            match fields.get(field) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                    Some(number) => Ok(Some(number)),
                    None => Err(wrong(field, format!("expected a number, found {value}"))),
                },
            }
        };
        let patterns = |field: &str| Patterns::parse(fields.get(field)).map_err(|reason| wrong(field, reason));
        let list = |field: &str| match fields.get(field) {
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(items)) => items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        };
        let token_field = if method == "TRAINABLE_TOKENS" { "token_indices" } else { "trainable_token_indices" };
        let tokens = match fields.get(token_field) {
            Some(value) => tokens(value).map_err(|reason| wrong(token_field, reason))?,
            None => Vec::new(),
        };
        let text = |field: &str| fields.get(field).and_then(Value::as_str).map(str::to_owned);
        let is_lora = method == "LORA";
        let neumann = fields.get("use_cayley_neumann").and_then(Value::as_bool).unwrap_or(true);
        let terms = number("num_cayley_neumann_terms")?.unwrap_or(5.0);
        if method == "OFT" && neumann && terms != 5.0 {
            return Err(wrong("num_cayley_neumann_terms", format!("{terms} terms are not read; expected 5")));
        }
        let biases = fields.get("bias").and_then(Value::as_str).is_some_and(|bias| bias != "none");
        Ok(Self {
            alpha: match number("lora_alpha")? {
                Some(alpha) => Some(alpha),
                None => number("alpha")?,
            }
            .or(is_lora.then_some(8.0)),
            rank: number("r")?.unwrap_or(8.0),
            alphas: patterns("alpha_pattern")?,
            ranks: patterns("rank_pattern")?,
            rank_stabilised: set("use_rslora"),
            neumann,
            whole: Whole { biases, weights: set("modules_to_save") },
            dora: is_lora && set("use_dora"),
            orthogonal: set("apply_GS"),
            limit: if method == "OFT" && set("coft") { Some(number("eps")?.unwrap_or(6e-5)) } else { None },
            residual: residual.filter(|_| is_lora),
            feedforward: list("feedforward_modules"),
            parameters: TargetParameters::new(list("target_parameters")),
            tokens,
            base_model: text("base_model_name_or_path"),
            task_type: text("task_type"),
            method,
        })
    }

    /// The rank of a module's adapter.
    fn rank_of(&self, path: &ModulePath) -> f64 {
        self.ranks.number(path).unwrap_or(self.rank)
    }

    fn context(&self, path: &ModulePath, parts: &Parts, vera: Option<(HostTensor, HostTensor)>) -> PeftContext {
        let alpha = self.alphas.number(path).or(self.alpha);
        let rank = self.rank_of(path);
        let scaled = match self.method.as_str() {
            "LORA" if self.rank_stabilised => alpha.map(|alpha| alpha * rank.sqrt()),
            // Without a low-rank factor the canonical rank is 1: the scale stands in alpha.
            "LOKR" if parts.contains_key("lokr_w1") && parts.contains_key("lokr_w2") => alpha.map(|alpha| alpha / rank),
            _ => alpha,
        };
        let is_of = |name: &str| name.is_empty() || path.path == name || path.path.ends_with(&format!(".{name}"));
        let feedforward = self.feedforward.iter().any(|name| is_of(name));
        let tokens = self.tokens.iter().find(|(name, _)| is_of(name)).map(|(_, tokens)| tokens.clone());
        PeftContext {
            alpha: scaled,
            neumann: self.neumann,
            feedforward,
            vera,
            limit: self.limit,
            dora: self.dora,
            orthogonal: self.orthogonal,
            residual: self.residual,
            tokens,
        }
    }
}

/// Numbers of trained tokens by the ending of the layer's name: one list for whatever embedding there is, or one a
/// layer.
fn tokens(value: &Value) -> Result<Vec<(String, Vec<u32>)>, String> {
    let list = |value: &Value| -> Result<Vec<u32>, String> {
        let numbers = value.as_array().ok_or_else(|| format!("{value} is no list of tokens"))?;
        // All numbers below 2^24 are f32s, which the module holds them as.
        let token = |number: &Value| {
            number.as_u64().and_then(|token| u32::try_from(token).ok()).filter(|token| *token < 1 << 24)
        };
        numbers.iter().map(|number| token(number).ok_or_else(|| format!("{number} is no token"))).collect()
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Object(layers) => layers.iter().map(|(name, own)| Ok((name.clone(), list(own)?))).collect(),
        _ => Ok(vec![(String::new(), list(value)?)]),
    }
}

/// The variant that an initialisation makes of a LoRA whose file was not converted; `None` for one that leaves the base
/// as it is.
fn residual(init: &str) -> Result<Option<&'static str>, String> {
    let init = init.to_lowercase();
    let known = [("pissa_niter", "pissa-fast"), ("pissa", "pissa"), ("olora", "olora")];
    if let Some((_, variant)) = known.iter().find(|(name, _)| init.starts_with(name)) {
        return Ok(Some(variant));
    }
    if ["corda", "loftq", "lora_ga"].iter().any(|name| init.starts_with(name)) {
        return Err(format!(
            "`{init}` adapters fit a changed base that is not in this folder; save it converted \
             (path_initial_model_for_weight_conversion)"
        ));
    }
    Ok(None)
}

/// Writes a folder. An adapter of several components becomes one folder for each, named after it, since PEFT knows one
/// network at a time.
///
/// # Errors
/// [`Error::Module`] for a module that PEFT has no form of, [`Error::Io`] where a file cannot be written.
pub fn write(folder: impl AsRef<Path>, adapter: &Adapter, dtype: DType, extra: &Extra) -> Result<Vec<String>> {
    let folder = folder.as_ref();
    let components: BTreeSet<Component> = adapter.modules.keys().map(|path| path.component).collect();
    let mut notes = Vec::new();
    if components.len() == 1 {
        fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        write_component(folder, adapter, dtype, extra)?;
    } else {
        // Where the disk is full at the second network, the first is not there either.
        let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(Error::io(parent, "create"))?;
        let partial = atomic::NewFolder::begin(parent)?;
        for &component in &components {
            let own = adapter.modules.iter().filter(|(path, _)| path.component == component);
            let own = Adapter {
                modules: own.map(|(path, module)| (path.clone(), module.clone())).collect(),
                metadata: adapter.metadata.clone(),
            };
            let made = partial.path().join(component.name());
            fs::create_dir_all(&made).map_err(Error::io(&made, "create"))?;
            write_component(&made, &own, dtype, extra)?;
        }
        for component in &components {
            moved(&partial.path().join(component.name()), &folder.join(component.name()))?;
        }
        let names: Vec<_> = components.iter().map(|component| component.name()).collect();
        notes.push(format!("one folder for each network: {}", names.join(", ")));
    }
    let kept = adapter.metadata.keys().any(|key| key.starts_with("ss_"));
    if kept {
        notes.push("training metadata stays in the file's header, where PEFT does not look".into());
    }
    Ok(notes)
}

/// Moves a folder's files into another, over those that are there.
fn moved(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io(to, "create"))?;
    for entry in fs::read_dir(from).map_err(Error::io(from, "list"))? {
        let entry = entry.map_err(Error::io(from, "list"))?;
        let target = to.join(entry.file_name());
        fs::rename(entry.path(), &target).map_err(Error::io(&target, "put in its place"))?;
    }
    Ok(())
}

/// Whether the layout has a form of every module, to be asked before hours are spent on training.
///
/// # Errors
/// [`Error::Module`] that names the first of which it has none.
pub fn check(adapter: &Adapter) -> Result<()> {
    spelled(adapter, DType::F32).map(drop)
}

/// The tensors of an adapter of one component under their names in the file.
fn spelled(adapter: &Adapter, dtype: DType) -> Result<BTreeMap<String, HostTensor>> {
    let mut tensors = BTreeMap::new();
    let plain = adapter.modules.iter().find(|(_, module)| !["dora", WHOLE].contains(&module.variant.as_str()));
    if plain.is_some() && adapter.modules.values().any(|module| module.variant == "dora") {
        return Err(Error::Module {
            module: plain.map(|(path, _)| path.to_string()).unwrap_or_default(),
            reason: "PEFT has either DoRA on all modules or on none".into(),
        });
    }
    for (path, module) in &adapter.modules {
        let refused = |reason: String| Error::Module { module: path.to_string(), reason };
        super::whole(&path.to_string(), module)?;
        let saved = is_saved_whole(module) || is_bias_alone(module) || tokens_of(module).is_some();
        if !saved && !["lora", "dora"].contains(&module.variant.as_str()) || module.tensors.contains_key("mid") {
            return Err(refused(format!(
                "PEFT folders are written for LoRA and DoRA, this is {}; flatten it to a plain LoRA first",
                module.variant
            )));
        }
        if path.component == Component::MODEL && !path.path.contains('.') {
            return Err(refused("its name has underscores for dots, which PEFT does not know".into()));
        }
        if let Some(factors) = of_all_experts(module) {
            let is_adapted = |other: &str| {
                let other = adapter.modules.get(&ModulePath::new(path.component, other));
                other.is_some_and(|other| other.tensors.contains_key(EXPERTS_DOWN))
            };
            let wrapper = wrapper_of(&path.path, is_adapted);
            let wrapper = wrapper.ok_or_else(|| refused("PEFT knows no such parameter of experts".into()))?;
            for (suffix, tensor) in ["lora_A.weight", "lora_B.weight"].into_iter().zip(factors.map_err(refused)?) {
                let tensor = tensor.to_dtype(dtype);
                super::finite(&path.to_string(), suffix, &tensor)?;
                tensors.insert(format!("base_model.model.{wrapper}.{suffix}"), tensor);
            }
            continue;
        }
        for (name, tensor) in module.tensors.iter().filter(|(name, _)| *name != TOKENS) {
            let suffix = match name.as_str() {
                "down" => "lora_A.weight",
                "up" => "lora_B.weight",
                "embedding_down" => "lora_embedding_A",
                "embedding_up" => "lora_embedding_B",
                "magnitude" => "lora_magnitude_vector",
                WEIGHT_VALUE => "weight",
                TOKEN_ROWS => "token_adapter.trainable_tokens_delta",
                BIAS_VALUE if module.variant == WHOLE => "bias",
                BIAS_VALUE => "base_layer.bias",
                LORA_BIAS if module.is_lora() => "lora_B.bias",
                other => return Err(refused(format!("PEFT has no form of its tensor `{other}`"))),
            };
            // PEFT's magnitudes of convolutions keep the axes of an output.
            let mut tensor = tensor.to_dtype(dtype);
            let axes = module.tensors.get("up").map_or(2, |up| up.shape().len());
            if name == "magnitude" && axes == 4 {
                let outputs = tensor.elements();
                tensor = tensor.reshape([1, outputs, 1, 1]).map_err(|error| refused(error.to_string()))?;
            }
            super::finite(&path.to_string(), suffix, &tensor)?;
            tensors.insert(format!("base_model.model.{}.{suffix}", path.path), tensor);
        }
    }
    // `lora_bias` is one switch for all modules, and PEFT expects a bias of each then.
    if adapter.modules.values().any(has_lora_bias) {
        for (path, module) in adapter.modules.iter().filter(|(_, module)| module.is_lora() && !has_lora_bias(module)) {
            let Some(up) = module.tensors.get("up") else { continue };
            let zeros = HostTensor::zeros([up.shape()[0]]).to_dtype(dtype);
            tensors.insert(format!("base_model.model.{}.lora_B.bias", path.path), zeros);
        }
    }
    Ok(tensors)
}

fn has_lora_bias(module: &AdapterModule) -> bool {
    module.is_lora() && module.tensors.contains_key(LORA_BIAS)
}

/// The variant of layers that are saved whole.
const WHOLE: &str = "full";

/// Whether a module holds a weight in the place of the base's, as `modules_to_save` names them.
fn is_saved_whole(module: &AdapterModule) -> bool {
    module.variant == WHOLE && module.tensors.contains_key(WEIGHT_VALUE)
}

/// The numbers of the tokens whose rows a module holds in the place of the base's.
fn tokens_of(module: &AdapterModule) -> Option<Vec<u32>> {
    let numbers = module.tensors.get(TOKENS).filter(|_| module.tensors.contains_key(TOKEN_ROWS))?;
    Some(numbers.to_f32().iter().map(|&number| number as u32).collect())
}

/// Whether a module is a layer without an adapter whose bias is trained.
fn is_bias_alone(module: &AdapterModule) -> bool {
    module.variant == WHOLE && module.tensors.keys().all(|name| name == BIAS_VALUE)
}

fn write_component(folder: &Path, all: &Adapter, dtype: DType, extra: &Extra) -> Result<()> {
    let tensors = spelled(all, dtype)?;
    let (beside, adapted): (BTreeMap<_, _>, BTreeMap<_, _>) =
        all.modules.clone().into_iter().partition(|(_, module)| module.variant == WHOLE);
    let saved: Vec<&String> =
        beside.iter().filter(|(_, module)| is_saved_whole(module)).map(|(path, _)| &path.path).collect();
    let tokens: Map<String, Value> =
        beside.iter().filter_map(|(path, module)| Some((path.path.clone(), json!(tokens_of(module)?)))).collect();
    let bias =
        match (beside.values().any(is_bias_alone), adapted.values().any(|own| own.tensors.contains_key(BIAS_VALUE))) {
            (true, _) => "all",
            (false, true) => "lora_only",
            (false, false) => "none",
        };
    let adapter = &Adapter { modules: adapted, metadata: all.metadata.clone() };
    let dora = adapter.modules.values().any(|module| module.variant == "dora");
    let rank = most_common(adapter.modules.values().map(|module| module.rank));
    let alphas: BTreeMap<u64, (usize, f64)> = adapter.modules.values().fold(BTreeMap::new(), |mut counts, module| {
        counts.entry(module.alpha.to_bits()).or_insert((0, module.alpha)).0 += 1;
        counts
    });
    let alpha = alphas.into_values().max_by_key(|(count, _)| *count).map_or(rank as f64, |(_, alpha)| alpha);
    let whole = |number: f64| if number.fract() == 0.0 { json!(number as i64) } else { json!(number) };
    let paths: Vec<&ModulePath> = adapter.modules.keys().collect();
    let other_ranks = adapter.modules.iter().filter(|(_, module)| module.rank != rank);
    let ranks = patterns::written(other_ranks.map(|(path, module)| (path, json!(module.rank))), &paths);
    let other_alphas = adapter.modules.iter().filter(|(_, module)| module.alpha != alpha);
    let own_alphas = patterns::written(other_alphas.map(|(path, module)| (path, whole(module.alpha))), &paths);
    let parameters: BTreeSet<String> =
        adapter.modules.iter().filter(is_of_experts).map(|(path, _)| target_of(&path.path)).collect();
    let language = adapter.modules.keys().all(|path| path.component == Component::LANGUAGE_MODEL);
    let base = extra.base_model.clone().or_else(|| adapter.metadata.get("base_model_name_or_path").cloned());
    let config = json!({
        "alpha_pattern": own_alphas,
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": bias,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": whole(alpha),
        "lora_bias": adapter.modules.values().any(has_lora_bias),
        "lora_dropout": extra.dropout,
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": targets(adapter),
        "target_parameters": if parameters.is_empty() { Value::Null } else { json!(parameters) },
        "trainable_token_indices": if tokens.is_empty() { Value::Null } else { json!(tokens) },
        "task_type": if language { json!("CAUSAL_LM") } else { Value::Null },
        "use_dora": dora,
        "use_rslora": false,
    });
    let weights = folder.join(WEIGHTS);
    let mut metadata = adapter.metadata.clone();
    metadata.retain(|key, _| !key.starts_with("sshs_") && key != diffusers::METADATA && key != HASH);
    metadata.insert("format".into(), "pt".into());
    write_file(&weights, &tensors, &metadata)?;
    verify(&weights, &tensors.entries())?;
    let text = serde_json::to_string_pretty(&config).expect("JSON values always serialise");
    atomic::write(folder.join(CONFIG), |file| std::io::Write::write_all(file, text.as_bytes()))
}

/// The names to target: the last parts of the paths where these are names of language models' layers, which every
/// consumer knows; whole paths otherwise, since a last part like `0` would match too much.
fn targets(adapter: &Adapter) -> Vec<String> {
    const LEAVES: &[&str] =
        &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"];
    let leaf = |path: &ModulePath| path.path.rsplit('.').next().unwrap_or_default().to_owned();
    let layers: Vec<&ModulePath> =
        adapter.modules.iter().filter(|own| !is_of_experts(own)).map(|(path, _)| path).collect();
    if layers.iter().all(|path| LEAVES.contains(&leaf(path).as_str())) {
        return layers.into_iter().map(leaf).collect::<BTreeSet<_>>().into_iter().collect();
    }
    layers.into_iter().map(|path| path.path.clone()).collect()
}

/// Whether a module belongs to experts, which `target_parameters` names.
fn is_of_experts((_, module): &(&ModulePath, &AdapterModule)) -> bool {
    module.tensors.contains_key(EXPERTS_DOWN)
}
