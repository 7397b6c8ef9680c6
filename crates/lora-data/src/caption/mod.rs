//! What becomes of a caption at a visit: dropped, one of its lines, wildcards chosen, trigger word and prefix put on,
//! tags shuffled and dropped, in sd-scripts' order (v0.10.1, `process_caption`) but for one thing: of several lines one
//! is chosen before prefix and suffix are put on, so that every line has them. Where captions come from is
//! [`crate::dataset`]'s.

pub mod trigger;
pub mod weights;

use std::borrow::Cow;
use std::fmt;

use lora_core::random::Stream;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Steps that were taken.
    pub steps: usize,
    /// Steps of the whole run.
    pub of: usize,
}

impl Done {
    /// The end of a run of any length: every warm-up is over.
    pub const ALL: Self = Self { steps: usize::MAX, of: usize::MAX };
}

/// Steps, or a share of those of the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum WarmupLength {
    /// Steps; 0 for none.
    Steps(usize),
    /// Share of the run, below 1.
    Share(f64),
}

/// What counts of a caption that has several lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CaptionLines {
    /// The first, as in sd-scripts.
    #[default]
    First,
    /// All of them, with their breaks, as in ai-toolkit, musubi-tuner and diffusion-pipe; lines without text are left
    /// out.
    All,
    /// All of them as one, with [`CaptionOptions::separator`] between them, as once in ai-toolkit.
    Joined,
}

/// How captions are treated. The default leaves them as they are.
#[derive(Clone, PartialEq)]
pub struct CaptionOptions {
    /// Put in front, as a tag that stays there, where the caption does not have it as a word of its own; it takes the
    /// place of [`trigger::MARKS`].
    pub trigger_word: String,
    /// Put before each caption, with a blank.
    pub prefix: String,
    /// Put after each caption, with a blank.
    pub suffix: String,
    /// Share of visits without caption.
    pub dropout: f64,
    /// In every so-many-th epoch all captions are left out, with 3 in the third and the sixth; 0 for never.
    pub dropout_every_n_epochs: u64,
    /// What counts of several lines, where none is chosen.
    pub lines: CaptionLines,
    /// Of several lines one is chosen, of `{a|b|c}` one part; `{{` and `}}` are braces.
    pub wildcards: bool,
    /// Shuffle the tags behind the kept ones.
    pub shuffle: bool,
    /// Probability that a tag behind the kept ones is left out.
    pub tag_dropout: f64,
    /// Tags behind the kept ones that are there at the first step; further ones come evenly until all are there.
    pub warmup_tags: usize,
    /// How long that takes.
    pub warmup: WarmupLength,
    /// Number of tags at the front that are neither shuffled nor dropped.
    pub keep_tokens: usize,
    /// What divides kept tags from the others in a caption, in place of a number; a second one begins a kept end.
    pub keep_separator: String,
    /// What divides tags.
    pub separator: String,
    /// What divides tags that move and drop together.
    pub secondary_separator: String,
}

impl Default for CaptionOptions {
    fn default() -> Self {
        Self {
            trigger_word: String::new(),
            prefix: String::new(),
            suffix: String::new(),
            dropout: 0.0,
            dropout_every_n_epochs: 0,
            lines: CaptionLines::First,
            wildcards: false,
            shuffle: false,
            tag_dropout: 0.0,
            warmup_tags: 1,
            warmup: WarmupLength::Steps(0),
            keep_tokens: 0,
            keep_separator: String::new(),
            separator: ",".into(),
            secondary_separator: String::new(),
        }
    }
}

impl fmt::Debug for CaptionOptions {
    // The states of runs record it. Those of older versions say nothing of what came later, which is told only where it
    // is used.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("CaptionOptions");
        text.field("trigger_word", &self.trigger_word)
            .field("prefix", &self.prefix)
            .field("suffix", &self.suffix)
            .field("dropout", &self.dropout)
            .field("dropout_every_n_epochs", &self.dropout_every_n_epochs)
            .field("wildcards", &self.wildcards)
            .field("shuffle", &self.shuffle)
            .field("tag_dropout", &self.tag_dropout)
            .field("keep_tokens", &self.keep_tokens)
            .field("keep_separator", &self.keep_separator)
            .field("separator", &self.separator)
            .field("secondary_separator", &self.secondary_separator);
        if self.lines != CaptionLines::First {
            text.field("lines", &self.lines);
        }
        if self.warms_up() {
            text.field("warmup_tags", &self.warmup_tags).field("warmup", &self.warmup);
        }
        text.finish()
    }
}

