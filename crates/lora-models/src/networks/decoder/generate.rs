//! Writing texts with a decoder: keys and values of the tokens so far are kept, and the next token is drawn from the
//! logits. Tokens come and go as numbers; texts are made of them outside.

use std::ops::ControlFlow;

use lora_core::random::Stream;
use lora_torch::dry;
use lora_torch::tch::{Kind, Tensor, no_grad};
use lora_torch::tensor::to_host;

use super::{Decoder, Rows};
use crate::layers::Pass;
use crate::{Error, Result};

/// How tokens are drawn, and when the text ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this before a token is drawn; 0 takes the likeliest.
    pub temperature: f64,
    /// Only the likeliest tokens that together are at least as likely as this are drawn from; 1 is all.
    pub top_p: f64,
    /// Draws are a function of this and the token's place alone.
    pub seed: u64,
    /// Tokens at most.
    pub tokens: usize,
    /// Tokens after which the text ends; they are given out too.
    pub stop: Vec<i64>,
}

impl Sampling {
    /// The likeliest tokens, at most so many.
    pub fn greedy(tokens: usize) -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0, tokens, stop: Vec::new() }
    }
}

/// Keys and values of one layer's tokens so far, `[1, kv heads, room, head]`, and how many tokens those are.
#[derive(Debug, Default)]
pub(super) struct KeyValues {
    held: Option<[Tensor; 2]>,
    tokens: i64,
    room: i64,
}

impl KeyValues {
    pub(super) fn with_room(room: i64) -> Self {
        Self { room, ..Self::default() }
    }

    /// All so far, these with them.
    pub(super) fn append(&mut self, key: &Tensor, value: &Tensor) -> Result<[Tensor; 2]> {
        let (batch, heads, more, head) = key.size4()?;
        if self.tokens + more > self.room {
            return Err(Error::Input {
                what: "tokens of a text",
                expected: format!("at most {}", self.room),
                found: (self.tokens + more).to_string(),
            });
        }
        let empty = |like: &Tensor| Tensor::f_empty([batch, heads, self.room, head], (like.kind(), like.device()));
        if self.held.is_none() {
            self.held = Some([empty(key)?, empty(value)?]);
        }
        let Some([keys, values]) = &self.held else { return Ok([key.shallow_clone(), value.shallow_clone()]) };
        keys.f_narrow(2, self.tokens, more)?.f_copy_(key)?;
        values.f_narrow(2, self.tokens, more)?.f_copy_(value)?;
        self.tokens += more;
        Ok([keys.f_narrow(2, 0, self.tokens)?, values.f_narrow(2, 0, self.tokens)?])
    }
}

impl Decoder {
    /// Tokens that follow a prompt. `each` is called with every token as it is drawn, and may end the text.
    ///
    /// # Errors
    /// If the prompt is empty or a token is not of the vocabulary, or memory runs out.
    pub fn generate(
        &self,
        prompt: &[i64],
        sampling: &Sampling,
        each: &mut dyn FnMut(i64) -> ControlFlow<()>,
    ) -> Result<Vec<i64>> {
        let known = 0..self.config().vocabulary as i64;
        if prompt.is_empty() || !prompt.iter().all(|token| known.contains(token)) {
            return Err(Error::Input {
                what: "prompt",
                expected: format!("one token at least, all below {}", known.end),
                found: format!("{} tokens", prompt.len()),
            });
        }
        no_grad(|| self.continued(prompt, sampling, each))
    }

    fn continued(
        &self,
        prompt: &[i64],
        sampling: &Sampling,
        each: &mut dyn FnMut(i64) -> ControlFlow<()>,
    ) -> Result<Vec<i64>> {
        let room = (prompt.len() + sampling.tokens) as i64;
        let mut caches: Vec<KeyValues> = self.config().layers.iter().map(|_| KeyValues::with_room(room)).collect();
        let (mut given, mut next, mut drawn) = (0, prompt.to_vec(), Vec::new());
        while drawn.len() < sampling.tokens {
            let tokens = Tensor::from_slice(&next).f_unsqueeze(0)?.f_to_device(self.device())?;
            let rows = Rows::of(&tokens, given)?;
            let hidden = self.continue_hidden(&rows, room, &mut caches, &Pass::default())?;
            let last = hidden.f_narrow(1, next.len() as i64 - 1, 1)?.f_reshape([-1])?;
            let logits = self.logits(&last, &Pass::default())?.f_to_kind(Kind::Float)?;
            // Where there is no memory there is nothing to draw from.
            let token = match dry::is_dry(self.device()) {
                true => 0,
                false => draw(&to_host(&logits)?.to_f32(), sampling, drawn.len() as u64) as i64,
            };
            given += next.len() as i64;
            next = vec![token];
            drawn.push(token);
            if each(token).is_break() || sampling.stop.contains(&token) {
                break;
            }
        }
        Ok(drawn)
    }
}

/// The token for a place in the text.
fn draw(logits: &[f32], sampling: &Sampling, place: u64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // The first of equals, so that the order is the same everywhere.
    let by_logit = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    if sampling.temperature <= 0.0 {
        return order.into_iter().min_by(by_logit).unwrap_or(0);
    }
    order.sort_by(by_logit);
    let largest = order.first().map_or(0.0, |&first| f64::from(logits[first]));
    let weight = |&token: &usize| ((f64::from(logits[token]) - largest) / sampling.temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();
    let (mut kept, mut sum) = (0, 0.0);
    while kept < weights.len() && (kept == 0 || sum < sampling.top_p * total) {
        sum += weights[kept];
        kept += 1;
    }
    let mut left = f64::from(Stream::new(sampling.seed).at("token").with(place).uniform()) * sum;
    for (&token, weight) in order.iter().zip(&weights).take(kept) {
        left -= weight;
        if left < 0.0 {
            return token;
        }
    }
    order.get(kept.saturating_sub(1)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely_and_only_from_the_likeliest() {
        // 0.5, 0.25, 0.125, 0.125 in another order.
        let logits = [0.25f32, 0.5, 0.125, 0.125].map(f32::ln);
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy(1) };
        let count = |sampling: &Sampling| {
            (0..4000).fold([0; 4], |mut counts, place| {
                counts[draw(&logits, sampling, place)] += 1;
                counts
            })
        };
        let counts = count(&sampling);
        assert!((900..1100).contains(&counts[0]) && (1900..2100).contains(&counts[1]), "{counts:?}");
        assert!((430..570).contains(&counts[2]) && (430..570).contains(&counts[3]), "{counts:?}");
        assert_eq!(counts, count(&sampling), "a function of the seed and the place");
        assert_ne!(counts, count(&Sampling { seed: 8, ..sampling.clone() }));
        let counts = count(&Sampling { top_p: 0.7, ..sampling.clone() });
        assert!((1230..1430).contains(&counts[0]) && counts[0] + counts[1] == 4000, "{counts:?}");
        assert_eq!(count(&Sampling { top_p: 0.0, ..sampling.clone() }), [0, 4000, 0, 0]);
        assert_eq!(count(&Sampling { temperature: 0.0, ..sampling.clone() }), [0, 4000, 0, 0]);
        // At half the temperature probabilities are squared: 0.25 to 0.0625, 0.015625 and 0.015625.
        let counts = count(&Sampling { temperature: 0.5, ..sampling });
        assert!((640..820).contains(&counts[0]) && (2800..3020).contains(&counts[1]), "{counts:?}");
    }
}
