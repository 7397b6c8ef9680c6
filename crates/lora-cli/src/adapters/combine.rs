//! `lora combine`: one LoRA of several, or the running average of one run's saves.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use lora_cli::arguments::Precision;
use lora_core::compose::{self, Keep, MajoritySign, Method, Pruning};
use lora_core::{Adapter, DType, Strength};
use lora_io::family::Family;
use lora_io::merge::{self, Weighted};
use lora_io::{adapter, metadata};

use super::convert::Layout;
use super::{Rank, summary, weighted, write};
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Adapters; those of --ema in the order in which they were saved.
    #[arg(required_unless_present = "lora")]
    files: Vec<String>,
    /// Adapter and strength, as of `lora merge`.
    #[arg(long)]
    lora: Vec<String>,
    /// Output file.
    #[arg(long)]
    out: PathBuf,
    /// How the updates become one. With a rule for ranks, the result is taken apart again to those ranks.
    #[arg(long, default_value = "sum")]
    method: CombineMethod,
    /// The running average of saves of one run, tensor by tensor: the first counts DECAYⁿ⁻¹ of n, the k-th (1 - DECAY)
    /// · DECAYⁿ⁻ᵏ.
    #[arg(long, value_name = "DECAY", conflicts_with_all = ["method", "density", "rank", "sv_ratio", "sv_cumulative", "sv_fro"])]
    ema: Option<f64>,
    /// Share of the numbers that the pruning methods keep.
    #[arg(long)]
    density: Option<f64>,
    /// How `ties` and `dare-ties` elect signs.
    #[arg(long, default_value = "total")]
    majority_sign: Majority,
    /// Seed of the numbers that `dare-linear` and `dare-ties` keep.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    rank: Rank,
    /// Format of the output (default: the one that most programs load for the base).
    #[arg(long)]
    to: Option<Layout>,
    /// Type of the output's numbers (default: the first adapter's).
    #[arg(long)]
    dtype: Option<Precision>,
}

/// Methods of combining on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum CombineMethod {
    /// The exact sum; ranks add up.
    Sum,
    /// Factors one by one as PEFT's `linear` (equal ranks only; not the sum of the updates).
    Linear,
    /// The largest numbers, elected signs, the mean of those that agree.
    Ties,
    /// Random numbers, enlarged so that the mean stays.
    DareLinear,
    /// Random numbers, elected signs.
    DareTies,
    /// The largest numbers.
    MagnitudePrune,
}

/// Elections of signs on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Majority {
    /// The sign of the sum.
    Total,
    /// The sign that more adapters have.
    Frequency,
}

