//! Causal language models as bases: rows of tokens laid out as tensors, the loss of next tokens, answers as samples.
//! The network is `lora_models`' decoder; how records become rows is told in [`lora_data::texts`].

mod preference;
mod prompts;
mod rows;
mod texts;

pub(crate) use prompts::Prompts;
pub use prompts::Writer;
pub(crate) use rows::labels_of;
pub use texts::TEXTS;
pub(crate) use texts::{known, options};

use std::ops::ControlFlow;
use std::sync::Arc;

use lora_core::Component;
use lora_data::source::Example;
use lora_data::texts::TokenRow;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::language;
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::decoder::{Decoder, DecoderConfig, LookedUp, LossOptions, Rows, Sampling};
use lora_models::weights::{Held, Weights};
use lora_torch::dry;
use lora_torch::tch::{Device, Kind, Tensor, no_grad_guard};
use lora_torch::tensor::kind_of;

use self::preference::Objective;
use self::rows::Filled;
use super::{Base, Inputs, Item, Network, Opening, Prompt, Registration, Sample};
use crate::config::keys::language::KEYS;
use crate::config::{SampleConfig, TrainMode};
use crate::{Error, Result};

/// Models of the LLaMA family and those that differ from it in a few switches.
pub(super) const LANGUAGE: Registration = Registration {
    family: &language::FAMILY,
    keys: KEYS,
    data: TEXTS,
    remedies: "a lower max_seq_length",
    open: |opening| Ok(Box::new(LanguageModel::open(opening)?)),
};

const DECODER: Component = Component::LANGUAGE_MODEL;

/// First tokens of a document that are seen beside a window where nothing is said: what StreamingLLM found to be
/// enough.
const SINKS: usize = 4;
/// Tokens of a sampled answer in a dry run: the first reads the prompt, the others are alike.
const DRY_TOKENS: usize = 2;
/// Tokens of a prompt in a dry run.
const DRY_PROMPT: usize = 64;

/// A language model.
#[derive(Debug)]
struct LanguageModel {
    networks: [Network; 1],
    checkpoint: Arc<Checkpoint>,
    config: DecoderConfig,
    decoder: Option<Decoder>,
    device: Device,
    kind: Kind,
    learning_rate: f64,
    filled: Filled,
    objective: Objective,
    smoothing: f64,
    /// NEFTune's α.
    noise: Option<f64>,
    sampling: Sampling,
    prompts: Prompts,
}

impl LanguageModel {
    fn open(opening: &Opening<'_>) -> Result<Self> {
        let (config, extra) = (opening.config, &opening.config.extra);
        if config.train == TrainMode::Full {
            let path = opening.checkpoint.path().to_owned();
            return Err(Error::NotTrainedWhole { path });
        }
        let checkpoint = Arc::clone(&opening.checkpoint);
        let mut decoder = DecoderConfig::detect(checkpoint.component(DECODER)?)?;
        let first = extra.whole("attention_sink_size");
        match extra.whole("sliding_window") {
            Some(window) => decoder.see_a_window(window, first.unwrap_or(SINKS)),
            None if first.is_some() => {
                let message = "means nothing without sliding_window; take it out, or set that".to_owned();
                return Err(config.refused([("attention_sink_size", message)]).into());
            }
            None => {}
        }
        Ok(Self {
            networks: [Network { component: DECODER, title: "language model", trains: true, encodes: None }],
            config: decoder,
            decoder: None,
            device: opening.device,
            kind: kind_of(opening.precision),
            learning_rate: config.learning_rate,
            filled: Filled {
                packing: extra.switch("packing") == Some(true),
                most: extra.whole("max_seq_length").unwrap_or(2048),
            },
            objective: Objective::of(config)?,
            smoothing: extra.number("label_smoothing").unwrap_or(0.0),
            noise: extra.number("neftune_noise_alpha"),
            sampling: Sampling {
                temperature: extra.number("sample_temperature").unwrap_or(0.0),
                top_p: extra.number("sample_top_p").unwrap_or(1.0),
                seed: config.samples.seed,
                tokens: extra.whole("sample_max_new_tokens").unwrap_or(128),
                stop: Vec::new(),
            },
            prompts: Prompts::of_run(checkpoint.path(), extra),
            checkpoint,
        })
    }

    fn decoder(&self) -> Result<&Decoder> {
        self.decoder.as_ref().ok_or(Error::NotLoaded { network: "language model" })
    }

