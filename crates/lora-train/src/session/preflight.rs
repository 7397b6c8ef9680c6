//! What the headers of files alone show to be wrong with a run: keys that name layers which the base lacks, ranks that no
//! layer can hold, an adapter to go on from that does not fit, a network that is not whole. Networks are built on the device
//! without memory for it, in no time. Whatever is wrong is found again when the run comes to it; here it is found before
//! hours have gone into encoding, and all of it at once.

use std::sync::Arc;

use lora_core::target::{Patterns, TargetLayer, Targets};
use lora_core::variant::{Request, Variant};
use lora_core::{DType, LayerGeometry};
use lora_io::checkpoint::Checkpoint;
use lora_models::weights::Held;
use lora_torch::TchBackend;
use lora_torch::dry::{DryRun, Platform};

use super::prepare::initial;
use super::trained;
use crate::base::{Base, Opening};
use crate::config::{TrainConfig, TrainMode};
use crate::plugins::Plugins;
use crate::trainable::{
    AdapterOptions, Biases, TrainedTokens, adaptable, chosen, parameters_of_experts, savable, target_parameters,
};
use crate::{Error, Result};

/// Refuses a run that cannot succeed; gives what to note about one that can.
///
/// # Errors
/// [`Error::Config`] with everything that is wrong with keys; what loading the base would say, of what headers show.
pub(crate) fn check(
    config: &TrainConfig,
    checkpoint: &Arc<Checkpoint>,
    precision: DType,
    plugins: &Plugins,
) -> Result<Vec<String>> {
    // On macOS there are no dry runs: a run says later what is wrong.
    let Ok(run) = DryRun::begin(Platform::cpu()) else { return Ok(Vec::new()) };
    let opening = Opening::new(config, checkpoint, run.device(), precision);
    match lora_torch::caught(|| look(&opening, plugins)) {
        // A base of somebody's own may do what the device without memory cannot, which says nothing of the run.
        Err(Error::Model(lora_models::Error::Torch(_))) => Ok(Vec::new()),
        seen => seen,
    }
}

fn look(opening: &Opening<'_>, plugins: &Plugins) -> Result<Vec<String>> {
    let config = opening.config;
    let mut base = plugins.bases.open(opening)?;
    for network in base.networks().to_vec() {
        base.load(network.component, Held::default())?;
    }
    match config.train {
        TrainMode::Full => Ok(Vec::new()),
        TrainMode::Adapter => adapter(&mut *base, opening, plugins),
    }
}