impl CaptionOptions {
    /// Whether a caption is the same at every visit that has one, so that what is made of it can be kept.
    pub(crate) fn is_fixed(&self) -> bool {
        !self.wildcards && !self.shuffle && self.tag_dropout == 0.0 && !self.warms_up()
    }

    /// Whether lines behind the first are never used.
    pub(crate) fn cuts_lines(&self) -> bool {
        !self.wildcards && self.lines == CaptionLines::First
    }

    /// Whether every line is used each time.
    pub(crate) fn takes_all_lines(&self) -> bool {
        !self.wildcards && self.lines != CaptionLines::First
    }

    fn warms_up(&self) -> bool {
        self.warmup != WarmupLength::Steps(0)
    }

    /// How many of the tags behind the kept ones are there.
    fn warm(&self, tags: usize, done: Done) -> usize {
        let steps = match self.warmup {
            WarmupLength::Steps(steps) => steps,
            WarmupLength::Share(share) => (share * done.of as f64) as usize,
        };
        if done.steps >= steps || tags <= self.warmup_tags {
            return tags;
        }
        self.warmup_tags + (done.steps as f64 * ((tags - self.warmup_tags) as f64 / steps as f64)) as usize
    }

    /// The caption of a visit. `lines` are the lines of its file; `epoch` counts from 0, `done` says how far the run
    /// is; `random` belongs to the visit.
    pub fn process<S: AsRef<str>>(&self, lines: &[S], epoch: u64, done: Done, random: &Stream) -> String {
        let every = self.dropout_every_n_epochs;
        let dropped = f64::from(random.at("caption_dropout").uniform()) < self.dropout;
        if dropped || every > 0 && (epoch + 1).is_multiple_of(every) {
            String::new()
        } else {
            self.kept(lines, done, random)
        }
    }

    /// The caption of a visit that keeps it.
    pub fn kept<S: AsRef<str>>(&self, lines: &[S], done: Done, random: &Stream) -> String {
        let joined = |by: &str| lines.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(by).into();
        let line: Cow<'_, str> = match (self.wildcards, self.lines, lines) {
            (_, _, []) => "".into(),
            (true, ..) => lines[random.at("line").below(lines.len() as u64) as usize].as_ref().into(),
            (false, CaptionLines::First, [first, ..]) => first.as_ref().into(),
            (false, CaptionLines::All, _) => joined("\n"),
            (false, CaptionLines::Joined, _) => joined(&self.between()),
        };
        let parts = [self.prefix.as_str(), &line, self.suffix.as_str()];
        let text = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
        let text = trigger::marked(&text, &self.trigger_word);
        let text = if self.wildcards { choose(&text, &mut random.at("wildcard")) } else { text };
        let text = self.order(&text, done, random);
        match self.secondary_separator.as_str() {
            "" => text,
            secondary => text.replace(secondary, &format!("{} ", self.separator)),
        }
    }

    /// Tags in their new order.
    fn order(&self, text: &str, done: Done, random: &Stream) -> String {
        let divided = !self.keep_separator.is_empty() && text.contains(&self.keep_separator);
        let is_whole = !self.shuffle && self.tag_dropout == 0.0 && !self.warms_up();
        if !divided && self.trigger_word.is_empty() && is_whole {
            return text.to_owned();
        }
        let tags = |part: &str| -> Vec<String> {
            let split: Vec<&str> =
                if self.separator.is_empty() { vec![part] } else { part.split(&self.separator).collect() };
            split.into_iter().map(|tag| tag.trim().to_owned()).filter(|tag| !tag.is_empty()).collect()
        };
        let (mut head, mut middle, tail) = match divided {
            true => {
                let mut parts = text.splitn(3, &self.keep_separator).map(tags);
                let mut next = || parts.next().unwrap_or_default();
                (next(), next(), next())
            }
            false => {
                let mut head = tags(text);
                let middle = head.split_off(self.keep_tokens.min(head.len()));
                (head, middle, Vec::new())
            }
        };
        // A trigger word of several tags is each of them.
        let missing = tags(&self.trigger_word).into_iter();
        let missing = missing.filter(|word| !head.iter().chain(&tail).any(|tag| trigger::has(tag, word)));
        let front: Vec<String> = missing.filter_map(|word| trigger::taken_out(&mut middle, word, is_whole)).collect();
        head.splice(0..0, front);
        middle.truncate(self.warm(middle.len(), done));
        if self.shuffle {
            random.at("shuffle").shuffle(&mut middle);
        }
        if self.tag_dropout > 0.0 {
            let mut draw = random.at("tag_dropout");
            middle.retain(|_| f64::from(draw.uniform()) >= self.tag_dropout);
        }
        [head, middle, tail].concat().join(&self.between())
    }

    /// What stands between two tags.
    fn between(&self) -> String {
        format!("{} ", self.separator)
    }
}

