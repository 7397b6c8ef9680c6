//! Prompts as tokens and answers as text: the base's tokenizer with its chat template.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use lora_data::template::{ChatTemplate, Conversation, TemplateOptions};
use lora_data::tokenizer::Tokenizer;

use crate::config::keys::Extra;
use crate::{Error, Result};

/// Where a base's tokenizer is, and how prompts are laid out; it is read when the first prompt comes.
#[derive(Debug)]
pub(crate) struct Prompts {
    base: PathBuf,
    template: Option<String>,
    system: Option<String>,
    writer: OnceLock<Arc<Writer>>,
}

/// Lays out prompts, and writes what a model answers.
#[derive(Debug)]
pub struct Writer {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    system: Option<String>,
    /// The token that ends an answer in the template's layout.
    turn_end: Option<u32>,
}

impl Prompts {
    /// For a base in a folder or a GGUF file. `template` is a file, or the name of a known one; the base's own without.
    /// `system` is said before prompts that are no conversation.
    pub(crate) fn new(base: impl Into<PathBuf>, template: Option<String>, system: Option<String>) -> Self {
        Self { base: base.into(), template, system, writer: OnceLock::new() }
    }

    pub(super) fn of_run(base: &Path, extra: &Extra) -> Self {
        let own = |key: &str| extra.text(key).map(str::to_owned);
        Self::new(base, own("chat_template"), own("system_prompt"))
    }

    /// The tokenizer and the template, read once.
    ///
    /// # Errors
    /// Where one of them is missing or damaged.
    pub(crate) fn writer(&self) -> Result<Arc<Writer>> {
        if let Some(writer) = self.writer.get() {
            return Ok(Arc::clone(writer));
        }
        let tokenizer = Arc::new(Tokenizer::open(&self.base)?);
        let template = ChatTemplate::choose(self.template.as_deref(), &tokenizer, &TemplateOptions::default())?;
        let turn_end = template.as_ref().and_then(|template| turn_end(template, &tokenizer));
        let writer = Writer { tokenizer, template, system: self.system.clone(), turn_end };
        Ok(Arc::clone(self.writer.get_or_init(|| Arc::new(writer))))
    }
}

/// The special token that training would learn as the end of an answer, told from an exchange of two words. Bases that
/// were trained on texts alone have it in their template and not among the tokens that end what they generate. `None`
/// where the template refuses the exchange, or ends answers in words.
fn turn_end(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    let layout = template.layout(&Conversation::of([("user", "one"), ("assistant", "two")])).ok()?;
    let encoding = tokenizer.encode(&layout.text).ok()?;
    let answer = layout.answers.last()?;
    let mut special = encoding.ids.iter().zip(&encoding.spans).filter(|(id, _)| tokenizer.is_special(**id));
    let found = match answer.message {
        Some(_) => special.find(|(_, own)| own.start >= answer.span.end),
        // The template itself has said what is learned.
        None => special.rfind(|(_, own)| answer.span.start <= own.start && own.end <= answer.span.end),
    };
    found.map(|(id, _)| *id)
}

impl Writer {
    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(crate) fn shared_tokenizer(&self) -> Arc<Tokenizer> {
        Arc::clone(&self.tokenizer)
    }

    /// The tokens of a prompt: what a user says, or a conversation as a JSON list of messages; with the beginning of
    /// the answer behind it. Without a chat template the prompt is a text to be continued.
    ///
    /// # Errors
    /// Where the list is malformed or the template refuses it.
    pub fn tokens(&self, prompt: &str) -> Result<Vec<i64>> {
        match &self.template {
            Some(_) => self.chat(&self.conversation(prompt)?),
            None => self.plain(prompt),
        }
    }

    /// The tokens of a text that is to be continued.
    ///
    /// # Errors
    /// Where the tokenizer fails.
    pub fn plain(&self, text: &str) -> Result<Vec<i64>> {
        let mut ids = self.tokenizer.encode_document(text)?;
        // A text that goes on has not ended, unless its own last token is one that ends texts.
        let own = self.tokenizer.encode(text)?.ids;
        let is_added = own.is_empty() || !ids.ends_with(&own);
        if is_added && ids.last().is_some_and(|last| self.tokenizer.ends().any(|end| end == *last)) {
            ids.pop();
        }
        Ok(ids.into_iter().map(i64::from).collect())
    }

    /// The tokens of a conversation, with the beginning of the answer behind it.
    ///
    /// # Errors
    /// Where there is no template, or it refuses the conversation.
    pub fn chat(&self, conversation: &Conversation) -> Result<Vec<i64>> {
        let Some(template) = &self.template else {
            return Err(Error::NoTemplate { path: self.tokenizer.path().to_owned() });
        };
        let text = template.render(conversation, true)?;
        Ok(self.tokenizer.encode(&text)?.ids.into_iter().map(i64::from).collect())
    }

    /// A prompt as a conversation.
    fn conversation(&self, prompt: &str) -> Result<Conversation> {
        if prompt.trim_start().starts_with("[{") {
            let messages = serde_json::from_str(prompt)
                .map_err(|error| Error::Prompt { prompt: prompt.to_owned(), reason: error.to_string() })?;
            return Ok(Conversation { messages, ..Conversation::default() });
        }
        let system = self.system.as_deref().map(|system| ("system", system));
        Ok(Conversation::of(system.into_iter().chain([("user", prompt)])))
    }

    /// Tokens that end an answer: those that the tokenizer's files name, and the one that ends turns in the chat
    /// template's layout.
    pub fn ends(&self) -> impl Iterator<Item = i64> {
        self.tokenizer.ends().chain(self.turn_end).map(i64::from)
    }

    /// The text of an answer's tokens, without those that end it.
    ///
    /// # Errors
    /// Where the tokenizer fails.
    pub fn text(&self, answer: &[i64]) -> Result<String> {
        let ids: Vec<u32> = answer.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        Ok(self.tokenizer.decode_text(&ids)?)
    }
}
