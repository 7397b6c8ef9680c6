//! What a run begins with where `init_from` names an adapter: the file held against the layers that are trained, and the
//! values of one layer at the run's variant, rank and alpha. Hanging them on layers is `trainable`'s business; the
//! arithmetic is `lora_core::compose`'s.
//!
//! | a layer of the file has | it begins with |
//! |---|---|
//! | the run's variant, rank and alpha | the file's tensors |
//! | another rank or alpha (`lora`, `dora`) | the same update: new ranks change nothing, of too many the largest stay |
//! | another variant, where the run trains `lora` | the largest singular values of its whole update |
//! | no module | what a new adapter begins with |

use std::collections::BTreeMap;
use std::path::Path;

use lora_core::compose::{self, ExtractOptions, Outcome};
use lora_core::rank::RankPolicy;
use lora_core::target::TargetLayer;
use lora_core::variant::{
    BIAS_VALUE, BaseLayer, BiasChange, EXPERTS_DOWN, Parameters, TOKEN_ROWS, Variant, VariantRegistry, WEIGHT_VALUE,
};
use lora_core::{Adapter, AdapterModule, Component, LayerGeometry, ModulePath};
use lora_io::adapter;
use lora_models::layers::AdaptableLayer;
use lora_torch::TchBackend;
use lora_torch::dry;
use lora_torch::tch::{Kind, Tensor, no_grad_guard};
use lora_torch::tensor::to_host;

use crate::config::TrainConfig;
use crate::fuse::takes_the_rest;
use crate::plugins::Plugins;
use crate::trainable::{AdapterOptions, Biases, TrainedTokens, fresh};
use crate::{Error, Result};

/// The adapter that a run begins with.
#[derive(Debug)]
pub(crate) struct Initial {
    /// Its modules of layers that the run trains.
    pub(crate) adapter: Adapter,
    /// The name and hash of its file.
    pub(crate) provenance: (String, String),
    /// Layers of the file that are merged into the base instead.
    merged: usize,
}

/// What a run trains, as far as an adapter to begin with has to fit it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trains<'t> {
    /// The networks that train.
    pub(crate) components: &'t [Component],
    /// All their layers.
    pub(crate) layers: &'t [TargetLayer],
    /// Those that carry adapters.
    pub(crate) targets: &'t [TargetLayer],
    /// Those that are trained whole, and tables that rows are trained of.
    pub(crate) others: &'t [TargetLayer],
}

impl Initial {
    /// Reads the adapter and holds it against what the run trains; no number is worked out yet.
    ///
    /// # Errors
    /// [`Error::InitFrom`] for an adapter that training cannot go on from, with what helps; what reading gives.
    pub(crate) fn read(path: &Path, config: &TrainConfig, plugins: &Plugins, trains: &Trains<'_>) -> Result<Self> {
        let read = adapter::read_among(path, &plugins.bases.families())?;
        read.undamaged()?;
        let mut adapter = read.adapter;
        let refused = |reason: String| Error::InitFrom { path: path.to_owned(), reason };
        if let Some(reason) = adapter.modules.iter().find_map(|(name, module)| not_trained_on(name, module, config)) {
            return Err(refused(reason));
        }
        let of_trained = |path: &ModulePath| trains.components.contains(&path.component);
        let mut elsewhere = split(&mut adapter, |path, _| of_trained(path));
        adapter::fit(path, &mut adapter, trains.layers)?;
        check_tokens(&adapter, config, trains).map_err(refused)?;
        // Where a layer's bias alone is trained, nothing is targeted.
        let bias_alone = |module: &AdapterModule| module.tensors.keys().all(|name| name == BIAS_VALUE);
        let biases = adapter.modules.values().filter(|module| bias_alone(module)).count();
        if biases > 0 && Biases::of(config) != Biases::All {
            let reason = format!("it trains biases of {biases} layers that it does not adapt; set bias = \"all\"");
            return Err(refused(reason));
        }
        let trained = |path: &ModulePath| trains.targets.iter().chain(trains.others).any(|layer| layer.path == *path);
        elsewhere.extend(split(&mut adapter, |path, module| bias_alone(module) || trained(path)));
        if let Some(name) = elsewhere.first().filter(|_| !takes_the_rest(config)) {
            return Err(refused(untrained(name, elsewhere.len())));
        }
        let options = AdapterOptions::of(config, trains.targets)?;
        for (name, module) in &adapter.modules {
            let checked = match trains.targets.iter().find(|target| target.path == *name) {
                Some(target) => Way::of(module, target, &plugins.variants, &options)?.map(drop),
                None if bias_alone(module) || module.variant == "full" => Ok(()),
                None => {
                    Err("is adapted in the file, and this run trains the layer whole; take it out of modules_to_save"
                        .into())
                }
            };
            checked.map_err(|reason| refused(format!("{name} {reason}")))?;
        }
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let hash = adapter.metadata.get("sshs_model_hash").cloned().unwrap_or_default();
        Ok(Self { adapter, provenance: (name, hash), merged: elsewhere.len() })
    }

