//! From hidden states to logits, and the loss of next tokens without ever holding the logits of all of them: some tokens
//! at a time. Where the head is frozen a kernel keeps the gradient of the hidden states in their place; where it carries an
//! adapter the logits are computed again in the backward pass.

use lora_torch::checkpoint::{Inputs, checkpoint};
use lora_torch::cross_entropy::CrossEntropy;
use lora_torch::tch::{Reduction, Tensor};

use super::Decoder;
use crate::layers::{AdaptableLayer, Pass, torch};
use crate::{Error, Result};

/// The layer from hidden states to logits, and what is done with them.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) lm_head: AdaptableLayer,
    pub(super) scale: f64,
    pub(super) cap: Option<f64>,
}

/// What a label is that is not trained.
pub const NO_LABEL: i64 = -100;

/// How tokens count in a loss.
#[derive(Debug, Default)]
pub struct LossOptions<'o> {
    /// What each label's loss is multiplied by, `[batch, tokens]`, f32; 1 without.
    pub weights: Option<&'o Tensor>,
    /// The share of the target that all tokens have alike, from 0 to 1.
    pub smoothing: f64,
}

/// Logits that exist at a time.
const LOGITS: i64 = 1 << 24;
/// Tokens at a time at least: fewer would read the head's weight too often.
const FEWEST: i64 = 64;

impl Head {
    pub(super) fn logits(&self, hidden: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut logits = self.lm_head.forward(hidden, pass)?;
        if self.scale != 1.0 {
            logits = logits.f_mul_scalar(self.scale)?;
        }
        if let Some(cap) = self.cap {
            logits = logits.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
        }
        Ok(logits)
    }

    /// The kernel that takes over where the head is frozen: it needs no second computation.
    fn kernel(&self, label_smoothing: f64) -> CrossEntropy {
        CrossEntropy { label_smoothing, soft_cap: self.cap, logit_scale: self.scale }
    }

    /// Cross entropies of tokens `[batch, tokens]`, in f32; 0 where there is no label.
    fn cross_entropy(&self, hidden: &Tensor, labels: &Tensor, smoothing: f64, pass: &Pass) -> Result<Tensor> {
        let logits = self.logits(hidden, pass)?.f_to_kind(lora_torch::tch::Kind::Float)?.f_flatten(0, 1)?;
        let none = None::<&Tensor>;
        let flat = labels.f_flatten(0, 1)?;
        let own = logits.f_cross_entropy_loss(&flat, none, Reduction::None, NO_LABEL, smoothing)?;
        Ok(own.f_view_as(labels)?)
    }
}

impl Decoder {
    /// Logits `[…, vocabulary]` of hidden states `[…, width]`, in the compute dtype.
    ///
    /// # Errors
    /// If the shape is another, or memory runs out.
    pub fn logits(&self, hidden: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.head().logits(hidden, pass)
    }

    /// The sum of the cross entropies of all labels, f32: divided by their number, the loss that others report.
    ///
    /// `hidden` `[batch, tokens, width]` is [`Decoder::hidden`]'s; `labels` `[batch, tokens]`, int64, are the tokens
    /// themselves or [`NO_LABEL`]. Each is foretold by the token before it, so that a row's first counts for nothing;
    /// that a document's first does not count either is for the labels to say.
    ///
    /// # Errors
    /// If the shapes do not fit, or memory runs out.
    pub fn loss(&self, hidden: &Tensor, labels: &Tensor, options: &LossOptions<'_>, pass: &Pass) -> Result<Tensor> {
        if let Some(head) = self.head().lm_head.frozen(pass) {
            self.check_labels(hidden, labels)?;
            let last = labels.size2()?.1 - 1;
            let (hidden, labels) = (hidden.f_narrow(1, 0, last)?, labels.f_narrow(1, 1, last)?);
            let weights = options.weights.map(|weights| weights.f_narrow(1, 1, last)).transpose()?;
            return Ok(self.head().kernel(options.smoothing).sum(&hidden, head, &labels, weights.as_ref())?);
        }
        let mut losses = self.token_losses(hidden, labels, options.smoothing, pass)?;
        if let Some(weights) = options.weights {
            losses = losses.f_mul(&weights.f_narrow(1, 1, labels.size2()?.1 - 1)?)?;
        }
        Ok(losses.f_sum(lora_torch::tch::Kind::Float)?)
    }

    fn check_labels(&self, hidden: &Tensor, labels: &Tensor) -> Result<()> {
        let (batch, tokens) = labels.size2()?;
        if hidden.size() != [batch, tokens, self.config().width as i64] || tokens < 2 {
            return Err(Error::Input {
                what: "labels",
                expected: format!("a label for each of the hidden states {:?}, two a row at least", hidden.size()),
                found: format!("{:?}", labels.size()),
            });
        }
        Ok(())
    }

    /// The cross entropy of each label but a row's first, `[batch, tokens - 1]`, f32; 0 for [`NO_LABEL`].
    ///
    /// # Errors
    /// As [`Decoder::loss`].
    pub fn token_losses(&self, hidden: &Tensor, labels: &Tensor, smoothing: f64, pass: &Pass) -> Result<Tensor> {
        self.check_labels(hidden, labels)?;
        let (batch, tokens) = labels.size2()?;
        if let Some(head) = self.head().lm_head.frozen(pass) {
            let (hidden, labels) = (hidden.f_narrow(1, 0, tokens - 1)?, labels.f_narrow(1, 1, tokens - 1)?);
            return Ok(self.head().kernel(smoothing).of_tokens(&hidden, head, &labels)?);
        }
        let chunk = (LOGITS / self.config().vocabulary as i64).max(FEWEST) / batch;
        let chunk = chunk.max(1);
        let hidden = hidden.f_narrow(1, 0, tokens - 1)?.f_split(chunk, 1)?;
        let labels = labels.f_narrow(1, 1, tokens - 1)?.f_split(chunk, 1)?;
        let mut losses = Vec::with_capacity(hidden.len());
        for (hidden, labels) in hidden.iter().zip(&labels) {
            let (head, pass) = (self.head().clone(), pass.clone());
            losses.push(checkpoint(&[hidden, labels], Inputs::Kept, move |inputs| {
                head.cross_entropy(&inputs[0], &inputs[1], smoothing, &pass).map_err(torch)
            })?);
        }
        Ok(Tensor::f_cat(&losses, 1)?)
    }
}