    /// The tensors of rows, with noise on their embeddings where that is given.
    fn laid_out(&self, items: &[Item], noise: Option<f64>) -> Result<Inputs> {
        let mut tokens = Vec::with_capacity(items.len());
        for item in items {
            let row = token_row(item)?;
            // Held-out texts are not looked through before.
            if row.ids.iter().any(|id| *id as usize >= self.config.vocabulary) {
                known(row, self.config.vocabulary, self.checkpoint.path(), self.prompts.writer()?.tokenizer())?;
            }
            tokens.push(row);
        }
        let width = noise.map(|alpha| (alpha, self.config.width));
        let look_up = |tokens: &Tensor| Ok(self.decoder()?.look_up(tokens)?);
        let inputs = rows::lay_out(&tokens, items, self.filled, width, self.device, &look_up)?;
        match self.objective.is_of_pairs() {
            true => self.objective.lay_out(inputs, &tokens, items, self.device),
            false => Ok(inputs),
        }
    }
}

/// The tokens of an item.
fn token_row(item: &Item) -> Result<&TokenRow> {
    match &item.example {
        Some(Example::Tokens(row)) => Ok(row),
        _ => Err(Error::MissingInput { name: "tokens" }),
    }
}

impl Base for LanguageModel {
    fn networks(&self) -> &[Network] {
        &self.networks
    }

    fn load(&mut self, _network: Component, held: Held) -> Result<()> {
        let component = self.checkpoint.component(DECODER)?;
        let weights = Weights::new(component, self.kind, self.device).held(held);
        self.decoder = Some(Decoder::load(&weights, self.config.clone())?);
        Ok(())
    }

    fn unload(&mut self, _network: Component) {
        self.decoder = None;
    }

    fn is_loaded(&self, _network: Component) -> bool {
        self.decoder.is_some()
    }

    fn adaptable(&mut self, _network: Component) -> Option<&mut dyn Adaptable> {
        self.decoder.as_mut().map(|decoder| decoder as &mut dyn Adaptable)
    }

    fn learning_rate(&self, _network: Component) -> f64 {
        self.learning_rate
    }

    fn inputs(&self, items: &[Item]) -> Result<Inputs> {
        self.laid_out(items, self.noise)
    }

    fn validation_inputs(&self, item: &Item) -> Result<Inputs> {
        self.laid_out(std::slice::from_ref(item), None)
    }

    fn figures(&self) -> &'static [&'static str] {
        if self.objective.is_of_pairs() { preference::FIGURES } else { &[] }
    }

    fn loss(&self, inputs: &Inputs, pass: &Pass) -> Result<Tensor> {
        let decoder = self.decoder()?;
        let rows = Rows {
            tokens: inputs.get("tokens")?.shallow_clone(),
            positions: inputs.get("positions")?.shallow_clone(),
            documents: inputs.find("documents").map(Tensor::shallow_clone),
            unpadded: None,
            noise: inputs.find("noise").map(Tensor::shallow_clone),
            looked_up: LookedUp {
                tokens: inputs.find("embedded").map(Tensor::shallow_clone),
                layer_inputs: inputs.find("layer_inputs").map(Tensor::shallow_clone),
            },
        };
        if self.objective.is_of_pairs() {
            return self.objective.loss(decoder, &rows, inputs, pass);
        }
        let hidden = decoder.hidden(&rows, pass)?;
        let options = LossOptions { weights: inputs.find("weights"), smoothing: self.smoothing };
        let sum = decoder.loss(&hidden, inputs.get("labels")?, &options, pass)?;
        Ok(sum.f_mul(inputs.get("share")?)?)
    }

    /// An answer to each prompt, or what follows it where the base has no chat template.
    fn sample(&mut self, prompts: &[Prompt], _config: &SampleConfig, _beside_recordings: bool) -> Result<Vec<Sample>> {
        let _guard = no_grad_guard();
        let decoder = self.decoder.as_ref().ok_or(Error::NotLoaded { network: "language model" })?;
        if dry::is_dry(self.device) {
            // As long as the longest answer; a vocabulary is not needed for it.
            let prompt = vec![0; DRY_PROMPT + self.sampling.tokens.saturating_sub(DRY_TOKENS)];
            decoder.generate(&prompt, &Sampling::greedy(DRY_TOKENS), &mut |_| ControlFlow::Continue(()))?;
            return Ok(vec![Sample::Text(String::new()); prompts.len()]);
        }
        let mut samples = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let writer = self.prompts.writer()?;
            let tokens = writer.tokens(&prompt.text)?;
            let stop = writer.ends().chain(self.config.end_tokens.iter().copied()).collect();
            let sampling = Sampling { stop, ..self.sampling.clone() };
            let answer = decoder.generate(&tokens, &sampling, &mut |_| ControlFlow::Continue(()))?;
            samples.push(Sample::Text(writer.text(&answer)?));
        }
        Ok(samples)
    }
}
