//! Templates for models that come without one. Each names the tokens that end its turns, which the tokenizer has to have: a
//! model that never saw them as tokens would not learn when to stop.

use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Names of the templates.
pub const NAMES: &[&str] = &["chatml", "llama3", "gemma", "mistral", "alpaca"];

/// Turns between `<|im_start|>` and `<|im_end|>`: Qwen, SmolLM, many others.
const CHATML: &str = r"
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}";

/// Roles between `<|start_header_id|>` and `<|end_header_id|>`, turns end with `<|eot_id|>`; without a date.
const LLAMA3: &str = r"
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}";

/// Turns between `<start_of_turn>` and `<end_of_turn>`; the system's words go before the first user's.
const GEMMA: &str = r"
{{- bos_token -}}
{%- set ns = namespace(before='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.before = message.content | trim + '\n\n' -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<start_of_turn>model\n' -}}
        {%- generation -%}{{- message.content | trim + '<end_of_turn>' -}}{%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- '<start_of_turn>' + message.role + '\n' + ns.before + message.content | trim + '<end_of_turn>\n' -}}
        {%- set ns.before = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}";

/// Tasks between `[INST]` and `[/INST]`, answers up to the end of text; the system's words go before the first user's.
const MISTRAL: &str = r"
{{- bos_token -}}
{%- set ns = namespace(before='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.before = message.content + '\n\n' -%}
    {%- elif message.role == 'assistant' -%}
        {%- generation -%}{{- ' ' + message.content | trim + eos_token -}}{%- endgeneration -%}
    {%- elif message.role == 'user' -%}
        {{- '[INST] ' + ns.before + message.content + '[/INST]' -}}
        {%- set ns.before = '' -%}
    {%- else -%}
        {{- raise_exception('the template mistral knows system, user and assistant, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}";

/// Headings in plain words, for models that were trained on texts alone: no token but the end of text.
const ALPACA: &str = r"
{{- bos_token if bos_token is defined -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + '\n\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '### Response:\n' -}}
        {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
        {{- '\n\n' if not loop.last -}}
    {%- elif message.role == 'user' -%}
        {{- '### Instruction:\n' + message.content + '\n\n' -}}
    {%- else -%}
        {{- raise_exception('the template alpaca knows system, user and assistant, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}";

pub(super) fn source(name: &str) -> Option<&'static str> {
    Some(match name {
        "chatml" => CHATML,
        "llama3" => LLAMA3,
        "gemma" => GEMMA,
        "mistral" => MISTRAL,
        "alpaca" => ALPACA,
        _ => return None,
    })
}

/// Refuses a template whose turns end with a token that the tokenizer does not have.
pub(super) fn check(name: &str, tokenizer: &Tokenizer) -> Result<()> {
    let refused = |lacks: &str| Error::Option {
        key: "chat_template",
        value: name.to_owned(),
        reason: format!(
            "its turns end with {lacks}, which is no token of {}, so that the model would not learn when to stop; \
             `alpaca` needs only an end of text",
            tokenizer.path().display()
        ),
    };
    match name {
        "chatml" | "llama3" | "gemma" => {
            let end = match name {
                "chatml" => "<|im_end|>",
                "llama3" => "<|eot_id|>",
                _ => "<end_of_turn>",
            };
            tokenizer.id_of(end).map(|_| ()).ok_or_else(|| refused(end))
        }
        _ if tokenizer.special_tokens().eos.is_none() => Err(refused("the end of text")),
        _ => Ok(()),
    }
}
