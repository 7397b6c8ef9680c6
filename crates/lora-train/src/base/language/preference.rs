//! What a language model learns: the next token, or to prefer one answer to another. Of preference pairs a row holds two
//! documents each, the better answer before the worse one; here is how their tokens are summed up, and the losses.

use lora_data::texts::TokenRow;
use lora_models::layers::Pass;
use lora_models::networks::decoder::{Decoder, Rows};
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};
use lora_torch::tensor::from_f32;

use crate::base::{Inputs, Item};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// What is told of each step, by TRL's names.
pub(super) const FIGURES: &[&str] =
    &["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"];

/// What is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Objective {
    /// The next token.
    NextToken,
    /// Direct preference optimisation (arXiv 2305.18290): of the sums of log-probabilities of both answers, what the adapter
    /// adds to those of the base. `doubt` is the share of pairs that are taken to be the wrong way round (conservative DPO).
    Dpo { beta: f64, doubt: f64 },
    /// Odds ratio preference optimisation (arXiv 2403.07691): the better answer is learned, and its odds against the worse
    /// one's; of mean log-probabilities, without a reference.
    Orpo { lambda: f64 },
}

impl Objective {
    /// What a configuration asks for.
    ///
    /// # Errors
    /// For keys that mean nothing for the objective.
    pub(super) fn of(config: &TrainConfig) -> Result<Self> {
        let extra = &config.extra;
        let (beta, lambda) = (extra.number("dpo_beta"), extra.number("orpo_lambda"));
        let doubt = extra.number("label_smoothing").unwrap_or(0.0);
        let own = match extra.text("objective") {
            Some("dpo") => Self::Dpo { beta: beta.unwrap_or(0.1), doubt },
            Some("orpo") => Self::Orpo { lambda: lambda.unwrap_or(0.1) },
            _ => Self::NextToken,
        };
        let refused = |key, objective| {
            let message = format!("means nothing without objective = \"{objective}\"; take it out, or set that");
            Err(config.refused([(key, message)]).into())
        };
        match own {
            Self::NextToken | Self::Orpo { .. } if beta.is_some() => refused("dpo_beta", "dpo"),
            Self::NextToken | Self::Dpo { .. } if lambda.is_some() => refused("orpo_lambda", "orpo"),
            Self::Orpo { .. } if doubt > 0.0 => refused("label_smoothing", "sft\" or \"dpo"),
            _ => Ok(own),
        }
    }

    /// Whether it is of pairs.
    pub(super) fn is_of_pairs(self) -> bool {
        self != Self::NextToken
    }

    /// Adds to the tensors of rows of pairs those that say which tokens are whose:
    ///
    /// | name | shape | what |
    /// |---|---|---|
    /// | `answers` | `[batch, 2 · pairs, tokens - 1]` f32 | how much each token but the first counts for each answer |
    /// | `pairs` | `[batch, pairs]` f32 | how much each pair counts; 0 where a row has fewer |
    pub(super) fn lay_out(self, inputs: Inputs, rows: &[&TokenRow], items: &[Item], device: Device) -> Result<Inputs> {
        let tokens = inputs.get("tokens")?.size2()?.1 as usize;
        let of_row = |row: &&TokenRow| row.documents.len() / 2;
        // Few different numbers, so that there are few different shapes.
        let most = rows.iter().map(of_row).max().unwrap_or(0).next_power_of_two();
        let all: usize = rows.iter().map(of_row).sum();
        let mut answers = vec![0f32; rows.len() * 2 * most * (tokens - 1)];
        let mut pairs = vec![0f32; rows.len() * most];
        for (place, (row, item)) in rows.iter().zip(items).enumerate() {
            let own = &mut pairs[place * most..][..of_row(row)];
            own.fill((item.weight / all.max(1) as f64) as f32);
            let mut start = 0;
            for (number, length) in row.documents.iter().take(2 * of_row(row)).enumerate() {
                let learned: Vec<usize> = (start..start + length).filter(|&at| at > 0 && row.trained[at]).collect();
                let counts = match self {
                    Self::Orpo { .. } => 1.0 / learned.len().max(1) as f32,
                    _ => 1.0,
                };
                let own = &mut answers[(place * 2 * most + number) * (tokens - 1)..][..tokens - 1];
                learned.into_iter().for_each(|at| own[at - 1] = counts);
                start += length;
            }
        }
        Ok(inputs
            .with("answers", Some(from_f32(&answers, &[rows.len(), 2 * most, tokens - 1], device)?))
            .with("pairs", Some(from_f32(&pairs, &[rows.len(), most], device)?)))
    }

