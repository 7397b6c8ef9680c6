//! A trained update at another rank and alpha, for a run that goes on from it: cut to its largest singular values where it
//! has more ranks, filled up with what a new adapter begins with where it has fewer. Whole updates are taken apart in
//! `extract`.

use super::factors::Factors;
use super::{Method, combine_modules};
use crate::rank::RankPolicy;
use crate::variant::LoraFactors;
use crate::{AdapterModule, Error, HostTensor, ModulePath, Result};

/// Variants whose only tensors that the rank shows in are the two factors of plain LoRA: the formula's other tensors stay
/// as they are.
const WITH_FACTORS: &[&str] = &["lora", "dora", "lycoris-dora"];

/// Whether a module's rank can be changed by [`refit`].
pub fn can_refit(module: &AdapterModule) -> bool {
    WITH_FACTORS.contains(&module.variant.as_str()) && factors_of(module).is_some() && !has_core(module)
}

/// A module with the rank and alpha of `fresh`, which is what a new adapter begins with on its layer and changes nothing.
/// Of more ranks the largest singular values are kept; to fewer the rest of `fresh` is added, so that the update stays the
/// same. The share of the norm of `up · down` that is kept comes with it; 1 is all of it.
///
/// # Errors
/// [`Error::Unsupported`] where [`can_refit`] says no; [`Error::Shape`] where the two are of layers of other sizes;
/// [`Error::NoConvergence`] where the module holds NaN or infinity.
pub fn refit(path: &ModulePath, module: &AdapterModule, fresh: &AdapterModule) -> Result<(AdapterModule, f64)> {
    let refused = |reason: &str| Error::Unsupported {
        variant: module.variant.clone(),
        layer: path.to_string(),
        reason: reason.to_owned(),
    };
    if !can_refit(module) {
        return Err(refused("its tensors have no form of another rank"));
    }
    let plain = |module: &AdapterModule| factors_of(module).ok_or_else(|| refused("a new one has other factors"));
    let (own, begun) = (plain(module)?, plain(fresh)?);
    let (own, kept) = match own.rank > begun.rank {
        true => combine_modules(path, &[(&own, 1.0)], Method::Svd(RankPolicy::Fixed(begun.rank)))?,
        false => (own, 1.0),
    };
    let filled = fill(path, &own, &begun)?;
    let mut tensors = module.tensors.clone();
    tensors.extend(filled.tensors);
    let result = AdapterModule { variant: module.variant.clone(), tensors, rank: fresh.rank, alpha: fresh.alpha };
    Ok((result, kept))
}

/// A module's two factors alone, as a plain LoRA.
fn factors_of(module: &AdapterModule) -> Option<AdapterModule> {
    let embedding = module.tensors.contains_key(LoraFactors::names(true)[1]);
    let [down, up] = LoraFactors::names(embedding).map(|name| module.tensors.get(name).cloned());
    Some(AdapterModule::of_factors(down?, up?, embedding, module.rank, module.alpha))
}

/// Whether there is a core between the factors (Tucker), or an update of the bias that has the scale.
fn has_core(module: &AdapterModule) -> bool {
    ["mid", "bias"].iter().any(|name| module.tensors.contains_key(*name))
}

