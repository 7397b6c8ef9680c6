//! Which family an adapter was made for, by what it shows: the names of its modules, the shape of one tensor where
//! families have the same names, and what its metadata says.

use std::collections::BTreeMap;

use lora_core::{Adapter, Component, ModulePath};

use super::{FAMILIES, Family};

/// How adapters for a family are told.
#[derive(Debug)]
pub struct Signs {
    /// Whether a module of this name is in no other family's adapters.
    pub alone: fn(&Module<'_>) -> bool,
    /// Numbers in the state of a token that the published model's cross attention reads. U-Nets of three families have
    /// the same names, and an adapter on them may show nothing else.
    pub context: Option<usize>,
    /// Whether a module is spelt as this family's usually are, though others' may be.
    pub spelt: fn(&Module<'_>) -> bool,
    /// Metadata keys and beginnings of their values.
    pub metadata: &'static [(&'static str, &'static str)],
    /// The family whose adapters have the same names: metadata alone tell this one's from those.
    pub named_as: Option<&'static Family>,
}

impl Signs {
    /// No signs at all.
    pub const NONE: Self = Self { alone: |_| false, context: None, spelt: |_| false, metadata: &[], named_as: None };
}

/// A module of an adapter.
#[derive(Debug, Clone)]
pub struct Module<'a> {
    /// Its name as its file spells it, or the canonical path.
    pub name: &'a str,
    /// What the name means.
    pub path: ModulePath,
    /// Numbers that its layer reads, where a tensor shows them.
    pub inputs: Option<usize>,
    /// Numbers that its layer gives, likewise.
    pub outputs: Option<usize>,
}

impl Module<'_> {
    /// The number after `start` in its path, where it is a module of the component.
    pub(super) fn number(&self, component: Component, start: &str) -> Option<usize> {
        if self.path.component != component {
            return None;
        }
        let (_, rest) = self.path.path.split_once(start)?;
        rest.split('.').next()?.parse().ok()
    }

    /// Its path, where it is a transformer's.
    pub(super) fn of_transformer(&self) -> Option<&str> {
        (self.path.component == Component::TRANSFORMER).then_some(self.path.path.as_str())
    }

    /// The number of the block behind `start` that it is attention of, where it is a transformer's and reads so many
    /// numbers.
    pub(super) fn attention(&self, start: &str, inputs: usize) -> Option<usize> {
        let (block, layer) = self.of_transformer()?.strip_prefix(start)?.split_once('.')?;
        let block = block.parse().ok()?;
        (layer.starts_with("attn.") && self.inputs == Some(inputs)).then_some(block)
    }

    /// Whether its layer gives so many times as many numbers as it reads, a half for each being 2 : 4.
    pub(super) fn widens(&self, outputs: usize, inputs: usize) -> bool {
        let sides = self.outputs.zip(self.inputs);
        sides.is_some_and(|(own_outputs, own_inputs)| own_outputs * inputs == own_inputs * outputs)
    }

    /// Whether it reads text states in cross attention.
    fn reads_text(&self) -> bool {
        let path = self.path.path.as_str();
        self.path.component == Component::UNET && (path.ends_with("attn2.to_k") || path.ends_with("attn2.to_v"))
    }
}

/// The family whose adapters alone have a module of such a name.
pub fn by_name(modules: &[Module<'_>]) -> Option<&'static Family> {
    FAMILIES.into_iter().find(|family| modules.iter().any(|module| (family.signs.alone)(module)))
}

/// The family that an adapter was made for, as far as it shows.
pub fn told(modules: &[Module<'_>], metadata: &BTreeMap<String, String>) -> Option<&'static Family> {
    let with = |wanted: &dyn Fn(&Family) -> bool| FAMILIES.into_iter().find(|family| wanted(family));
    let context = modules.iter().filter(|module| module.reads_text()).find_map(|module| module.inputs);
    let says = |&(key, start): &(&str, &str)| metadata.get(key).is_some_and(|value| value.starts_with(start));
    let said = with(&|family| family.signs.metadata.iter().any(says));
    let shown = by_name(modules).map(|shown| said.filter(|own| own.signs.named_as == Some(shown)).unwrap_or(shown));
    shown
        .or_else(|| context.and_then(|width| with(&|family| family.signs.context == Some(width))))
        .or_else(|| with(&|family| modules.iter().any(|module| (family.signs.spelt)(module))))
        .or(said)
}

/// What speaks against an adapter on a base of a family, in words that name both: the family that it shows, unless its
/// metadata names the base's, or metadata that names another.
pub(crate) fn foreign(
    adapter: &Adapter,
    shown: impl Fn(&Adapter) -> Option<&'static Family>,
    base: &Family,
) -> Option<String> {
    let of = |sign: &(&'static str, &'static str)| {
        let (key, start) = *sign;
        adapter.metadata.get(key).map(|value| (key, value, value.starts_with(start)))
    };
    let said: Vec<_> = base.signs.metadata.iter().filter_map(of).collect();
    if said.iter().any(|(.., fits)| *fits) {
        return None;
    }
    let is_other = |family: &&Family| *family != base && base.signs.named_as != Some(*family);
    if let Some(family) = shown(adapter).filter(is_other) {
        return Some(format!("the adapter seems to be made for {family}, the base is {base}"));
    }
    let (key, value, _) = said.first()?;
    let value: String = value.chars().take(60).collect();
    Some(format!("the adapter says that it was made for `{value}` (`{key}`), the base is {base}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{flux, qwen_image, sd3};

    #[test]
    fn attention_alone_shows_how_many_blocks_there_are() {
        let family = |blocks: std::ops::Range<usize>, inputs: usize| {
            let module = |block: usize| Module {
                name: "x",
                path: ModulePath::new(Component::TRANSFORMER, format!("transformer_blocks.{block}.attn.to_q")),
                inputs: Some(inputs),
                outputs: Some(inputs),
            };
            told(&blocks.map(module).collect::<Vec<_>>(), &BTreeMap::new())
        };
        // What diffusers' script for Qwen-Image trains by itself, 60 blocks, and double blocks of FLUX.1 alone, 19.
        assert_eq!(family(0..60, 3072), Some(&qwen_image::FAMILY));
        assert_eq!(family(0..19, 3072), Some(&flux::FAMILY));
        assert_eq!(family(0..24, 1536), Some(&sd3::FAMILY));
        // Either may have these.
        assert_eq!(family(7..8, 3072), None);
    }
}
