//! Chat templates: how a conversation is laid out for a model, in the Jinja dialect of Hugging Face, and which part of
//! the layout the model itself says. How records become conversations is [`crate::texts`]' business.
//!
//! A template is data: it sees nothing but the conversation, runs with limited fuel, and loads no other template.

mod answers;
mod builtin;
mod conversation;
mod functions;

pub use answers::{Answer, Layout};
pub use builtin::NAMES;
pub use conversation::Conversation;

use std::borrow::Cow;
use std::path::Path;
use std::sync::OnceLock;

use jiff::civil::Date;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context};
use regex::Regex;
use serde_json::Map;

use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// What one rendering may take, an instruction or 64 bytes each: forty times what the longest conversations take. So a
/// template that comes with a model takes half a GiB at most, and less than a second.
const FUEL: u64 = 8_000_000;
/// Deepest nesting of macros and includes.
const DEPTH: usize = 200;

/// What templates are given beside the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateOptions {
    /// Today, as `year-month-day`. It is fixed, so that a run can be repeated.
    pub date: String,
    /// Variables by name, for instance `enable_thinking`.
    pub variables: Map<String, serde_json::Value>,
}

impl Default for TemplateOptions {
    fn default() -> Self {
        Self { date: "2026-01-01".to_owned(), variables: Map::new() }
    }
}

/// A chat template with all that it needs to be rendered.
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    /// Whether the usual template, and that for conversations with tools, mark answers themselves.
    tagged: [bool; 2],
    /// Whether there is another template for conversations with tools.
    for_tools: bool,
    sources: Vec<(String, String)>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate({})", self.origin)
    }
}

/// Names of the two templates inside an environment.
const USUAL: &str = "default";
const WITH_TOOLS: &str = "tool_use";

impl ChatTemplate {
    /// The template of a run: the one that is named (a file, or one of [`NAMES`]), else the tokenizer's own. `None`
    /// where neither is there.
    ///
    /// # Errors
    /// Where the named one is not there or has no place with this tokenizer, or the template is malformed.
    pub fn choose(named: Option<&str>, tokenizer: &Tokenizer, options: &TemplateOptions) -> Result<Option<Self>> {
        let Some(name) = named else {
            return match tokenizer.templates() {
                [] => Ok(None),
                templates => {
                    let origin = tokenizer.path().display().to_string();
                    Self::new(&origin, templates, tokenizer, options).map(Some)
                }
            };
        };
        let source = match builtin::source(name) {
            Some(source) => {
                builtin::check(name, tokenizer)?;
                source.to_owned()
            }
            None if Path::new(name).is_file() => crate::dataset::read_text(Path::new(name))?,
            None => {
                let reason = format!("there is no such file; expected a file, or one of {}", NAMES.join(", "));
                return Err(Error::Option { key: "chat_template", value: name.to_owned(), reason });
            }
        };
        Self::new(name, &[(USUAL.to_owned(), source)], tokenizer, options).map(Some)
    }

    /// Of templates by name, of which those called `default` and `tool_use` are used; a single one counts as the usual
    /// one whatever its name.
    ///
    /// # Errors
    /// Where a template is malformed, the date is none, or there is no usual template.
    pub fn new(
        origin: &str,
        templates: &[(String, String)],
        tokenizer: &Tokenizer,
        options: &TemplateOptions,
    ) -> Result<Self> {
        let date: Date = options.date.parse().map_err(|_| Error::Option {
            key: "chat_template_date",
            value: options.date.clone(),
            reason: "expected a date as 2026-01-31".into(),
        })?;
        let failed = |reason: String| Error::Template { origin: origin.to_owned(), reason };
        let mut environment = environment(date);
        let special = tokenizer.special_tokens();
        let tokens = [
            ("bos_token", &special.bos),
            ("eos_token", &special.eos),
            ("pad_token", &special.pad),
            ("unk_token", &special.unk),
        ];
        for (name, token) in tokens {
            if let Some(token) = token {
                environment.add_global(name, token.text.clone());
            }
        }
        for (name, value) in &options.variables {
            environment.add_global(name.clone(), functions::value(value));
        }
        let named = |name: &str| templates.iter().find(|(own, _)| own == name).map(|(_, source)| source);
        let usual = named(USUAL).or(match templates {
            [(_, only)] => Some(only),
            _ => None,
        });
        let usual = usual.ok_or_else(|| {
            let names: Vec<&str> = templates.iter().map(|(name, _)| name.as_str()).collect();
            failed(format!("no template is called `default`; found {}", names.join(", ")))
        })?;
        let mut tagged = [false; 2];
        let with_tools = named(WITH_TOOLS);
        for (place, (name, source)) in [(USUAL, Some(usual)), (WITH_TOOLS, with_tools)].into_iter().enumerate() {
            let Some(source) = source else { continue };
            let source = with_answers_as_filters(source);
            tagged[place] = matches!(source, Cow::Owned(_));
            environment.add_template_owned(name, source.into_owned()).map_err(|error| failed(reason(&error)))?;
        }
        Ok(Self {
            environment,
            origin: origin.to_owned(),
            tagged,
            for_tools: with_tools.is_some(),
            sources: templates.to_vec(),
        })
    }

