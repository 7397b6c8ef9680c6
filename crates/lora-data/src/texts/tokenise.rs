//! One record as tokens, each with whether it is learned: the layout by the chat template, the tokens of its text, and
//! by their places in the text those that belong to an answer.

use std::ops::Range;

use regex::Regex;

use super::record::TextSample;
use super::rows::TRAINED;
use crate::finding::FindingKind;
use crate::template::{ChatTemplate, Conversation, Layout};
use crate::tokenizer::{Encoding, Tokenizer};
use crate::{Error, Result};

/// What a record became.
#[derive(Debug, Default)]
pub(super) struct Tokenised {
    /// One document, or the two of a pair: tokens, those that are learned with the bit [`TRAINED`].
    pub(super) documents: Vec<Vec<u32>>,
    /// What is worth a look.
    pub(super) warnings: Vec<(FindingKind, String)>,
}

/// Why a record cannot be used.
pub(super) type Refusal = (FindingKind, String);

/// How records become tokens.
pub(super) struct Tokeniser<'t> {
    tokenizer: &'t Tokenizer,
    template: Option<&'t ChatTemplate>,
    train_on_inputs: bool,
    system_prompt: Option<&'t str>,
    /// Special tokens as they are written.
    special: Option<Regex>,
}

impl<'t> Tokeniser<'t> {
    pub(super) fn new(
        tokenizer: &'t Tokenizer,
        template: Option<&'t ChatTemplate>,
        train_on_inputs: bool,
        system_prompt: Option<&'t str>,
    ) -> Self {
        let texts: Vec<String> = tokenizer.special_texts().filter(|text| !text.is_empty()).collect();
        let escaped: Vec<String> = texts.iter().map(|text| regex::escape(text)).collect();
        // A vocabulary with too many special tokens for one expression is not looked for; nothing but a warning depends
        // on it.
        let special = (!escaped.is_empty()).then(|| Regex::new(&escaped.join("|")).ok()).flatten();
        Self { tokenizer, template, train_on_inputs, system_prompt, special }
    }

    /// The tokens of a record.
    ///
    /// # Errors
    /// Where its template refuses it, or nothing in it is learned.
    pub(super) fn record(&self, sample: TextSample) -> Result<Tokenised, Refusal> {
        let mut tokenised = Tokenised::default();
        self.look_for_special_tokens(&sample, &mut tokenised);
        match sample {
            TextSample::Plain(text) => {
                let ids = self.tokenizer.encode_document(&text).map_err(unusable)?;
                tokenised.documents.push(ids.into_iter().map(|id| id | TRAINED).collect());
            }
            TextSample::Completion { prompt, completion } if self.template.is_none() => {
                tokenised.documents.push(self.completion(&prompt, &completion).map_err(unusable)?);
            }
            TextSample::Completion { prompt, completion } => {
                let conversation = Conversation::of([("user", &*prompt), ("assistant", &completion)]);
                self.conversation(conversation, &mut tokenised)?;
            }
            TextSample::Chat(conversation) => self.conversation(conversation, &mut tokenised)?,
            TextSample::Preference { chosen, rejected } => {
                self.conversation(chosen, &mut tokenised)?;
                self.conversation(rejected, &mut tokenised)?;
            }
        }
        // The first token of a document follows nothing, so that nobody predicts it.
        let learns = |document: &Vec<u32>| document.iter().skip(1).any(|token| token & TRAINED != 0);
        match tokenised.documents.iter().all(learns) {
            true => Ok(tokenised),
            false => Err((FindingKind::NothingLearned, "no token of it is learned".into())),
        }
    }

    fn look_for_special_tokens(&self, sample: &TextSample, tokenised: &mut Tokenised) {
        let Some(special) = &self.special else { return };
        if let Some(found) = sample.texts().into_iter().find_map(|text| special.find(text)) {
            let detail = format!("the text holds {:?}, which is a special token", found.as_str());
            tokenised.warnings.push((FindingKind::SpecialToken, detail));
        }
    }