/// The factors of `begun` with those of `own` in the place of its first ranks.
fn fill(path: &ModulePath, own: &AdapterModule, begun: &AdapterModule) -> Result<AdapterModule> {
    let (part, whole) = (Factors::of(path, own)?, Factors::of(path, begun)?);
    if (part.rows, part.columns, part.embedding) != (whole.rows, whole.columns, whole.embedding) {
        return Err(Error::Shape {
            what: format!("adapter of {path}"),
            expected: format!("an update of {}×{}", whole.rows, whole.columns),
            found: format!("{}×{}", part.rows, part.columns),
        });
    }
    let ratio = own.scale() / begun.scale();
    let (mut up, mut down) = (whole.up, whole.down);
    down[..part.rank * part.columns].copy_from_slice(&part.down);
    for row in 0..part.rows {
        let from = &part.up[row * part.rank..][..part.rank];
        let to = &mut up[row * whole.rank..][..part.rank];
        to.iter_mut().zip(from).for_each(|(to, from)| *to = (f64::from(*from) * ratio) as f32);
    }
    let shapes = |names: [&str; 2]| names.map(|name| begun.tensors[name].shape().to_vec());
    let [down_shape, up_shape] = shapes(LoraFactors::names(whole.embedding));
    let (down, up) = (HostTensor::from_f32(down_shape, down)?, HostTensor::from_f32(up_shape, up)?);
    Ok(AdapterModule::of_factors(down, up, whole.embedding, begun.rank, begun.alpha))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Component;
    use crate::conformance::distance;
    use crate::random::Stream;

    fn random(shape: &[usize], seed: u64) -> HostTensor {
        HostTensor::from_f32(shape, Stream::new(seed).normals(shape.iter().product())).unwrap()
    }

    fn module(rank: usize, alpha: f64, down: &[usize], seed: u64) -> AdapterModule {
        let ones: Vec<usize> = down.iter().skip(1).map(|_| 1).collect();
        let (down, up) = (random(&[&[rank], down].concat(), seed), random(&[&[20, rank], &*ones].concat(), seed + 1));
        AdapterModule::of_factors(down, up, false, rank, alpha)
    }

    /// What a new LoRA begins with.
    fn fresh(rank: usize, alpha: f64, down: &[usize]) -> AdapterModule {
        let mut fresh = module(rank, alpha, down, 77);
        let up = HostTensor::zeros(fresh.tensors["up"].shape());
        fresh.tensors.insert("up".into(), up);
        fresh
    }

    fn update(module: &AdapterModule) -> HostTensor {
        let path = ModulePath::new(Component::UNET, "a");
        let factors = Factors::of(&path, &factors_of(module).unwrap()).unwrap();
        HostTensor::from_f32([factors.rows, factors.columns], factors.update(module.scale())).unwrap()
    }

    #[test]
    fn more_ranks_change_nothing_and_can_all_learn() {
        let path = ModulePath::new(Component::UNET, "a");
        for down in [&[12][..], &[6, 3, 3]] {
            let own = module(3, 1.5, down, 1);
            let (grown, kept) = refit(&path, &own, &fresh(8, 4.0, down)).unwrap();
            assert_eq!((grown.rank, grown.alpha, kept), (8, 4.0, 1.0));
            assert!(distance(&update(&grown), &update(&own)) < 1e-6);
            // New ranks are a new adapter's: of a `down` that is there and an `up` that is zero.
            let begun = fresh(8, 4.0, down);
            let columns: usize = down.iter().product();
            let rest = |module: &AdapterModule| module.tensors["down"].to_f32()[3 * columns..].to_vec();
            assert_eq!(rest(&grown), rest(&begun));
            let up = grown.tensors["up"].to_f32().into_owned();
            assert!(up.chunks(8).all(|row| row[3..].iter().all(|&value| value == 0.0) && row[0] != 0.0));
        }
    }

    #[test]
    fn fewer_ranks_keep_the_best_approximation_and_say_what_of_it() {
        let path = ModulePath::new(Component::UNET, "a");
        let own = module(6, 3.0, &[6, 3, 3], 1);
        let (cut, kept) = refit(&path, &own, &fresh(2, 1.0, &[6, 3, 3])).unwrap();
        assert_eq!((cut.rank, cut.alpha, cut.tensors["down"].shape()), (2, 1.0, &[2, 6, 3, 3][..]));
        // The best there is: what is lost and what is kept stand at a right angle.
        let lost = distance(&update(&cut), &update(&own));
        assert!(kept < 0.95 && (lost - (1.0 - kept * kept).sqrt()).abs() < 1e-4, "{kept} {lost}");
        // A layer that is too small for the rank is filled up again.
        let (all, kept) = refit(&path, &module(24, 3.0, &[12], 1), &fresh(16, 1.0, &[12])).unwrap();
        assert!(all.tensors["down"].shape() == [16, 12] && (kept - 1.0).abs() < 1e-6);
        assert!(distance(&update(&all), &update(&module(24, 3.0, &[12], 1))) < 1e-5);
    }

    #[test]
    fn magnitudes_stay_and_what_has_no_such_form_is_refused() {
        let path = ModulePath::new(Component::UNET, "a");
        let mut own = module(3, 1.5, &[12], 1);
        own.variant = "dora".into();
        own.tensors.insert("magnitude".into(), random(&[20], 5));
        let mut begun = fresh(4, 2.0, &[12]);
        begun.variant = "dora".into();
        begun.tensors.insert("magnitude".into(), random(&[20], 6));
        let (grown, _) = refit(&path, &own, &begun).unwrap();
        assert_eq!((&*grown.variant, &grown.tensors["magnitude"]), ("dora", &own.tensors["magnitude"]));
        for (name, variant) in [("mid", "lora"), ("bias", "lora"), ("magnitude", "lokr")] {
            let mut other = own.clone();
            other.variant = variant.into();
            other.tensors.insert(name.into(), random(&[3, 3], 1));
            assert!(!can_refit(&other) && refit(&path, &other, &begun).is_err(), "{name} {variant}");
        }
        let wide = AdapterModule {
            tensors: BTreeMap::from([("down".into(), random(&[4, 13], 1)), ("up".into(), random(&[20, 4], 1))]),
            ..fresh(4, 2.0, &[12])
        };
        assert!(refit(&path, &own, &wide).unwrap_err().to_string().contains("20×12"));
    }
}
