//! What a language model with its adapters does: it writes, and is judged on texts.

use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use lora_core::{Component, DType, Strength};
use lora_data::source::{Example, Source};
use lora_data::texts::{TextOptions, Texts, TokenRow};
use lora_models::layers::{Adaptable, Pass};
pub use lora_models::networks::decoder::Sampling;
use lora_models::networks::decoder::{Decoder, DecoderConfig, Rows};
use lora_models::weights::{Frozen, Held, Weights};
use lora_torch::frozen::Storage;
use lora_torch::tch::{Kind, Tensor, no_grad_guard};
use lora_torch::tensor::kind_of;

use super::adapters;
pub use crate::base::language::Writer;
use crate::base::language::{Prompts, known, labels_of};
use crate::{Error, Plugins, Result};

/// What a text model is made of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TextModelOptions {
    /// The base: a folder or a GGUF file.
    pub base: PathBuf,
    /// Adapters, and how strongly each is applied.
    pub adapters: Vec<(PathBuf, f64)>,
    /// Where it computes, as the key `device` says it.
    pub device: String,
    /// What it computes in.
    pub precision: DType,
    /// How the base's weights are held; as they compute without.
    pub base_storage: Option<Storage>,
    /// A chat template's file or name; the base's own without.
    pub chat_template: Option<String>,
    /// What the system says before a prompt that is no conversation.
    pub system_prompt: Option<String>,
}

impl TextModelOptions {
    /// A base without adapters, on the best device, in fp32.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self {
            base: base.into(),
            adapters: Vec::new(),
            device: "auto".into(),
            precision: DType::F32,
            base_storage: None,
            chat_template: None,
            system_prompt: None,
        }
    }
}

/// A language model with its adapters, loaded.
#[derive(Debug)]
pub struct TextModel {
    decoder: Decoder,
    writer: Arc<Writer>,
    end_tokens: Vec<i64>,
}

/// How a model judges texts.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Evaluation {
    /// Mean cross entropy of a token, in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Windows of a text, or records.
    pub rows: usize,
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { loss, perplexity, tokens, rows } = self;
        write!(f, "loss {loss:.4}, perplexity {perplexity:.3}, over {tokens} tokens of {rows} rows")
    }
}

impl TextModel {
    /// Loads a base and hangs adapters on it: their changes are added.
    ///
    /// # Errors
    /// Where a file is missing or damaged, an adapter does not fit the base, and where memory runs out.
    pub fn open(options: &TextModelOptions, plugins: &Plugins) -> Result<Self> {
        let checkpoint = plugins.bases.checkpoint(&options.base)?;
        let device = lora_torch::device::resolve(&options.device)?;
        let component = checkpoint.component(Component::LANGUAGE_MODEL)?;
        let config = DecoderConfig::detect(component)?;
        let end_tokens = config.end_tokens.clone();
        let weights = Weights::new(component, kind_of(options.precision), device)
            .held(Held::Frozen(Frozen::stored(options.base_storage)));
        let mut decoder = Decoder::load(&weights, config)?;
        let (layers, families) = (decoder.adaptable_layers()?, plugins.bases.families());
        let read = |(path, strength): &(PathBuf, f64)| {
            Ok((adapters::read(path, checkpoint.family(), &layers, &families)?, Strength::from(*strength)))
        };
        let all: Vec<_> = options.adapters.iter().map(read).collect::<Result<_>>()?;
        let several: Vec<_> = all.iter().map(|(adapter, strength)| (adapter, strength)).collect();
        adapters::hang(&adapters::joined(&several)?, &mut decoder, &plugins.variants)?;
        let prompts = Prompts::new(checkpoint.path(), options.chat_template.clone(), options.system_prompt.clone());
        Ok(Self { decoder, writer: prompts.writer()?, end_tokens })
    }

    /// The tokenizer with its chat template.
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// The answer to tokens that [`Writer`] laid out. `each` is given every piece of text as soon as its characters are
    /// whole.
    ///
    /// # Errors
    /// Where the prompt is empty, and where memory runs out.
    pub fn generate(&self, prompt: &[i64], sampling: &Sampling, each: &mut dyn FnMut(&str)) -> Result<String> {
        let stop = self.writer.ends().chain(self.end_tokens.iter().copied()).chain(sampling.stop.iter().copied());
        let sampling = Sampling { stop: stop.collect(), ..sampling.clone() };
        let (mut drawn, mut told) = (Vec::new(), String::new());
        let answer = self.decoder.generate(prompt, &sampling, &mut |token| {
            drawn.push(token);
            // A character of several tokens is not a text before its last one is there.
            if let Ok(text) = self.writer.text(&drawn)
                && let Some(more) = text.strip_prefix(&told)
                && !more.is_empty()
                && !text.ends_with(char::REPLACEMENT_CHARACTER)
            {
                each(more);
                told = text;
            }
            ControlFlow::Continue(())
        })?;
        self.writer.text(&answer)
    }

