//! Which tags become a caption, in which order and spelling. What a picture's tags are is the tagger's business.

use std::collections::{BTreeMap, HashSet};

use serde::Deserialize;

use crate::tags::Probabilities;

/// Where the most probable rating stands in a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RatingPlace {
    /// Nowhere.
    #[default]
    None,
    /// Before all tags but those of [`TagChoice::always_first`].
    First,
    /// Behind all tags.
    Last,
}

/// How tags become a caption. Names may be written with underscores or spaces, in any case.
#[derive(Debug, Clone, PartialEq)]
pub struct TagChoice {
    /// General tags from this probability on.
    pub threshold: f32,
    /// Characters from this probability on.
    pub character_threshold: f32,
    /// The most tags, the most probable ones; ratings do not count.
    pub max_tags: Option<usize>,
    /// Underscores stay; otherwise they become spaces but in emoticons.
    pub keep_underscores: bool,
    /// Tags that are left out.
    pub exclude: Vec<String>,
    /// Tags that are called otherwise; an empty name leaves a tag out.
    pub replace: BTreeMap<String, String>,
    /// Tags that stand first where the picture has them, in this order.
    pub always_first: Vec<String>,
    /// Characters stand before general tags; otherwise the more probable tag stands first.
    pub characters_first: bool,
    /// Where the rating stands.
    pub rating: RatingPlace,
    /// Brackets are written `\(` and `\)`, as prompts of some programs have them. Captions are not prompts.
    pub escape_brackets: bool,
}

impl Default for TagChoice {
    fn default() -> Self {
        Self {
            threshold: 0.35,
            character_threshold: 0.85,
            max_tags: None,
            keep_underscores: false,
            exclude: Vec::new(),
            replace: BTreeMap::new(),
            always_first: Vec::new(),
            characters_first: false,
            rating: RatingPlace::None,
            escape_brackets: false,
        }
    }
}

impl TagChoice {
    /// The tags of a caption, in its order.
    pub fn choose(&self, probabilities: &Probabilities) -> Vec<String> {
        let above = |tags: &BTreeMap<String, f32>, threshold: f32| -> Vec<(String, f32)> {
            let chosen = tags.iter().filter(|&(_, &probability)| probability >= threshold);
            chosen.map(|(name, &probability)| (name.clone(), probability)).collect()
        };
        let excluded: HashSet<String> = self.exclude.iter().map(|name| plain(name)).collect();
        let characters = above(&probabilities.character, self.character_threshold);
        let general = above(&probabilities.general, self.threshold);
        let mut chosen: Vec<(bool, String, f32)> = characters
            .into_iter()
            .map(|(name, probability)| (true, name, probability))
            .chain(general.into_iter().map(|(name, probability)| (false, name, probability)))
            .filter(|(_, name, _)| !excluded.contains(&plain(name)))
            .collect();
        // Equal probabilities stand by name, so that a caption is the same from run to run.
        chosen.sort_by(|a, b| b.2.total_cmp(&a.2).then_with(|| a.1.cmp(&b.1)));
        chosen.truncate(self.max_tags.unwrap_or(usize::MAX));
        if self.characters_first {
            chosen.sort_by_key(|(is_character, ..)| !is_character);
        }
        let firsts: Vec<String> = self.always_first.iter().map(|name| plain(name)).collect();
        let mut names: Vec<String> = chosen.into_iter().map(|(_, name, _)| name).collect();
        let rating = probabilities.likeliest_rating().map(str::to_owned);
        match (self.rating, rating) {
            (RatingPlace::First, Some(rating)) => names.insert(0, rating),
            (RatingPlace::Last, Some(rating)) => names.push(rating),
            _ => {}
        }
        let place = |name: &str| firsts.iter().position(|first| *first == plain(name)).unwrap_or(firsts.len());
        names.sort_by_cached_key(|name| place(name));
        self.spelled(names)
    }

    /// Names as they are written, none of them twice.
    fn spelled(&self, names: Vec<String>) -> Vec<String> {
        let replaced: BTreeMap<String, &String> = self.replace.iter().map(|(from, to)| (plain(from), to)).collect();
        let mut seen = HashSet::new();
        let spell = |name: String| {
            let name = match replaced.get(&plain(&name)) {
                Some(other) => other.trim().to_owned(),
                None if self.keep_underscores => name,
                None => spaced(&name),
            };
            match self.escape_brackets {
                true => name.replace('(', "\\(").replace(')', "\\)"),
                false => name,
            }
        };
        let names = names.into_iter().map(spell);
        names.filter(|name| !name.is_empty() && seen.insert(plain(name))).collect()
    }
}