/// One part of each `{a|b|c}`; `{{` and `}}` become braces; an opening brace without its end stays as it is.
fn choose(text: &str, random: &mut Stream) -> String {
    let mut chosen = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        chosen.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            chosen.push_str(brace);
            rest = after;
            continue;
        }
        match rest.find('}').filter(|&end| brace == "{" && end > 0) {
            Some(end) => {
                let parts: Vec<&str> = rest[..end].split('|').collect();
                chosen.push_str(parts[random.below(parts.len() as u64) as usize]);
                rest = &rest[end + 1..];
            }
            None => chosen.push_str(brace),
        }
    }
    chosen + rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn seen(options: &CaptionOptions, lines: &[&str]) -> BTreeSet<String> {
        (0..300).map(|seed| options.process(lines, 1, Done::ALL, &Stream::new(seed))).collect()
    }

    fn only(options: &CaptionOptions, lines: &[&str]) -> String {
        let all = seen(options, lines);
        assert_eq!(all.len(), 1, "{all:?}");
        all.into_iter().next().unwrap()
    }

    #[test]
    fn lines_behind_the_first_count_where_they_are_asked_for() {
        let of = |lines| CaptionOptions { lines, prefix: "photo of".into(), ..CaptionOptions::default() };
        let caption = ["a cat", "on a sofa", "by night"];
        assert_eq!(only(&of(CaptionLines::First), &caption), "photo of a cat");
        assert_eq!(only(&of(CaptionLines::All), &caption), "photo of a cat\non a sofa\nby night");
        assert_eq!(only(&of(CaptionLines::Joined), &caption), "photo of a cat, on a sofa, by night");
        for lines in [CaptionLines::First, CaptionLines::All, CaptionLines::Joined] {
            assert_eq!(only(&of(lines), &[]), "photo of");
            assert!(of(lines).is_fixed());
            let chosen = CaptionOptions { wildcards: true, ..of(lines) };
            assert_eq!(seen(&chosen, &caption).len(), 3);
        }
        let tags = CaptionOptions { shuffle: true, ..of(CaptionLines::Joined) };
        assert_eq!(seen(&tags, &caption).len(), 6);
    }

    #[test]
    fn what_is_fixed_is_put_where_it_belongs() {
        let plain = CaptionOptions::default();
        assert!(plain.is_fixed());
        assert_eq!(only(&plain, &["a red apple,  on a table", "another"]), "a red apple,  on a table");
        assert_eq!(only(&plain, &[]), "");
        let around = CaptionOptions { prefix: "photo of".into(), suffix: "in oil".into(), ..plain.clone() };
        assert_eq!(only(&around, &["a cat"]), "photo of a cat in oil");
        let trigger = CaptionOptions { trigger_word: "ohwx".into(), ..plain.clone() };
        assert_eq!(only(&trigger, &["cat, sofa"]), "ohwx, cat, sofa");
        assert_eq!(only(&trigger, &["cat, ohwx, sofa"]), "ohwx, cat, sofa");
        assert_eq!(only(&trigger, &[""]), "ohwx");
        assert_eq!(only(&trigger, &["photo of ohwx cat, sofa"]), "photo of ohwx cat, sofa");
        assert_eq!(only(&trigger, &["photo of ohwxy, sofa"]), "ohwx, photo of ohwxy, sofa");
        assert_eq!(only(&trigger, &["photo of [trigger], sofa"]), "photo of ohwx, sofa");
        let dropped = CaptionOptions { tag_dropout: 1.0, ..trigger.clone() };
        assert_eq!(only(&dropped, &["sofa, photo of ohwx cat"]), "photo of ohwx cat");
        let several = CaptionOptions { trigger_word: "ohwx, cat".into(), ..plain.clone() };
        assert_eq!(only(&several, &["sofa, cat, red"]), "ohwx, cat, sofa, red");
        let divided = CaptionOptions { keep_separator: "|||".into(), secondary_separator: ";;;".into(), ..plain };
        assert_eq!(only(&divided, &["a, b ||| c;;;d, e"]), "a, b, c, d, e");
    }

    #[test]
    fn tags_move_and_drop_behind_the_kept_ones() {
        let shuffle = CaptionOptions { shuffle: true, keep_tokens: 1, ..CaptionOptions::default() };
        let all = seen(&shuffle, &["one, a, b, c"]);
        assert!(all.len() == 6 && all.iter().all(|caption| caption.starts_with("one, ")), "{all:?}");
        let around = CaptionOptions { keep_separator: "|||".into(), ..shuffle.clone() };
        let all = seen(&around, &["x, y ||| a, b ||| z"]);
        assert_eq!(all, ["x, y, a, b, z", "x, y, b, a, z"].map(String::from).into());
        let bound = CaptionOptions { secondary_separator: ";;;".into(), keep_tokens: 0, ..shuffle };
        assert_eq!(seen(&bound, &["a;;;b, c"]), ["a, b, c", "c, a, b"].map(String::from).into());
        let drop = CaptionOptions { tag_dropout: 0.5, keep_tokens: 1, ..CaptionOptions::default() };
        let all = seen(&drop, &["one, a, b"]);
        assert_eq!(all, ["one", "one, a", "one, b", "one, a, b"].map(String::from).into());
        let none = CaptionOptions { tag_dropout: 1.0, ..drop };
        assert_eq!(only(&none, &["one, a, b"]), "one");
    }

    /// Values of sd-scripts' formula, ⌊step (tags − least) / steps⌋ + least.
    #[test]
    fn tags_come_evenly_over_a_warm_up() {
        let seen = |options: &CaptionOptions, steps: usize| {
            options.process(&["one, a, b, c, d, e"], 1, Done { steps, of: 40 }, &Stream::new(0))
        };
        let warm = CaptionOptions { keep_tokens: 1, warmup: WarmupLength::Steps(8), ..CaptionOptions::default() };
        assert!(!warm.is_fixed() && format!("{warm:?}").contains("warmup: Steps(8)"));
        // As a state of before there was a warm-up has it.
        assert!(
            format!("{:?}", CaptionOptions::default()).ends_with(", separator: \",\", secondary_separator: \"\" }")
        );
        for (step, tags) in
            [(0, "one, a"), (1, "one, a"), (2, "one, a, b"), (7, "one, a, b, c, d"), (8, "one, a, b, c, d, e")]
        {
            assert_eq!(seen(&warm, step), tags, "{step}");
        }
        // Of a fifth of 40 steps the same; none at first; more than there are.
        let share = CaptionOptions { warmup: WarmupLength::Share(0.2), ..warm.clone() };
        assert!((0..10).all(|step| seen(&share, step) == seen(&warm, step)));
        assert_eq!(seen(&CaptionOptions { warmup_tags: 0, ..warm.clone() }, 0), "one");
        assert_eq!(seen(&CaptionOptions { warmup_tags: 9, ..warm }, 0), "one, a, b, c, d, e");
    }

    #[test]
    fn whole_captions_drop_by_chance_and_by_epoch() {
        let dropout = CaptionOptions { dropout: 0.3, ..CaptionOptions::default() };
        let empty =
            (0..1000).filter(|&seed| dropout.process(&["a"], 1, Done::ALL, &Stream::new(seed)).is_empty()).count();
        // Standard deviation √(1000 · 0.3 · 0.7) = 14.5; five of them.
        assert!(empty.abs_diff(300) < 73, "{empty}");
        let epochs = CaptionOptions { dropout_every_n_epochs: 3, ..CaptionOptions::default() };
        let kept: Vec<bool> =
            (0..6).map(|epoch| !epochs.process(&["a"], epoch, Done::ALL, &Stream::new(0)).is_empty()).collect();
        assert_eq!(kept, [true, true, false, true, true, false], "epochs 3 and 6, as people count");
    }

    #[test]
    fn wildcards_choose_a_line_and_a_part() {
        let wild = CaptionOptions { wildcards: true, ..CaptionOptions::default() };
        let all = seen(&wild, &["a {red|green} apple", "{{plain}}"]);
        assert_eq!(all, ["a red apple", "a green apple", "{plain}"].map(String::from).into());
        assert_eq!(only(&wild, &["broken { brace } } {"]), "broken  brace  } {");
        let prefixed = CaptionOptions { prefix: "photo,".into(), ..wild };
        assert!(seen(&prefixed, &["a", "b"]).iter().all(|caption| caption.starts_with("photo, ")));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shuffling_loses_no_tag_and_no_text_panics(text in "\\PC*", keep in 0usize..4, seed: u64) {
            let shuffle = CaptionOptions { shuffle: true, keep_tokens: keep, ..CaptionOptions::default() };
            let sorted = |text: &str| {
                let mut tags: Vec<String> = text.split(',').map(|tag| tag.trim().to_owned()).collect();
                tags.retain(|tag| !tag.is_empty());
                tags.sort();
                tags
            };
            prop_assert_eq!(sorted(&shuffle.process(&[&text], 0, Done::ALL, &Stream::new(seed))), sorted(&text));
            let all = CaptionOptions { wildcards: true, keep_separator: "|".into(), trigger_word: "x".into(), ..shuffle };
            all.process(&[&text], 0, Done::ALL, &Stream::new(seed));
        }
    }
}