impl Arguments {
    fn method(&self) -> Result<Method, Failure> {
        let policy = self.rank.policy()?;
        let random = Keep::Random { seed: self.seed };
        let sign = Some(match self.majority_sign {
            Majority::Total => MajoritySign::Total,
            Majority::Frequency => MajoritySign::Frequency,
        });
        let (keep, majority) = match self.method {
            CombineMethod::Sum if self.density.is_none() => {
                return Ok(policy.map_or(Method::Concatenate, Method::Svd));
            }
            CombineMethod::Linear if policy.is_none() && self.density.is_none() => return Ok(Method::Linear),
            CombineMethod::Linear if policy.is_some() => {
                return Err(Failure::Usage("--method linear keeps the rank; leave the rule for ranks out".into()));
            }
            CombineMethod::Sum | CombineMethod::Linear => {
                return Err(Failure::Usage("--density belongs to the pruning methods".into()));
            }
            CombineMethod::Ties => (Keep::Largest, sign),
            CombineMethod::MagnitudePrune => (Keep::Largest, None),
            CombineMethod::DareLinear => (random, None),
            CombineMethod::DareTies => (random, sign),
        };
        let density =
            self.density.ok_or_else(|| Failure::Usage("this method needs --density, for instance 0.5".into()))?;
        let pruning = Pruning { keep, density, majority };
        Ok(policy.map_or(Method::Pruned(pruning), |policy| Method::PrunedSvd(pruning, policy)))
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let files = [&*arguments.files, &*arguments.lora].concat();
    let (adapters, dtype) = weighted(&files, &arguments.out)?;
    let (family, others) = families(&adapters);
    if let (Some(first), Some(second)) = (family, others.first()) {
        eprintln!("note: these adapters seem to be made for different base models: {first} and {second}");
    }
    for own in &adapters {
        if let Some(family) = adapter::family(&own.adapter) {
            merge::check_blocks(Path::new(&own.name), family, &own.strength)?;
        }
    }
    let dtype = arguments.dtype.map(DType::from).or(dtype).unwrap_or_default();
    if let Some(decay) = arguments.ema {
        return ema(arguments, &adapters, decay, dtype);
    }
    let method = arguments.method()?;
    let format = arguments.to.map_or_else(|| adapter::usual_format(&adapters[0].adapter, family), Layout::format);
    // What goes factor by factor is of the layers that the files have; the others of those that are written.
    let by_update = matches!(method, Method::Concatenate | Method::Svd(_) | Method::PrunedSvd(..));
    let layers: Vec<_> = adapters
        .iter()
        .map(|own| if by_update { adapter::in_layers_of(format, &own.adapter, family) } else { own.adapter.clone() })
        .collect();
    let parts: Vec<_> = layers.iter().zip(&adapters).map(|(layers, own)| (layers, &own.strength)).collect();
    let (mut combined, outcomes) =
        compose::combine(&parts, method).map_err(|error| Failure::Work(error.to_string()))?;
    if combined.modules.is_empty() {
        return Err(Failure::Work("nothing is left: the strength of every adapter is 0".into()));
    }
    summary(&outcomes, &combined, dtype);
    say_base(&mut combined, &adapters, family);
    let names: Vec<_> = adapters.iter().map(|weighted| weighted.name.as_str()).collect();
    combined.metadata.insert("lora_combined".into(), names.join(", "));
    output(arguments, combined, family, dtype)
}

/// The family that all adapters are made for, as far as they show one, and the families that do not go with it. One
/// whose adapters have another's names is told by metadata alone, which not all of the files may have.
fn families(adapters: &[Weighted]) -> (Option<&'static Family>, Vec<&'static Family>) {
    let told: Vec<_> = adapters.iter().filter_map(|weighted| adapter::family(&weighted.adapter)).collect();
    let goes = |own: &Family, other: &Family| own == other || own.signs.named_as == Some(other);
    let of_all = told.iter().copied().find(|own| told.iter().all(|other| goes(own, other)));
    let family = of_all.or(told.first().copied());
    let others = told.into_iter().filter(|other| family.is_some_and(|own| !goes(own, other))).collect();
    (family, others)
}

/// Has a combined adapter say of its base what those that it was made of say.
fn say_base(combined: &mut Adapter, adapters: &[Weighted], family: Option<&Family>) {
    if family.is_none_or(|family| family.image) {
        metadata::describe(combined, None);
    }
    let is_of = |own: &&Weighted| adapter::family(&own.adapter) == family;
    let (first, others): (Vec<_>, Vec<_>) = adapters.iter().partition(is_of);
    combined.metadata.extend(metadata::of_base(first.into_iter().chain(others).map(|own| &own.adapter)));
    if adapter::family(combined) != family {
        metadata::describe(combined, family);
    }
}

/// Writes the result in the format that was asked for, or the usual one.
fn output(arguments: &Arguments, result: Adapter, family: Option<&Family>, dtype: DType) -> Result<(), Failure> {
    match arguments.to {
        Some(layout) => layout.write(&arguments.out, result, family, dtype),
        None => write(&arguments.out, &result, adapter::usual_format(&result, family), family, dtype),
    }
}

/// The running average of one run's saves; what the last one says of the run stays.
fn ema(arguments: &Arguments, adapters: &[Weighted], decay: f64, dtype: DType) -> Result<(), Failure> {
    if !(0.0..1.0).contains(&decay) {
        return Err(Failure::Usage(format!("--ema {decay}: expected a decay from 0 to below 1, for instance 0.8")));
    }
    if let Some(own) = adapters.iter().find(|own| own.strength != Strength::default()) {
        return Err(Failure::Usage(format!("--ema averages {} by its own weights; leave the strength out", own.name)));
    }
    let weights = compose::ema_weights(adapters.len(), decay);
    let all: Vec<_> = adapters.iter().map(|own| &own.adapter).collect();
    let mut averaged = compose::average(&all, &weights).map_err(|error| Failure::Work(error.to_string()))?;
    averaged.metadata = adapters.last().map(|own| own.adapter.metadata.clone()).unwrap_or_default();
    metadata::refresh(&mut averaged);
    let of = |(own, weight): (&Weighted, &f64)| format!("{} {weight:.4}", own.name);
    let told = adapters.iter().zip(&weights).map(of).collect::<Vec<_>>().join(", ");
    eprintln!("weights: {told}");
    averaged.metadata.insert("lora_ema".into(), format!("decay {decay}: {told}"));
    let (family, _) = families(adapters);
    output(arguments, averaged, family, dtype)
}
