//! What happens to a caption before it is split into tokens. Two treatments are in use, and they disagree on full-width
//! punctuation, curly quotes, ligatures, entities and mojibake.

use std::borrow::Cow;
use std::sync::OnceLock;

use regex::{Captures, Regex};
use unicode_normalization::UnicodeNormalization;

/// How text is cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TextCleaning {
    /// As the original CLIP and sd-scripts do through the Python library ftfy ("fixes text for you", R. Speer): entities,
    /// mojibake, ligatures, full-width characters, quotes and control characters are repaired; then lower case.
    #[default]
    Ftfy,
    /// As transformers 5's tokenizer: Unicode normalisation (NFC) and lower case only.
    None,
}

impl TextCleaning {
    /// Its name in configs and metadata.
    pub fn name(self) -> &'static str {
        match self {
            TextCleaning::Ftfy => "ftfy",
            TextCleaning::None => "none",
        }
    }

    pub(super) fn apply(self, text: &str) -> String {
        match self {
            TextCleaning::Ftfy => fix_text(text).to_lowercase(),
            // Character by character, as the reference does: no final sigma.
            TextCleaning::None => text.nfc().flat_map(char::to_lowercase).collect(),
        }
    }
}

/// The repairs of ftfy 6.3 with its default settings, again and again until nothing changes.
fn fix_text(text: &str) -> String {
    let mut text = text.to_owned();
    // ftfy has no limit; text that is still changing after ten rounds is hostile.
    for _ in 0..10 {
        let mut fixed = unescape(&text).into_owned();
        fixed = fix_mojibake(&fixed);
        fixed = fixed.chars().flat_map(|c| fix_character(c).chars().collect::<Vec<_>>()).collect();
        fixed = fixed.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        fixed = terminal_escapes().replace_all(&fixed, "").into_owned();
        fixed = fixed.chars().filter(|&c| !is_removed_control(c)).collect::<String>().nfc().collect();
        if fixed == text {
            break;
        }
        text = fixed;
    }
    text
}

/// HTML entities, unless the text looks like HTML itself.
fn unescape(text: &str) -> Cow<'_, str> {
    static ENTITY: OnceLock<Regex> = OnceLock::new();
    if text.contains('<') || !text.contains('&') {
        return Cow::Borrowed(text);
    }
    let entity = ENTITY.get_or_init(|| Regex::new("&#?[0-9A-Za-z]{1,24};").expect("a fixed expression"));
    entity.replace_all(text, |found: &Captures<'_>| match htmlize::unescape(&found[0]) {
        // Browsers read `&notit;` as `¬it;`; ftfy wants the whole name.
        partly if partly.len() > 1 && partly.ends_with(';') => found[0].to_owned(),
        whole => whole.into_owned(),
    })
}

/// Text in UTF-8 that was read as Windows-1252 or Latin-1 and saved again ("â€™" for a quote, "Ã©" for é).
///
/// ftfy weighs how likely a text is; here a run of characters is repaired where all of it is well-formed UTF-8 once
/// taken back to bytes, which real text practically never is.
fn fix_mojibake(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let mut fixed = String::with_capacity(text.len());
    let mut index = 0;
    while index < characters.len() {
        let length = match windows_1252(characters[index]) {
            Some(0xc2..=0xdf) => 2,
            Some(0xe0..=0xef) => 3,
            Some(0xf0..=0xf4) => 4,
            _ => 1,
        };
        let bytes: Option<Vec<u8>> =
            characters.get(index..index + length).and_then(|run| run.iter().map(|&c| windows_1252(c)).collect());
        match bytes.as_deref().map(std::str::from_utf8) {
            Some(Ok(repaired)) if length > 1 => {
                fixed.push_str(repaired);
                index += length;
            }
            _ => {
                fixed.push(characters[index]);
                index += 1;
            }
        }
    }
    fixed
}

/// The byte of a character in Windows-1252, its five holes filled from Latin-1, as browsers do.
fn windows_1252(c: char) -> Option<u8> {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘',
        '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    match HIGH.iter().position(|&high| high == c) {
        Some(position) => Some(0x80 + position as u8),
        None => u8::try_from(u32::from(c)).ok(),
    }
}

/// One character repaired: C1 controls, Latin ligatures, full-width forms, quotes.
fn fix_character(c: char) -> Cow<'static, str> {
    let fixed = match c {
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "ʼn",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        '\u{2018}'..='\u{201b}' | 'ʼ' => "'",
        '\u{201c}'..='\u{201f}' => "\"",
        '\u{3000}' => " ",
        // Half- and full-width forms have their ordinary form as compatibility decomposition.
        '\u{ff01}'..='\u{ffef}' => return Cow::Owned(std::iter::once(c).nfkc().collect()),
        '\u{80}'..='\u{9f}' => return Cow::Owned(c1_as_windows_1252(c).to_string()),
        other => return Cow::Owned(other.to_string()),
    };
    Cow::Borrowed(fixed)
}

/// A C1 control as the Windows-1252 character that was meant, where there is one.
fn c1_as_windows_1252(c: char) -> char {
    (0x2013..=0x2122)
        .chain(0x152..=0x192)
        .chain([0x2c6, 0x2dc])
        .filter_map(char::from_u32)
        .find(|&meant| windows_1252(meant).map(char::from) == Some(c))
        .unwrap_or(c)
}

fn is_removed_control(c: char) -> bool {
    matches!(
        c,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}'
    )
}

fn terminal_escapes() -> &'static Regex {
    static ESCAPES: OnceLock<Regex> = OnceLock::new();
    ESCAPES.get_or_init(|| Regex::new("\u{1b}\\[((?:\\d|;)*)([a-zA-Z])").expect("a fixed expression"))
}
