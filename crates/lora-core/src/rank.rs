//! How many singular values an update keeps.

use crate::{Error, Result};

/// The rule for a rank. Singular values come from the largest down; at least one is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankPolicy {
    /// So many.
    Fixed(usize),
    /// Those above the largest divided by this (sd-scripts' `sv_ratio`).
    Ratio(f64),
    /// The fewest whose sum reaches this share of the whole (sd-scripts' `sv_cumulative`).
    Cumulative(f64),
    /// The fewest whose norm (root of the sum of squares) reaches this share of the whole (sd-scripts' `sv_fro`).
    Frobenius(f64),
}

impl RankPolicy {
    /// Whether the rule says anything: a rank from 1, a ratio from 1, a share above 0 and up to 1.
    ///
    /// # Errors
    /// [`Error::Option`] with what is expected.
    pub fn check(&self) -> Result<()> {
        let share = |share: f64| share > 0.0 && share <= 1.0;
        let (fits, key, value, reason) = match *self {
            RankPolicy::Fixed(rank) => (rank > 0, "rank", rank.to_string(), "expected a whole number from 1"),
            RankPolicy::Ratio(ratio) => {
                let fits = ratio.is_finite() && ratio >= 1.0;
                (fits, "sv_ratio", ratio.to_string(), "expected a number from 1, which the largest value is divided by")
            }
            RankPolicy::Cumulative(own) => {
                (share(own), "sv_cumulative", own.to_string(), "expected a share above 0 and up to 1")
            }
            RankPolicy::Frobenius(own) => {
                (share(own), "sv_fro", own.to_string(), "expected a share above 0 and up to 1")
            }
        };
        if fits { Ok(()) } else { Err(Error::Option { key, value, reason: reason.into() }) }
    }

    /// The rank, at most `limit`.
    pub fn choose(&self, values: &[f32], limit: usize) -> usize {
        let total = |power: i32| values.iter().map(|&value| f64::from(value).powi(power)).sum::<f64>();
        let reaching = |power: i32, wanted: f64| {
            let mut sum = 0.0;
            let below = values.iter().take_while(|&&value| {
                sum += f64::from(value).powi(power);
                sum < wanted
            });
            below.count() + 1
        };
        let rank = match *self {
            RankPolicy::Fixed(rank) => rank,
            RankPolicy::Ratio(ratio) => {
                let least = f64::from(values.first().copied().unwrap_or(0.0)) / ratio;
                values.iter().take_while(|&&value| f64::from(value) > least).count()
            }
            RankPolicy::Cumulative(share) => reaching(1, share * total(1)),
            RankPolicy::Frobenius(share) => reaching(2, share * share * total(2)),
        };
        rank.min(limit).min(values.len()).max(1)
    }
}

/// The share of the update's norm that the first `rank` singular values keep, 0 to 1.
pub fn kept(values: &[f32], rank: usize) -> f64 {
    let norm = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    let whole = norm(values);
    if whole == 0.0 { 1.0 } else { norm(&values[..rank.min(values.len())]) / whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_keep_nothing_are_refused() {
        let wrong = [
            RankPolicy::Fixed(0),
            RankPolicy::Ratio(0.0),
            RankPolicy::Ratio(f64::NAN),
            RankPolicy::Cumulative(0.0),
            RankPolicy::Frobenius(f64::NAN),
            RankPolicy::Frobenius(1.5),
        ];
        for policy in wrong {
            assert!(policy.check().unwrap_err().to_string().contains("expected"), "{policy:?}");
        }
        for policy in [RankPolicy::Fixed(1), RankPolicy::Ratio(2.0), RankPolicy::Frobenius(1.0)] {
            policy.check().unwrap();
        }
    }

    #[test]
    fn policies_keep_what_they_say() {
        let values = [4.0, 2.0, 1.0, 1.0];
        for (policy, rank) in [
            (RankPolicy::Fixed(3), 3),
            (RankPolicy::Fixed(9), 4),
            (RankPolicy::Ratio(2.0), 1),
            (RankPolicy::Ratio(3.0), 2),
            (RankPolicy::Cumulative(0.75), 2),
            (RankPolicy::Cumulative(0.76), 3),
            // 16 of 22; 20 of 22.
            (RankPolicy::Frobenius(0.85), 1),
            (RankPolicy::Frobenius(0.9), 2),
        ] {
            assert_eq!(policy.choose(&values, 8), rank, "{policy:?}");
        }
        assert_eq!(RankPolicy::Fixed(4).choose(&values, 2), 2);
        assert_eq!(RankPolicy::Ratio(2.0).choose(&[0.0], 2), 1);
        assert!((kept(&values, 1) - (16f64 / 22.0).sqrt()).abs() < 1e-12);
    }
}
