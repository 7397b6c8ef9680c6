//! Prompt weights as the WebUI writes them: `(word)` counts 1.1 times, `(word:1.3)` 1.3 times, `[word]` 1/1.1 times, nested
//! as often as one likes; `\(`, `\)`, `\[` and `\]` are plain brackets. What the weights do to a text's states is the
//! trainer's.

const UP: f32 = 1.1;
const DOWN: f32 = 1.0 / 1.1;

/// The parts of a prompt with their weights; neighbours of equal weight are one part. Brackets that are never closed count
/// to the end. A prompt without text gives one empty part.
pub fn parse(prompt: &str) -> Vec<(String, f32)> {
    let mut parts: Vec<(String, f32)> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let multiply = |parts: &mut [(String, f32)], from: usize, factor: f32| {
        parts[from..].iter_mut().for_each(|(_, weight)| *weight *= factor);
    };
    let mut text = String::new();
    // Text so far becomes a part of its own, so that brackets begin and end between parts.
    let flush = |text: &mut String, parts: &mut Vec<(String, f32)>| {
        if !text.is_empty() {
            parts.push((std::mem::take(text), 1.0));
        }
    };
    let mut rest = prompt;
    while let Some(character) = rest.chars().next() {
        let after = &rest[character.len_utf8()..];
        rest = after;
        match character {
            '\\' => match after.chars().next().filter(|next| "()[]\\".contains(*next)) {
                Some(next) => {
                    text.push(next);
                    rest = &after[next.len_utf8()..];
                }
                None => text.push('\\'),
            },
            '(' => {
                flush(&mut text, &mut parts);
                round.push(parts.len());
            }
            '[' => {
                flush(&mut text, &mut parts);
                square.push(parts.len());
            }
            ':' if !round.is_empty() => match weight(after) {
                Some((factor, end)) => {
                    flush(&mut text, &mut parts);
                    multiply(&mut parts, round.pop().unwrap_or_default(), factor);
                    rest = &after[end..];
                }
                None => text.push(':'),
            },
            ')' if !round.is_empty() => {
                flush(&mut text, &mut parts);
                multiply(&mut parts, round.pop().unwrap_or_default(), UP);
            }
            ']' if !square.is_empty() => {
                flush(&mut text, &mut parts);
                multiply(&mut parts, square.pop().unwrap_or_default(), DOWN);
            }
            other => text.push(other),
        }
    }
    flush(&mut text, &mut parts);
    round.into_iter().for_each(|from| multiply(&mut parts, from, UP));
    square.into_iter().for_each(|from| multiply(&mut parts, from, DOWN));
    let mut merged: Vec<(String, f32)> = Vec::new();
    for (text, weight) in parts {
        match merged.last_mut() {
            Some((last, own)) if *own == weight => last.push_str(&text),
            _ => merged.push((text, weight)),
        }
    }
    if merged.is_empty() { vec![(String::new(), 1.0)] } else { merged }
}

/// The number up to a closing bracket, and where the text goes on behind it.
fn weight(text: &str) -> Option<(f32, usize)> {
    let end = text.find(')')?;
    let number: f32 = text[..end].trim().parse().ok()?;
    number.is_finite().then_some((number, end + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prompts_are_read_as_the_webui_reads_them() {
        // The examples of the WebUI's own documentation of its parser.
        let cases: [(&str, &[(&str, f32)]); 9] = [
            ("normal text", &[("normal text", 1.0)]),
            ("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
            ("(unbalanced", &[("unbalanced", 1.1)]),
            (r"\(literal\]", &[("(literal]", 1.0)]),
            ("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]),
            (
                "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))",
                &[
                    ("a ", 1.0),
                    ("house", 1.573),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641),
                ],
            ),
            ("", &[("", 1.0)]),
            ("time: 12:30) ]", &[("time: 12:30) ]", 1.0)]),
            ("(a:b)", &[("a:b", 1.1)]),
        ];
        for (prompt, expected) in cases {
            let found = parse(prompt);
            assert_eq!(found.len(), expected.len(), "{prompt}: {found:?}");
            for ((text, weight), (own, value)) in found.iter().zip(expected) {
                assert!(text == own && (weight - value).abs() < 1e-4, "{prompt}: {found:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_none_without_brackets_changes(text in "\\PC*") {
            let parts = parse(&text);
            prop_assert!(!parts.is_empty());
            if !text.contains(['(', '[', '\\']) {
                prop_assert_eq!(parts, vec![(text, 1.0)]);
            }
        }
    }
}