    /// What to know of the beginning, in one line: what was lost on the way, and which of `targets` the file lacks.
    pub(crate) fn note(&self, begun: &[Outcome], targets: &[TargetLayer]) -> Option<String> {
        let new = targets.iter().filter(|target| !self.adapter.modules.contains_key(&target.path)).count();
        let mut parts = Vec::new();
        if !begun.is_empty() {
            let (mean, least) = compose::kept(begun);
            parts.push(format!(
                "{} layers are brought to the run's variant, rank and alpha, of whose updates' norm {:.2}% is kept on average, {:.2}% at least",
                begun.len(),
                100.0 * mean,
                100.0 * least
            ));
        }
        if self.merged > 0 {
            parts.push(format!("{} layers that this run does not train are merged into the base", self.merged));
        }
        if new > 0 {
            parts.push(format!("{new} of {} targeted layers are not in the file and begin anew", targets.len()));
        }
        (!parts.is_empty()).then(|| format!("init_from {}: {}", self.provenance.0, parts.join("; ")))
    }
}

/// Takes the modules out of an adapter that are not to stay; gives their paths.
fn split(adapter: &mut Adapter, stays: impl Fn(&ModulePath, &AdapterModule) -> bool) -> Vec<ModulePath> {
    let (stay, go): (BTreeMap<_, _>, BTreeMap<_, _>) =
        std::mem::take(&mut adapter.modules).into_iter().partition(|(path, module)| stays(path, module));
    adapter.modules = stay;
    go.into_keys().collect()
}

/// What is said of layers that the run does not train.
fn untrained(first: &ModulePath, count: usize) -> String {
    format!(
        "it adapts {count} layers that this run does not train, {first} among them: train them too (target_modules, \
         train_text_encoder), or name the file in fuse_adapters too, which merges them into the frozen base"
    )
}

/// Holds trained rows of tokens against those that the configuration names.
fn check_tokens(adapter: &Adapter, config: &TrainConfig, trains: &Trains<'_>) -> std::result::Result<(), String> {
    let tokens = TrainedTokens::of(config, trains.layers, &[]).ok().flatten();
    let other = |module: &AdapterModule| {
        module.tensors.contains_key(TOKEN_ROWS) && tokens.as_ref().is_some_and(|tokens| !tokens.are_of(module))
    };
    match adapter.modules.iter().find(|(_, module)| other(module)) {
        Some((name, _)) => {
            Err(format!("{name} holds rows of other tokens than trainable_token_indices names; make them equal"))
        }
        None => Ok(()),
    }
}

/// Why training cannot go on with a module that merging knows how to apply.
fn not_trained_on(name: &ModulePath, module: &AdapterModule, config: &TrainConfig) -> Option<String> {
    let has = |tensor: &str| module.tensors.contains_key(tensor);
    let what = if adapter::lacks_first_values(module) {
        format!("is {} as PEFT saves it unconverted, without what was taken out of the base:", module.variant)
    } else if has(WEIGHT_VALUE) && config.extra.texts("modules_to_save").is_none_or(<[String]>::is_empty) {
        "is a layer saved whole: name it in modules_to_save; or else".to_owned()
    } else if has(TOKEN_ROWS) && config.extra.texts("trainable_token_indices").is_none_or(<[String]>::is_empty) {
        "holds trained tokens: name them in trainable_token_indices; or else".to_owned()
    } else if has(BIAS_VALUE) && Biases::of(config) == Biases::None {
        "has a trained bias: set bias as it was trained; or else".to_owned()
    } else {
        return None;
    };
    Some(format!(
        "{name} {what} merge it into the base with `lora merge` and train on the merged base, without init_from"
    ))
}

/// How a layer comes from a module of the file to what the run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As it is.
    Same,
    /// By its factors.
    Refit,
    /// By its whole update.
    Flatten,
}