    /// Prompt and completion one after the other, as a model without turns goes on from a text.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Vec<u32>> {
        let text = format!("{prompt}{completion}");
        let whole = self.tokenizer.encode_document(&text)?;
        let Encoding { ids, spans } = self.tokenizer.encode(&text)?;
        // What the tokenizer puts before a text has no place in it.
        let before = whole.windows(ids.len().max(1)).position(|window| window == ids).unwrap_or(0);
        let mut document: Vec<u32> =
            whole.iter().map(|id| if self.train_on_inputs { id | TRAINED } else { *id }).collect();
        let learned = spans.iter().position(|span| span.end > prompt.len()).unwrap_or(spans.len());
        document.iter_mut().skip(before + learned).for_each(|token| *token |= TRAINED);
        Ok(document)
    }

    fn conversation(&self, mut conversation: Conversation, tokenised: &mut Tokenised) -> Result<(), Refusal> {
        let refused = |error: Error| match error {
            Error::Template { reason, .. } => (FindingKind::TemplateRefused, reason),
            other => unusable(other),
        };
        let Some(template) = self.template else {
            let reason = "the model has no chat template; choose one with chat_template".to_owned();
            return Err((FindingKind::TemplateRefused, reason));
        };
        if let Some(system) = self.system_prompt
            && conversation.role(0) != "system"
        {
            conversation.messages.splice(0..0, Conversation::of([("system", system)]).messages);
        }
        let conversation = template.with_calls(conversation).map_err(refused)?;
        if self.train_on_inputs {
            let text = template.render(&conversation, false).map_err(refused)?;
            let ids = self.tokenizer.encode(&text).map_err(unusable)?.ids;
            tokenised.documents.push(ids.into_iter().map(|id| id | TRAINED).collect());
            return Ok(());
        }
        let layout = template.layout(&conversation).map_err(refused)?;
        let encoding = self.tokenizer.encode(&layout.text).map_err(unusable)?;
        let (mut document, mut endless) = (encoding.ids.clone(), false);
        let mut silent = false;
        for answer in self.answers(template, &conversation, &layout, &encoding, &mut endless) {
            silent |= encoding.ids[answer.clone()].iter().all(|id| self.tokenizer.is_special(*id));
            document[answer].iter_mut().for_each(|token| *token |= TRAINED);
        }
        if silent {
            tokenised.warnings.push((FindingKind::EmptyAnswer, "an answer has no words".to_owned()));
        }
        if endless {
            let detail = "no special token ends an answer, so that the model does not learn when to stop";
            tokenised.warnings.push((FindingKind::EndlessAnswer, detail.to_owned()));
        }
        tokenised.documents.push(document);
        Ok(())
    }

    /// The tokens of each answer, with the one that ends its turn.
    fn answers(
        &self,
        template: &ChatTemplate,
        conversation: &Conversation,
        layout: &Layout,
        encoding: &Encoding,
        endless: &mut bool,
    ) -> Vec<Range<usize>> {
        let mut places = Vec::with_capacity(layout.answers.len());
        for answer in &layout.answers {
            let mut span = answer.span.clone();
            if let Some(message) = answer.message {
                let ends = self.end_of_turn(encoding, span.end, || template.turn_end(layout, conversation, message));
                *endless |= ends.is_none();
                span.end = ends.unwrap_or(span.end);
            }
            // Several tokens may stand for one character, and a token may take white space along: overlap is what
            // counts.
            let first = encoding.spans.partition_point(|own| own.end <= span.start);
            let length = encoding.spans[first..].iter().take_while(|own| own.start < span.end).count();
            places.push(first..first + length);
        }
        places
    }

    /// Where the special token behind an answer's words ends, if there is one before the next message's words. `next`
    /// tells where those begin, and is asked only where something stands between.
    fn end_of_turn(&self, encoding: &Encoding, words: usize, next: impl FnOnce() -> usize) -> Option<usize> {
        let from = encoding.spans.partition_point(|own| own.end <= words);
        let behind = encoding.ids.iter().zip(&encoding.spans).skip(from);
        let (_, end) = behind.into_iter().find(|(id, own)| self.tokenizer.is_special(**id) && own.start >= words)?;
        (end.start == words || end.start < next()).then_some(end.end)
    }
}

fn unusable(error: Error) -> Refusal {
    (FindingKind::TextRecord, error.reason())
}
