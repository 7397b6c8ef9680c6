//! The weighted mean of adapters tensor by tensor: of saves of one run, as a running average of its trained numbers would have
//! made it. Sums of updates are the other methods' business.
//!
//! The mean of factors is not the factor of the mean: `Σ wᵢ Bᵢ · Σ wᵢ Aᵢ` has cross terms, and two runs may have learnt the
//! same update in other bases of its rank, whose mean is nothing. Saves of one run have one basis, which moves a little from
//! each to the next; there the cross terms are of second order in that, the rank stays, and any variant's tensors can be
//! averaged. It is what averaging during training does (`ema_decay`), seen at the saves alone.

use std::collections::BTreeMap;

use crate::{Adapter, AdapterModule, Error, HostTensor, ModulePath, Result};

/// The weights of `count` saves, in their order, in an exponential moving average that begins with the first and takes in each
/// of the others: `decayⁿ⁻¹` for the first of n and `(1 - decay) · decayⁿ⁻ᵏ` for the k-th; their sum is 1.
pub fn ema_weights(count: usize, decay: f64) -> Vec<f64> {
    let own = |place: usize| if place == 0 { 1.0 } else { 1.0 - decay };
    (0..count).map(|place| own(place) * decay.powi((count - 1 - place) as i32)).collect()
}

/// The mean of adapters of the same modules and ranks, each with its weight.
///
/// # Errors
/// [`Error::Option`] where adapters differ in a module, its variant, rank, alpha or tensors, and where there are no adapters or
/// not as many weights.
pub fn average(adapters: &[&Adapter], weights: &[f64]) -> Result<Adapter> {
    let wrong = |reason: String| Error::Option { key: "ema", value: "saves of one run".into(), reason };
    let [first, ..] = adapters else { return Err(wrong("there are none".into())) };
    if adapters.len() != weights.len() {
        return Err(wrong(format!("{} weights for {} adapters", weights.len(), adapters.len())));
    }
    let mut modules = BTreeMap::new();
    for (path, module) in &first.modules {
        let all: Option<Vec<&AdapterModule>> = adapters.iter().map(|adapter| adapter.modules.get(path)).collect();
        let all = all.ok_or_else(|| wrong(format!("not all have {path}")))?;
        modules.insert(path.clone(), mean(path, module, &all, weights).map_err(wrong)?);
    }
    if let Some(other) = adapters.iter().find(|adapter| adapter.modules.len() != modules.len()) {
        let path = other.modules.keys().find(|path| !modules.contains_key(*path));
        return Err(wrong(format!("not all have {}", path.map_or_else(String::new, ToString::to_string))));
    }
    Ok(Adapter { modules, metadata: first.metadata.clone() })
}

fn mean(
    path: &ModulePath,
    first: &AdapterModule,
    all: &[&AdapterModule],
    weights: &[f64],
) -> std::result::Result<AdapterModule, String> {
    let like = |module: &&AdapterModule| {
        (&module.variant, module.rank, module.alpha) == (&first.variant, first.rank, first.alpha)
            && module.tensors.len() == first.tensors.len()
    };
    if let Some(other) = all.iter().find(|module| !like(module)) {
        return Err(format!(
            "{path} is `{}` of rank {} and alpha {} in one and `{}` of {} and {} in another",
            first.variant, first.rank, first.alpha, other.variant, other.rank, other.alpha
        ));
    }
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &first.tensors {
        let mut sum = vec![0.0f64; tensor.elements()];
        for (module, weight) in all.iter().zip(weights) {
            let own = module.tensors.get(name).filter(|own| own.shape() == tensor.shape());
            let own = own.ok_or_else(|| format!("`{name}` of {path} has not the same shape in all"))?;
            sum.iter_mut().zip(&*own.to_f32()).for_each(|(sum, value)| *sum += weight * f64::from(*value));
        }
        let values = sum.into_iter().map(|value| value as f32).collect();
        let averaged = HostTensor::from_f32(tensor.shape(), values).map_err(|error| error.to_string())?;
        tensors.insert(name.clone(), averaged);
    }
    Ok(AdapterModule { tensors, ..first.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Component;
    use crate::random::Stream;

    fn save(step: u64, rank: usize) -> Adapter {
        let values = |name: &str, shape: [usize; 2]| {
            HostTensor::from_f32(shape, Stream::new(step).at(name).normals(shape[0] * shape[1])).unwrap()
        };
        let module = AdapterModule::of_factors(values("down", [rank, 6]), values("up", [5, rank]), false, rank, 2.0);
        let path = ModulePath::new(Component::UNET, "mid_block.resnets.0.conv1");
        Adapter { modules: BTreeMap::from([(path, module)]), metadata: BTreeMap::new() }
    }

    #[test]
    fn the_mean_is_the_one_of_a_running_average_that_begins_with_the_first() {
        let saves: Vec<Adapter> = (1..=5).map(|step| save(step, 3)).collect();
        let (weights, decay) = (ema_weights(5, 0.7), 0.7f32);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((weights[0] - 0.7f64.powi(4)).abs() < 1e-12 && (weights[4] - 0.3).abs() < 1e-12);
        assert_eq!((ema_weights(1, 0.9), ema_weights(3, 0.0)), (vec![1.0], vec![0.0, 0.0, 1.0]));
        let averaged = average(&saves.iter().collect::<Vec<_>>(), &weights).unwrap();
        for name in ["down", "up"] {
            let of = |adapter: &Adapter| adapter.modules.values().next().unwrap().tensors[name].to_f32().into_owned();
            let mut running = of(&saves[0]);
            for save in &saves[1..] {
                running
                    .iter_mut()
                    .zip(of(save))
                    .for_each(|(running, value)| *running += (1.0 - decay) * (value - *running));
            }
            assert!(of(&averaged).iter().zip(&running).all(|(own, other)| (own - other).abs() < 1e-6), "{name}");
        }
    }

    #[test]
    fn what_is_not_of_one_run_is_refused() {
        let (one, other) = (save(1, 3), save(2, 4));
        let error = average(&[&one, &other], &[0.5, 0.5]).unwrap_err().to_string();
        assert!(error.contains("rank 3") && error.contains("mid_block"), "{error}");
        let none = Adapter::default();
        assert!(average(&[&one, &none], &[0.5, 0.5]).unwrap_err().to_string().contains("not all have"));
        assert!(average(&[&none, &one], &[0.5, 0.5]).unwrap_err().to_string().contains("not all have unet."));
        assert!(average(&[], &[]).is_err() && average(&[&one], &[0.5, 0.5]).is_err());
    }
}