    /// The loss and [`FIGURES`], `[1 + figures]` f32, means over pairs: all of these for the backward pass and for people.
    pub(super) fn loss(self, decoder: &Decoder, rows: &Rows, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let likelihoods = |rows: &Rows, pass: &Pass| -> Result<[Tensor; 2]> {
            let hidden = decoder.hidden(rows, pass)?;
            let losses = decoder.token_losses(&hidden, inputs.get("labels")?, 0.0, pass)?;
            // A matrix product, where indices would be summed in any order on a GPU.
            let sums = inputs.get("answers")?.f_matmul(&losses.f_unsqueeze(-1)?)?.f_neg()?;
            let sums = sums.f_view([rows.tokens.size2()?.0, -1, 2])?;
            Ok([sums.f_select(-1, 0)?, sums.f_select(-1, 1)?])
        };
        let reference = match self {
            Self::Dpo { .. } => {
                let _guard = no_grad_guard();
                let rows = Rows {
                    tokens: rows.tokens.shallow_clone(),
                    positions: rows.positions.shallow_clone(),
                    documents: rows.documents.as_ref().map(Tensor::shallow_clone),
                    unpadded: None,
                    noise: None,
                    looked_up: rows.looked_up.shallow_clone(),
                };
                Some(likelihoods(&rows, &Pass { without_adapters: true, ..Pass::default() })?)
            }
            _ => None,
        };
        let own = likelihoods(rows, pass)?;
        let (losses, rewards) = self.of_pairs(&own, reference.as_ref())?;
        let [chosen, rejected] = rewards;
        let margins = chosen.f_sub(&rejected)?;
        let right = margins.f_gt(0.0)?.f_to_kind(Kind::Float)?;
        let [first, second] = own.map(|own| own.detach());
        let told = [losses, chosen, rejected, margins, right, first, second];
        let told = Tensor::f_stack(&told, 0)?.f_mul(inputs.get("pairs")?)?;
        Ok(told.f_sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float)?)
    }

    /// The loss of each pair `[batch, pairs]`, and the rewards of its answers without gradients.
    fn of_pairs(self, own: &[Tensor; 2], reference: Option<&[Tensor; 2]>) -> Result<(Tensor, [Tensor; 2])> {
        let [chosen, rejected] = own;
        let rewards = |factor: f64| -> Result<[Tensor; 2]> {
            let reward = |place: usize| -> Result<Tensor> {
                let own = match reference {
                    Some(reference) => own[place].f_sub(&reference[place])?,
                    None => own[place].shallow_clone(),
                };
                Ok(own.f_mul_scalar(factor)?)
            };
            Ok([reward(0)?, reward(1)?])
        };
        let (losses, rewards) = match self {
            Self::NextToken => return Err(Error::MissingInput { name: "pairs" }),
            Self::Dpo { beta, doubt } => {
                let rewards = rewards(beta)?;
                let margins = rewards[0].f_sub(&rewards[1])?;
                let mut losses = minus_log_sigmoid(&margins)?;
                if doubt > 0.0 {
                    let turned = minus_log_sigmoid(&margins.f_neg()?)?;
                    losses = losses.f_mul_scalar(1.0 - doubt)?.f_add(&turned.f_mul_scalar(doubt)?)?;
                }
                (losses, rewards)
            }
            Self::Orpo { lambda } => {
                let odds = |likelihood: &Tensor| -> Result<Tensor> {
                    // Of an answer that is certain they have no end.
                    let likelihood = likelihood.f_clamp_max(-1e-6)?;
                    Ok(likelihood.f_sub(&likelihood.f_expm1()?.f_neg()?.f_log()?)?)
                };
                let ratio = odds(chosen)?.f_sub(&odds(rejected)?)?;
                let losses = minus_log_sigmoid(&ratio)?.f_mul_scalar(lambda)?.f_sub(chosen)?;
                (losses, rewards(lambda)?)
            }
        };
        Ok((losses, rewards.map(|reward| reward.detach())))
    }
}

/// −log σ(x), in a form that has a kernel on the device without memory.
fn minus_log_sigmoid(input: &Tensor) -> Result<Tensor> {
    Ok(input.f_neg()?.f_softplus()?)
}