    /// The loss on texts: of records on what is learned of them, of a plain text file on windows of up to
    /// `max_seq_length` tokens, side by side. Each window begins as a text begins, with the tokenizer's first token
    /// where it has one, and all that follows is predicted; without one, all but the window's first token. `progress`
    /// is told rows done, of.
    ///
    /// # Errors
    /// Where the texts cannot be read or have nothing to judge, and where memory runs out.
    pub fn evaluate(&self, options: &EvaluationOptions, progress: &mut dyn FnMut(usize, usize)) -> Result<Evaluation> {
        let _guard = no_grad_guard();
        let rows = self.rows(options)?;
        let count = options.limit.unwrap_or(usize::MAX).min(rows.len());
        let (mut sum, mut tokens) = (0.0, 0);
        for (index, row) in rows.iter().take(count).enumerate() {
            let learned = row.trained.iter().skip(1).filter(|&&trained| trained).count();
            if learned > 0 {
                known(row, self.decoder.config().vocabulary, &options.data, self.writer.tokenizer())?;
                let loss = self.loss(row)?;
                if !loss.is_finite() {
                    let place = format!(" in row {}", index + 1);
                    let remedy = "compute in another --precision";
                    return Err(Error::NotFinite { stage: "the loss".into(), place, remedy });
                }
                sum += loss;
                tokens += learned;
            }
            progress(index + 1, count);
        }
        if tokens == 0 {
            return Err(Error::NothingJudged { data: options.data.clone() });
        }
        let loss = sum / tokens as f64;
        Ok(Evaluation { loss, perplexity: loss.exp(), tokens, rows: count })
    }

    /// The sum of the cross entropies of a row's learned tokens.
    fn loss(&self, row: &TokenRow) -> Result<f64> {
        let device = self.decoder.device();
        let numbers = |values: Vec<i64>| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(&values)?.f_unsqueeze(0)?.f_to_device(device)?)
        };
        let tokens = numbers(row.ids.iter().map(|&id| i64::from(id)).collect())?;
        let labels = numbers(labels_of(row).collect())?;
        let pass = Pass::default();
        let hidden = self.decoder.hidden(&Rows::of(&tokens, 0)?, &pass)?;
        let losses = self.decoder.token_losses(&hidden, &labels, 0.0, &pass)?;
        Ok(f64::try_from(losses.f_sum(Kind::Double)?)?)
    }

    fn rows(&self, options: &EvaluationOptions) -> Result<Vec<TokenRow>> {
        let is_text = options.data.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("txt"));
        if options.data.is_file() && is_text {
            let text = lora_data::dataset::read_text(&options.data)?;
            let tokenizer = self.writer.tokenizer();
            let ids = tokenizer.encode_document(&text)?;
            let begin =
                tokenizer.special_tokens().bos.as_ref().map(|bos| bos.id).filter(|bos| ids.first() == Some(bos));
            return Ok(windows(&ids[usize::from(begin.is_some())..], begin, options.max_seq_length));
        }
        let texts = TextOptions {
            path: options.data.clone(),
            max_seq_length: options.max_seq_length,
            chat_template: options.chat_template.clone(),
            system_prompt: options.system_prompt.clone(),
            train_on_inputs: options.train_on_inputs,
            pairs: Some(false),
            ..TextOptions::default()
        };
        let texts = Texts::open(texts, self.writer.shared_tokenizer(), None)?;
        let count = options.limit.unwrap_or(usize::MAX).min(texts.count());
        let draw = lora_core::random::Stream::new(0);
        let row = |item| match texts.example(item, &draw)? {
            Example::Tokens(row) => Ok(row),
            _ => Err(Error::MissingInput { name: "tokens" }),
        };
        (0..count).map(row).collect()
    }
}

/// Texts to judge a model on.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EvaluationOptions {
    /// A file or a folder.
    pub data: PathBuf,
    /// Tokens of a row at most.
    pub max_seq_length: usize,
    /// Windows or records at most.
    pub limit: Option<usize>,
    /// Judged on what is given, too.
    pub train_on_inputs: bool,
    /// As in training.
    pub chat_template: Option<String>,
    /// As in training.
    pub system_prompt: Option<String>,
}

impl EvaluationOptions {
    /// All of these data, in rows of 2048 tokens at most.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            max_seq_length: 2048,
            limit: None,
            train_on_inputs: false,
            chat_template: None,
            system_prompt: None,
        }
    }
}

/// Tokens in windows side by side, the last one shorter. Each has the token that begins texts before it, where there is
/// one, and every token but the first of a window is predicted.
fn windows(ids: &[u32], begin: Option<u32>, length: usize) -> Vec<TokenRow> {
    let row = |own: &[u32]| {
        let ids: Vec<u32> = begin.into_iter().chain(own.iter().copied()).collect();
        TokenRow { trained: (0..ids.len()).map(|place| place > 0).collect(), documents: vec![ids.len()], ids }
    };
    let own = length.max(2) - usize::from(begin.is_some());
    ids.chunks(own).map(row).filter(|row| row.ids.len() > 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_side_by_side_begin_as_texts_begin_and_leave_nothing_out() {
        let ids: Vec<u32> = (0..10).collect();
        let of = |rows: Vec<TokenRow>| rows.into_iter().map(|row| row.ids).collect::<Vec<_>>();
        let rows = windows(&ids, None, 4);
        assert_eq!(rows[0].trained, [false, true, true, true]);
        assert_eq!(of(rows), [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);
        let begun = windows(&ids[..7], Some(99), 4);
        assert_eq!(begun[2].trained, [false, true]);
        assert_eq!(of(begun), [vec![99, 0, 1, 2], vec![99, 3, 4, 5], vec![99, 6]]);
        assert!(windows(&ids[..1], None, 4).is_empty(), "nothing stands before it");
    }
}
