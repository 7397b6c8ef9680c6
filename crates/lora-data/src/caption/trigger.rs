//! Trigger words in captions: where they stand as words of their own, and what takes their place. When one is put in
//! front is [`super::CaptionOptions`]' to say.

/// What stands in captions for the trigger word, as ai-toolkit has it.
pub const MARKS: [&str; 2] = ["[trigger]", "[name]"];

/// `text` with a trigger word in the place of [`MARKS`]; as it is where there is no trigger word.
pub(super) fn marked(text: &str, word: &str) -> String {
    if word.is_empty() {
        text.to_owned()
    } else {
        MARKS.iter().fold(text.to_owned(), |text, mark| text.replace(mark, word))
    }
}

/// Whether `text` has `word` as a word of its own: “ink” is none of “a pink drink”.
pub fn has(text: &str, word: &str) -> bool {
    places(text, word).next().is_some()
}

/// `text` with `by` wherever it has `word` as a word of its own.
pub fn replaced(text: &str, word: &str, by: &str) -> String {
    let (mut out, mut from) = (String::with_capacity(text.len()), 0);
    for at in places(text, word) {
        out += &text[from..at];
        out += by;
        from = at + word.len();
    }
    out + &text[from..]
}

/// The tag that is to stand in front for a trigger word: `tags` lose it where they have it. None where a tag of several
/// words has it and no tag moves (`is_whole`): that caption reads as a sentence.
pub(super) fn taken_out(tags: &mut Vec<String>, word: String, is_whole: bool) -> Option<String> {
    if tags.contains(&word) {
        tags.retain(|tag| *tag != word);
        return Some(word);
    }
    match tags.iter().position(|tag| has(tag, &word)) {
        Some(_) if is_whole => None,
        Some(at) => Some(tags.remove(at)),
        None => Some(word),
    }
}

/// Where `word` stands as a word of its own, from the front, none within another.
fn places<'t>(text: &'t str, word: &'t str) -> impl Iterator<Item = usize> + 't {
    let places = text.match_indices(word).filter(|_| !word.is_empty()).map(|(at, _)| at);
    places.filter(move |&at| {
        let end = at + word.len();
        !joined(text[..at].chars().next_back(), word.chars().next())
            && !joined(word.chars().next_back(), text[end..].chars().next())
    })
}

/// Whether two neighbours are of one word. Scripts that are written without blanks show no ends of words.
fn joined(before: Option<char>, after: Option<char>) -> bool {
    let is_inside = |letter: char| (letter.is_alphanumeric() || letter == '_') && !is_unspaced(letter);
    before.is_some_and(is_inside) && after.is_some_and(is_inside)
}

/// Chinese, Japanese and Korean characters, and Thai's to Myanmar's.
fn is_unspaced(letter: char) -> bool {
    matches!(letter, '\u{e00}'..='\u{109f}' | '\u{2e80}'..='\u{9fff}' | '\u{ac00}'..='\u{d7af}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_where_it_stands_alone() {
        for (text, word, found) in [
            ("photo of sks cat, sitting", "sks cat", true),
            ("a pink drink", "ink", false),
            ("ink_style", "ink", false),
            ("(ink:1.2)", "ink", true),
            ("pink, ink", "ink", true),
            ("一只小猫在睡觉", "小猫", true),
            ("anything", "", false),
        ] {
            assert_eq!(has(text, word), found, "{text}");
        }
        assert_eq!(replaced("ink on pink, in ink", "ink", "drawing"), "drawing on pink, in drawing");
        assert_eq!(marked("a [trigger] and [name]", "sks"), "a sks and sks");
        assert_eq!(marked("a [trigger]", ""), "a [trigger]");
    }
}
