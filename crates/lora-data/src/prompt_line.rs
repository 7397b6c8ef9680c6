//! A prompt with what it says of its own picture, in the form that sd-scripts' prompt files have:
//! `a cat --n blurry --w 512 --h 768 --d 7 --s 28 --l 6.5 --ss dpmpp_2m`. What drawing makes of that is not here.

use std::path::Path;

use crate::Result;
use crate::dataset::read_text;

/// One prompt. What it does not say is for whoever draws it to choose.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct PromptLine {
    /// The prompt itself.
    pub text: String,
    /// What the picture shall not show.
    pub negative: Option<String>,
    /// Pixels in a row, a multiple of 8.
    pub width: Option<usize>,
    /// Rows of pixels, a multiple of 8.
    pub height: Option<usize>,
    /// Steps of the sampler, at least 1.
    pub steps: Option<usize>,
    /// Classifier-free guidance, at least 1.
    pub guidance: Option<f64>,
    /// Seed of the noise.
    pub seed: Option<u64>,
    /// Name of the sampler.
    pub sampler: Option<String>,
}

/// Sides that pictures may have.
const SIDES: std::ops::RangeInclusive<usize> = 64..=4096;

impl PromptLine {
    /// Reads a line. What is no option, or an option without a value of its kind, stays in the prompt. Sides are
    /// rounded down to multiples of 8, between 64 and 4096.
    pub fn parse(line: &str) -> Self {
        let mut parts = line.trim().split(" --");
        let mut own = Self { text: parts.next().unwrap_or_default().trim().to_owned(), ..Self::default() };
        for part in parts {
            if own.option(part).is_none() {
                own.text.push_str(" --");
                own.text.push_str(part.trim_end());
            }
        }
        own
    }

    /// Takes an option; `None` where it is none.
    fn option(&mut self, part: &str) -> Option<()> {
        let (name, value) = part.split_once(char::is_whitespace)?;
        let value = value.trim();
        let side = || value.parse().ok().map(|side: usize| side.clamp(*SIDES.start(), *SIDES.end()) / 8 * 8);
        match name {
            "n" => self.negative = Some(value.to_owned()),
            "w" => self.width = Some(side()?),
            "h" => self.height = Some(side()?),
            "s" => self.steps = Some(value.parse().ok().filter(|steps| (1..=1000).contains(steps))?),
            "l" => self.guidance = Some(value.parse().ok().filter(|scale: &f64| *scale >= 1.0 && scale.is_finite())?),
            "d" => self.seed = Some(value.parse().ok()?),
            "ss" => self.sampler = Some(value.to_owned()),
            _ => return None,
        }
        Some(())
    }

    /// What is written as an option and is none, or has no value of its kind: it stays in the prompt.
    pub fn unread(&self) -> impl Iterator<Item = &str> {
        let parts = self.text.split(" --").skip(1);
        parts.filter(|part| part.starts_with(char::is_alphabetic)).filter_map(|part| part.split_whitespace().next())
    }

    /// The lines of a file that hold a prompt: empty ones and those that begin with `#` do not.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read, or is no text.
    pub fn lines_of(path: &Path) -> Result<Vec<String>> {
        let text = read_text(path)?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Ok(lines.map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_its_picture_is_drawn() {
        let line =
            PromptLine::parse("a cat, (sitting:1.2) --n blurry, low --w 515 --h 768 --d 7 --s 28 --l 6.5 --ss ddim");
        let expected = PromptLine {
            text: "a cat, (sitting:1.2)".into(),
            negative: Some("blurry, low".into()),
            width: Some(512),
            height: Some(768),
            steps: Some(28),
            guidance: Some(6.5),
            seed: Some(7),
            sampler: Some("ddim".into()),
        };
        assert_eq!(line, expected);
        let plain = |text: &str| PromptLine { text: text.into(), ..PromptLine::default() };
        for text in ["a cat", "well-known -- or so", "a --w wide cat", "a --s 0 cat", "use --verbose now"] {
            assert_eq!(PromptLine::parse(text), plain(text));
        }
    }

    #[test]
    fn what_stays_in_the_prompt_can_be_told() {
        let unread = |line: &str| PromptLine::parse(line).unread().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(unread("a cat --g 3.5 --w 512 --fs 3 --s 0"), ["g", "fs", "s"]);
        assert!(unread("well-known -- or so --d 7").is_empty());
    }

    #[test]
    fn files_of_prompts_have_comments_and_empty_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, "# what to look at\n\n a cat --d 1 \r\na dog\n").unwrap();
        assert_eq!(PromptLine::lines_of(&path).unwrap(), ["a cat --d 1", "a dog"]);
        assert!(PromptLine::lines_of(&folder.path().join("none.txt")).is_err());
    }
}