    /// Where it is from: a file, a folder, or a name.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The template itself, and others that stand beside it, by name.
    pub fn sources(&self) -> &[(String, String)] {
        &self.sources
    }

    /// The whole conversation as text; with the beginning of an answer to come, where it is asked for.
    ///
    /// # Errors
    /// With the template's own words, where it refuses the conversation.
    pub fn render(&self, conversation: &Conversation, with_generation_prompt: bool) -> Result<String> {
        let messages = conversation.messages.iter().map(functions::value).collect::<Vec<_>>();
        let text = self.render_values(&messages, conversation, with_generation_prompt)?;
        Ok(match self.marks_answers(conversation) {
            true => answers::without_marks(&text).0,
            false => text,
        })
    }

    fn marks_answers(&self, conversation: &Conversation) -> bool {
        self.tagged[usize::from(self.for_tools && !conversation.tools.is_null())]
    }

    fn render_values(&self, messages: &[Value], conversation: &Conversation, prompt: bool) -> Result<String> {
        let name = if self.for_tools && !conversation.tools.is_null() { WITH_TOOLS } else { USUAL };
        let context = context! {
            messages => Value::from_iter(messages.iter().cloned()),
            tools => functions::value(&conversation.tools),
            documents => Value::from(()),
            add_generation_prompt => prompt,
            ..functions::value(&conversation.variables)
        };
        let template = self.environment.get_template(name);
        template
            .and_then(|template| template.render(context))
            .map_err(|error| Error::Template { origin: self.origin.clone(), reason: reason(&error) })
    }
}

/// The environment that transformers gives to templates.
fn environment(date: Date) -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    // Only delimiters can be wrong, and they are the usual ones.
    if let Ok(syntax) = syntax.build() {
        environment.set_syntax(syntax);
    }
    // By default the template's name decides, which may end in `.html`.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(functions::method);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(DEPTH);
    environment.add_filter("tojson", functions::tojson);
    environment.add_filter("wordcount", functions::wordcount);
    environment.add_filter(answers::FILTER, answers::mark);
    environment.add_test("iterable", functions::is_iterable);
    environment.add_test("sequence", functions::is_sequence);
    environment.add_function("raise_exception", functions::raise_exception);
    environment.add_function("strftime_now", move |format: &str| functions::strftime(date, format));
    environment
}

/// Statements of transformers' own, `{% generation %}` to `{% endgeneration %}`, as a filter over the same text, which
/// keeps the rules of white space and tells where the text is.
fn with_answers_as_filters(source: &str) -> Cow<'_, str> {
    static TAGS: OnceLock<Regex> = OnceLock::new();
    let tags =
        TAGS.get_or_init(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a fixed expression"));
    tags.replace_all(source, |found: &regex::Captures<'_>| match found.get(2) {
        None => format!("{{%{} filter {} {}%}}", &found[1], answers::FILTER, &found[3]),
        Some(_) => format!("{{%{} endfilter {}%}}", &found[1], &found[3]),
    })
}

/// What a template said, or what was wrong with it, and where.
fn reason(error: &minijinja::Error) -> String {
    let said = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{said} (line {line} of the template)"),
        None => said,
    }
}