/// A tag's name as it is compared: with spaces, in lower case.
pub(crate) fn plain(name: &str) -> String {
    name.trim().replace('_', " ").to_lowercase()
}

/// A tag with spaces for underscores, unless it is an emoticon, whose underscores are a mouth: no two letters or digits of an
/// emoticon stand beside each other.
fn spaced(name: &str) -> String {
    let characters: Vec<char> = name.chars().collect();
    let has_word = characters.windows(2).any(|pair| pair.iter().all(|character| character.is_alphanumeric()));
    if has_word { name.replace('_', " ") } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Probabilities {
        let of = |tags: &[(&str, f32)]| tags.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        Probabilities {
            rating: of(&[("general", 0.7), ("sensitive", 0.29)]),
            character: of(&[("saber_(fate)", 0.95), ("rin", 0.5)]),
            general: of(&[("1girl", 0.99), ("long_hair", 0.9), ("^_^", 0.6), ("blurry", 0.36), ("sky", 0.34)]),
        }
    }

    fn chosen(change: impl FnOnce(&mut TagChoice)) -> String {
        let mut choice = TagChoice::default();
        change(&mut choice);
        choice.choose(&picture()).join(", ")
    }

    #[test]
    fn thresholds_go_by_category_and_the_more_probable_stands_first() {
        assert_eq!(chosen(|_| {}), "1girl, saber (fate), long hair, ^_^, blurry");
        let lower = chosen(|choice| (choice.threshold, choice.character_threshold) = (0.34, 0.5));
        assert_eq!(lower, "1girl, saber (fate), long hair, ^_^, rin, blurry, sky");
        assert_eq!(chosen(|choice| choice.threshold = 1.0), "saber (fate)");
        assert_eq!(chosen(|choice| choice.max_tags = Some(2)), "1girl, saber (fate)");
        assert_eq!(chosen(|choice| choice.max_tags = Some(0)), "");
    }

    #[test]
    fn tags_are_excluded_replaced_and_put_first_however_they_are_written() {
        assert_eq!(
            chosen(|choice| choice.exclude = vec!["Long Hair".into(), "blurry".into()]),
            "1girl, saber (fate), ^_^"
        );
        let replaced = chosen(|choice| {
            choice.replace.insert("saber (fate)".into(), "sks_girl".into());
            choice.replace.insert("blurry".into(), String::new());
            choice.replace.insert("^_^".into(), "1girl".into());
        });
        assert_eq!(replaced, "1girl, sks_girl, long hair");
        let first = chosen(|choice| choice.always_first = vec!["blurry".into(), "long_hair".into(), "absent".into()]);
        assert_eq!(first, "blurry, long hair, 1girl, saber (fate), ^_^");
    }

    #[test]
    fn order_rating_underscores_and_brackets_are_as_asked() {
        assert_eq!(chosen(|choice| choice.characters_first = true), "saber (fate), 1girl, long hair, ^_^, blurry");
        let rated = chosen(|choice| {
            (choice.rating, choice.always_first) = (RatingPlace::First, vec!["1girl".into()]);
        });
        assert_eq!(rated, "1girl, general, saber (fate), long hair, ^_^, blurry");
        assert!(chosen(|choice| choice.rating = RatingPlace::Last).ends_with("blurry, general"));
        assert!(chosen(|choice| choice.keep_underscores = true).contains("saber_(fate), long_hair"));
        assert!(chosen(|choice| choice.escape_brackets = true).contains(r"saber \(fate\)"));
    }

    /// The emoticons of Danbooru that have an underscore.
    #[test]
    fn emoticons_keep_their_underscores_and_words_lose_them() {
        for emoticon in [
            "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@",
            "^_^", "o_o", "u_u", "x_x", "|_|", "||_||",
        ] {
            assert_eq!(spaced(emoticon), emoticon);
        }
        for (tag, written) in
            [("long_hair", "long hair"), ("d-pad_on_x", "d-pad on x"), (":d", ":d"), ("a_tree", "a tree")]
        {
            assert_eq!(spaced(tag), written);
        }
    }
}