impl Way {
    /// The way, or why there is none.
    fn of(
        known: &AdapterModule,
        target: &TargetLayer,
        variants: &VariantRegistry<TchBackend>,
        options: &AdapterOptions,
    ) -> Result<std::result::Result<Self, String>> {
        let variant = begun_as(known, options);
        let (request, alpha) = options.for_layer(target);
        let (rank, alpha) = variants.get(variant)?.rank_and_alpha(&target.geometry, &request, alpha);
        let own = variants.get(&known.variant)?;
        // Files of some variants do not say their rank.
        let fits = |shapes: BTreeMap<String, Vec<usize>>| {
            shapes.iter().all(|(name, shape)| known.tensors.get(name).is_some_and(|own| own.shape() == shape))
        };
        let is_one = |scale: f64| (known.scale() - scale).abs() <= 1e-6 * scale.abs();
        let same = known.variant == variant;
        let matrix = matches!(target.geometry, LayerGeometry::Linear { .. } | LayerGeometry::Conv2d { .. });
        Ok(if same && (known.rank, known.alpha) == (rank, alpha) {
            Ok(Self::Same)
        } else if same && compose::can_refit(known) {
            Ok(Self::Refit)
        } else if same && is_one(alpha / rank.max(1) as f64) && own.shapes(&target.geometry, &request).is_ok_and(fits) {
            Ok(Self::Same)
        } else if variant != "lora" || known.tensors.contains_key(EXPERTS_DOWN) || !matrix {
            let (as_it_is, wanted) =
                (description(&known.variant, known.rank, known.alpha), description(variant, rank, alpha));
            Err(format!(
                "is {as_it_is} in the file, and the run asks for {wanted}, which it cannot be brought to: set variant, \
                 lora_rank and lora_alpha as the file has them, or variant = \"lora\"; fuse_adapters instead of init_from \
                 merges it into the frozen base"
            ))
        } else if own.changes(&known.tensors).bias == BiasChange::Always {
            Err("changes its layer's bias too, which plain LoRA does not: set variant as the file has it".into())
        } else {
            Ok(Self::Flatten)
        })
    }
}

fn description(variant: &str, rank: usize, alpha: f64) -> String {
    format!("`{variant}` of rank {rank} and alpha {alpha}")
}

/// The variant that a module of the file begins as. Ways to begin a plain LoRA have no part in one that is there, and of the
/// conventions of one variant the file's stays, as formats have one of them.
fn begun_as<'o>(known: &'o AdapterModule, options: &'o AdapterOptions) -> &'o str {
    let stem = |name: &'o str| name.trim_start_matches("peft-").trim_start_matches("lycoris-");
    let residual = adapter::RESIDUAL.contains(&options.variant.as_str()) && known.is_lora();
    match residual || stem(&known.variant) == stem(&options.variant) {
        true => &known.variant,
        false => &options.variant,
    }
}

/// What a layer begins with that the file has a module of, and what was kept of the module's update where it is another one
/// now. In a dry run only shapes matter.
///
/// # Errors
/// [`Error::InitFrom`]'s reasons as [`lora_core::Error::Unsupported`], where [`Initial::read`] could not see them; where memory
/// runs out.
pub(crate) fn module(
    known: &AdapterModule,
    layer: &AdaptableLayer,
    target: &TargetLayer,
    variants: &VariantRegistry<TchBackend>,
    options: &AdapterOptions,
) -> Result<(AdapterModule, Option<Outcome>)> {
    let unsupported = |reason: String| lora_core::Error::Unsupported {
        variant: known.variant.clone(),
        layer: target.path.to_string(),
        reason,
    };
    let way = Way::of(known, target, variants, options)?.map_err(unsupported)?;
    if way == Way::Same {
        return Ok((known.clone(), None));
    }
    let variant = variants.get(begun_as(known, options))?;
    let fresh = fresh(&*variant, layer, target, options)?;
    if dry::is_dry(layer.device()) {
        return Ok((fresh, None));
    }
    let (begun, kept) = match way {
        Way::Flatten => {
            let (flat, kept) =
                flattened(known, layer, &*variants.get(&known.variant)?, fresh.rank).map_err(|error| match error {
                    Error::Adapter(lora_core::Error::Unsupported { reason, .. }) => unsupported(reason).into(),
                    other => other,
                })?;
            (compose::refit(&target.path, &flat, &fresh)?.0, kept)
        }
        _ => compose::refit(&target.path, known, &fresh)?,
    };
    let outcome = Outcome { module: target.path.clone(), rank: begun.rank, kept };
    Ok((begun, Some(outcome)))
}

/// The largest singular values of a module's update on its layer, as a plain LoRA, and the share of its norm that they hold.
fn flattened(
    module: &AdapterModule,
    layer: &AdaptableLayer,
    variant: &dyn Variant<TchBackend>,
    rank: usize,
) -> Result<(AdapterModule, f64)> {
    let _guard = no_grad_guard();
    if variant.changes(&module.tensors).bias != BiasChange::Never && BaseLayer::bias(layer).is_some() {
        return Err(lora_core::Error::Unsupported {
            variant: module.variant.clone(),
            layer: layer.path().to_owned(),
            reason: "it changes the layer's bias too, which plain LoRA does not: set variant as the file has it".into(),
        }
        .into());
    }
    let like = Tensor::f_zeros([1], (Kind::Float, layer.device()))?;
    let parameters = Parameters::upload(&TchBackend, module, &like)?;
    let delta = to_host(&variant.delta_weight(&TchBackend, layer, &parameters)?.f_to_kind(Kind::Float)?)?;
    let options = ExtractOptions { policy: RankPolicy::Fixed(rank), limit: rank, ..ExtractOptions::default() };
    Ok(compose::flatten(&delta, &options)?)
}