/// The adapter that the configuration asks for, held against the layers that there are.
fn adapter(base: &mut dyn Base, opening: &Opening<'_>, plugins: &Plugins) -> Result<Vec<String>> {
    let (config, family) = (opening.config, opening.checkpoint.family());
    let mut layers = Vec::new();
    for network in trained(base) {
        if let Some(network) = base.adaptable(network.component) {
            layers.extend(network.adaptable_layers()?);
        }
    }
    let mut problems: Vec<(&'static str, String)> = Vec::new();
    let targets = Targets::parse(&config.target_modules)?;
    let candidates = adaptable(&layers);
    problems.extend(targets.unmatched(&candidates).map(|error| ("target_modules", error.to_string())));
    if let Some(names) = config.extra.texts("modules_to_save").filter(|names| !names.is_empty()) {
        let saved = Targets::parse(names)?;
        problems.extend(saved.unmatched(&savable(&layers)).map(|error| ("modules_to_save", error.to_string())));
    }
    if let Some(names) = target_parameters(config) {
        let parameters = parameters_of_experts(&layers);
        if parameters.is_empty() {
            problems.push(("target_parameters", "the base has no mixture of experts; take it out".into()));
        } else {
            let unmatched =
                Targets::parse(names)?.unmatched(&parameters).map(|error| error.to_string()).collect::<Vec<_>>();
            problems.extend(unmatched.into_iter().map(|error| ("target_parameters", error)));
        }
        let dropped = config.lora_dropout + config.rank_dropout + config.module_dropout > 0.0;
        if config.variant != "lora" || dropped || Biases::of(config) != Biases::None {
            let message = "experts carry plain LoRA without dropout and biases; take it out, or those".to_owned();
            problems.push(("target_parameters", message));
        }
    }
    problems.extend(unlimited(config).map(|message| ("scale_weight_norms", message)));
    let targets = targets.matched(&candidates);
    let patterns = [
        ("rank_pattern", &config.rank_pattern),
        ("alpha_pattern", &config.alpha_pattern),
        ("learning_rate_pattern", &config.learning_rate_pattern),
    ];
    for (key, pattern) in patterns {
        for (entry, number) in pattern {
            let alone = [(entry.clone(), *number)].into();
            problems.extend(Patterns::parse(&alone, &targets).err().map(|error| (key, error.to_string())));
        }
    }
    if !problems.is_empty() {
        return Err(config.refused(problems).into());
    }
    if Biases::of(config) != Biases::None && config.variant != "lora" {
        let message = format!("PEFT trains biases beside LoRA; take it out, or variant = \"{}\"", config.variant);
        return Err(config.refused([("bias", message)]).into());
    }
    let variant = plugins.variants.get(&config.variant)?;
    let notes = ranks(&*variant, &AdapterOptions::of(config, &targets)?, &targets)
        .map_err(|(key, message)| config.refused([(key, message)]))?;
    let (chosen, saved) = chosen(config, &layers)?;
    let tokens = TrainedTokens::of(config, &layers, &[&*chosen, &*saved].concat())
        .map_err(|message| config.refused([("trainable_token_indices", message)]))?;
    if let Some(path) = &config.init_from {
        initial(config, plugins, &*base, (&layers, &chosen, &saved), tokens.as_ref()).map_err(|error| {
            let adapter = lora_io::adapter::read(path).ok();
            let other = adapter.and_then(|read| lora_io::adapter::made_for_another(&read.adapter, family));
            let error = other.map_or_else(|| error.to_string(), |other| format!("{other}: {error}"));
            config.refused([("init_from", error)])
        })?;
    }
    Ok(notes)
}

/// Why norms of updates cannot be limited, where that is asked for.
fn unlimited(config: &TrainConfig) -> Option<String> {
    config.extra.number("scale_weight_norms")?;
    if config.variant != "lora" {
        let own = &config.variant;
        return Some(format!(
            "is for variant = \"lora\", whose update is the product of two factors, not for \"{own}\""
        ));
    }
    if target_parameters(config).is_some() {
        return Some("experts have a product of factors each; take it out, or target_parameters".into());
    }
    None
}

/// Whether layers can hold their ranks. One that cannot is worth a note; where none can, the rank is a mistake.
fn ranks(
    variant: &dyn Variant<TchBackend>,
    options: &AdapterOptions,
    targets: &[TargetLayer],
) -> std::result::Result<Vec<String>, (&'static str, String)> {
    let mut beyond = Vec::new();
    for target in targets {
        let (request, _) = options.for_layer(target);
        let most = most_rank(&target.geometry);
        let numbers = |rank: usize| {
            let request = Request { rank, ..request.clone() };
            let shapes = variant.shapes(&target.geometry, &request).map_err(|error| ("variant", error.to_string()))?;
            let numbers = |shape: &Vec<usize>| shape.iter().try_fold(1usize, |all, side| all.checked_mul(*side));
            let sum = shapes.values().try_fold(0usize, |all, shape| all.checked_add(numbers(shape)?));
            Ok(sum.unwrap_or(usize::MAX))
        };
        // Variants whose tensors do not grow beyond a layer take a rank beyond it as all of the layer.
        if request.rank > most && numbers(request.rank)? > numbers(most)? {
            beyond.push((target, request.rank, most));
        }
    }
    let Some((layer, rank, most)) = beyond.iter().max_by_key(|(_, _, most)| *most) else { return Ok(Vec::new()) };
    let what = format!("rank {rank} is more than {} of the {} targeted layers can hold", beyond.len(), targets.len());
    match beyond.len() == targets.len() {
        true => Err((
            "lora_rank",
            format!("{what}: the largest, {}, has {most} directions; lower it to at most that", layer.path),
        )),
        false => {
            let (least, _, most) = beyond.iter().min_by_key(|(_, _, most)| *most).unwrap_or(&beyond[0]);
            Ok(vec![format!(
                "{what}, {} with {most} directions among them: there it costs memory and gives nothing; rank_pattern can lower it",
                least.path
            )])
        }
    }
}

/// The most that the rank of a change of a layer can be: the shorter side of its weight as a matrix.
fn most_rank(geometry: &LayerGeometry) -> usize {
    if let LayerGeometry::Experts { in_features, out_features, .. } = *geometry {
        return in_features.min(out_features).max(1);
    }
    let shape = geometry.weight_shape();
    let (rows, columns) = (shape.first().copied().unwrap_or(1), shape.iter().skip(1).product::<usize>());
    rows.min(columns).max(1)
}
