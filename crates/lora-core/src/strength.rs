//! How strongly an adapter is applied: one factor, factors by component, factors by block; and the WebUI's
//! `<lora:name:0.8>` in prompts.

use std::collections::BTreeMap;
use std::fmt;

use crate::{Component, Error, ModulePath, Result};

/// Factors on an adapter's updates.
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    /// Factors by component.
    pub components: BTreeMap<Component, f64>,
    /// For the components that are not named.
    pub others: f64,
    /// Further factors for the U-Net's blocks: 25 for Stable Diffusion 1 and 2 (12 down, middle, 12 up), 23 for SDXL (see
    /// [`block`]). Empty: 1 everywhere.
    pub blocks: Vec<f64>,
}

impl Default for Strength {
    fn default() -> Self {
        Self::from(1.0)
    }
}

impl From<f64> for Strength {
    fn from(factor: f64) -> Self {
        Self { components: BTreeMap::new(), others: factor, blocks: Vec::new() }
    }
}

/// As [`Strength::parse`] reads it.
impl fmt::Display for Strength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.of_component(Component::TEXT_ENCODER);
        if text != self.others || !self.blocks.is_empty() {
            write!(f, "{text}:")?;
        }
        write!(f, "{}", self.others)?;
        match self.blocks.as_slice() {
            [] => Ok(()),
            blocks => write!(f, ":{}", blocks.iter().map(f64::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

impl Strength {
    /// A factor for the text encoders of an image model, and one for everything else.
    pub fn of_text_and_others(text_encoders: f64, others: f64) -> Self {
        let components = Component::KNOWN.into_iter().filter(|component| component.is_text_encoder());
        Self { components: components.map(|component| (component, text_encoders)).collect(), ..Self::from(others) }
    }

    /// The same, so many times as strong.
    pub fn times(&self, factor: f64) -> Self {
        let components = self.components.iter().map(|(component, own)| (*component, own * factor)).collect();
        Self { components, others: self.others * factor, blocks: self.blocks.clone() }
    }

    /// The factor for a component, blocks apart.
    pub fn of_component(&self, component: Component) -> f64 {
        self.components.get(&component).copied().unwrap_or(self.others)
    }

    /// The factor for a module.
    pub fn of(&self, module: &ModulePath) -> f64 {
        match module.component {
            // kohya's name of a text encoder whose model is not known.
            Component::MODEL if module.path.starts_with("lora_te") => self.of_component(Component::TEXT_ENCODER),
            Component::UNET => {
                let own = block(&module.path, self.blocks.len() == 23).and_then(|index| self.blocks.get(index));
                self.of_component(Component::UNET) * own.copied().unwrap_or(1.0)
            }
            other => self.of_component(other),
        }
    }

    /// Reads `FILE`, `FILE:0.8`, `FILE:0.8:0.6` or `FILE:0.8:0.6:1,0,…`: the file, and how strongly it is applied.
    ///
    /// # Errors
    /// As of [`Self::parse`].
    pub fn split(text: &str) -> Result<(&str, Self)> {
        let numbers = |text: &str| !text.is_empty() && text.split(',').all(|part| part.trim().parse::<f64>().is_ok());
        let mut path = text;
        for _ in 0..3 {
            match path.rsplit_once(':') {
                Some((rest, last)) if numbers(last) => path = rest,
                _ => break,
            }
        }
        match text[path.len()..].strip_prefix(':') {
            Some(strength) => Ok((path, Self::parse(strength)?)),
            None => Ok((path, Self::default())),
        }
    }

    /// Reads `0.8`, `0.8:0.6` (text encoder, U-Net: the WebUI's order), and `0.8:0.6:1,1,0.5,…` with factors by block.
    ///
    /// # Errors
    /// [`Error::Option`] where a part is no finite number, or the list has neither 23 nor 25 factors.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::Option { key: "strength", value: text.to_owned(), reason: reason.to_owned() };
        let number = |part: &str| {
            let number = part.trim().parse::<f64>().ok().filter(|number| number.is_finite());
            number.ok_or_else(|| wrong(&format!("`{part}` is no number")))
        };
        let mut parts = text.split(':');
        let first = number(parts.next().unwrap_or_default())?;
        let second = parts.next().map(number).transpose()?.unwrap_or(first);
        let blocks: Vec<f64> = parts
            .next()
            .map(|list| list.split(',').map(number).collect::<Result<_>>())
            .transpose()?
            .unwrap_or_default();
        if !matches!(blocks.len(), 0 | 23 | 25) || parts.next().is_some() {
            return Err(wrong("expected NUMBER, TEXT:UNET or TEXT:UNET:LIST with 25 factors by block (SDXL: 23)"));
        }
        Ok(Self { blocks, ..Self::of_text_and_others(first, second) })
    }
}

/// The place of a U-Net module among the blocks, as sd-scripts counts them for block weights.
///
/// Stable Diffusion 1 and 2: `1 + 3i + j` for `down_blocks.i` (resnets and attentions `j`, downsamplers 2), 12 the middle,
/// `13 + 3i + j` up (upsamplers 2): 25 places. SDXL: 0 the embeddings, `1 + n` the n-th input block, 10 to 12 the middle,
/// `13 + n` the n-th output block, 22 the output layer: 23 places.
pub fn block(path: &str, xl: bool) -> Option<usize> {
    let mut parts = path.split('.');
    let next_number = |parts: &mut std::str::Split<'_, char>| parts.next()?.parse::<usize>().ok();
    match parts.next()? {
        "mid_block" => {
            let (kind, index) = (parts.next()?, next_number(&mut parts)?);
            match (xl, kind) {
                (false, _) => Some(12),
                (true, "resnets") => Some(10 + 2 * index),
                (true, _) => Some(11),
            }
        }
        side @ ("down_blocks" | "up_blocks") => {
            let (level, kind) = (next_number(&mut parts)?, parts.next()?);
            let place = match kind {
                "downsamplers" | "upsamplers" => 2,
                _ => next_number(&mut parts)?,
            };
            let first = match (xl, side) {
                // Place 0 is the input convolution's, which carries no LoRA.
                (false, "down_blocks") => 1,
                (true, "down_blocks") => 2,
                _ => 13,
            };
            Some(first + 3 * level + place)
        }
        "time_embedding" | "add_embedding" if xl => Some(0),
        "conv_in" if xl => Some(1),
        "conv_out" | "conv_norm_out" if xl => Some(22),
        _ => None,
    }
}

/// One `<lora:…>` of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTag {
    /// The name: the stem of a file.
    pub name: String,
    /// How strongly.
    pub strength: Strength,
    /// Use the first so many ranks only (`dyn`).
    pub dyn_rank: Option<usize>,
}

/// Takes the `<lora:name:text encoder:U-Net:dyn>` tags (also `<lyco:…>`) out of a prompt, as the WebUI does: further values
/// by place, or by name (`te=`, `unet=`, `dyn=`), which count over those by place. The U-Net's factor is the text
/// encoder's if it is not given. Tags of other networks stay in the prompt.
///
/// # Errors
/// [`Error::Option`] with the tag where one of its values is no number.
pub fn parse_prompt(prompt: &str) -> Result<(String, Vec<LoraTag>)> {
    let mut text = String::with_capacity(prompt.len());
    let mut tags = Vec::new();
    let mut rest = prompt;
    while let Some(start) = rest.find('<') {
        text.push_str(&rest[..start]);
        let tag = rest[start..].find('>').map(|end| &rest[start..=start + end]);
        let inner = tag.and_then(|tag| {
            let inner = &tag[1..tag.len() - 1];
            ["lora:", "lyco:"].iter().find_map(|kind| inner.strip_prefix(kind)).filter(|inner| !inner.is_empty())
        });
        match (tag, inner) {
            (Some(tag), Some(inner)) => {
                tags.push(parse_tag(tag, inner)?);
                rest = &rest[start + tag.len()..];
            }
            _ => {
                text.push('<');
                rest = &rest[start + 1..];
            }
        }
    }
    text.push_str(rest);
    Ok((text, tags))
}

fn parse_tag(tag: &str, inner: &str) -> Result<LoraTag> {
    let wrong = |value: &str| Error::Option {
        key: "prompt",
        value: tag.to_owned(),
        reason: format!("`{value}` is no number; expected <lora:name:text encoder:U-Net:dyn>"),
    };
    let number =
        |value: &str| value.trim().parse::<f64>().ok().filter(|number| number.is_finite()).ok_or_else(|| wrong(value));
    let (mut positional, mut named) = (Vec::new(), Vec::new());
    for item in inner.split(':') {
        match item.split_once('=') {
            Some((key, value)) if !value.contains('=') => named.push((key.trim(), value)),
            _ => positional.push(item),
        }
    }
    let name = positional.first().copied().unwrap_or_default().to_owned();
    let by_name = |key: &str| named.iter().find(|(known, _)| *known == key).map(|(_, value)| *value);
    let text_encoder = by_name("te").or(positional.get(1).copied()).map_or(Ok(1.0), number)?;
    let unet = by_name("unet").or(positional.get(2).copied()).map_or(Ok(text_encoder), number)?;
    let dyn_rank = by_name("dyn").or(positional.get(3).copied());
    let dyn_rank = dyn_rank.map(|value| value.trim().parse::<usize>().map_err(|_| wrong(value))).transpose()?;
    Ok(LoraTag { name, strength: Strength::of_text_and_others(text_encoder, unet), dyn_rank })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_read_as_the_webui_reads_them() {
        let (text, tags) = parse_prompt("a cat <lora:ink style:0.8>, <hypernet:x:1> <lyco:b:1:0.5:8> < c").unwrap();
        assert_eq!(text, "a cat , <hypernet:x:1>  < c");
        let of = |tag: &LoraTag| {
            let factor = |component| tag.strength.of_component(component);
            (tag.name.clone(), factor(Component::TEXT_ENCODER), factor(Component::UNET), tag.dyn_rank)
        };
        assert_eq!(of(&tags[0]), ("ink style".into(), 0.8, 0.8, None));
        assert_eq!(of(&tags[1]), ("b".into(), 1.0, 0.5, Some(8)));
        let one = |prompt: &str| of(&parse_prompt(prompt).unwrap().1[0]);
        assert_eq!(one("<lora:x>"), ("x".into(), 1.0, 1.0, None));
        assert_eq!(one("<lora:x:unet=0.7:te=0.2>"), ("x".into(), 0.2, 0.7, None));
        assert_eq!(one("<lora:x:0.8:dyn=8>"), ("x".into(), 0.8, 0.8, Some(8)));
        assert_eq!(one("<lora:x:-1.5>"), ("x".into(), -1.5, -1.5, None));
        let error = parse_prompt("<lora:x:much>").unwrap_err().to_string();
        assert!(error.contains("<lora:x:much>") && error.contains("`much`"), "{error}");
        assert_eq!(parse_prompt("<lora:>é<").unwrap(), ("<lora:>é<".into(), vec![]));
    }

    #[test]
    fn blocks_are_counted_as_sd_scripts_counts_them() {
        for (path, sd1, xl) in [
            ("down_blocks.0.resnets.0.conv1", 1, 2),
            ("down_blocks.0.attentions.1.proj_in", 2, 3),
            ("down_blocks.0.downsamplers.0.conv", 3, 4),
            ("mid_block.attentions.0.proj_in", 12, 11),
            ("mid_block.resnets.1.conv1", 12, 12),
            ("up_blocks.0.resnets.0.conv1", 13, 13),
            ("up_blocks.2.attentions.2.proj_in", 21, 21),
            ("up_blocks.1.upsamplers.0.conv", 18, 18),
        ] {
            assert_eq!((block(path, false), block(path, true)), (Some(sd1), Some(xl)), "{path}");
        }
        assert_eq!(block("up_blocks.3.resnets.2.conv1", false), Some(24));
    }

    #[test]
    fn strengths_differ_by_component_and_block() {
        let mut strength = Strength::parse("0.5:0.8").unwrap();
        strength.blocks = vec![0.0; 25];
        strength.blocks[12] = 2.0;
        let of = |component, path: &str| strength.of(&ModulePath::new(component, path));
        assert_eq!(of(Component::TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1"), 0.5);
        assert_eq!(of(Component::UNET, "mid_block.attentions.0.proj_in"), 1.6);
        assert_eq!(of(Component::UNET, "down_blocks.0.attentions.0.proj_in"), 0.0);
        assert_eq!(of(Component::LANGUAGE_MODEL, "model.layers.0.mlp.up_proj"), 0.8);
        let twice = strength.times(2.0);
        assert_eq!(twice.of(&ModulePath::new(Component::UNET, "mid_block.attentions.0.proj_in")), 3.2);
        assert_eq!(twice.of_component(Component::TEXT_ENCODER), 1.0);
        assert!(Strength::parse("1:1:1,2").is_err() && Strength::parse("x").is_err());
    }
}
