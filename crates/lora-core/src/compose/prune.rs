//! Adding updates that were pruned first, so that they get less in each other's way: TIES (Yadav et al. 2023,
//! arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099) and plain pruning by magnitude, as PEFT's
//! `add_weighted_adapter` defines them. Element by element; what the elements are (factors, whole updates) is not known here.

use crate::random::Stream;
use crate::{Error, ModulePath, Result};

/// Which elements are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Those of the largest magnitudes.
    Largest,
    /// Random ones, divided by the density so that the expected value stays (DARE).
    Random {
        /// The same seed, module and place of the adapter in the list give the same elements.
        seed: u64,
    },
}

/// How adapters agree on an element's sign; those of the other sign are left out, and the rest is averaged (TIES).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of the sum.
    Total,
    /// The sign that more adapters have.
    Frequency,
}

/// Pruning before adding. TIES keeps the largest and elects signs; DARE-linear keeps random ones; DARE-TIES does that and
/// elects signs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pruning {
    /// Which elements are kept.
    pub keep: Keep,
    /// The share that is kept, above 0 and at most 1.
    pub density: f64,
    /// The election, if any; before the weights are applied.
    pub majority: Option<MajoritySign>,
}

impl Pruning {
    /// The random numbers of one tensor of a module.
    pub(super) fn stream(&self, path: &ModulePath, side: &str) -> Stream {
        let seed = match self.keep {
            Keep::Largest => 0,
            Keep::Random { seed } => seed,
        };
        Stream::new(seed).at("dare").at(&path.to_string()).at(side)
    }

    /// One tensor out of the same one of several adapters, all of one length.
    pub(super) fn merge(&self, parts: &[&[f32]], weights: &[f64], stream: &Stream) -> Result<Vec<f32>> {
        if !(self.density > 0.0 && self.density <= 1.0) {
            return Err(Error::Option {
                key: "density",
                value: self.density.to_string(),
                reason: "expected a share above 0 and at most 1".into(),
            });
        }
        let pruned: Vec<Vec<f32>> =
            parts.iter().zip(0..).map(|(part, index)| self.prune(part, stream.with(index))).collect();
        let element = |place: usize| {
            let values = pruned.iter().map(|part| part[place]);
            let weighted = values.clone().zip(weights).map(|(value, weight)| (value, f64::from(value) * weight));
            let Some(majority) = self.majority else { return weighted.map(|(_, value)| value).sum::<f64>() };
            let balance: f32 = match majority {
                MajoritySign::Total => values.sum(),
                MajoritySign::Frequency => values.filter(|value| *value != 0.0).map(f32::signum).sum(),
            };
            let agrees = |value: f32| if balance >= 0.0 { value > 0.0 } else { value < 0.0 };
            let (mut sum, mut count) = (0.0, 0);
            for (_, value) in weighted.filter(|(value, _)| agrees(*value)) {
                sum += value;
                count += 1;
            }
            sum / f64::from(count.max(1))
        };
        Ok((0..parts[0].len()).map(|place| element(place) as f32).collect())
    }

    fn prune(&self, values: &[f32], mut random: Stream) -> Vec<f32> {
        if self.density >= 1.0 {
            return values.to_vec();
        }
        match self.keep {
            Keep::Random { .. } => {
                let keep = self.density as f32;
                values.iter().map(|value| if random.uniform() < keep { value / keep } else { 0.0 }).collect()
            }
            Keep::Largest => {
                let count = (self.density * values.len() as f64) as usize;
                let mut order: Vec<usize> = (0..values.len()).collect();
                if count > 0 {
                    order.select_nth_unstable_by(count - 1, |&a, &b| {
                        values[b].abs().total_cmp(&values[a].abs()).then(a.cmp(&b))
                    });
                }
                let mut kept = vec![0.0; values.len()];
                order[..count].iter().for_each(|&place| kept[place] = values[place]);
                kept
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(pruning: Pruning, parts: &[&[f32]], weights: &[f64]) -> Vec<f32> {
        pruning.merge(parts, weights, &Stream::new(1)).unwrap()
    }

    #[test]
    fn signs_are_elected_and_the_agreeing_averaged() {
        let parts: [&[f32]; 3] = [&[4.0, -1.0, 0.0], &[-1.0, -1.0, 0.0], &[-1.0, 3.0, 0.0]];
        let ties = |majority| Pruning { keep: Keep::Largest, density: 1.0, majority: Some(majority) };
        let weights = [1.0, 2.0, 3.0];
        assert_eq!(merge(ties(MajoritySign::Total), &parts, &weights), [4.0, 9.0, 0.0]);
        assert_eq!(merge(ties(MajoritySign::Frequency), &parts, &weights), [-2.5, -1.5, 0.0]);
    }

    #[test]
    fn the_largest_are_kept_and_random_ones_keep_the_mean() {
        let largest = Pruning { keep: Keep::Largest, density: 0.5, majority: None };
        assert_eq!(merge(largest, &[&[1.0, -4.0, 2.0, 3.0]], &[2.0]), [0.0, -8.0, 0.0, 6.0]);
        let dare = |seed| Pruning { keep: Keep::Random { seed }, density: 0.25, majority: None };
        let stream = |seed| dare(seed).stream(&ModulePath::new(crate::Component::UNET, "conv_in"), "up");
        let ones = vec![1.0; 40_000];
        let kept = dare(7).merge(&[&ones], &[1.0], &stream(7)).unwrap();
        assert!(kept.iter().all(|&value| value == 0.0 || value == 4.0));
        let mean = kept.iter().sum::<f32>() / 40_000.0;
        // Standard deviation of the mean: √(0.25 · 0.75 / 40000) · 4 = 0.0087; five of them.
        assert!((mean - 1.0).abs() < 0.044, "{mean}");
        assert_eq!(kept, dare(7).merge(&[&ones], &[1.0], &stream(7)).unwrap());
        assert_ne!(kept, dare(8).merge(&[&ones], &[1.0], &stream(8)).unwrap());
        for density in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(Pruning { density, ..largest }.merge(&[&ones], &[1.0], &Stream::new(0)).is_err());
        }
    }
}
